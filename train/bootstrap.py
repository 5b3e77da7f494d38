"""How far a mean over scenes can be trusted: percentile intervals by resampling the scenes (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
MIN_SCENES = 5  # fewer say nothing about their spread


@dataclass(frozen=True)
class Estimate:
    """A mean over `scenes` scenes, and the bounds of its interval, None with too few of them."""

    mean: float
    scenes: int
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies above or below zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def estimate(values: Sequence[float], groups: Sequence[str] | None = None) -> Estimate:
    """The mean of one value a scene and its interval; with groups (a name each) the mean of the groups' means.

    For a paired comparison give the differences: what scenes have in common then cancels. Raises ValueError if there
    are no values.
    """
    x = np.asarray(values, np.float64)
    if not len(x):
        raise ValueError("values: expected at least one")
    names, group = np.unique(groups if groups is not None else [""] * len(x), return_inverse=True)
    member = group[:, None] == np.arange(len(names))  # [scenes, groups]

    def means(times: np.ndarray) -> np.ndarray:
        """Of resamples, given how often each has each scene [draws, scenes]; a group that is in none does not count."""
        counts = times @ member
        with np.errstate(invalid="ignore"):
            return np.nanmean((times * x) @ member / counts, axis=1)

    mean = float(means(np.ones((1, len(x))))[0])
    if len(x) < MIN_SCENES:
        return Estimate(mean, len(x), None, None)
    times = np.random.default_rng(0).multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS)
    low, high = np.quantile(means(times), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, len(x), float(low), float(high))


def paired(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    name: str,
    groups: Sequence[str] | None = None,
) -> tuple[float, float, Estimate] | None:
    """The means of a figure before and after, and its change, over the scenes that have it in both; None without any.

    before, after: the figures of each scene, by name, in the same order; None or NaN stands for one that is not finite.
    """
    both = [
        (b[name], a[name], group)
        for b, a, group in zip(before, after, groups if groups is not None else [""] * len(before), strict=True)
        if is_finite(b.get(name)) and is_finite(a.get(name))
    ]
    if not both:
        return None
    first, second, group = zip(*both, strict=True)
    change = estimate([a - b for b, a, _ in both], group)
    return estimate(first, group).mean, estimate(second, group).mean, change


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
