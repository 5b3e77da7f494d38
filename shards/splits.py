"""Does a split to test on hold places, or even pictures, of the one that is trained on?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards.reader import ShardSet


@dataclass(frozen=True)
class SharedPlaces:
    """How many of the `tested` sequences are also trained on, and how many of their frames are the same pictures."""

    sequences: int
    tested: int
    frames: int

    def check(self, how_to_allow: str) -> None:
        """Raises ValueError if pictures are shared: a test on them says nothing."""
        if self.frames:
            raise ValueError(
                f"{self.frames} frames to test on are the same as frames to train on, so that a test says nothing; "
                f"pack other splits, or give {how_to_allow}"
            )

    @property
    def words(self) -> str:
        """What the tested sequences are, to be put behind their number."""
        if self.frames:
            return f"{self.frames} of whose frames are trained on"
        if not self.sequences:
            return "never trained on"
        part = "" if self.sequences == self.tested else f"{self.sequences} of which are "
        return f"{part}other frames of places that are trained on"


def shared_places(
    train_sets: Sequence[ShardSet],
    train_split: str,
    test_sets: Sequence[ShardSet],
    test_split: str,
    only: set[tuple[str, str]] | None = None,
) -> SharedPlaces:
    """Compare sequences by category and name, within a set and between sets that were packed from the same annotations.

    (Elsewhere equal names mean nothing.) Their pictures are compared by size and CRC. only: the (category, name) that
    are tested; None: the whole split.
    """
    sequences = frames = tested = 0
    for test_set in test_sets:
        train_rows = {}
        for train_set in train_sets:
            if _same_source(train_set, test_set) and train_split in train_set.dataset["splits"]:
                train_rows |= {key: (train_set, row) for key, row in _rows(train_set, train_split)}
        for key, row in _rows(test_set, test_split):
            if only is not None and key not in only:
                continue
            tested += 1
            if key in train_rows:
                sequences += 1
                frames += int(np.isin(_pictures(test_set, row), _pictures(*train_rows[key])).sum())
    return SharedPlaces(sequences, tested, frames)


def _same_source(a: ShardSet, b: ShardSet) -> bool:
    files = [set(shard_set.dataset["source"].get("annotations", {}).values()) for shard_set in (a, b)]
    return a.digest == b.digest or bool(files[0] & files[1])


def _rows(shard_set: ShardSet, split: str) -> Iterator[tuple[tuple[str, str], np.void]]:
    for row in shard_set.sequences[shard_set.split(split)]:
        yield (row["category"].decode(), row["name"].decode()), row


def _pictures(shard_set: ShardSet, sequence: np.void) -> np.ndarray:
    """What tells the pictures of a sequence's frames apart [n]."""
    rows = shard_set.frames[int(sequence["first"]) : int(sequence["first"]) + int(sequence["count"])]
    return (rows["jpg_size"].astype(np.uint64) << np.uint64(32)) | rows["jpg_crc"]
