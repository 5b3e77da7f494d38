"""What is drawn at each step: a pure function of the configuration, the seed and the position in the stream.

Sequences form one endless stream: position p is number p % N of a permutation of the N sequences that belongs to
pass p // N. A step takes the next scenes of the stream, each rank its own slice, and the whole state of the data is
(step, position): nothing depends on worker processes, and a run goes on with any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

PATCH = 14  # image sides are multiples of it
NEARBY_WINDOW = 2  # frames that `nearby` chooses from, in multiples of the views drawn

# Each use of randomness has a stream of its own, keyed (seed, use, counter).
_SHAPE, _ORDER, _SCENE = range(3)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str | None = None
    train_split: Literal["train", "test"] = "train"
    val_split: Literal["train", "test"] = "test"
    width: int = 518
    views: tuple[int, int] = (2, 24)
    aspect: tuple[float, float] = (0.33, 1.0)
    sampling: Literal["uniform", "nearby"] = "uniform"
    augment: bool = True
    workers: int | None = None
    max_bad: float = 0.02
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


@dataclass(frozen=True)
class DataState:
    """Where the data is: the step to be drawn next, and the position in the stream of sequences."""

    step: int = 0
    position: int = 0


@dataclass(frozen=True)
class StepShape:
    """The same on every rank: views a scene, and height and width of the images in pixels."""

    views: int
    height: int
    width: int


@dataclass(frozen=True)
class Scene:
    """sequence: its place among those of the split; frames: numbers within it, the reference first."""

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


def step_shape(config: DataConfig, seed: int, step: int) -> StepShape:
    rng = np.random.default_rng((seed, _SHAPE, step))
    views = int(rng.integers(config.views[0], config.views[1] + 1))
    return StepShape(views, image_height(config.width, rng.uniform(*config.aspect)), config.width)


def scenes_per_rank(max_img_per_gpu: int, views: int) -> int:
    return max(1, max_img_per_gpu // views)


def advance(config: DataConfig, seed: int, state: DataState, *, max_img_per_gpu: int, world_size: int) -> DataState:
    """The state after the step that `state` stands before."""
    views = step_shape(config, seed, state.step).views
    return DataState(state.step + 1, state.position + world_size * scenes_per_rank(max_img_per_gpu, views))


def plan_step(
    config: DataConfig,
    lengths: np.ndarray,
    seed: int,
    state: DataState,
    *,
    max_img_per_gpu: int,
    rank: int,
    world_size: int,
) -> Step:
    """What `rank` loads for the step that `state` stands before. lengths: frames of each sequence of the split [N]."""
    shape = step_shape(config, seed, state.step)
    count = scenes_per_rank(max_img_per_gpu, shape.views)
    first = state.position + rank * count
    scenes = tuple(draw_scene(config, lengths, seed, first + i, shape.views) for i in range(count))
    return Step(shape, scenes, advance(config, seed, state, max_img_per_gpu=max_img_per_gpu, world_size=world_size))


def draw_scene(config: DataConfig, lengths: np.ndarray, seed: int, position: int, views: int) -> Scene:
    """The scene at a position of the stream: no frame twice, unless the sequence has fewer than `views`."""
    turn, place = divmod(position, len(lengths))
    sequence = int(_permutation(seed, turn, len(lengths))[place])
    rng = np.random.default_rng((seed, _SCENE, position))
    low, high = 0, int(lengths[sequence])
    if config.sampling == "nearby":
        anchor = int(rng.integers(high))
        size = min(high, NEARBY_WINDOW * views)
        low = min(max(0, anchor - size // 2), high - size)
        others = np.delete(np.arange(low, low + size), anchor - low)
        frames = [anchor, *rng.permutation(others)[: views - 1]]
    else:
        frames = [*(low + rng.permutation(high)[:views])]
    if len(frames) < views:
        frames += [*rng.integers(low, high, views - len(frames))]
    augmentation = int(rng.integers(2**62)) if config.augment else None
    return Scene(sequence, tuple(map(int, frames)), augmentation)


@lru_cache(maxsize=2)
def _permutation(seed: int, turn: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, turn)).permutation(count)


def validation_plan(config: DataConfig, lengths: np.ndarray, rank: int, world_size: int) -> list[Step]:
    """The scenes `rank` validates on, one a step: always the same, evenly spaced in the split and in each sequence."""
    count = min(config.val_scenes, len(lengths))
    chosen = np.linspace(0, len(lengths) - 1, count).round().astype(int)
    shape = StepShape(config.val_views, image_height(config.width, config.val_aspect), config.width)
    steps = []
    for sequence in chosen[rank::world_size]:
        # Without the very last: a turn-table often ends where it began.
        frames = (np.arange(config.val_views) * lengths[sequence] / config.val_views).astype(int)
        steps.append(Step(shape, (Scene(int(sequence), tuple(map(int, frames)), None),), DataState()))
    return steps
