"""What an evaluation found, as plain values: the content of results.json, which words and pages are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from train.evaluation.bootstrap import estimate, group_mean
from train.evaluation.comparison import compare
from train.evaluation.metrics import HEADLINE, METRICS
from train.evaluation.overlaps import PairErrors, metrics_by_overlap
from train.evaluation.protocol import EvalSequence, Protocol
from train.evaluation.sizes import summarize_sizes

# VGGT-1B, feed-forward, on Co3D: arXiv:2503.11651, and the fast variant of its published evaluation.
REFERENCES: dict[bool, dict[str, float]] = {  # by Protocol.fast
    False: {"auc_30": 0.882},
    True: {"auc_30": 0.8998, "auc_15": 0.8389, "auc_5": 0.6745, "auc_3": 0.5665},
}
REFERENCE = "published VGGT-1B"
PUBLISHED_CATEGORIES = 41
COMPARED = (*HEADLINE, "point_map_chamfer")


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a checkpoint or a baseline in each scene, in order; None: not finite.

    by_pair: of a checkpoint, also the errors of each pair of views in each scene.
    """

    label: str
    by_scene: list[dict[str, float | None]]
    by_pair: list[PairErrors] = field(default_factory=list)


def make_results(
    sequences: Sequence[EvalSequence],
    protocol: Protocol,
    checkpoints: list[Evaluation],
    baselines: list[Evaluation],
    metric: Sequence[bool],
) -> dict[str, Any]:
    """The results as JSON's types. The first checkpoint is what the others are compared with.

    metric: of each sequence, whether its lengths are known to be meters.
    """
    categories = [sequence.category for sequence in sequences]
    best = {metric: best_baseline(baselines, metric, categories) for metric in COMPARED}
    pairs = [(best[metric], e, metric) for e in checkpoints for metric in COMPARED]
    everyone = (*checkpoints, *baselines)
    # Those of poses are defined wherever a frame could be read, the last one where there is depth.
    baseline_rows = list(zip(sequences, baselines[0].by_scene, baselines[-1].by_scene, strict=True))
    return {
        "protocol": asdict(protocol) | {"deviations": protocol.deviations},
        "sequences": {name: categories.count(name) for name in sorted(set(categories))},
        "without_depth": [s.label for s, row, depth in baseline_rows if row and not depth],
        "unusable": [s.label for s, row, _ in baseline_rows if not row],
        "checkpoints": {e.label: summarize(e, sequences) for e in checkpoints},
        "baselines": {e.label: summarize(e, sequences) for e in baselines},
        "reference": {} if protocol.deviations else {REFERENCE: REFERENCES[protocol.fast]},
        "comparisons": _comparisons([(checkpoints[0], e, m) for e in checkpoints[1:] for m in COMPARED], categories),
        "against_baseline": _comparisons([(b, e, m) for b, e, m in pairs if b is not None], categories),
        "by_overlap": {e.label: metrics_by_overlap(e.by_pair, categories) for e in checkpoints},
        "by_shards": _by_shards(sequences, checkpoints, baselines),
        "sizes": {
            e.label: summarize_sizes([row for row, known in zip(e.by_scene, metric, strict=True) if known])
            for e in checkpoints
        },
        "scenes": [
            {
                "shards": sequence.shards,
                "scene": sequence.label,
                "frames": list(sequence.step.scenes[0].frames),
                "metrics": {e.label: e.by_scene[i] for e in everyone},
            }
            for i, sequence in enumerate(sequences)
        ],
    }


def summarize(evaluation: Evaluation, sequences: Sequence[EvalSequence]) -> dict[str, Any]:
    """The mean over categories of each metric with its interval, each category's mean, and what is not finite."""
    summary: dict[str, Any] = {"metrics": {}, "categories": {}, "not_finite": []}
    rows = list(zip(sequences, evaluation.by_scene, strict=True))
    summary["not_finite"] = [sequence.label for sequence, metrics in rows if None in metrics.values()]
    for name in METRICS:
        known = [(value, s.category) for s, metrics in rows if (value := metrics.get(name)) is not None]
        if not known:
            continue
        values, categories = zip(*known, strict=True)
        summary["metrics"][name] = asdict(estimate(values, categories))
        for category in sorted(set(categories)):
            mean = float(np.mean([value for value, c in known if c == category]))
            summary["categories"].setdefault(category, {})[name] = mean
    return summary


def best_baseline(baselines: list[Evaluation], metric: str, categories: list[str]) -> Evaluation | None:
    """The baseline with the best mean of a metric; None if none has it."""
    sign = -1 if METRICS[metric].higher_is_better else 1
    candidates = []
    for baseline in baselines:
        values = [(row[metric], c) for row, c in zip(baseline.by_scene, categories, strict=True) if metric in row]
        if values:
            candidates.append((sign * group_mean(*zip(*values, strict=True)), baseline))
    return min(candidates, key=lambda pair: pair[0])[1] if candidates else None


def _comparisons(pairs: list[tuple[Evaluation, Evaluation, str]], categories: list[str]) -> list[dict[str, Any]]:
    rows = []
    for before, after, metric in pairs:
        comparison = compare(before.by_scene, after.by_scene, metric, categories)
        if comparison is not None:
            means, change = [comparison.before, comparison.after], asdict(comparison.change)
            row = {"metric": metric, "before": before.label, "after": after.label, "means": means, "change": change}
            rows.append(row | {"gain": comparison.gain})
    return rows


def _by_shards(
    sequences: Sequence[EvalSequence], checkpoints: list[Evaluation], baselines: list[Evaluation]
) -> dict[str, Any]:
    """Each shard set by itself, if there are several: the metrics of all, the changes from the first checkpoint."""
    sources = list(dict.fromkeys(sequence.shards for sequence in sequences))
    parts: dict[str, Any] = {}
    for source in sources if len(sources) > 1 else ():
        places = [i for i, sequence in enumerate(sequences) if sequence.shards == source]
        part, categories = [sequences[i] for i in places], [sequences[i].category for i in places]
        alone = {e.label: Evaluation(e.label, [e.by_scene[i] for i in places]) for e in (*checkpoints, *baselines)}
        first, *others = (alone[e.label] for e in checkpoints)
        parts[source] = {label: summarize(evaluation, part)["metrics"] for label, evaluation in alone.items()}
        changes = _comparisons([(first, other, metric) for other in others for metric in COMPARED], categories)
        parts[source] |= {"sequences": len(part), "comparisons": changes}
    return parts
