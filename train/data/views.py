"""Which frames of a sequence a scene is made of."""

from __future__ import annotations

import numpy as np

NEARBY_WINDOW = 2  # frames that `nearby` chooses from, in multiples of the views drawn


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
