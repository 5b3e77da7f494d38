"""A checkpoint on the sequences of a protocol, divided among the ranks."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from train.data.split import Split
from train.evaluation.baselines import BASELINES, baseline_metrics
from train.evaluation.bootstrap import is_finite
from train.evaluation.metrics import scene_metrics
from train.evaluation.overlaps import PairErrors, errors_by_pair
from train.evaluation.predict import Metrics, predict, scene_name
from train.evaluation.protocol import EvalSequence
from train.evaluation.results import Evaluation
from train.evaluation.scene_result import SceneResult, scene_result
from train.evaluation.sizes import is_metric, size_ratio
from train.objective.targets import Batch
from train.runtime.distributed import World
from train.runtime.jsonl import finite_or_none
from train.runtime.precision import Precision
from vggt.model import VGGT

TELL_EVERY = 50  # sequences
IN_GALLERY = 2  # scenes of each kind: best, median, worst


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What is evaluated, and how."""

    split: Split
    sequences: list[EvalSequence]
    precision: Precision
    workers: int
    world: World
    mean_pose: torch.Tensor

    def evaluate(self, model: VGGT, label: str) -> tuple[Evaluation, list[Evaluation], Counter[str]]:
        """The model's evaluation; those of the baselines; and the damaged frames by file. The same on every rank."""
        mine: list[tuple[Metrics, dict[str, Metrics], PairErrors]] = []  # all are empty if no frame could be used
        bad = Counter[str]()
        world, my_sequences = self.world, self.sequences[self.world.rank :: self.world.size]
        for sequence, (raw, batch, predictions) in zip(my_sequences, self._predict(model, my_sequences), strict=True):
            usable = scene_name(raw) == sequence.label  # else the loader took another sequence
            metrics = scene_metrics(predictions, batch) | size_ratio(predictions, batch) if usable else {}
            pairs = errors_by_pair(predictions, batch) if usable else []
            mine.append((metrics, baseline_metrics(batch, self.mean_pose) if usable else {}, pairs))
            bad.update(raw["bad"])
            self._show_progress(len(mine))
        by_rank = world.gather((mine, bad))
        rows = [by_rank[i % world.size][0][i // world.size] for i in range(len(self.sequences))]
        evaluation = Evaluation(
            label, [finite_or_none(metrics) for metrics, _, _ in rows], [pairs for _, _, pairs in rows]
        )
        baselines = [
            Evaluation(name, [finite_or_none(of_baselines.get(name, {})) for _, of_baselines, _ in rows])
            for name in BASELINES
        ]
        return evaluation, baselines, sum((b for _, b in by_rank), Counter())

    @property
    def metric(self) -> list[bool]:
        """Of each sequence, whether its lengths are known to be meters."""
        sets = self.split.shard_sets
        return [is_metric(sets[one.step.scenes[0].source], one.name) for one in self.sequences]

    def gallery(self, model: VGGT, evaluation: Evaluation) -> list[tuple[str, SceneResult]]:
        """The best, the median and the worst scenes, predicted again: why each is there, and what to draw."""
        picked = pick(evaluation)
        sequences = [self.sequences[number] for _, number in picked]
        predicted = self._predict(model, sequences)
        return [
            (reason, scene_result(sequence.label, predictions, batch))
            for (reason, _), sequence, (_, batch, predictions) in zip(picked, sequences, predicted, strict=True)
        ]

    def _predict(
        self, model: VGGT, sequences: list[EvalSequence]
    ) -> Iterator[tuple[dict[str, Any], Batch, dict[str, Any]]]:
        steps = [sequence.step for sequence in sequences]
        return predict(model, self.split, steps, self.precision, self.world, self.workers)

    def _show_progress(self, done: int) -> None:
        """How far the main rank is; without a terminal a line now and then."""
        if not self.world.is_main:
            return
        total = min(done * self.world.size, len(self.sequences))
        words = f"{total} of {len(self.sequences)} sequences"
        if sys.stderr.isatty():
            print(f"\r{words}", end="\n" if total == len(self.sequences) else "", file=sys.stderr, flush=True)
        elif done % TELL_EVERY == 0:
            print(words, file=sys.stderr, flush=True)


def pick(evaluation: Evaluation) -> list[tuple[str, int]]:
    """The scenes to show: (kind, number). Ranked by pose errors, or by depth error without a camera head."""
    keys = ("rotation_deg", "translation_deg")
    if not any(is_finite(metrics.get(keys[0])) for metrics in evaluation.by_scene):
        keys = ("depth_abs_rel",)
    errors = {
        number: sum(float(metrics[key] or 0) for key in keys)
        for number, metrics in enumerate(evaluation.by_scene)
        if all(is_finite(metrics.get(key)) for key in keys)
    }
    order = sorted(errors, key=lambda number: errors[number])
    most = min(IN_GALLERY, -(-len(order) // 3))
    middle = (len(order) - most) // 2
    kinds = {"best": order[:most], "worst": order[most:][::-1][:most], "median": order[middle : middle + most]}
    picked: dict[int, str] = {}
    for kind, numbers in kinds.items():
        for number in numbers:
            picked.setdefault(number, kind)
    return [(kind, number) for shown in ("best", "median", "worst") for number, kind in picked.items() if kind == shown]
