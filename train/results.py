"""What an evaluation found, as plain values: what goes into results.json, the terminal's table and report.html."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.table import Table

from train.bootstrap import MIN_SCENES, estimate, group_mean, paired
from train.metrics import FIGURES
from train.protocol import Chosen, Protocol
from train.report import finite_or_none
from train.summary import describe_change

# VGGT-1B, feed-forward, on Co3D: arXiv:2503.11651, and the fast variant of its published evaluation.
REFERENCES: dict[bool, dict[str, float]] = {  # by Protocol.fast
    False: {"auc_30": 0.882},
    True: {"auc_30": 0.8998, "auc_15": 0.8389, "auc_5": 0.6745, "auc_3": 0.5665},
}
REFERENCE = "published VGGT-1B"
PUBLISHED_CATEGORIES = 41
COLUMNS = {
    "auc_30": "AUC@30",
    "auc_15": "AUC@15",
    "auc_5": "AUC@5",
    "auc_3": "AUC@3",
    "rotation_deg": "rotation",
    "translation_deg": "direction",
    "fov_deg": "field of view",
    "depth_abs_rel": "depth error",
    "depth_delta_1": "depth < 1.25",
    "points_chamfer": "chamfer",
    "point_map_chamfer": "chamfer (point head)",
}
JUDGED = (
    "auc_30",
    "rotation_deg",
    "translation_deg",
    "depth_abs_rel",
    "points_chamfer",
    "point_map_chamfer",
)  # in words


@dataclass(frozen=True)
class Evaluation:
    """What came of a checkpoint, or of guessing: the figures of each scene, in order; None: not finite."""

    label: str
    by_scene: list[dict[str, float | None]]


def make_results(
    chosen: Sequence[Chosen],
    protocol: Protocol,
    checkpoints: list[Evaluation],
    guesses: list[Evaluation],
    unusable: list[str],
) -> dict[str, Any]:
    """Everything that is told of an evaluation. The first checkpoint is what the others are compared with.

    unusable: scenes of which no frame could be read.
    """
    categories = [scene.category for scene in chosen]
    comparisons = [comparison(checkpoints[0], other, name, categories) for other in checkpoints[1:] for name in JUDGED]
    rivals = {name: best_guess(guesses, name, categories) for name in JUDGED}
    against = [
        comparison(guess, checkpoint, name, categories)
        for checkpoint in checkpoints
        for name, guess in rivals.items()
        if guess is not None
    ]
    return {
        "protocol": asdict(protocol) | {"deviations": protocol.deviations},
        "sequences": {name: categories.count(name) for name in sorted(set(categories))},
        "without_depth": [
            f"{scene.category}/{scene.name}"
            for scene, figures in zip(chosen, guesses[-1].by_scene, strict=True)
            if not figures and f"{scene.category}/{scene.name}" not in unusable
        ],
        "unusable": unusable,
        "checkpoints": {e.label: describe(e, chosen) for e in checkpoints},
        "guesses": {e.label: describe(e, chosen) for e in guesses},
        "reference": {} if protocol.deviations else {REFERENCE: REFERENCES[protocol.fast]},
        "comparisons": [c for c in comparisons if c],
        "against_guessing": [c for c in against if c],
        "scenes": [
            {
                "scene": f"{scene.category}/{scene.name}",
                "frames": list(scene.step.scenes[0].frames),
                "figures": {e.label: e.by_scene[i] for e in (*checkpoints, *guesses)},
            }
            for i, scene in enumerate(chosen)
        ],
    }


def describe(evaluation: Evaluation, chosen: Sequence[Chosen]) -> dict[str, Any]:
    """The mean over categories of each figure with its interval, each category's mean, and what is not finite."""
    found: dict[str, Any] = {"figures": {}, "categories": {}, "not_finite": []}
    for scene, figures in zip(chosen, evaluation.by_scene, strict=True):
        if None in figures.values():
            found["not_finite"].append(f"{scene.category}/{scene.name}")
    for name in FIGURES:
        known = [
            (value, scene.category)
            for scene, figures in zip(chosen, evaluation.by_scene, strict=True)
            if (value := figures.get(name)) is not None
        ]
        if not known:
            continue
        values, categories = zip(*known, strict=True)
        found["figures"][name] = asdict(estimate(values, categories))
        for category in sorted(set(categories)):
            mean = float(np.mean([value for value, c in known if c == category]))
            found["categories"].setdefault(category, {})[name] = mean
    return found


def best_guess(guesses: list[Evaluation], name: str, categories: list[str]) -> Evaluation | None:
    """The one with the best mean of a figure; None if none has it."""
    sign = -1 if FIGURES[name].higher_is_better else 1
    having = []
    for guess in guesses:
        values = [(figures[name], c) for figures, c in zip(guess.by_scene, categories, strict=True) if name in figures]
        if values:
            having.append((sign * group_mean(*zip(*values, strict=True)), guess))
    return min(having, key=lambda pair: pair[0])[1] if having else None


def comparison(before: Evaluation, after: Evaluation, name: str, categories: list[str]) -> dict[str, Any] | None:
    """A figure of two evaluations over the scenes that have it in both, and its change with an interval."""
    change = paired(before.by_scene, after.by_scene, name, categories)
    if change is None:
        return None
    means, figure = change[:2], FIGURES[name]
    values = " -> ".join(figure.form.format(mean) for mean in means)
    return {
        "figure": name,
        "before": before.label,
        "after": after.label,
        "means": list(means),
        "change": asdict(change[2]),
        "gain": change[2].sign if figure.higher_is_better else -change[2].sign,
        "words": f"{figure.label}: {values}, {describe_change(change[2], figure)}",
    }


def headline(results: dict[str, Any]) -> str:
    """What was evaluated on what, in a line."""
    protocol, counts = results["protocol"], results["sequences"]
    return (
        f"{sum(counts.values()):,} sequences of {len(counts)} categories ({protocol['split']} split), "
        f"{protocol['views']} random frames of each, {protocol['width']} pixels wide, seed {protocol['seed']}"
    )


def remarks(results: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    found = []
    if results["protocol"]["deviations"]:
        what = "; ".join(results["protocol"]["deviations"])
        found.append(f"Not the published protocol ({what}): do not compare with published figures.")
    elif len(results["sequences"]) != PUBLISHED_CATEGORIES:
        found.append(
            f"The published figures are over {PUBLISHED_CATEGORIES} categories of Co3D, these over "
            f"{len(results['sequences'])}: they are not quite comparable."
        )
    if results["trained_on"]:
        found.append(
            f"{sum(results['sequences'].values())} sequences evaluated, {results['trained_on']}: this does not tell "
            "how new places would fare."
        )
    if results.get("unusable"):
        names = _few(results["unusable"])
        found.append(f"{len(results['unusable'])} sequences without usable frames are left out: {names}.")
    if results["without_depth"]:
        count, names = len(results["without_depth"]), _few(results["without_depth"])
        found.append(f"{count} scenes without true depth count for cameras only: {names}.")
    for label, row in results["checkpoints"].items():
        if row["not_finite"]:
            names = _few(row["not_finite"])
            found.append(
                f"{label}: predictions that are NaN or infinite in {len(row['not_finite'])} scenes, left out of the "
                f"figures they spoil: {names}."
            )
        lacking = {h for f in FIGURES.values() for h in f.heads} - {"point"} - set(row["heads"])
        if lacking:
            found.append(f"{label}: has no {' and no '.join(sorted(lacking))} head, so none of its figures.")
    if results.get("damaged"):
        found.append(f"Damaged frames were replaced by others: {results['damaged']}.")
    if sum(results["sequences"].values()) < MIN_SCENES:
        found.append(f"Fewer than {MIN_SCENES} sequences: no interval can be given, and little can be concluded.")
    return found


def in_short(results: dict[str, Any], label: str) -> str:
    """A checkpoint's cameras and depth against guessing, and against the first checkpoint, in a sentence or two."""
    sentences = []
    words = {1: "better than", 0: "not told apart from", -1: "worse than", None: "not to be judged against"}
    for key, other in (("against_guessing", "guessing"), ("comparisons", next(iter(results["checkpoints"])))):
        found = {c["figure"]: c for c in results[key] if c["after"] == label}
        parts = []
        for what, name in (("cameras are", "auc_30"), ("depth is", "depth_abs_rel")):
            if name in found:
                gain = None if found[name]["change"]["low"] is None else found[name]["gain"]
                before, after = (FIGURES[name].form.format(mean) for mean in found[name]["means"])
                parts.append(f"{what} {words[gain]} {other} ({FIGURES[name].label} {after} against {before})")
        if parts:
            sentences.append(f"Its {', its '.join(parts)}.")
    return " ".join(sentences)


def verdicts(results: dict[str, Any]) -> list[str]:
    """Each checkpoint against guessing and against the first, in words."""
    found = []
    for label in results["checkpoints"]:
        found.append(f"\n{label}: {in_short(results, label)}")
        found.append("Against the best guess:")
        found += [f"  {c['words']}" for c in results["against_guessing"] if c["after"] == label]
        compared = [c for c in results["comparisons"] if c["after"] == label]
        if compared:
            found.append(f"Against {compared[0]['before']}:")
            found += [f"  {c['words']}" for c in compared]
    return found


def table(results: dict[str, Any]) -> Table:
    """A row a figure; checkpoints, the best guess and the published figures as columns."""
    checkpoints = results["checkpoints"]
    shown = Table("")
    for label in (*checkpoints, "best guess", *results["reference"]):
        shown.add_column(label, overflow="fold")
    for name in shown_columns(results):
        columns = [_means(row) for row in checkpoints.values()]
        guesses = [_means(row) for row in results["guesses"].values() if name in row["figures"]]
        best = max if FIGURES[name].higher_is_better else min
        columns.append(best(guesses, key=lambda means: means[name]) if guesses else {})
        columns += results["reference"].values()
        shown.add_row(COLUMNS[name], *(cell(name, means) for means in columns))
    return shown


def shown_columns(results: dict[str, Any]) -> list[str]:
    """Those of COLUMNS that a checkpoint has."""
    return [name for name in COLUMNS if any(name in row["figures"] for row in results["checkpoints"].values())]


def _means(row: dict[str, Any]) -> dict[str, float]:
    return {name: e["mean"] for name, e in row["figures"].items()}


def cell(name: str, values: dict[str, float]) -> str:
    """A figure in short, empty where there is none."""
    return FIGURES[name].form.replace(" degrees", "°").format(values[name]) if name in values else ""


def as_json_rows(by_scene: Sequence[dict[str, float]]) -> list[dict[str, float | None]]:
    return [finite_or_none(figures) for figures in by_scene]


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
