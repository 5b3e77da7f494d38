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
from train.report.charts import overlap_charts, run_charts, spread_charts
from train.report.pictures import scene_block
from train.report.tables import category_table, metric_table, shown_columns
from train.report.viewer import scene_figure
from train.report.words import comparison_line, headline, in_short, remarks

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
        "charts": "".join(map(_plot, [*overlap_charts(results), *spread_charts(results), *run_charts(logged)])),
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


def scene_section(reason: str, scene: SceneResult) -> str:
    name, picture = html.escape(scene.name), base64.b64encode(drawing.jpeg(scene_block(scene))).decode()
    image = f'<img alt="views and depths of {name}" src="data:image/jpeg;base64,{picture}">'
    return f"<section><h3>{html.escape(reason)}: {name}</h3>{_plot(scene_figure(scene))}{image}</section>"


def _plot(figure: go.Figure) -> str:
    """A place for a figure, which the page draws when it comes into view."""
    data = (figure.to_json() or "").replace("</", "<\\/")
    style = f"height: {figure.layout['height']}px"
    return f'<div class="plot" style="{style}"><script type="application/json">{data}</script></div>'
