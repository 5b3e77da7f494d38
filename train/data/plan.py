"""What is drawn at each step: a pure function of the configuration, the seed and the positions in the streams.

The sequences of a shard set form one endless stream: position p is number p % N of a permutation of the N sequences
that belongs to pass p // N. A step takes the next scenes of the streams, by weight if there are several sets, each
rank its own slice; the whole state of the data is (step, positions): nothing depends on worker processes, and a run
can be resumed with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from train.data.views import OVERLAP, SPREAD, draw_frames, draw_overlapping
from train.runtime.typed import Location, documented

PATCH = 14  # image sides are multiples of it

# Each use of randomness has a stream of its own, keyed (seed, use, counters).
_SHAPE, _ORDER, _SCENE, _MIX, _VALIDATION = range(5)


MOST_WEIGHT = 1e9
Sampling = Literal["uniform", "nearby", "overlap"]


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """A shard set to draw from. weight: its share of the scenes, in proportion to the weights of the others.

    sampling: of its views; None: as data.sampling says.
    """

    path: Location
    weight: float = 1.0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= MOST_WEIGHT:
            hint = "leave the set out instead" if self.weight <= 0 else f"at most {MOST_WEIGHT:g}"
            raise ValueError(f"weight: expected more than 0, found {self.weight}; {hint}")


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
    view_weights: dict[int, float] | None = documented(
        None, "fractions of the steps with so many views, {1: 0.1}; the others share what is left; null: all alike"
    )
    sampling: Sampling = documented(
        "uniform",
        "views from the whole sequence (uniform), a window around one (nearby), or that see the same (overlap)",
    )
    overlap: tuple[float, float] = documented(
        OVERLAP, "least and most overlap of a view with the one it is drawn for, from 0 to 1 (sampling=overlap)"
    )
    spread: float = documented(
        SPREAD, "how often a view is drawn for the newest one, not for any: 1 reaches farthest (sampling=overlap)"
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
        if not 0 <= self.overlap[0] <= self.overlap[1] <= 1:
            raise ValueError(
                f"overlap: expected [least, most] with 0 <= least <= most <= 1, found {list(self.overlap)}"
            )
        if not 0 <= self.spread <= 1:
            raise ValueError(f"spread: expected a fraction from 0 to 1, found {self.spread}")
        self._check_view_weights()
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
        for key in ("val_scenes", "val_views"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: expected at least 1, found {getattr(self, key)}")
        if self.val_aspect <= 0:
            raise ValueError(f"val_aspect: expected more than 0, found {self.val_aspect}")

    def _check_view_weights(self) -> None:
        weights, (low, high) = self.view_weights or {}, self.views
        if any(not low <= views <= high for views in weights):
            raise ValueError(f"view_weights: expected numbers of views from {low} to {high}, found {[*weights]}")
        total = sum(weights.values())
        whole = len(weights) == high - low + 1  # then nothing may be left
        if any(weight < 0 for weight in weights.values()) or total > 1 + 1e-9 or (whole and total < 1 - 1e-9):
            limit = "1" if whole else "at most 1"
            raise ValueError(f"view_weights: expected fractions of all steps, {limit} in sum, found {weights}")

    @property
    def view_fractions(self) -> np.ndarray:
        """How often a step has each number of views, from the fewest to the most."""
        low, high = self.views
        weights = self.view_weights or {}
        others = (1 - sum(weights.values())) / max(1, high - low + 1 - len(weights))
        found = np.array([max(0.0, weights.get(views, others)) for views in range(low, high + 1)])
        return found / found.sum()

    @property
    def sources(self) -> tuple[ShardSource, ...]:
        return (ShardSource(path=self.shards),) if isinstance(self.shards, str) else self.shards or ()

    @property
    def samplings(self) -> tuple[Sampling, ...]:
        """Of each shard set."""
        return tuple(source.sampling or self.sampling for source in self.sources)


# Of each set that is sampled by overlap: sequence, frame -> frames that overlap with it, best first, and how much.
NeighborsBySet = tuple[Callable[[int, int], tuple[np.ndarray, np.ndarray]] | None, ...]


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
    which stays the same when other sets join or leave; None: their order. neighbors: of each set that is sampled by
    overlap, what overlaps with a frame of a sequence (train.data.split.stored_neighbors).
    """

    config: DataConfig
    lengths: tuple[np.ndarray, ...]
    streams: tuple[int, ...] | None = None
    neighbors: NeighborsBySet | None = None
    seed: int
    max_img_per_gpu: int
    world_size: int

    def start(self) -> DataState:
        return DataState(0, (0,) * len(self.lengths))

    def shape(self, step: int) -> StepShape:
        config, rng = self.config, np.random.default_rng((self.seed, _SHAPE, step))
        low, high = config.views
        if config.view_weights:
            views = int(rng.choice(np.arange(low, high + 1), p=config.view_fractions))
        else:
            views = int(rng.integers(low, high + 1))
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
        frames = self._frames(rng, source, sequence, int(lengths[sequence]), views)
        augmentation = int(rng.integers(2**62)) if self.config.augment else None
        return Scene(source, sequence, frames, augmentation)

    def _frames(self, rng: np.random.Generator, source: int, sequence: int, length: int, views: int) -> tuple[int, ...]:
        stored = self.neighbors[source] if self.neighbors is not None else None
        if stored is not None:
            config = self.config
            return draw_overlapping(rng, partial(stored, sequence), length, views, config.overlap, config.spread)
        sampling = self.config.samplings[source] if self.config.samplings else self.config.sampling
        if sampling == "overlap":
            raise ValueError("neighbors: needed to draw by overlap, and not given")
        return draw_frames(rng, sampling, length, views)


@lru_cache(maxsize=32)
def _permutation(seed: int, stream: int, order: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, stream, order)).permutation(count)


def validation_plan(
    config: DataConfig,
    lengths: tuple[np.ndarray, ...],
    rank: int,
    world_size: int,
    neighbors: NeighborsBySet | None = None,
) -> tuple[list[Step], int]:
    """The scenes `rank` validates on, one a step: always the same, evenly spaced over all sets and in each sequence.

    Of sets with neighbors, which are sampled by overlap, views that see the same: the others would say little.
    Also how many of the scenes count: all ranks have equally many, as ranks that share a model must. If the scenes do
    not divide evenly, some ranks repeat the first.
    """
    everything = [(source, number) for source, part in enumerate(lengths) for number in range(len(part))]
    chosen = np.linspace(0, len(everything) - 1, min(config.val_scenes, len(everything))).round().astype(int)
    height = image_height(config.width, config.val_aspect)
    mine = chosen[rank::world_size]
    repeated = [chosen[0]] * (-(-len(chosen) // world_size) - len(mine))
    steps = []
    for place in [*mine, *repeated]:
        source, sequence = everything[place]
        length = int(lengths[source][sequence])
        views, stored = min(config.val_views, length), neighbors[source] if neighbors else None
        if stored is None:
            # Without the very last: a turn-table often ends where it began.
            frames = (np.arange(views) * length / views).astype(int)
        else:
            rng = np.random.default_rng((_VALIDATION, sequence))
            near = partial(stored, sequence)
            frames = draw_overlapping(rng, near, length, views, config.overlap, config.spread)
        scene = Scene(source, sequence, tuple(map(int, frames)), None)
        steps.append(Step(StepShape(views, height, config.width), (scene,), DataState(0, ())))
    return steps, len(mine)
