"""The metrics of an evaluation as tables, for the terminal and for report.html."""

from __future__ import annotations

import html
from typing import Any

from rich.table import Table

from train.evaluation.metrics import METRICS

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


def table(results: dict[str, Any]) -> Table:
    """A row a metric; checkpoints, the best baseline and the published values as columns."""
    checkpoints = results["checkpoints"]
    rows = Table("")
    for label in (*checkpoints, "best baseline", *results["reference"]):
        rows.add_column(label, overflow="fold")
    for name in shown_columns(results):
        columns = [_means(row) for row in checkpoints.values()]
        baselines = [_means(row) for row in results["baselines"].values() if name in row["metrics"]]
        best = max if METRICS[name].higher_is_better else min
        columns.append(best(baselines, key=lambda means: means[name]) if baselines else {})
        columns += results["reference"].values()
        rows.add_row(COLUMNS[name], *(cell(name, means) for means in columns))
    return rows


def overlap_table(results: dict[str, Any]) -> Table:
    """The cameras of each checkpoint by how much two views see of each other: a row a bin."""
    rows = Table("overlap of two views", "pairs")
    for label in results["by_overlap"]:
        rows.add_column(f"{label}: {COLUMNS['auc_30']}, {COLUMNS['rotation_deg']}", overflow="fold")
    found = {label: {tuple(b["overlap"]): b for b in bins} for label, bins in results["by_overlap"].items()}
    counts = {ends: b["pairs"] for bins in found.values() for ends, b in bins.items()}
    for (low, high), pairs in sorted(counts.items()):
        cells = []
        for bins in found.values():
            means = _means(bins[low, high]) if (low, high) in bins else {}
            cells.append(", ".join(cell(name, means) for name in ("auc_30", "rotation_deg") if name in means))
        rows.add_row(f"{low:.0%} to {high:.0%}", f"{pairs:,}", *cells)
    return rows


def shown_columns(results: dict[str, Any]) -> list[str]:
    """Those of COLUMNS that a checkpoint has."""
    return [name for name in COLUMNS if any(name in row["metrics"] for row in results["checkpoints"].values())]


def cell(name: str, values: dict[str, float]) -> str:
    """A metric in short, empty where there is none."""
    return METRICS[name].form.replace(" degrees", "°").format(values[name]) if name in values else ""


def _means(row: dict[str, Any]) -> dict[str, float]:
    return {name: e["mean"] for name, e in row["metrics"].items()}


def metric_table(results: dict[str, Any]) -> str:
    """Checkpoints, baselines and published values, with their intervals in small print: a row a metric."""
    columns = [
        (kind, label, row["metrics"]) for kind in ("checkpoints", "baselines") for label, row in results[kind].items()
    ]
    rows = [
        _row("", [html.escape(label) for _, label, _ in columns] + [*map(html.escape, results["reference"])], "titles")
    ]
    for name in shown_columns(results):
        cells = [_with_interval(name, estimates.get(name)) for _, _, estimates in columns]
        cells += [cell(name, values) for values in results["reference"].values()]
        rows.append(_row(COLUMNS[name], cells))
    return f"<table>{''.join(rows)}</table>"


def category_table(results: dict[str, Any], shown: str) -> str:
    """The shown checkpoint's metrics in each category."""
    columns = shown_columns(results)
    rows = [_row("", ["sequences", *(html.escape(COLUMNS[name]) for name in columns)], "titles")]
    for category, count in results["sequences"].items():
        means = results["checkpoints"][shown]["categories"].get(category, {})
        rows.append(_row(category, [str(count), *(cell(name, means) for name in columns)]))
    return f"<table>{''.join(rows)}</table>"


def _row(label: str, values: list[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><th>{html.escape(label)}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'


def _with_interval(name: str, estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    low, high = (cell(name, {name: estimate[end]} if estimate[end] is not None else {}) for end in ("low", "high"))
    return cell(name, {name: estimate["mean"]}) + (f"<small>{low} to {high}</small>" if low else "")
