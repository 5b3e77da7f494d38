"""Numbers in words: counts, damage, metrics, comparisons, and what follows from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from train.evaluation.bootstrap import MIN_SCENES, STUDENT
from train.evaluation.comparison import Comparison
from train.evaluation.metrics import HEADLINE, METRICS, Metric
from train.evaluation.results import PUBLISHED_CATEGORIES
from train.objective.losses import OBJECTIVE

# Of all the metrics of a validation, those that its line shows.
HEADLINE_METRICS = (OBJECTIVE, *HEADLINE)
OBJECTIVE_METRIC = Metric("objective", "what training minimizes", ())


def count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def describe_damage(by_rank: list[Counter[str]]) -> str:
    """The files that hold damaged frames, those with the most first."""
    files = sum(by_rank, Counter[str]()).most_common()
    more = f" and {len(files) - 5} more files" if len(files) > 5 else ""
    return ", ".join(f"{file} ({count})" for file, count in files[:5]) + more


# A run


def metric_of(name: str) -> Metric:
    return METRICS.get(name, OBJECTIVE_METRIC)


def describe_metrics(means: dict[str, float]) -> str:
    """The metrics of a validation in a line."""
    shown = ((metric_of(name), means[name]) for name in HEADLINE_METRICS if name in means)
    return ", ".join(f"{metric.label} {metric.form.format(mean)}" for metric, mean in shown)


def describe_harm(harm: list[str], found: Mapping[str, Comparison], broken: list[str]) -> str:
    """Metrics that got worse, before and after. broken: those that are not finite any more."""
    shown = []
    for metric, name in ((metric_of(name), name) for name in harm):
        if name in broken:
            shown.append(f"{metric.label} is not finite any more")
        else:
            before, after = (metric.form.format(value) for value in (found[name].before, found[name].after))
            shown.append(f"{metric.label} {before} -> {after}")
    return ", ".join(shown)


def describe_change(name: str, before: float, after: float, change: Mapping[str, Any]) -> str:
    """A metric before and after, and whether it changed beyond the noise. change: an Estimate as a dict."""
    metric = metric_of(name)
    values = f"{metric.label}: {metric.form.format(before)} -> {metric.form.format(after)}"
    if change["low"] is None:
        return f"{values}, too few scenes ({change['scenes']}) to tell from noise"
    interval = f"95% interval of the change {metric.form.format(change['low'])} to {metric.form.format(change['high'])}"
    if change["low"] <= 0 <= change["high"]:
        return f"{values}, no change beyond the noise ({interval})"
    better = (change["low"] > 0) == metric.higher_is_better
    return f"{values}, {'better' if better else 'WORSE'} beyond the noise ({interval})"


def run_verdict(gains: list[int | None], *, seen: bool) -> str:
    """What the gains of a run's metrics (1, 0 or -1 each; None: too few scenes to tell) mean, and what to do."""
    if all(gain is None for gain in gains):
        return f"Whether it got better cannot be told: validate on at least {MIN_SCENES} scenes."
    better, worse = gains.count(1), gains.count(-1)
    if not better and not worse:
        return "Nothing changed beyond the noise: train for longer, or validate on more scenes or captures."
    if not worse:
        places = "places that were trained on, or may have been" if seen else "scenes that were never trained on"
        return f"It got better, on {places}."
    if not better:
        return "It got worse: try fewer steps, a lower optim.lr, or more sequences."
    return f"{better} of these metrics got better, {worse} got worse: compare the curves, and see checkpoint.best."


# An evaluation: what make_results returns


def headline(results: dict[str, Any]) -> str:
    """What was evaluated on what, in a line."""
    protocol, counts = results["protocol"], results["sequences"]
    drawn = "random frames" if protocol["views_from"] == "uniform" else "frames that see some of the same"
    return (
        f"{count(sum(counts.values()), 'sequence')} of {count(len(counts), 'category', 'categories')} "
        f"({protocol['split']} split), "
        f"{protocol['views']} {drawn} of each, {protocol['width']} pixels wide, seed {protocol['seed']}"
    )


def remarks(results: dict[str, Any]) -> list[str]:
    """What a reader must know beside the metrics."""
    total = sum(results["sequences"].values())
    lines = []
    if results["protocol"]["deviations"]:
        what = "; ".join(results["protocol"]["deviations"])
        lines.append(f"Not the published protocol ({what}): do not compare with published metrics.")
    elif len(results["sequences"]) != PUBLISHED_CATEGORIES:
        lines.append(
            f"The published metrics are over {PUBLISHED_CATEGORIES} categories of Co3D, these over "
            f"{len(results['sequences'])}: they are not quite comparable."
        )
    if results["trained_on"]:
        lines.append(
            f"{total} sequence{'' if total == 1 else 's'} evaluated, {results['trained_on']}. "
            "This does not tell how well the model does in new places."
        )
    for label, width in results["trained_at_other_width"].items():
        lines.append(f"{label}: was trained at {width} pixels, and is evaluated at {results['protocol']['width']}.")
    if results["unusable"]:
        number = count(len(results["unusable"]), "sequence has", "sequences have")
        lines.append(f"{number} no usable frame: {_few(results['unusable'])}.")
    if results["without_depth"]:
        noun = "scene without true depth counts", "scenes without true depth count"
        number = count(len(results["without_depth"]), *noun)
        lines.append(f"{number} for cameras only: {_few(results['without_depth'])}.")
    for label, row in results["checkpoints"].items():
        if row["not_finite"]:
            lines.append(
                f"{label}: predictions that are NaN or infinite in {len(row['not_finite'])} scenes do not count in the "
                f"metrics that they affect: {_few(row['not_finite'])}."
            )
        missing = {head for metric in METRICS.values() for head in metric.heads} - {"point"} - set(row["heads"])
        if missing:
            lines.append(f"{label}: has no {' and no '.join(sorted(missing))} head, so none of its metrics.")
    if results["damaged"]:
        lines.append(f"Damaged frames were replaced by others: {results['damaged']}.")
    if total < MIN_SCENES or total < len(results["sequences"]) + min(STUDENT):
        lines.append("Too few sequences for intervals: little can be concluded.")
    for source, part in results["by_shards"].items():
        lines.append(f"{source} alone ({count(part['sequences'], 'sequence')}): {_in_set(part, results)}")
    lines += [f"{label}: {_size_words(sizes)}" for label, sizes in results["sizes"].items() if sizes]
    return lines


def _size_words(sizes: dict[str, float]) -> str:
    return (
        f"takes things for {sizes['median']:.3g} times as large as they are (median of {sizes['scenes']:.0f} scenes in "
        f"meters), two thirds of the scenes within a factor of {sizes['spread']:.2f} of that"
    )


def _in_set(part: dict[str, Any], results: dict[str, Any]) -> str:
    """The checkpoints' metrics on one shard set of several."""
    rows = ((label, {name: e["mean"] for name, e in part[label].items()}) for label in results["checkpoints"])
    return "; ".join(f"{label} {describe_metrics(means)}" for label, means in rows)


def in_short(results: dict[str, Any], label: str) -> str:
    """A checkpoint's cameras and depth against the best baseline and the first checkpoint, in a sentence or two."""
    sentences = []
    words = {
        1: "better than",
        0: "indistinguishable from",
        -1: "worse than",
        None: "not comparable, on so few scenes, with",
    }
    for key, other in (("against_baseline", "the baseline"), ("comparisons", next(iter(results["checkpoints"])))):
        by_metric = {c["metric"]: c for c in results[key] if c["after"] == label}
        parts = []
        for what, name in (("cameras are", "auc_30"), ("depth is", "depth_abs_rel")):
            if name in by_metric:
                gain = None if by_metric[name]["change"]["low"] is None else by_metric[name]["gain"]
                before, after = (METRICS[name].form.format(mean) for mean in by_metric[name]["means"])
                parts.append(f"{what} {words[gain]} {other} ({METRICS[name].label} {after} against {before})")
        if parts:
            sentences.append(f"Its {', its '.join(parts)}.")
    return " ".join(sentences)


def comparison_line(comparison: dict[str, Any]) -> str:
    """One of the results' comparisons."""
    before, after = comparison["means"]
    return describe_change(comparison["metric"], before, after, comparison["change"])


def verdicts(results: dict[str, Any]) -> list[str]:
    """Each checkpoint against the baselines and against the first checkpoint."""
    lines = []
    for label in results["checkpoints"]:
        lines.append(f"\n{label}: {in_short(results, label)}")
        lines.append("Against the best baseline:")
        lines += [f"  {comparison_line(c)}" for c in results["against_baseline"] if c["after"] == label]
        compared = [c for c in results["comparisons"] if c["after"] == label]
        if compared:
            lines.append(f"Against {compared[0]['before']}:")
            lines += [f"  {comparison_line(c)}" for c in compared]
        for source, part in results["by_shards"].items():  # gained on one, forgotten on another?
            alone = [c for c in part["comparisons"] if c["after"] == label]
            if alone:
                lines.append(f"Against {alone[0]['before']}, on {source} alone:")
                lines += [f"  {comparison_line(c)}" for c in alone]
    return lines


def _few(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
