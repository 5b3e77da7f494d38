"""Line charts of an evaluation: how errors are spread over the scenes, how the run went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from train.evaluation.bootstrap import is_finite
from train.evaluation.metrics import METRICS
from train.evaluation.overlaps import BINNED
from train.report.words import metric_of

CURVES = ("loss_objective", "auc_30", "rotation_deg", "depth_abs_rel")
FEW = 10  # points of a line, which are marked
SPREAD = ("rotation_deg", "translation_deg", "depth_abs_rel")
Line = tuple[str, Sequence[float], Sequence[float], bool]  # label, x, y, whether it is dashed


def spread_charts(results: dict[str, Any]) -> list[go.Figure]:
    """The fraction of scenes below each error: a line a checkpoint, a dashed one a baseline."""
    charts = []
    for name in SPREAD:
        lines = []
        for kind in ("checkpoints", "baselines"):
            for label in results[kind]:
                values = [s["metrics"][label].get(name) for s in results["scenes"]]
                lines.append((label, *cumulative([v for v in values if is_finite(v)]), kind == "baselines"))
        unit = "degrees" if name.endswith("deg") else "fraction of the true depth"
        charts.append(line_chart(f"{METRICS[name].label}: fraction of scenes below", unit, lines))
    return [chart for chart in charts if chart is not None]


def overlap_charts(results: dict[str, Any]) -> list[go.Figure]:
    """Errors of cameras by how much two views see of each other: a line a checkpoint."""
    charts = []
    for name in BINNED:
        lines = []
        for label, bins in results["by_overlap"].items():
            middles = [sum(b["overlap"]) / 2 for b in bins]
            lines.append((label, middles, [b["metrics"][name]["mean"] for b in bins], False))
        title = f"{METRICS[name].label} by the overlap of two views"
        charts.append(line_chart(title, "part of a view that the other one sees", lines))
    return [chart for chart in charts if chart is not None]


def run_charts(logged: list[dict[str, Any]]) -> list[go.Figure]:
    """How the metrics of a run went; logged: the lines of its metrics.jsonl."""
    charts = []
    for name in CURVES:
        lines = []
        for split in sorted({line["split"] for line in logged}):
            known = [line for line in logged if line["split"] == split and is_finite(line.get(name))]
            if len(known) > 1:
                lines.append((split, [line["step"] for line in known], [line[name] for line in known], False))
        charts.append(line_chart(f"During training: {metric_of(name).label}", "step", lines))
    return [chart for chart in charts if chart is not None]


def line_chart(title: str, x_label: str, lines: Sequence[Line]) -> go.Figure | None:
    """All lines in one pair of axes, the vertical one from zero; None if none of them has a point."""
    traces = [
        go.Scatter(
            x=list(x),
            y=list(y),
            name=label,
            mode="lines+markers" if len(x) < FEW else "lines",
            line={"dash": "dash" if dashed else "solid"},
        )
        for label, x, y, dashed in lines
        if len(x)
    ]
    if not traces:
        return None
    figure = go.Figure(traces)
    figure.update_layout(
        title={"text": title, "font": {"size": 14}},
        template="plotly_white",
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "yanchor": "top", "y": -0.25},
        margin={"l": 50, "r": 10, "t": 40, "b": 40},
        height=340,
    )
    figure.update_xaxes(title=x_label)
    figure.update_yaxes(rangemode="tozero")
    return figure


def cumulative(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """The fraction of values that are at most x, as steps: x and y."""
    x = np.sort(np.asarray(values, np.float64))
    fraction = np.arange(len(x) + 1) / max(len(x), 1)
    return np.repeat(x, 2).tolist(), np.repeat(fraction, 2)[1:-1].tolist()
