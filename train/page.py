"""report.html: an evaluation to look at, in one file that needs no network; scenes can be turned with the mouse."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import drawing
from train.bootstrap import is_finite
from train.charts import Series, cumulative, line_chart
from train.metrics import FIGURES, apply_similarity, umeyama
from train.pictures import Cameras, SceneResult, scene_block
from train.results import COLUMNS, cell, headline, in_short, remarks, shown_columns
from vggt.geometry import invert_se3, transform_points, unproject
from vggt.scene import EDGES, camera_pyramids

TEMPLATE = Path(__file__).with_name("page.html")
CLOUD_POINTS = 25_000  # of a scene, predicted and true each
CONFIDENT = 0.7  # share of the predicted points that is drawn, the most confident ones
CAMERA_SIZE = 0.12  # of a drawn camera, in units of the scene's mean point distance
CURVES = ("loss_objective", "auc_30", "rotation_deg", "depth_abs_rel")
SPREAD = ("rotation_deg", "translation_deg", "depth_abs_rel")


def make_page(
    results: dict[str, Any],
    gallery: list[tuple[str, SceneResult]],
    shown: str,
    curves: list[dict[str, Any]],
) -> str:
    """The whole page. gallery: why a scene is there, and the scene; shown: the checkpoint whose scenes these are;
    curves: the lines of its run's metrics.jsonl.
    """
    scenes = [scene_section(number, reason, scene) for number, (reason, scene) in enumerate(gallery)]
    clouds = [cloud_data(scene) for _, scene in gallery]
    parts = {
        "title": html.escape(f"Evaluation of {', '.join(results['checkpoints'])}"),
        "headline": html.escape(headline(results)),
        "summary": summary(results),
        "remarks": "".join(f'<p class="remark">{html.escape(line)}</p>' for line in remarks(results)),
        "table": figure_table(results),
        "charts": charts(results, curves),
        "shown": html.escape(shown),
        "scenes": "".join(scenes),
        "clouds": json.dumps(clouds, allow_nan=False),
        "glossary": "".join(
            f"<dt>{html.escape(FIGURES[n].label)}</dt><dd>{html.escape(FIGURES[n].meaning)}</dd>"
            for n in shown_columns(results)
        ),
        "categories": category_table(results, shown),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->", text)
    return page


def summary(results: dict[str, Any]) -> str:
    """What the figures mean, a box for each checkpoint: against guessing, and against the first."""
    boxes = []
    for label in results["checkpoints"]:
        lines = ""
        for title, key in (("against guessing", "against_guessing"), ("against", "comparisons")):
            compared = [c for c in results[key] if c["after"] == label]
            if compared:
                other = "" if key == "against_guessing" else f" {compared[0]['before']}"
                lines += f"<h3>{html.escape(title + other)}</h3><ul>{''.join(map(_verdict, compared))}</ul>"
        short = html.escape(in_short(results, label))
        boxes.append(f"<div class='box'><h2>{html.escape(label)}</h2><p><b>{short}</b></p>{lines}</div>")
    return "".join(boxes)


def _verdict(comparison: dict[str, Any]) -> str:
    kind = {1: "good", -1: "bad", 0: "unsure"}[comparison["gain"]]
    return f'<li class="{kind}">{html.escape(comparison["words"])}</li>'


def figure_table(results: dict[str, Any]) -> str:
    """Checkpoints, guesses and published figures, with their intervals as small print."""
    columns = shown_columns(results)
    rows = [_row("", [html.escape(COLUMNS[name]) for name in columns], "titles")]
    for kind in ("checkpoints", "guesses"):
        for label, row in results[kind].items():
            rows.append(_row(label, [_with_interval(name, row["figures"].get(name)) for name in columns], kind))
    for label, figures in results["reference"].items():
        rows.append(_row(label, [cell(name, figures) for name in columns], "reference"))
    return f"<table>{''.join(rows)}</table>"


def _row(label: str, values: list[str], kind: str = "") -> str:
    return f'<tr class="{kind}"><th>{html.escape(label)}</th>{"".join(f"<td>{value}</td>" for value in values)}</tr>'


def _with_interval(name: str, estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return ""
    low, high = (cell(name, {name: estimate[end]} if estimate[end] is not None else {}) for end in ("low", "high"))
    return cell(name, {name: estimate["mean"]}) + (f"<small>{low} to {high}</small>" if low else "")


def category_table(results: dict[str, Any], shown: str) -> str:
    """The shown checkpoint's figures in each category."""
    columns = shown_columns(results)
    rows = [_row("", ["sequences", *(html.escape(COLUMNS[name]) for name in columns)], "titles")]
    for category, count in results["sequences"].items():
        means = results["checkpoints"][shown]["categories"].get(category, {})
        rows.append(_row(category, [str(count), *(cell(name, means) for name in columns)]))
    return f"<table>{''.join(rows)}</table>"


def charts(results: dict[str, Any], curves: list[dict[str, Any]]) -> str:
    """How errors are spread over the scenes; how the run went."""
    found = []
    for name in SPREAD:
        series = [
            cumulative(label, values, dashed=kind == "guesses")
            for kind in ("checkpoints", "guesses")
            for label in results[kind]
            if (
                values := [
                    s["figures"][label][name] for s in results["scenes"] if is_finite(s["figures"][label].get(name))
                ]
            )
        ]
        unit = "degrees" if name.endswith("deg") else "share of the true depth"
        found.append(line_chart(f"{FIGURES[name].label}: share of scenes below", unit, series))
    for name in CURVES:
        series = []
        for split in sorted({line["split"] for line in curves}):
            known = [line for line in curves if line["split"] == split and is_finite(line.get(name))]
            if len(known) > 1:
                series.append(Series(split, [line["step"] for line in known], [line[name] for line in known]))
        label = FIGURES[name].label if name in FIGURES else "objective"
        found.append(line_chart(f"During training: {label}", "step", series))
    return "".join(found)


def scene_section(number: int, reason: str, scene: SceneResult) -> str:
    picture = base64.b64encode(drawing.jpeg(scene_block(scene))).decode()
    return (
        f'<section><h3>{html.escape(reason)}: {html.escape(scene.name)}</h3><div class="viewer" data-scene="{number}">'
        "<canvas></canvas><div class='layers'></div></div>"
        f'<img alt="views and depths of {html.escape(scene.name)}" src="data:image/jpeg;base64,{picture}"></section>'
    )


def cloud_data(scene: SceneResult) -> dict[str, Any]:
    """What the page's viewer draws of a scene: point clouds and cameras, predicted ones laid over true ones.

    positions: uint16 x, y, z within `low` and `high`; colours: uint8 r, g, b; lines: pairs of ends.
    """
    layers: list[dict[str, Any]] = []
    colours = (scene.images.permute(0, 2, 3, 1) * 255).round().byte()
    truth = _points(scene.truth, scene.true_cameras)
    if scene.mask.any():
        layers.append(_cloud("true points", truth[scene.mask], colours[scene.mask]))
    layers.append(_lines("true cameras", scene.true_cameras, scene, [40, 160, 70]))
    cameras = scene.predicted_cameras
    if cameras is not None and cameras.extrinsics.isfinite().all() and cameras.intrinsics.isfinite().all():
        points = None if scene.predicted is None else _points(scene.predicted, cameras)
        similarity = _alignment(scene, points, truth)
        if not all(part.isfinite().all() for part in similarity):  # all cameras in one place
            return {"layers": layers}
        if points is not None and scene.confidence is not None and (points.sum() + scene.confidence.sum()).isfinite():
            moved = apply_similarity(*similarity, points.reshape(1, -1, 3)).reshape(points.shape)
            sure = (
                scene.confidence
                >= scene.confidence.flatten().kthvalue(max(1, round((1 - CONFIDENT) * scene.confidence.numel())))[0]
            )
            layers.append(_cloud("predicted points", moved[sure], colours[sure]))
        layers.append(_lines("predicted cameras", cameras, scene, [230, 110, 20], similarity))
    return {"layers": layers}


def _points(depth: Tensor, cameras: Cameras) -> Tensor:
    """World points [S, H, W, 3] of depths [S, H, W]."""
    return transform_points(invert_se3(cameras.extrinsics), unproject(depth, cameras.intrinsics))


def _alignment(scene: SceneResult, points: Tensor | None, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity from predicted to true world: by points if there are both, else by the cameras' places."""
    if points is not None and scene.mask.any() and points.isfinite().all():
        return umeyama(points.reshape(1, -1, 3), truth.reshape(1, -1, 3), scene.mask.reshape(1, -1))
    assert scene.predicted_cameras is not None
    predicted, true = (invert_se3(c.extrinsics)[None, :, :, 3] for c in (scene.predicted_cameras, scene.true_cameras))
    return umeyama(predicted, true, torch.ones(1, len(scene.images), dtype=torch.bool))


def _cloud(name: str, points: Tensor, colours: Tensor) -> dict[str, Any]:
    chosen = torch.linspace(0, len(points) - 1, min(len(points), CLOUD_POINTS)).round().long()
    xyz, rgb = points[chosen].double().numpy(), colours[chosen].numpy()
    low, high = np.percentile(xyz, [0.5, 99.5], axis=0)  # a few wild points must not make the rest a dot
    inside = ((xyz >= low) & (xyz <= high)).all(axis=1)
    xyz, rgb = xyz[inside], rgb[inside]
    share = (xyz - low) / np.maximum(high - low, 1e-12)
    return {
        "name": name,
        "low": low.tolist(),
        "high": high.tolist(),
        "positions": base64.b64encode((share * 65535).round().astype("<u2").tobytes()).decode(),
        "colours": base64.b64encode(rgb.tobytes()).decode(),
    }


def _lines(
    name: str,
    cameras: Cameras,
    scene: SceneResult,
    colour: list[int],
    similarity: tuple[Tensor, Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """Cameras as pyramids of one size, which stays as it is when a similarity moves them."""
    height, width = scene.images.shape[-2:]
    size = CAMERA_SIZE / (1.0 if similarity is None else max(float(similarity[0]), 1e-9))
    corners = camera_pyramids(cameras.extrinsics, cameras.intrinsics, height, width, size)
    if similarity is not None:
        corners = apply_similarity(*similarity, corners.reshape(1, -1, 3)).reshape(corners.shape)
    ends = corners[:, torch.tensor(EDGES)]  # [S, edges, 2, 3]
    return {"name": name, "colour": colour, "lines": [round(value, 4) for value in ends.flatten().tolist()]}
