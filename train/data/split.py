"""The sequences of a split over all shard sets, and the bytes of their frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shards.pairs import Pairs
from shards.reader import DamagedMemberError, ShardSet
from train.data.plan import Scene, Step


class Split:
    """The sequences of one split of some shard sets: their first rows and lengths, numbered from 0 within each set."""

    def __init__(self, shard_sets: Sequence[ShardSet], split: str) -> None:
        self.shard_sets = tuple(shard_sets)
        rows = [shard_set.sequences[shard_set.split(split)] for shard_set in shard_sets]
        for shard_set, part in zip(shard_sets, rows, strict=True):
            if not len(part):
                has = ", ".join(shard_set.dataset["splits"])
                raise ValueError(f"{shard_set}: has no {split} split, only {has}; see data.train_split, data.val_split")
        self.first = tuple(part["first"].astype(np.int64) for part in rows)
        self.lengths = tuple(part["count"].astype(np.int64) for part in rows)
        for shard_set in shard_sets:
            len(shard_set.frames)  # a remote index is fetched once, here, and a damaged one is an error now


@dataclass(frozen=True)
class StoredNeighbors:
    """Of the sequences of a split: which frames overlap with a frame, as its shard set says."""

    shard_set: ShardSet
    first: np.ndarray  # the rows of the sequences' first frames [N]

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredNeighbors, (self.shard_set, self.first)  # without what is mapped

    @cached_property
    def pairs(self) -> Pairs:
        return Pairs(self.shard_set)

    def __call__(self, sequence: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Other frames of the sequence, best first, and their overlaps from 0 to 1. Raises DamagedIndexError."""
        first = int(self.first[sequence])
        rows, overlaps = self.pairs.neighbors(first + frame)
        return rows - first, overlaps


def stored_neighbors(split: Split, samplings: Sequence[str]) -> tuple[StoredNeighbors | None, ...]:
    """For each set that is sampled by overlap, its neighbors. Raises ValueError if it has none stored."""
    found: list[StoredNeighbors | None] = []
    for shard_set, first, sampling in zip(split.shard_sets, split.first, samplings, strict=True):
        stored = StoredNeighbors(shard_set, first) if sampling == "overlap" else None
        if stored is not None:
            _ = stored.pairs  # of a remote set it is fetched once, here, and a missing one is an error now
        found.append(stored)
    return tuple(found)


def lonely_frames(
    split: Split, neighbors: Sequence[StoredNeighbors | None], overlap: tuple[float, float]
) -> tuple[float, float]:
    """Of the frames of sets that are sampled by overlap, the fractions with neighbors, but none in this range, and
    without any.
    """
    outside, alone, count = 0, 0, 0
    for stored, all_first, lengths in zip(neighbors, split.first, split.lengths, strict=True):
        if stored is None:
            continue
        for first, length in zip(all_first, lengths, strict=True):
            values = stored.pairs.rows["overlap"][first : first + length] / np.float32(255)
            fits = (values > 0) & (values >= overlap[0]) & (values <= overlap[1])
            without = ~(values > 0).any(axis=1)
            alone += int(without.sum())
            outside += int((~fits.any(axis=1) & ~without).sum())
            count += int(length)
    return (outside / count, alone / count) if count else (0.0, 0.0)


Members = tuple[bytes, bytes | None] | DamagedMemberError  # JPEG and depth of a frame, or why there are none


def read_step(split: Split, step: Step) -> list[list[Members]]:
    """The members of each scene's frames, read in as few requests as possible. Raises StorageError."""
    members: list[list[Members]] = [[] for _ in step.scenes]
    for source, shard_set in enumerate(split.shard_sets):
        places = [i for i, scene in enumerate(step.scenes) if scene.source == source]
        frames = [frame_rows(split, step.scenes[i]) for i in places]
        found = iter(shard_set.try_read_many([frame for part in frames for frame in part]))
        for i, part in zip(places, frames, strict=True):
            members[i] = [next(found) for _ in part]
    return members


def frame_rows(split: Split, scene: Scene) -> list[int]:
    """The rows of a scene's frames in the index of its shard set."""
    return [int(split.first[scene.source][scene.sequence]) + frame for frame in scene.frames]


def sequence_name(split: Split, scene: Scene) -> str:
    """category/sequence of a scene of the plan, which need not be that of what was loaded for it."""
    rows = split.shard_sets[scene.source].sequences
    row = rows[np.searchsorted(rows["first"], split.first[scene.source][scene.sequence])]
    return f"{bytes(row['category']).decode()}/{bytes(row['name']).decode()}"
