"""Which frames of which sequences are evaluated: a pure function of a shard set's sequences and the protocol."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from shards import ShardSet
from train.data.plan import PATCH, DataState, Scene, Step, StepShape
from train.data.split import Split, StoredNeighbors, stored_neighbors
from train.data.views import draw_frames, draw_overlapping

FAST_SEQUENCES = 10  # a category


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """VGGT's protocol on Co3D: random frames, none twice, of each test sequence that is long enough.

    fast: at most FAST_SEQUENCES random sequences of each category. width: of the images, in pixels. views_from:
    "overlap" draws frames that see the same, which no published protocol does.
    """

    split: str = "test"
    min_frames: int = 50
    views: int = 10
    views_from: Literal["uniform", "overlap"] = "uniform"
    fast: bool = False
    seed: int = 0
    width: int = 518

    def __post_init__(self) -> None:
        if self.views < 2:
            raise ValueError(f"--views: expected at least 2, found {self.views}: poses are compared in pairs")
        if self.min_frames < self.views:
            raise ValueError(f"--min-frames {self.min_frames}: expected at least the {self.views} of --views")
        if self.seed < 0:
            raise ValueError(f"--seed: expected at least 0, found {self.seed}")
        if self.width < PATCH or self.width % PATCH:
            raise ValueError(f"--width: expected a multiple of {PATCH} pixels, found {self.width}")

    @property
    def deviations(self) -> list[str]:
        """How this protocol differs from the published one."""
        published, found = Protocol(), []
        for name in ("split", "min_frames", "views", "views_from", "width"):
            ours, theirs = getattr(self, name), getattr(published, name)
            if ours != theirs:
                found.append(f"{name} {ours} instead of {theirs}")
        return found


@dataclass(frozen=True)
class EvalSequence:
    """A sequence to evaluate, and what to load of it. shards: the set that it is in."""

    shards: str
    category: str
    name: str
    step: Step

    @property
    def label(self) -> str:
        return f"{self.category}/{self.name}"


def choose(shard_sets: Sequence[ShardSet], protocol: Protocol) -> list[EvalSequence]:
    """The sequences to evaluate, of all sets in their order; raises ValueError if a set has none."""
    neighbors: Sequence[StoredNeighbors | None] = [None] * len(shard_sets)
    if protocol.views_from == "overlap":
        neighbors = stored_neighbors(Split(shard_sets, protocol.split), ["overlap"] * len(shard_sets))
    return [
        one
        for source, (shard_set, stored) in enumerate(zip(shard_sets, neighbors, strict=True))
        for one in _of_set(shard_set, source, stored, protocol)
    ]


def _of_set(
    shard_set: ShardSet, source: int, neighbors: StoredNeighbors | None, protocol: Protocol
) -> list[EvalSequence]:
    """The sequences to evaluate and their frames, in the order of the set; the draws depend on names and seed alone.

    The height of the images follows the aspect ratio of the first drawn frame, rounded to a multiple of 14, at
    most the width. Raises ValueError if no sequence is long enough.
    """
    rows = shard_set.sequences[shard_set.split(protocol.split)]
    long_enough = [i for i, row in enumerate(rows) if row["count"] >= protocol.min_frames]
    if not long_enough:
        longest = int(rows["count"].max())
        views = f" --views {longest}" if longest < protocol.views else ""
        raise ValueError(
            f"{shard_set}: no sequence of the {protocol.split} split has {protocol.min_frames} frames, as the protocol "
            f"asks for; the longest has {longest}: give --min-frames {longest}{views} or less "
            f"(with make ARGS='--min-frames {longest}{views}'); the metrics are then not comparable with published ones"
        )
    if protocol.fast:
        long_enough = _some_of_each_category(rows, long_enough, protocol.seed)
    chosen = []
    for i in long_enough:
        row = rows[i]
        category, name = bytes(row["category"]).decode(), bytes(row["name"]).decode()
        rng, length = _rng(protocol.seed, category, name), int(row["count"])
        if neighbors is None:
            frames = draw_frames(rng, "uniform", length, protocol.views)
        else:
            frames = draw_overlapping(rng, partial(neighbors, i), length, protocol.views)
        frame = shard_set.row(int(row["first"]) + frames[0])
        height = round(protocol.width * int(frame["height"]) / int(frame["width"]) / PATCH) * PATCH
        shape = StepShape(protocol.views, min(max(height, PATCH), protocol.width), protocol.width)
        step = Step(shape, (Scene(source, i, frames, None),), DataState(0, ()))
        chosen.append(EvalSequence(str(shard_set), category, name, step))
    return chosen


def _some_of_each_category(rows: np.ndarray, numbers: list[int], seed: int) -> list[int]:
    kept = []
    for category in np.unique(rows["category"][numbers]):
        members = [i for i in numbers if rows["category"][i] == category]
        order = _rng(seed, bytes(category).decode()).permutation(len(members))
        kept += [members[i] for i in order[:FAST_SEQUENCES]]
    return sorted(kept)


def _rng(seed: int, *names: str) -> np.random.Generator:
    return np.random.default_rng((seed, zlib.crc32("/".join(names).encode())))
