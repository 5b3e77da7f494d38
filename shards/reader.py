"""Reading a shard set: the index by mmap, frames by pread of just their bytes, every byte checked."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards.schema import DATASET_FILE, FORMAT, FRAMES_FILE, SEQUENCES_FILE, VERSION, member_key, row_crc


class DamagedMemberError(ValueError):
    """A frame whose bytes are not those that were packed; says the tar and the key."""


def open(path: str | Path) -> ShardSet:  # noqa: A001
    """The shard set in directory `path`.

    Raises ValueError if there is none, if it is of another version, or if a file's size is not the one in
    dataset.json (a stale or truncated set).
    """
    root = Path(path)
    dataset_file = root / DATASET_FILE
    hint = "make one with: vggt-prep pack --co3d-dir ... --annotation-dir ... --out " + str(path)
    if not root.is_dir():
        raise ValueError(f"{path}: no such directory; {hint}")
    if not dataset_file.is_file():
        raise ValueError(f"{path}: holds no {DATASET_FILE}, so it is no finished shard set; {hint}")
    try:
        dataset = json.loads(dataset_file.read_bytes())
        found = (dataset["format"], dataset["version"])
        files, tars = dataset["files"], tuple(dataset["tars"])
        sizes = {name: int(entry["size"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{dataset_file}: not readable as the description of a shard set ({error!r})") from error
    if found != (FORMAT, VERSION):
        raise ValueError(
            f"{dataset_file}: expected {FORMAT} version {VERSION}, found {found[0]} {found[1]}; pack again"
        )
    for name, size in sizes.items():
        actual = (root / name).stat().st_size if (root / name).is_file() else None
        if actual != size:
            state = "missing" if actual is None else f"{actual} bytes"
            raise ValueError(f"{root / name}: {DATASET_FILE} says {size} bytes, found {state}; copy or pack it again")
    return ShardSet(root=root, dataset=dataset, tars=tars)


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set. Cheap to pickle: a worker process maps the index and opens the tars itself."""

    root: Path
    dataset: dict[str, Any]
    tars: tuple[str, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.root, self.dataset, self.tars)  # without the mapped arrays

    @cached_property
    def frames(self) -> np.ndarray:
        """The rows of all frames (shards.schema.frame_dtype), mapped from disk."""
        return np.load(self.root / FRAMES_FILE, mmap_mode="r", allow_pickle=False)

    @cached_property
    def sequences(self) -> np.ndarray:
        """The rows of all sequences (shards.schema.sequence_dtype), mapped from disk."""
        return np.load(self.root / SEQUENCES_FILE, mmap_mode="r", allow_pickle=False)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files: two sets with the same digest hold the same frames."""
        lines = (f"{name} {entry['sha256']}\n" for name, entry in sorted(self.dataset["files"].items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def split(self, split: str) -> np.ndarray:
        """The numbers of the sequences of "train" or "test" [n], in order."""
        return np.flatnonzero(self.sequences["split"] == split.encode())

    def key(self, frame: int) -> str:
        """The WebDataset key of a frame."""
        row = self.frames[frame]
        sequence = self.sequences[row["sequence"]]
        return member_key(*(bytes(name).decode() for name in (sequence["category"], sequence["name"], row["name"])))

    def read(self, frame: int) -> tuple[bytes, bytes | None]:
        """The JPEG and the depth (None: camera only) of a frame, in one read. Raises DamagedMemberError."""
        row = self.frames[frame]
        if row_crc(row) != row["row_crc"]:
            raise DamagedMemberError(f"{self.root / FRAMES_FILE}: row {frame} does not match its own CRC")
        spans = [(int(row["jpg_offset"]), int(row["jpg_size"]))]
        if row["depth_size"]:
            spans.append((int(row["depth_offset"]), int(row["depth_size"])))
        start = min(offset for offset, _ in spans)
        end = max(offset + size for offset, size in spans)
        tar = self.root / self.tars[row["tar"]]
        block = os.pread(_descriptor(os.getpid(), tar), end - start, start)
        parts = [block[offset - start : offset - start + size] for offset, size in spans]
        for part, extension in zip(parts, ("jpg", "depth"), strict=False):
            if zlib.crc32(part) != row[f"{extension}_crc"]:
                raise DamagedMemberError(f"{tar}: the {extension} of {self.key(frame)} does not match its CRC")
        return parts[0], parts[1] if len(parts) == 2 else None


MAX_OPEN_TARS = 128  # a process
_descriptors: OrderedDict[tuple[int, Path], int] = OrderedDict()


def _descriptor(process: int, path: Path) -> int:
    """An open file of this process. Keyed by process: a descriptor inherited through fork is not trusted."""
    if (process, path) not in _descriptors:
        _descriptors[process, path] = os.open(path, os.O_RDONLY)
        if len(_descriptors) > MAX_OPEN_TARS:
            os.close(_descriptors.popitem(last=False)[1])
    _descriptors.move_to_end((process, path))
    return _descriptors[process, path]
