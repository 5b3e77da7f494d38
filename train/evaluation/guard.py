"""Do no harm: each validation of a run against what the run started from, scene by scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from train.evaluation.comparison import Comparison, compare
from train.evaluation.metrics import HEADLINE

Guard = Literal["warn", "stop", "off"]
PATIENCE = 2  # validations in a row with the same metric worse: a single one may be chance


def changes(validations: Sequence[Mapping[str, Any]], of: int = -1) -> dict[str, Comparison]:
    """How each headline metric of a validation differs from the first one's, for those that both have.

    validations: of the same scenes, as ValidationHistory has them, in order.
    """
    first, other = validations[0]["scenes"], validations[of]["scenes"]
    found = {name: compare(first, other, name) for name in HEADLINE}
    return {name: change for name, change in found.items() if change is not None}


def broken(validations: Sequence[Mapping[str, Any]], of: int = -1) -> list[str]:
    """The headline metrics that are not finite in a scene where they were at first: nothing can be worse."""
    pairs = list(zip(validations[0]["scenes"], validations[of]["scenes"], strict=True))

    def broke(name: str) -> bool:
        return any(before.get(name) is not None and after.get(name, 0) is None for before, after in pairs)

    return [name for name in HEADLINE if broke(name)]


def worse(validations: Sequence[Mapping[str, Any]], of: int = -1) -> list[str]:
    """The headline metrics that are worse than at first beyond the noise, or broken."""
    found = [name for name, change in changes(validations, of).items() if change.gain < 0]
    return list(dict.fromkeys([*found, *broken(validations, of)]))


def harmed(validations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The headline metrics that are worse in each of the last PATIENCE validations."""
    if len(validations) <= PATIENCE:
        return []
    lately = [worse(validations, -i) for i in range(1, PATIENCE + 1)]
    return [name for name in HEADLINE if all(name in names for names in lately)]


def score(validations: Sequence[Mapping[str, Any]], of: int, metrics: Sequence[str]) -> float | None:
    """How much better a validation is than the first: the mean change of `metrics`, each relative to what it was.

    None if it does harm: a headline metric is worse beyond the noise, or broken.
    Metrics that were not measured do not count.
    """
    if worse(validations, of):
        return None
    first, scenes = validations[0]["scenes"], validations[of]["scenes"]
    found = [change.relative_gain for name in metrics if (change := compare(first, scenes, name)) is not None]
    return sum(found) / len(found) if found else None
