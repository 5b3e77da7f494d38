"""Ratios that hold on a noisy machine: two ways of doing a thing in turn, many times, and the median of the ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio(ours: Callable[[], object], other: Callable[[], object], pairs: int = 15) -> str:
    """Time of `ours` over that of `other`: the median of interleaved pairs, with its 95% bootstrap interval."""
    ours(), other()  # caches, allocators
    ratios = []
    for i in range(pairs):
        # Each goes first in turn, so that neither profits from its place.
        first, second = (ours, other) if i % 2 else (other, ours)
        a, b = seconds(first), seconds(second)
        ratios.append(a / b if i % 2 else b / a)
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=pairs)) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} (95% interval {medians[50]:.3f} to {medians[-51]:.3f}, {pairs} pairs)"
