"""Reading a shard set: the index by mmap, frames by reading just their bytes, every byte checked."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards.index import REPAIR, DamagedIndexError, how_to_make_pairs, map_rows, read_dataset, sha256
from shards.schema import (
    DATASET_FILE,
    FRAMES_FILE,
    PAIRS_FILE,
    SEQUENCES_FILE,
    frame_dtype,
    member_key,
    row_crc,
    sequence_dtype,
)
from shards.storage import LocalStorage, Span, Storage, StorageError, storage_at
from shards.writer import atomic_file

MAX_WASTE = 1.05  # bytes read over bytes asked for, when the frames between are read in one request


class DamagedMemberError(ValueError):
    """A frame whose bytes are not those that were packed; says the tar and the key. file: with its set's place."""

    def __init__(self, file: str, problem: str, shard_set: ShardSet | str) -> None:
        super().__init__(file, problem, str(shard_set))  # as pickle wants it
        self.file, self.problem = f"{shard_set}/{file}", problem

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


def open(location: str | Path, *, check_sizes: bool = True) -> ShardSet:  # noqa: A001
    """The shard set in a directory or at a URL, whatever fsspec opens: s3://, gs://, hf://, http(s)://, memory://.

    The index of a remote set is kept in ~/.cache/vggt-shards, under its digest. Raises ValueError if there is no set,
    if it is of another version, or if a file's size is not the one in dataset.json (a stale or truncated set);
    StorageError if the storage cannot be reached or does not send ranges. check_sizes=False: size_problems() will tell.
    """
    storage = storage_at(location)
    where = f"{str(location).rstrip('/')}/{DATASET_FILE}"
    hint = "make one with: vggt-prep pack CAPTURES... --out "
    hint += shlex.quote(str(location)) if isinstance(storage, LocalStorage) else "DIRECTORY, and copy it there"
    if isinstance(storage, LocalStorage) and not storage.root.is_dir():
        raise ValueError(f"{location}: no such directory; {hint}")
    try:
        data = storage.read(DATASET_FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{location}: holds no {DATASET_FILE}, so it is no finished shard set; {hint}") from error
    try:
        dataset = read_dataset(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    storage.read_spans([Span(DATASET_FILE, 0, 1)])  # finds a server without ranges before it sends a whole tar
    opened = ShardSet(storage=storage, dataset=dataset)
    wrong = opened.size_problems()
    wrong.pop(PAIRS_FILE, None)  # it may not be needed, and can be made again
    if wrong and check_sizes:
        raise ValueError("; ".join([*wrong.values()][:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    if not {FRAMES_FILE, SEQUENCES_FILE} & set(wrong):
        opened.refresh_index(FRAMES_FILE, SEQUENCES_FILE)
    return opened


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set. Cheap to pickle: a worker process maps the index and opens the tars itself."""

    storage: Storage
    dataset: dict[str, Any] = field(repr=False)

    in_worker: bool = field(default=False, repr=False)  # sent from another process, perhaps long after it was opened

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.storage, self.dataset, True)  # without the mapped arrays

    def __str__(self) -> str:
        return str(self.storage)

    @property
    def tars(self) -> list[str]:
        return self.dataset["tars"]

    @cached_property
    def frames(self) -> np.ndarray:
        """The rows of all frames (shards.schema.frame_dtype), mapped from disk. Raises DamagedIndexError."""
        if self.in_worker and isinstance(self.storage, LocalStorage):  # a remote index is kept under its digest
            self._check_still_there()
        rows = map_rows(self.index_path(FRAMES_FILE), frame_dtype, "name")
        if len(rows) != int(self.sequences["count"].sum()):
            raise DamagedIndexError(
                f"{self.storage}/{FRAMES_FILE}: has {len(rows)} rows, not what {SEQUENCES_FILE} counts"
            )
        return rows

    def _check_still_there(self) -> None:
        try:
            digest = ShardSet(self.storage, read_dataset(self.storage.read(DATASET_FILE))).digest
        except (FileNotFoundError, ValueError):
            digest = None
        if digest != self.digest:
            raise DamagedIndexError(f"{self.storage}: was replaced or removed while it was in use; start again")

    @cached_property
    def sequences(self) -> np.ndarray:
        """The rows of all sequences (shards.schema.sequence_dtype), mapped from disk. Raises DamagedIndexError."""
        path = self.index_path(SEQUENCES_FILE)
        if sha256(path) != self.dataset["files"][SEQUENCES_FILE]["sha256"]:  # small, and its rows have no CRC
            raise DamagedIndexError(f"{path}: not the one that {DATASET_FILE} describes; {REPAIR}")
        return map_rows(path, sequence_dtype, "category", "name")

    @property
    def has_pairs(self) -> bool:
        return self.pairs_digest is not None

    @property
    def pairs_digest(self) -> str | None:
        """SHA-256 of pairs.npy, None if the set has none."""
        return self.dataset["files"].get(PAIRS_FILE, {}).get("sha256")

    def index_path(self, name: str) -> Path:
        """Where a file of the index lies on this machine; that of a remote set is fetched once."""
        if isinstance(self.storage, LocalStorage):
            return self.storage.root / name
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vggt-shards"
        path = folder / self.dataset["files"][name]["sha256"] / name
        if not path.is_file():
            self._fetch(name, path)
        return path

    def _fetch(self, name: str, path: Path) -> None:
        """Keep a copy of a file of a remote index under this path. Raises StorageError if it is another one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.storage.local_copy(name) as copy:
            if sha256(copy) != self.dataset["files"][name]["sha256"]:
                raise StorageError(f"{self.storage}/{name}: not the one that {DATASET_FILE} describes; copy it again")
            with copy.open("rb") as source, atomic_file(path) as file:
                shutil.copyfileobj(source, file)

    def refresh_index(self, *names: str) -> None:
        """Fetch files of a remote set's index, again if the copies on this machine are damaged."""
        if not isinstance(self.storage, LocalStorage):
            for name in names:
                path = self.index_path(name)
                if sha256(path) != self.dataset["files"][name]["sha256"]:
                    self._fetch(name, path)

    def size_problems(self) -> dict[str, str]:
        """File -> what is wrong with it, for those that are missing or not of the size that dataset.json says."""
        files, found = self.dataset["files"], {}
        known = [FRAMES_FILE, SEQUENCES_FILE, *self.tars]  # a later version may list others
        known += [PAIRS_FILE] if self.has_pairs else []
        advices = {FRAMES_FILE: REPAIR, SEQUENCES_FILE: REPAIR, PAIRS_FILE: how_to_make_pairs(str(self))}
        for name, size in zip(known, self.storage.sizes(known), strict=True):
            if size != files[name]["size"]:
                state = f"has {size} bytes, not {files[name]['size']} as {DATASET_FILE} says"
                advice = advices.get(name, "copy or pack it again")
                found[name] = f"{self.storage}/{name}: {'is missing' if size is None else state}; {advice}"
        return found

    def with_tars_at(self, storage: Storage) -> ShardSet:
        """The same set whose tars are read elsewhere, such as from copies; the index stays. For this process."""
        moved = ShardSet(storage=storage, dataset=self.dataset)
        vars(moved).update(frames=self.frames, sequences=self.sequences)
        return moved

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the hashes of index and tars: two sets with the same digest hold the same frames."""
        files = self.dataset["files"]
        lines = (f"{name} {files[name]['sha256']}\n" for name in sorted([FRAMES_FILE, SEQUENCES_FILE, *self.tars]))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def split(self, split: str) -> np.ndarray:
        """The numbers of the sequences of "train" or "test" [n], in order. Raises ValueError if the set has none."""
        if split not in self.dataset["splits"]:
            raise ValueError(f"{self.storage}: has no {split} split, only {', '.join(self.dataset['splits'])}")
        return np.flatnonzero(self.sequences["split"] == split.encode())

    def row(self, frame: int) -> np.void:
        """The row of a frame, checked. Raises DamagedMemberError."""
        row = self.frames[frame]
        if row_crc(row) != row["row_crc"]:
            raise DamagedMemberError(FRAMES_FILE, f"row {frame} does not match its own CRC", self)
        return row

    def key(self, frame: int) -> str:
        """The WebDataset key of a frame. Raises DamagedMemberError."""
        row = self.row(frame)
        sequence = self.sequences[row["sequence"]]
        return member_key(*(bytes(name).decode() for name in (sequence["category"], sequence["name"], row["name"])))

    def read(self, frame: int) -> tuple[bytes, bytes | None]:
        """The JPEG and the depth (None: camera only) of a frame, as in read_many.

        Raises DamagedMemberError if they are not the bytes that were packed, StorageError if they cannot be read.
        """
        return self.read_many([frame])[0]

    def read_many(self, frames: Sequence[int]) -> list[tuple[bytes, bytes | None]]:
        """As read, for many frames, all or none, in as few requests as 5% more bytes allow."""
        found = []
        for members in self.try_read_many(frames):
            if isinstance(members, DamagedMemberError):
                raise members
            found.append(members)
        return found

    def try_read_many(self, frames: Sequence[int]) -> list[tuple[bytes, bytes | None] | DamagedMemberError]:
        """The same, with the error in its place where a frame is damaged. Raises StorageError."""
        wanted = [self._members(frame) for frame in frames]
        spans = merge_spans([m for members in wanted if not isinstance(members, DamagedMemberError) for m in members])
        blocks = self.storage.read_spans(spans)
        return [
            members if isinstance(members, DamagedMemberError) else self._take(frame, members, spans, blocks)
            for frame, members in zip(frames, wanted, strict=True)
        ]

    def _take(
        self, frame: int, members: list[Span], spans: list[Span], blocks: list[bytes]
    ) -> tuple[bytes, bytes | None] | DamagedMemberError:
        """A frame's members out of the blocks that were read, checked."""
        parts = []
        for kind, member in zip(("jpg", "depth"), members, strict=False):
            number = bisect_right(spans, (member.file, member.start + 1)) - 1  # the last that starts before it
            start = member.start - spans[number].start
            part = blocks[number][start : start + member.end - member.start]
            if len(part) < member.end - member.start:
                return DamagedMemberError(member.file, f"the {kind} of {self.key(frame)} is cut off", self)
            if zlib.crc32(part) != self.frames[frame][f"{kind}_crc"]:
                return DamagedMemberError(member.file, f"the {kind} of {self.key(frame)} does not match its CRC", self)
            parts.append(part)
        return parts[0], parts[1] if len(parts) == 2 else None

    def _members(self, frame: int) -> list[Span] | DamagedMemberError:
        """Where the JPEG and, if there is one, the depth of a frame lie."""
        try:
            row = self.row(frame)
        except DamagedMemberError as error:
            return error
        if row["tar"] >= len(self.tars):
            return DamagedMemberError(FRAMES_FILE, f"row {frame} names a tar that is not there", self)
        tar = self.tars[row["tar"]]
        kinds = ("jpg", "depth") if row["depth_size"] else ("jpg",)
        places = [(int(row[f"{kind}_offset"]), int(row[f"{kind}_size"])) for kind in kinds]
        return [Span(tar, offset, offset + size) for offset, size in places]


def merge_spans(spans: list[Span]) -> list[Span]:
    """Fewer spans, sorted, that hold all of these and are at most MAX_WASTE times as many bytes."""
    merged: list[Span] = []
    wanted = 0  # bytes of the last one that were asked for
    for span in sorted(set(spans)):
        size = span.end - span.start
        last = merged[-1] if merged else None
        if last and last.file == span.file and span.end - last.start <= MAX_WASTE * (wanted + size):
            merged[-1] = last._replace(end=span.end)
            wanted += size
        else:
            merged.append(span)
            wanted = size
    return merged
