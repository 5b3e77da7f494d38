"""How a metric differs between two evaluations of the same scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.evaluation.bootstrap import Estimate, estimate, group_mean, is_finite
from train.evaluation.metrics import METRICS

LEAST = {True: 0.1, False: 0.01}  # a fraction of right ones, or an error, that was less is not many times better now


@dataclass(frozen=True)
class Comparison:
    """Means before and after, and the change with its interval, over the scenes that have the metric in both."""

    metric: str
    before: float
    after: float
    change: Estimate

    @property
    def gain(self) -> int:
        """1 for better and -1 for worse beyond the noise, else 0."""
        return self.change.sign * self._good

    @property
    def relative_gain(self) -> float:
        """The improvement as a fraction of what was before, at least of LEAST; negative if it became worse."""
        return self._good * self.change.mean / max(abs(self.before), LEAST[self._good > 0])

    @property
    def _good(self) -> int:
        """1 if more is better, else -1."""
        return 1 if self.metric in METRICS and METRICS[self.metric].higher_is_better else -1


def compare(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    metric: str,
    groups: Sequence[str] | None = None,
) -> Comparison | None:
    """None if no scene has the metric in both.

    before, after: the metrics of each scene, in the same order; None or NaN stands for a value that is not finite.
    groups: a name for each scene; means are then means over groups.
    """
    both = [
        (b[metric], a[metric], group)
        for b, a, group in zip(before, after, groups if groups is not None else [""] * len(before), strict=True)
        if is_finite(b.get(metric)) and is_finite(a.get(metric))
    ]
    if not both:
        return None
    first, second, group = zip(*both, strict=True)
    change = estimate([a - b for b, a, _ in both], group)
    return Comparison(metric, group_mean(first, group), group_mean(second, group), change)
