"""report.html: an evaluation to look at, in one file that needs no network."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from shards import drawing
from train.evaluation.metrics import METRICS
from train.evaluation.scene_result import SceneResult
from train.report.charts import run_charts, spread_charts
from train.report.pictures import scene_block
from train.report.viewer import scene_figure
from train.report.words import COLUMNS, cell, comparison_line, headline, in_short, remarks, shown_columns

TEMPLATE = Path(__file__).with_name("page.html")


def make_page(
    results: dict[str, Any],
    gallery: list[tuple[str, SceneResult]],
    shown: str,
    logged: list[dict[str, Any]],
) -> str:
    """The whole page. gallery: why a scene is there, and the scene; shown: the checkpoint whose scenes these are;
    logged: the lines of its run's metrics.jsonl.
    """
    parts = {
        "title": html.escape(f"Evaluation of {', '.join(results['checkpoints'])}"),
        "plotly": get_plotlyjs(),
        "headline": html.escape(headline(results)),
        "summary": summary(results),
        "remarks": "".join(f'<p class="remark">{html.escape(line)}</p>' for line in remarks(results)),
        "table": metric_table(results),
        "charts": "".join(map(_plot, [*spread_charts(results), *run_charts(logged)])),
        "shown": html.escape(shown),
        "scenes": "".join(scene_section(reason, scene) for reason, scene in gallery),
        "glossary": "".join(
            f"<dt>{html.escape(METRICS[n].label)}</dt><dd>{html.escape(METRICS[n].meaning)}</dd>"
            for n in shown_columns(results)
        ),
        "categories": category_table(results, shown),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->", text)
    return page


def summary(results: dict[str, Any]) -> str:
    """What the metrics mean, a box for each checkpoint: against the baselines, and against the first checkpoint."""
    boxes = []
    for label in results["checkpoints"]:
        lines = ""
        for key in ("against_baseline", "comparisons"):
            compared = [c for c in results[key] if c["after"] == label]
            if compared:
                other = "the best baseline" if key == "against_baseline" else compared[0]["before"]
                lines += f"<h3>against {html.escape(other)}</h3><ul>{''.join(map(_verdict, compared))}</ul>"
        short = html.escape(in_short(results, label))
        boxes.append(f"<div class='box'><h2>{html.escape(label)}</h2><p><b>{short}</b></p>{lines}</div>")
    return "".join(boxes)


def _verdict(comparison: dict[str, Any]) -> str:
    kind = {1: "good", -1: "bad", 0: "unsure"}[comparison["gain"]]
    return f'<li class="{kind}">{html.escape(comparison_line(comparison))}</li>'


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


def scene_section(reason: str, scene: SceneResult) -> str:
    name, picture = html.escape(scene.name), base64.b64encode(drawing.jpeg(scene_block(scene))).decode()
    image = f'<img alt="views and depths of {name}" src="data:image/jpeg;base64,{picture}">'
    return f"<section><h3>{html.escape(reason)}: {name}</h3>{_plot(scene_figure(scene))}{image}</section>"


def _plot(figure: go.Figure) -> str:
    """A place for a figure, which the page draws when it comes into view."""
    data = (figure.to_json() or "").replace("</", "<\\/")
    style = f"height: {figure.layout['height']}px"
    return f'<div class="plot" style="{style}"><script type="application/json">{data}</script></div>'
