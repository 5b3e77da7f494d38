"""How far a mean over scenes can be trusted: percentile intervals by resampling the scenes (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
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


def group_mean(values: Sequence[float], groups: Sequence[str] | None = None) -> float:
    """The mean of one value a scene; with groups (a name each) the mean of the groups' means."""
    x, member = _by_group(values, groups)
    return float(_means(np.ones((1, len(x))), x, member)[0])


def estimate(values: Sequence[float], groups: Sequence[str] | None = None) -> Estimate:
    """group_mean and its interval, by resampling the scenes.

    For a paired comparison give the differences: what scenes have in common then cancels. As few scenes spread less
    than what they are drawn from, the interval is widened about the mean by sqrt(n / (n - 1)) and Student's quantile
    over the normal one (Hesterberg 2015, The American Statistician 69, 371). Raises ValueError without values.
    """
    mean, n = group_mean(values, groups), len(values)
    if n < MIN_SCENES:
        return Estimate(mean, n, None, None)
    x, member = _by_group(values, groups)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), DRAWS).astype(np.float64)
    low, high = np.quantile(_means(times, x, member), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    widen = np.sqrt(n / (n - 1)) * _student_over_normal(n - 1)
    low, high = np.clip(mean + (np.array([low, high]) - mean) * widen, x.min(), x.max())  # a mean lies among its values
    return Estimate(mean, n, float(low), float(high))


def _by_group(values: Sequence[float], groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Values [n], and which group each is of [n, groups]."""
    if not len(values):
        raise ValueError("values: expected at least one")
    names, group = np.unique(groups if groups is not None else [""] * len(values), return_inverse=True)
    return np.asarray(values, np.float64), (group[:, None] == np.arange(len(names))).astype(np.float64)


def _means(times: np.ndarray, x: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Of resamples, given how often each has each scene [draws, n]; a group that is in none does not count."""
    with np.errstate(invalid="ignore"):
        return np.nanmean((times @ (member * x[:, None])) / (times @ member), axis=1)


def _student_over_normal(freedom: int) -> float:
    """LEVEL's quantile of Student's t over the normal one, to 2% from 4 degrees of freedom (Fisher's expansion)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)


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
    return group_mean(first, group), group_mean(second, group), change


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
