"""A scene in 3D: predicted points and cameras laid over the true ones, as layers that the legend switches."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

from train.evaluation.points import apply_similarity, umeyama
from train.evaluation.scene_result import Cameras, SceneResult
from vggt.geometry import invert_se3, transform_points, unproject
from vggt.scene import EDGES, camera_pyramids

CLOUD_POINTS = 15_000  # of a scene, predicted and true each
CONFIDENT = 0.7  # fraction of the predicted points that is drawn, the most confident ones
CAMERA_SIZE = 0.12  # of a drawn camera, in units of the scene's extent
TRUE_COLOR, PREDICTED_COLOR = "rgb(40,160,70)", "rgb(230,110,20)"
LEVELS = 6  # of red, green and blue each: a color is then a single number, a byte a point
PALETTE = [
    [i / (LEVELS**3 - 1), f"rgb({','.join(str(c * 255 // (LEVELS - 1)) for c in levels)})"]
    for i, levels in enumerate(np.ndindex(LEVELS, LEVELS, LEVELS))
]


def scene_figure(scene: SceneResult) -> go.Figure:
    """Points and cameras, as there are. Predictions are moved by the similarity that fits them to the truth best."""
    colors = (scene.images.permute(0, 2, 3, 1) * 255).round().byte()
    truth = _points(scene.truth, scene.true_cameras)
    layers = []
    if scene.mask.any():
        layers.append(_cloud("true points", truth[scene.mask], colors[scene.mask]))
    layers.append(_wireframes("true cameras", scene.true_cameras, scene, TRUE_COLOR))
    layers += _predicted(scene, truth, colors)
    if any(layer.name == "predicted points" for layer in layers) and layers[0].name == "true points":
        layers[0].visible = "legendonly"
    figure = go.Figure(layers)
    hidden = {"visible": False, "showspikes": False}
    figure.update_layout(
        scene={
            **dict.fromkeys(("xaxis", "yaxis", "zaxis"), hidden),
            "aspectmode": "data",
            "dragmode": "orbit",
            "camera": {"eye": {"x": 0.4, "y": -1.1, "z": 0.5}, "up": {"x": 0, "y": 0, "z": 1}},
        },
        legend={"orientation": "h", "itemsizing": "constant", "y": 1.0},
        margin={"l": 0, "r": 0, "t": 0, "b": 0},
        height=480,
        paper_bgcolor="#f4f4f4",
    )
    return figure


def _predicted(scene: SceneResult, truth: Tensor, colors: Tensor) -> list[go.Scatter3d]:
    cameras = scene.predicted_cameras
    if cameras is None or not (cameras.extrinsics.isfinite().all() and cameras.intrinsics.isfinite().all()):
        return []
    points = None if scene.predicted is None else _points(scene.predicted, cameras)
    similarity = _alignment(scene, points, truth)
    if not all(part.isfinite().all() for part in similarity):  # all cameras are in one place
        return []
    layers = []
    if points is not None and scene.confidence is not None and (points.sum() + scene.confidence.sum()).isfinite():
        moved = apply_similarity(*similarity, points.reshape(1, -1, 3)).reshape(points.shape)
        least = max(1, round((1 - CONFIDENT) * scene.confidence.numel()))
        sure = scene.confidence >= scene.confidence.flatten().kthvalue(least)[0]
        layers.append(_cloud("predicted points", moved[sure], colors[sure]))
    return [*layers, _wireframes("predicted cameras", cameras, scene, PREDICTED_COLOR, similarity)]


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


def _cloud(name: str, points: Tensor, colors: Tensor) -> go.Scatter3d:
    """points [N, 3] in the world, colors uint8 [N, 3]."""
    chosen = torch.linspace(0, len(points) - 1, min(len(points), CLOUD_POINTS)).round().long()
    xyz, rgb = points[chosen].double().numpy(), colors[chosen].numpy()
    low, high = np.percentile(xyz, [0.5, 99.5], axis=0)  # a few wild points must not make the rest a dot
    inside = ((xyz >= low) & (xyz <= high)).all(axis=1)
    level = (rgb[inside].astype(np.uint16) * LEVELS // 256) @ np.array([LEVELS**2, LEVELS, 1], np.uint16)
    marker = {"size": 1.8, "color": level.astype(np.uint8), "colorscale": PALETTE, "cmin": 0, "cmax": LEVELS**3 - 1}
    return go.Scatter3d(**_upright(xyz[inside]), mode="markers", name=name, marker=marker, hoverinfo="name")


def _wireframes(
    name: str,
    cameras: Cameras,
    scene: SceneResult,
    color: str,
    similarity: tuple[Tensor, Tensor, Tensor] | None = None,
) -> go.Scatter3d:
    """Cameras as pyramids of one size, which stays as it is when a similarity moves them."""
    height, width = scene.images.shape[-2:]
    size = CAMERA_SIZE * _extent(scene) / (1.0 if similarity is None else max(float(similarity[0]), 1e-9))
    corners = camera_pyramids(cameras.extrinsics, cameras.intrinsics, height, width, size)
    if similarity is not None:
        corners = apply_similarity(*similarity, corners.reshape(1, -1, 3)).reshape(corners.shape)
    ends = corners[:, torch.tensor(EDGES)].reshape(-1, 2, 3)  # [S * edges, 2, 3]
    gaps = torch.full_like(ends[:, :1], torch.nan)  # a line ends where a number is missing
    xyz = torch.cat([ends, gaps], dim=1).reshape(-1, 3).double().numpy()
    line = {"color": color, "width": 3}
    return go.Scatter3d(**_upright(xyz), mode="lines", name=name, line=line, hoverinfo="name")


def _extent(scene: SceneResult) -> float:
    """Of scenes with depth the mean point distance, which is their unit, of others that of the true cameras."""
    centers = invert_se3(scene.true_cameras.extrinsics)[:, :, 3]
    spread = float((centers - centers.mean(0)).norm(dim=1).mean())
    return 1.0 if scene.mask.any() or not spread else spread


def _upright(xyz: np.ndarray) -> dict[str, np.ndarray]:
    """Points [N, 3] with x right, y down, z forward as plotly draws them, whose z is up."""
    x, y, z = xyz.astype(np.float32).T
    return {"x": x, "y": z, "z": -y}
