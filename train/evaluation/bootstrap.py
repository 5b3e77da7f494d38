"""How far a mean over scenes can be trusted: percentile intervals by resampling the scenes (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
MIN_SCENES = 5  # fewer say nothing about their spread
STUDENT = {2: 2.195, 3: 1.624}  # by degrees of freedom, where the expansion is too far off


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
    return float(np.mean([part.mean() for part in _by_group(values, groups)]))


def estimate(values: Sequence[float], groups: Sequence[str] | None = None) -> Estimate:
    """group_mean and its interval, by resampling the scenes of each group, so that no group is ever left out.

    For a paired comparison give the differences: the effect of each scene then cancels. A small sample varies less
    than its population, so each group's resampled means are widened about its mean by sqrt(n / (n - 1)), and the
    interval by the ratio of Student's to the normal quantile (Hesterberg 2015, The American Statistician 69, 371);
    each group costs one degree of freedom. A group of one scene is assumed to vary as the others do.
    Raises ValueError without values.
    """
    mean, n, parts = group_mean(values, groups), len(values), _by_group(values, groups)
    freedom = n - len(parts)
    if n < MIN_SCENES or freedom < min(STUDENT):
        return Estimate(mean, n, None, None)
    spread = np.zeros(DRAWS)
    rng = np.random.default_rng(1)
    residuals = np.concatenate([(x - x.mean()) * np.sqrt(len(x) / (len(x) - 1)) for x in parts if len(x) > 1])
    for part, times in zip(parts, _resamples(tuple(map(len, parts))), strict=True):
        size = len(part)
        if size == 1:
            spread += rng.choice(residuals, DRAWS) / len(parts)
        else:
            spread += (times @ part / size - part.mean()) * np.sqrt(size / (size - 1)) / len(parts)
    low, high = mean + np.quantile(spread, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) * _student_over_normal(freedom)
    least, most = min(map(min, parts)), max(map(max, parts))  # a mean lies among its values
    return Estimate(mean, n, float(np.clip(low, least, most)), float(np.clip(high, least, most)))


def _by_group(values: Sequence[float], groups: Sequence[str] | None) -> list[np.ndarray]:
    """The values of each group, in the order of their names."""
    if not len(values):
        raise ValueError("values: expected at least one")
    names, group = np.unique(groups if groups is not None else [""] * len(values), return_inverse=True)
    x = np.asarray(values, np.float64)
    return [x[group == number] for number in range(len(names))]


@lru_cache(maxsize=1)  # an evaluation has dozens of metrics of the same scenes
def _resamples(sizes: tuple[int, ...]) -> list[np.ndarray]:
    """How often each scene of a group is drawn [DRAWS, size], for groups of these sizes."""
    rng = np.random.default_rng(0)
    return [rng.multinomial(size, np.full(size, 1 / size), DRAWS).astype(np.float64) for size in sizes]


def _student_over_normal(freedom: int) -> float:
    """LEVEL's quantile of Student's t over the normal one, to 2% from 2 degrees of freedom (Fisher's expansion)."""
    if freedom in STUDENT:
        return STUDENT[freedom]
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
