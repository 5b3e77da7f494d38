"""Building the index of a shard set from its tars."""

from __future__ import annotations

import logging
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from shards.index import TAR_NAME, read_dataset, sha256
from shards.schema import (
    CRC_ZEROS,
    DATASET_FILE,
    DEPTH,
    FORMAT,
    FRAMES_FILE,
    JPEG,
    META,
    PAIRS_FILE,
    SELF_CRC,
    SEQUENCES_FILE,
    SPLITS,
    VERSION,
    WORK_FOLDER,
    FrameMeta,
    frame_dtype,
    frame_name,
    row_crc,
    self_crc,
    sequence_dtype,
)
from shards.writer import atomic_file, json_bytes, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """What the index says of one tar. sequences: (category, name, count) in order; rows: .npy of its frames' rows."""

    file: str
    size: int
    sha256: str
    sequences: list[tuple[str, str, int]]
    rows: Path

    @property
    def split(self) -> str:
        return self.file.split("-")[0]


def index_file(tar: Path, folder: Path) -> TarIndex:
    """Index a tar, leaving the rows of its frames in `folder`. Raises ValueError like index_tar."""
    sequences, rows = index_tar(tar)
    path = folder / f"{tar.stem}.npy"
    with atomic_file(path) as file:
        np.save(file, rows, allow_pickle=False)
    return TarIndex(file=tar.name, size=tar.stat().st_size, sha256=sha256(tar), sequences=sequences, rows=path)


def index_tar(path: Path) -> tuple[list[tuple[str, str, int]], np.ndarray]:
    """Read a tar's members back: its sequences (category, name, count) in order, and the rows of its frames.

    In the rows, `sequence` counts within this tar, and `tar` and `row_crc` are 0. Raises ValueError for a tar that is
    damaged or not ours, naming the member.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = _members_by_key(tar)
            _check_end(tar, path.stat().st_size)
        frames = [_frame_entry(key, parts) for key, parts in members.items()]
    except (ValueError, tarfile.TarError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    sequences: list[tuple[str, str, int]] = []
    rows = np.zeros(len(frames), dtype=frame_dtype(max((len(frame["name"]) for frame in frames), default=1)))
    for row, frame, key in zip(rows, frames, members, strict=True):
        category, sequence, _ = frame_name(key)
        if not sequences or sequences[-1][:2] != (category, sequence):
            sequences.append((category, sequence, 0))
        sequences[-1] = (category, sequence, sequences[-1][2] + 1)
        row["sequence"] = len(sequences) - 1
        for field, value in frame.items():
            row[field] = value
    return sequences, rows


@dataclass(frozen=True)
class _Member:
    offset: int
    size: int
    crc: int
    data: bytes | None  # of a JSON member


def _members_by_key(tar: tarfile.TarFile) -> dict[str, dict[str, _Member]]:
    """Key -> extension -> member, in the order of the tar."""
    members: dict[str, dict[str, _Member]] = {}
    for info in tar:
        reader = tar.extractfile(info) if info.isreg() else None  # what a link points to is not looked at
        extension = info.name.rpartition("/")[2].partition(".")[2]
        parts = members.setdefault(info.name[: -len(extension) - 1], {})
        if reader is None or extension not in (JPEG, DEPTH, META) or extension in parts:
            raise ValueError(f"member {info.name} is not one of a frame")
        data = reader.read()
        parts[extension] = _Member(info.offset_data, info.size, zlib.crc32(data), data if extension == META else None)
    return members


def _check_end(tar: tarfile.TarFile, size: int) -> None:
    """Check that only an archive's final zeros follow: tarfile mistakes a damaged header for the end."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    end = 2 * tarfile.BLOCKSIZE
    rest = tar.fileobj.read(end + tarfile.RECORDSIZE)
    # The two blocks that end an archive, and what fills up its last record.
    if not end <= len(rest) < end + tarfile.RECORDSIZE or any(rest):
        raise ValueError(f"damaged or cut off at byte {tar.offset} of {size}")


def _frame_entry(key: str, parts: dict[str, _Member]) -> dict[str, Any]:
    """The fields of a frame's row that its members determine."""
    for extension in (JPEG, META):
        if extension not in parts:
            raise ValueError(f"frame {key} lacks its {extension} member")
    try:
        meta = FrameMeta.from_json(parts[META].data or b"")
        name = frame_name(key)[2]
    except ValueError as error:
        raise ValueError(f"member {key}.{META}: {error}") from error
    for extension, crc in ((JPEG, meta.jpg_crc), (DEPTH, meta.depth_crc)):
        if (parts[extension].crc if extension in parts else None) != crc:
            raise ValueError(f"member {key}.{extension} does not match the CRC in {key}.{META}")
    jpg, depth = parts[JPEG], parts.get(DEPTH, _Member(0, 0, 0, None))
    return (
        {"name": name.encode()}
        | {"jpg_offset": jpg.offset, "jpg_size": jpg.size, "jpg_crc": jpg.crc}
        | {"depth_offset": depth.offset, "depth_size": depth.size, "depth_crc": depth.crc}
        | {"height": meta.height, "width": meta.width, "depth_scale": meta.depth_scale}
        | {"extrinsics": meta.extrinsics, "intrinsics": meta.intrinsics}
    )


def complete_rows(rows: np.ndarray, dtype: np.dtype, tar: int, first_sequence: int) -> np.ndarray:
    """Rows of index_tar as they stand in frames.npy, where this is the tar of that number."""
    rows = rows.astype(dtype)
    rows["tar"] = tar
    rows["sequence"] += np.uint32(first_sequence)
    for row in rows:
        row["row_crc"] = row_crc(row)
    return rows


def write_index(out: Path, tars: list[TarIndex], *, source: dict[str, Any], options: dict[str, Any]) -> None:
    """Write frames.npy and sequences.npy of these tars, then dataset.json; pairs.npy stays if it is of these frames.

    dataset.json comes last: a directory without it is not a shard set yet.
    """
    entries = [(tar.split.encode(), *entry) for tar in tars for entry in tar.sequences]
    if not entries:
        raise ValueError(f"{out}: its tars hold no frame, so there is nothing to index")
    splits, categories, names, counts = zip(*((s, c.encode(), n.encode(), k) for s, c, n, k in entries), strict=True)
    sequences = np.zeros(len(entries), dtype=sequence_dtype(max(map(len, categories)), max(map(len, names))))
    sequences["split"], sequences["category"], sequences["name"] = splits, categories, names
    sequences["count"], sequences["first"] = counts, np.cumsum([0, *counts[:-1]])
    with atomic_file(out / SEQUENCES_FILE) as file:
        np.save(file, sequences, allow_pickle=False)
    _write_frames(out / FRAMES_FILE, tars)

    per_split = {}
    for split in sorted(set(splits)):
        part = sequences["count"][sequences["split"] == split]
        per_split[split.decode()] = {"sequences": len(part), "frames": int(part.sum())}
    index = {name: (out / name) for name in (FRAMES_FILE, SEQUENCES_FILE)}
    files = {name: {"size": path.stat().st_size, "sha256": sha256(path)} for name, path in index.items()}
    stated = _stated(out / DATASET_FILE)
    if stated.get("files", {}).get(FRAMES_FILE) == files[FRAMES_FILE] and PAIRS_FILE in stated["files"]:
        files[PAIRS_FILE] = stated["files"][PAIRS_FILE]  # of the same frames
    dataset = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "options": options,
        "categories": sorted({category.decode() for category in categories}),
        "splits": per_split,
        "tars": [tar.file for tar in tars],
        "files": files | {tar.file: {"size": tar.size, "sha256": tar.sha256} for tar in tars},
    }
    write_dataset(out, dataset)
    if PAIRS_FILE not in files and (out / PAIRS_FILE).exists():
        (out / PAIRS_FILE).unlink()
        log.warning(
            "%s: was of other frames, and is removed; pack makes it again, else: vggt-prep pairs", out / PAIRS_FILE
        )


def write_dataset(out: Path, dataset: dict[str, Any]) -> None:
    """Write dataset.json, with its own CRC."""
    dataset = dataset | {SELF_CRC: CRC_ZEROS}
    write_json(out / DATASET_FILE, dataset | {SELF_CRC: self_crc(json_bytes(dataset), CRC_ZEROS)})


def _write_frames(path: Path, tars: list[TarIndex]) -> None:
    """frames.npy, a tar at a time: the rows of a large set need not fit into memory."""
    names = [np.load(tar.rows)["name"].dtype.itemsize for tar in tars]
    dtype, count = frame_dtype(max(names)), sum(n for tar in tars for _, _, n in tar.sequences)
    first_sequence = 0
    with atomic_file(path) as file:
        header = {"descr": dtype.descr, "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for number, tar in enumerate(tars):
            file.write(complete_rows(np.load(tar.rows), dtype, number, first_sequence).tobytes())
            first_sequence += len(tar.sequences)


def rebuild_index(
    out: Path,
    executor: Executor,
    *,
    on_plan: Callable[[int], None] = lambda tars: None,
    on_tar: Callable[[], None] = lambda: None,
) -> int:
    """Make the index and dataset.json again from the tars of a set; returns the number of frames.

    What dataset.json says of the source and the options is kept where it can be read. Raises ValueError if there is no
    tar, one that dataset.json lists is missing, or one is damaged: then everything stays as it was.
    """
    if (out / WORK_FOLDER).exists():
        raise ValueError(
            f"{out}: its pack is not finished; the same pack command continues it, and writes the index at its end"
        )
    stated = _stated(out / DATASET_FILE)
    names = [path.name for path in out.glob("*.tar") if TAR_NAME.fullmatch(path.name)]
    if not names:
        raise ValueError(f"{out}: holds no tars like train-000000.tar, so there is nothing to index")
    lost = [name for name in stated.get("tars", []) if name not in names]
    if lost:
        raise ValueError(f"{out / lost[0]}: missing; copy it again, or remove {DATASET_FILE} to do without its frames")
    on_plan(len(names))
    names.sort(key=lambda name: (SPLITS.index(name.split("-")[0]), name))
    with TemporaryDirectory() as folder:
        futures = [executor.submit(index_file, out / name, Path(folder)) for name in names]
        try:
            tars = []
            for future in futures:
                tars.append(_known(future.result(), out, stated))
                on_tar()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # they write into the folder
        _check_apart(out, tars)
        write_index(out, tars, source=stated.get("source", {}), options=stated.get("options", {}))
    return sum(count for tar in tars for _, _, count in tar.sequences)


def _check_apart(out: Path, tars: list[TarIndex]) -> None:
    """Raises ValueError if two tars of a split hold the same sequence: its frames would count twice."""
    holders: dict[tuple[str, str, str], str] = {}
    for tar in tars:
        for category, name, _ in tar.sequences:
            first = holders.setdefault((tar.split, category, name), tar.file)
            if first != tar.file:
                raise ValueError(f"{out}: {first} and {tar.file} both hold {category}/{name}; remove one of them")


def _known(tar: TarIndex, out: Path, stated: dict[str, Any]) -> TarIndex:
    """The tar, if it is the one that dataset.json describes, or none is described. Raises ValueError."""
    if stated and tar.sha256 != stated["files"].get(tar.file, {}).get("sha256"):
        advice = f"copy it again, or remove {DATASET_FILE} to take it as it is"
        raise ValueError(f"{out / tar.file}: not the one that {DATASET_FILE} describes; {advice}")
    return tar


def _stated(path: Path) -> dict[str, Any]:
    """What dataset.json says, empty where it cannot be believed."""
    try:
        return read_dataset(path.read_bytes())
    except (OSError, ValueError):
        return {}
