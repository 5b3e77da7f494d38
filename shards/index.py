"""The index of a shard set: what the tars hold, as rows that are mapped from disk."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
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


def write_index(
    out: Path,
    tars: list[tuple[str, str, list[tuple[str, str, int]], np.ndarray]],
    *,
    source: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Write frames.npy and sequences.npy of these tars (file name, split, and what index_tar gave), then dataset.json.

    dataset.json comes last: a directory without it is not a shard set yet.
    """
    parts = [part for _, _, part, _ in tars]
    names = [(split, category.encode(), name.encode(), n) for (_, split, part, _) in tars for category, name, n in part]
    sequences = np.zeros(len(names), dtype=sequence_dtype(*(max(len(bytes(n[i])) for n in names) for i in (1, 2))))
    first = 0
    for row, (split, category, name, count) in zip(sequences, names, strict=True):
        row["category"], row["name"], row["split"] = category, name, split.encode()
        row["first"], row["count"] = first, count
        first += count

    width = max(rows.dtype["name"].itemsize for _, _, _, rows in tars)
    frames = np.concatenate([rows.astype(frame_dtype(width)) for _, _, _, rows in tars])
    sequence_base = np.cumsum([0, *(len(part) for part in parts)])
    start = 0
    for i, (_, _, _, rows) in enumerate(tars):
        part = frames[start : start + len(rows)]
        part["tar"] = i
        part["sequence"] += np.uint32(sequence_base[i])
        start += len(rows)
    for row in frames:
        row["row_crc"] = row_crc(row)

    for name, array in ((FRAMES_FILE, frames), (SEQUENCES_FILE, sequences)):
        with atomic_file(out / name) as file:
            np.save(file, array, allow_pickle=False)
    splits = sorted({split for _, split, _, _ in tars})
    counts = {
        split: {
            "sequences": int((sequences["split"] == split.encode()).sum()),
            "frames": int(sequences["count"][sequences["split"] == split.encode()].sum()),
        }
        for split in splits
    }
    files = [FRAMES_FILE, SEQUENCES_FILE, *(name for name, _, _, _ in tars)]
    dataset = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "options": options,
        "categories": sorted({category.decode() for category in sequences["category"]}),
        "splits": counts,
        "tars": [name for name, _, _, _ in tars],
        "files": {name: {"size": (out / name).stat().st_size, "sha256": sha256(out / name)} for name in files},
    }
    write_json(out / DATASET_FILE, dataset)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
