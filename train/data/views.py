"""Which frames of a sequence a scene is made of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

NEARBY_WINDOW = 2  # frames that `nearby` chooses from, in multiples of the views drawn
OVERLAP, SPREAD = (0.1, 0.9), 0.5  # of drawing by overlap: the defaults, and those of evaluations

Neighbors = Callable[[int], tuple[np.ndarray, np.ndarray]]  # of a frame: others [n], best first, and their overlaps


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
    return _repeated(rng, frames, low, high, views)


def draw_overlapping(
    rng: np.random.Generator,
    neighbors: Neighbors,
    length: int,
    views: int,
    overlap: tuple[float, float] = OVERLAP,
    spread: float = SPREAD,
) -> tuple[int, ...]:
    """Frames of a sequence of `length`: a random one, and then each from the neighbors of one that was drawn before.

    With the probability `spread` that is the newest, so that the scene reaches on with every view, else any of them.
    Its neighbors whose overlap is in the range are drawn from. If no frame that was drawn has one left, the neighbor
    whose overlap is nearest to the range is taken; if none has any, a random frame. None is taken twice, unless the
    sequence has fewer than `views`.
    """
    free = np.ones(length, bool)
    frames, known = list[int](), list[tuple[np.ndarray, np.ndarray]]()
    frame = int(rng.integers(length))
    while True:
        frames.append(frame)
        free[frame] = False
        if len(frames) == min(views, length):
            return _repeated(rng, frames, 0, length, views)
        known.append(neighbors(frame))
        newest = rng.random() < spread
        first = len(frames) - 1 if newest else int(rng.integers(len(frames)))
        # The others, the newest first, in case this one has none left.
        anchors = [first, *(i for i in reversed(range(len(frames))) if i != first)]
        frame = _next_frame(rng, [known[i] for i in anchors], free, overlap)


def _next_frame(
    rng: np.random.Generator,
    known: list[tuple[np.ndarray, np.ndarray]],
    free: np.ndarray,
    overlap: tuple[float, float],
) -> int:
    low, high = overlap
    for others, values in known:
        fitting = others[free[others] & (values >= low) & (values <= high)]
        if len(fitting):
            return int(fitting[rng.integers(len(fitting))])
    others, values = (np.concatenate(parts) for parts in zip(*known, strict=True))
    others, values = others[free[others]], values[free[others]]
    if len(others):
        return int(others[np.argmin(np.maximum(low - values, values - high))])
    return int(rng.choice(np.flatnonzero(free)))


def _repeated(rng: np.random.Generator, frames: list[int], low: int, high: int, views: int) -> tuple[int, ...]:
    """The frames, and random ones again where they are too few."""
    if len(frames) < views:
        frames = [*frames, *rng.integers(low, high, views - len(frames))]
    return tuple(map(int, frames))
