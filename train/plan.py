"""What is drawn at each step: a pure function of the configuration, the seed and the positions in the streams.

The sequences of a shard set form one endless stream: position p is number p % N of a permutation of the N sequences
that belongs to pass p // N. A step takes the next scenes of the streams, by weight if there are several sets, each
rank its own slice; the whole state of the data is (step, positions): nothing depends on worker processes, and a run
goes on with any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np

PATCH = 14  # image sides are multiples of it
Location = Annotated[str, "a path, whose ~ is expanded, a URL or a name"]
NEARBY_WINDOW = 2  # frames that `nearby` chooses from, in multiples of the views drawn

# Each use of randomness has a stream of its own, keyed (seed, use, counters).
_SHAPE, _ORDER, _SCENE, _MIX = range(4)


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """A shard set to draw from. weight: its share of the scenes, in proportion to the weights of the others."""

    path: Location
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight: expected more than 0, found {self.weight}; leave the set out instead")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: Location | tuple[ShardSource, ...] | None = None
    train_split: Literal["train", "test"] = "train"
    val_split: Literal["train", "test"] = "test"
    width: int = 518
    views: tuple[int, int] = (2, 24)
    aspect: tuple[float, float] = (0.33, 1.0)
    sampling: Literal["uniform", "nearby"] = "uniform"
    augment: bool = True
    workers: int | None = None
    max_bad: float = 0.02
    allow_shared_frames: bool = False
    val_scenes: int = 100
    val_views: int = 8
    val_aspect: float = 0.75

    def __post_init__(self) -> None:
        low, high = self.views
        if not 1 <= low <= high:
            raise ValueError(f"views: expected [least, most] with 1 <= least <= most, found {list(self.views)}")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect: expected [least, most] with 0 < least <= most, found {list(self.aspect)}")
        if self.val_split == self.train_split:
            raise ValueError(f"val_split: {self.val_split!r} is what train_split trains on; expected another split")
        if self.width < PATCH or self.width % PATCH:
            raise ValueError(f"width: expected a multiple of {PATCH} pixels, found {self.width}")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers: expected 0 or more, or null for automatic, found {self.workers}")
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad: expected a share from 0 to 1, found {self.max_bad}")
        if self.val_scenes < 1 or self.val_views < 1 or self.val_aspect <= 0:
            raise ValueError("val_scenes and val_views: expected at least 1; val_aspect: expected more than 0")

    @property
    def sources(self) -> tuple[ShardSource, ...]:
        return (ShardSource(path=self.shards),) if isinstance(self.shards, str) else self.shards or ()


@dataclass(frozen=True)
class DataState:
    """Where the data is: the step to be drawn next, and the position in the stream of each shard set."""

    step: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class StepShape:
    """The same on every rank: views a scene, and height and width of the images in pixels."""

    views: int
    height: int
    width: int


@dataclass(frozen=True)
class Scene:
    """source: which shard set; sequence: its place in the split there; frames: those of it, the reference first."""

    source: int
    sequence: int
    frames: tuple[int, ...]
    seed: int | None  # of the augmentation; None: none


@dataclass(frozen=True)
class Step:
    """What one rank loads for one step, and where the data is once the step is done."""

    shape: StepShape
    scenes: tuple[Scene, ...]
    after: DataState


def image_height(width: int, aspect: float) -> int:
    """The multiple of 14 at or below width * aspect, at least 14."""
    return max(PATCH, int(width * aspect) // PATCH * PATCH)


def scenes_per_rank(max_img_per_gpu: int, views: int) -> int:
    return max(1, max_img_per_gpu // views)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that training draws. lengths: the frames of each sequence [N], of each shard set."""

    config: DataConfig
    lengths: tuple[np.ndarray, ...]
    seed: int
    max_img_per_gpu: int
    world_size: int

    def start(self) -> DataState:
        return DataState(0, (0,) * len(self.lengths))

    def shape(self, step: int) -> StepShape:
        config, rng = self.config, np.random.default_rng((self.seed, _SHAPE, step))
        views = int(rng.integers(config.views[0], config.views[1] + 1))
        return StepShape(views, image_height(config.width, rng.uniform(*config.aspect)), config.width)

    def after(self, state: DataState) -> DataState:
        """The state once the step that `state` stands before is done."""
        taken = np.bincount(self._sources(state.step), minlength=len(self.lengths))
        return DataState(state.step + 1, tuple(int(p + n) for p, n in zip(state.positions, taken, strict=True)))

    def step(self, state: DataState, rank: int) -> Step:
        """What `rank` loads for the step that `state` stands before."""
        shape, sources = self.shape(state.step), self._sources(state.step)
        count = len(sources) // self.world_size
        scenes = []
        for place in range(rank * count, (rank + 1) * count):
            source = int(sources[place])
            position = state.positions[source] + int((sources[:place] == source).sum())
            scenes.append(self._scene(source, position, shape.views))
        return Step(shape, tuple(scenes), self.after(state))

    def _sources(self, step: int) -> np.ndarray:
        """The shard set of each scene of a step, of all ranks."""
        count = self.world_size * scenes_per_rank(self.max_img_per_gpu, self.shape(step).views)
        weights = np.array([source.weight for source in self.config.sources] or [1.0])
        return np.random.default_rng((self.seed, _MIX, step)).choice(len(weights), count, p=weights / weights.sum())

    def _scene(self, source: int, position: int, views: int) -> Scene:
        """The scene at a position of a stream: no frame twice, unless the sequence has fewer than `views`."""
        lengths = self.lengths[source]
        turn, place = divmod(position, len(lengths))
        sequence = int(_permutation(self.seed, source, turn, len(lengths))[place])
        rng = np.random.default_rng((self.seed, _SCENE, source, position))
        frames = draw_frames(rng, self.config.sampling, int(lengths[sequence]), views)
        augmentation = int(rng.integers(2**62)) if self.config.augment else None
        return Scene(source, sequence, frames, augmentation)


def draw_frames(rng: np.random.Generator, sampling: str, length: int, views: int) -> tuple[int, ...]:
    """Frames of a sequence of `length`, the reference first; they repeat only if it has fewer than `views`."""
    low, high = 0, length
    if sampling == "nearby":
        anchor = int(rng.integers(length))
        size = min(length, NEARBY_WINDOW * views)
        low = min(max(0, anchor - size // 2), length - size)
        others = np.delete(np.arange(low, low + size), anchor - low)
        frames = [anchor, *rng.permutation(others)[: views - 1]]
    else:
        frames = [*rng.permutation(length)[:views]]
    if len(frames) < views:
        frames += [*rng.integers(low, high, views - len(frames))]
    return tuple(map(int, frames))


@lru_cache(maxsize=32)
def _permutation(seed: int, source: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, source, turn)).permutation(count)


def validation_plan(
    config: DataConfig, lengths: tuple[np.ndarray, ...], rank: int, world_size: int
) -> tuple[list[Step], int]:
    """The scenes `rank` validates on, one a step: always the same, evenly spaced over all sets and in each sequence.

    Also how many of them count: every rank has equally many, as those that share a model must, and where they cannot
    be shared out evenly some repeat the first.
    """
    everything = [(source, number) for source, part in enumerate(lengths) for number in range(len(part))]
    chosen = np.linspace(0, len(everything) - 1, min(config.val_scenes, len(everything))).round().astype(int)
    shape = StepShape(config.val_views, image_height(config.width, config.val_aspect), config.width)
    mine = chosen[rank::world_size]
    repeated = [chosen[0]] * (-(-len(chosen) // world_size) - len(mine))
    steps = []
    for place in [*mine, *repeated]:
        source, sequence = everything[place]
        # Without the very last: a turn-table often ends where it began.
        frames = (np.arange(config.val_views) * lengths[source][sequence] / config.val_views).astype(int)
        scene = Scene(source, sequence, tuple(map(int, frames)), None)
        steps.append(Step(shape, (scene,), DataState(0, ())))
    return steps, len(mine)
