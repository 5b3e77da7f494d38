"""The validations of a run, in validation.jsonl: which are done, which can be compared, which is the best."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.plan import DataConfig
from train.evaluation.guard import score
from train.evaluation.metrics import METRICS
from train.runtime.jsonl import append_line, finite_or_none, read_jsonl

VALIDATION_FILE = "validation.jsonl"

Line = dict[str, Any]  # step, plan (see compared_plan) and scenes: [{scene: its name, metric: value or null, ...}]


def compared_plan(data: DataConfig, digests: list[str], pairs: Sequence[str | None] = ()) -> dict[str, Any]:
    """What two validations must have in common to be of the same scenes.

    digests: of the shard sets they are in; pairs: of those files of the sets whose views are drawn by overlap.
    """
    values = asdict(data)
    plan = {key: values[key] for key in ("val_split", "val_scenes", "val_views", "val_aspect", "width")}
    drawn = {"pairs": list(pairs), "overlap": list(data.overlap), "spread": data.spread} if any(pairs) else {}
    return plan | {"sets": digests} | drawn


@dataclass(frozen=True)
class ValidationHistory:
    """The validations of the run in a folder."""

    out_dir: Path

    @property
    def lines(self) -> list[Line]:
        return read_jsonl(self.out_dir / VALIDATION_FILE, "plan", "scenes")

    def add(self, step: int, plan: dict[str, Any], names: list[str], by_scene: list[dict[str, float]]) -> None:
        scenes = [{"scene": name} | finite_or_none(values) for name, values in zip(names, by_scene, strict=True)]
        append_line(self.out_dir / VALIDATION_FILE, {"step": step, "plan": plan, "scenes": scenes})

    def has(self, step: int, plan: dict[str, Any], names: list[str]) -> bool:
        """Whether these scenes were validated at a step."""
        return any(line["step"] == step and _are_same(_scenes(line), (plan, names)) for line in self.lines)

    @property
    def comparable(self) -> list[Line]:
        """Those of the same scenes as the last: a resumed run may validate on others, or have other shard sets."""
        lines = self.lines
        return [line for line in lines if _are_same(_scenes(line), _scenes(lines[-1]))]

    def best_step(self, metrics: str | Sequence[str], saved: Container[int] | None = None) -> int | None:
        """The step of the best validation, the first of equals; None if there is none.

        metrics: by the mean of this one; or of several, by their score against the first validation, see guard.score.
        saved: the steps that have a checkpoint; of the others only the first validation takes part.
        """
        lines = self.comparable
        lines = [line for line in lines if saved is None or line is lines[0] or line["step"] in saved]
        if isinstance(metrics, str):
            return _best_mean(lines, metrics)
        scores = [(score(lines, i, metrics) if i else 0.0, line["step"]) for i, line in enumerate(lines)]
        harmless = [(value, -step) for value, step in scores if value is not None]
        return -max(harmless)[1] if harmless else None


def _best_mean(lines: list[Line], metric: str) -> int | None:
    """The step with the best mean of a metric over the scenes that have it in every validation.

    A scene that can no longer be read would change the mean.
    """
    sign = -1 if metric in METRICS and METRICS[metric].higher_is_better else 1
    lines = [line for line in lines if any(metric in scene for scene in line["scenes"])]
    in_all = [all(metric in scene for scene in same) for same in zip(*(line["scenes"] for line in lines))]  # noqa: B905
    found = []
    for line in lines:
        values = [scene[metric] for scene, counts in zip(line["scenes"], in_all, strict=False) if counts]
        if values and None not in values:  # None: not finite
            found.append((sign * float(np.mean(values)), line["step"]))
    return min(found)[1] if found else None


Scenes = tuple[dict[str, Any], list[str]]


def _scenes(line: Line) -> Scenes:
    """What a validation was of: the plan, and the names of the scenes."""
    return line["plan"], [scene["scene"] for scene in line["scenes"]]


def _are_same(a: Scenes, b: Scenes) -> bool:
    """A plan that does not say of which shard sets it is, as in older runs, fits all."""
    sets = [plan.get("sets") for plan, _ in (a, b)]
    same_sets = None in sets or sets[0] == sets[1]
    plans = [{key: value for key, value in plan.items() if key != "sets"} for plan, _ in (a, b)]
    return same_sets and plans[0] == plans[1] and a[1] == b[1]
