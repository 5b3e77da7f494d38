"""The index of a shard set: what the tars hold, as rows that are mapped from disk."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.schema import (
    DATASET_FILE,
    DEPTH,
    FORMAT,
    FRAMES_FILE,
    JPEG,
    META,
    SEQUENCES_FILE,
    VERSION,
    FrameMeta,
    frame_dtype,
    frame_name,
    row_crc,
    sequence_dtype,
)
from shards.writer import atomic_file, write_json


@dataclass(frozen=True)
class TarIndex:
    """A tar of the set: its file name, its split, and what index_tar says of it."""

    file: str
    split: str
    sequences: list[tuple[str, str, int]]
    frames: np.ndarray


def index_tar(path: Path) -> tuple[list[tuple[str, str, int]], np.ndarray]:
    """Read a tar's members back: its sequences (category, name, count) in order, and the rows of its frames.

    In the rows, `sequence` counts within this tar and `tar` is 0. Raises ValueError for a tar that is damaged or
    not ours, naming the member.
    """
    sequences: list[tuple[str, str, int]] = []
    frames: list[dict[str, Any]] = []
    with tarfile.open(path, "r:") as tar:
        members: dict[str, dict[str, tuple[int, int, int]]] = {}
        metas: dict[str, FrameMeta] = {}
        for info in tar:
            key, _, extension = info.name.rpartition("/")[2].partition(".")
            key = info.name[: -len(extension) - 1]
            reader = tar.extractfile(info)
            assert reader is not None
            data = reader.read()
            members.setdefault(key, {})[extension] = (info.offset_data, info.size, zlib.crc32(data))
            if extension == META:
                try:
                    metas[key] = FrameMeta.from_json(data)
                except ValueError as error:
                    raise ValueError(f"{path}: member {info.name}: {error}") from error
    names: list[bytes] = []
    for key, parts in members.items():
        meta = metas.get(key)
        if meta is None or JPEG not in parts:
            raise ValueError(f"{path}: frame {key} lacks its {META if meta is None else JPEG} member")
        for extension, crc in ((JPEG, meta.jpg_crc), (DEPTH, meta.depth_crc)):
            if (parts[extension][2] if extension in parts else None) != crc:
                raise ValueError(f"{path}: member {key}.{extension} does not match the CRC in {key}.{META}")
        category, sequence, name = frame_name(key)
        if not sequences or sequences[-1][:2] != (category, sequence):
            sequences.append((category, sequence, 0))
        sequences[-1] = (category, sequence, sequences[-1][2] + 1)
        names.append(name.encode())
        jpg, depth = parts[JPEG], parts.get(DEPTH, (0, 0, 0))
        frames.append(
            {"sequence": len(sequences) - 1, "tar": 0}
            | {"jpg_offset": jpg[0], "jpg_size": jpg[1], "jpg_crc": jpg[2]}
            | {"depth_offset": depth[0], "depth_size": depth[1], "depth_crc": depth[2]}
            | {"height": meta.height, "width": meta.width, "depth_scale": meta.depth_scale}
            | {"extrinsics": meta.extrinsics, "intrinsics": meta.intrinsics, "row_crc": 0}
        )
    rows = np.zeros(len(frames), dtype=frame_dtype(max(map(len, names), default=1)))
    rows["name"] = names
    for row, frame in zip(rows, frames, strict=True):
        for field, value in frame.items():
            row[field] = value
    return sequences, rows


def write_index(out: Path, tars: list[TarIndex], *, source: dict[str, Any], options: dict[str, Any]) -> None:
    """Write frames.npy and sequences.npy of these tars, then dataset.json.

    dataset.json comes last: a directory without it is not a shard set yet.
    """
    entries = [(tar.split.encode(), *entry) for tar in tars for entry in tar.sequences]
    splits, categories, names, counts = zip(*((s, c.encode(), n.encode(), k) for s, c, n, k in entries), strict=True)
    sequences = np.zeros(len(entries), dtype=sequence_dtype(max(map(len, categories)), max(map(len, names))))
    sequences["split"], sequences["category"], sequences["name"] = splits, categories, names
    sequences["count"], sequences["first"] = counts, np.cumsum([0, *counts[:-1]])

    width = max(tar.frames.dtype["name"].itemsize for tar in tars)
    frames = np.concatenate([tar.frames.astype(frame_dtype(width)) for tar in tars])
    first_sequence = np.cumsum([0, *(len(tar.sequences) for tar in tars[:-1])])
    sizes = [len(tar.frames) for tar in tars]
    frames["tar"] = np.repeat(np.arange(len(tars)), sizes)
    frames["sequence"] += np.repeat(first_sequence, sizes).astype(np.uint32)
    for row in frames:
        row["row_crc"] = row_crc(row)

    for name, array in ((FRAMES_FILE, frames), (SEQUENCES_FILE, sequences)):
        with atomic_file(out / name) as file:
            np.save(file, array, allow_pickle=False)
    per_split = {}
    for split in sorted(set(splits)):
        part = sequences["count"][sequences["split"] == split]
        per_split[split.decode()] = {"sequences": len(part), "frames": int(part.sum())}
    files = [FRAMES_FILE, SEQUENCES_FILE, *(tar.file for tar in tars)]
    dataset = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "options": options,
        "categories": sorted({category.decode() for category in categories}),
        "splits": per_split,
        "tars": [tar.file for tar in tars],
        "files": {name: {"size": (out / name).stat().st_size, "sha256": sha256(out / name)} for name in files},
    }
    write_json(out / DATASET_FILE, dataset)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
