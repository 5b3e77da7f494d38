"""What is drawn at each step: a pure function of the configuration, the seed and the positions in the streams.

The sequences of a shard set form one endless stream: position p is number p % N of a permutation of the N sequences
that belongs to pass p // N. A step takes the next scenes of the streams, by weight if there are several sets, each
rank its own slice; the whole state of the data is (step, positions): nothing depends on worker processes, and a run
can be resumed with any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from train.data.views import draw_frames
from train.runtime.typed import Location, documented

PATCH = 14  # image sides are multiples of it

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
    shards: Location | tuple[ShardSource, ...] | None = documented(
        None, "directory made by vggt-prep pack, or its URL; several: [{path: A, weight: 2}, {path: B}]"
    )
    train_split: Literal["train", "test"] = documented("train", "split to train on: train or test")
    val_split: Literal["train", "test"] = documented("test", "split to validate on: train or test")
    width: int = documented(518, "image width in pixels, a multiple of 14")
    views: tuple[int, int] = documented((2, 24), "fewest and most views per scene, drawn uniformly for each step")
    aspect: tuple[float, float] = documented(
        (0.33, 1.0), "smallest and largest height over width, drawn uniformly for each step"
    )
    sampling: Literal["uniform", "nearby"] = documented(
        "uniform", "views from the whole sequence (uniform) or from a window around one of them (nearby)"
    )
    augment: bool = documented(True, "whether to crop and color images at random")
    workers: int | None = documented(
        None, "loader processes per rank; null: one per core that the ranks leave free, 1 to 8"
    )
    max_bad: float = documented(0.02, "fraction of damaged frames above which the run stops")
    allow_shared_frames: bool = documented(False, "whether frames that are trained on may also be validated on")
    val_scenes: int = documented(100, "most scenes to validate on")
    val_views: int = documented(8, "views of each validation scene, or all that it has")
    val_aspect: float = documented(0.75, "height over width of each validation image")

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
            raise ValueError(f"max_bad: expected a fraction from 0 to 1, found {self.max_bad}")
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
    """Everything that training draws.

    lengths: the frames of each sequence [N], of each shard set; streams: the number of each set in the random draws,
    which stays the same when other sets join or leave; None: their order.
    """

    config: DataConfig
    lengths: tuple[np.ndarray, ...]
    streams: tuple[int, ...] | None = None
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
        """The state after step `state.step`."""
        taken = np.bincount(self._sources(state.step), minlength=len(self.lengths))
        return DataState(state.step + 1, tuple(int(p + n) for p, n in zip(state.positions, taken, strict=True)))

    def step(self, state: DataState, rank: int) -> Step:
        """What `rank` loads for step `state.step`."""
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
        lengths, stream = self.lengths[source], source if self.streams is None else self.streams[source]
        order, place = divmod(position, len(lengths))
        sequence = int(_permutation(self.seed, stream, order, len(lengths))[place])
        rng = np.random.default_rng((self.seed, _SCENE, stream, position))
        frames = draw_frames(rng, self.config.sampling, int(lengths[sequence]), views)
        augmentation = int(rng.integers(2**62)) if self.config.augment else None
        return Scene(source, sequence, frames, augmentation)


@lru_cache(maxsize=32)
def _permutation(seed: int, stream: int, order: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, stream, order)).permutation(count)


def validation_plan(
    config: DataConfig, lengths: tuple[np.ndarray, ...], rank: int, world_size: int
) -> tuple[list[Step], int]:
    """The scenes `rank` validates on, one a step: always the same, evenly spaced over all sets and in each sequence.

    Also how many of them count: all ranks have equally many, as ranks that share a model must. If the scenes do not
    divide evenly, some ranks repeat the first.
    """
    everything = [(source, number) for source, part in enumerate(lengths) for number in range(len(part))]
    chosen = np.linspace(0, len(everything) - 1, min(config.val_scenes, len(everything))).round().astype(int)
    height = image_height(config.width, config.val_aspect)
    mine = chosen[rank::world_size]
    repeated = [chosen[0]] * (-(-len(chosen) // world_size) - len(mine))
    steps = []
    for place in [*mine, *repeated]:
        source, sequence = everything[place]
        # Without the very last: a turn-table often ends where it began.
        views = min(config.val_views, int(lengths[source][sequence]))
        frames = (np.arange(views) * lengths[source][sequence] / views).astype(int)
        scene = Scene(source, sequence, tuple(map(int, frames)), None)
        steps.append(Step(StepShape(views, height, config.width), (scene,), DataState(0, ())))
    return steps, len(mine)
