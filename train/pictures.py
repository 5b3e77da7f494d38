"""Contact sheets: what the model saw, what it says, what is true and how far off it is, cameras seen from above."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from shards import drawing

MAX_VIEWS = 6
ROW_LABELS = ("input", "predicted depth", "true depth", "error (black 0, white 20%)", "confidence (black low)")
MOST_ERROR = 0.2  # of the true depth
MAX_POINTS = 4000  # in a picture from above


@dataclass(frozen=True)
class Cameras:
    """extrinsics [S, 3, 4] camera-from-world, intrinsics [S, 3, 3] pixels."""

    extrinsics: Tensor
    intrinsics: Tensor


@dataclass(frozen=True)
class SceneResult:
    """images [S, 3, H, W] in [0, 1]; predicted and true depth [S, H, W] in the same units, and the former's confidence.

    mask: where the truth is known [S, H, W]; predicted_cameras: None without a camera head.
    """

    name: str
    images: Tensor
    predicted: Tensor
    confidence: Tensor
    truth: Tensor
    mask: Tensor
    true_cameras: Cameras
    predicted_cameras: Cameras | None


def contact_sheet(scenes: list[SceneResult], title: str) -> np.ndarray:
    """RGB [H, W, 3]: a block a scene, a row for each of ROW_LABELS, a column a view; cameras from above on the right.

    Grey where the truth is unknown. Near is red, far is blue, the same colours for the same depth within a scene.
    """
    blocks = [_scene_block(scene) for scene in scenes]
    width = max(block.shape[1] for block in blocks)
    return drawing.stack([drawing.text(title, width), *blocks])


def save_picture(path: Path, image: np.ndarray) -> None:
    """An RGB picture [H, W, 3] as a file. Raises OSError."""
    path.write_bytes(cv2.imencode(path.suffix, image[..., ::-1])[1].tobytes())


def _scene_block(scene: SceneResult) -> np.ndarray:
    views = min(MAX_VIEWS, len(scene.images))
    mask = scene.mask[:views].numpy()
    truth, predicted = np.where(mask, scene.truth[:views].numpy(), 0), scene.predicted[:views].numpy()
    near, far = drawing.near_and_far(truth if truth.any() else predicted)
    images = (scene.images[:views].numpy().transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)
    error = np.abs(predicted - truth) / np.where(mask, truth, np.nan)
    confidence = np.log(scene.confidence[:views].numpy())
    low, high = np.percentile(confidence, [1, 99])
    rows = [
        images,
        drawing.colour_depth(predicted, near, far),
        drawing.colour_depth(truth, near, far),
        drawing.colour_amount(error / MOST_ERROR),
        drawing.colour_amount((confidence - low) / max(high - low, 1e-9)),
    ]
    pictures = [drawing.row(row) for row in rows]
    body = drawing.stack(pictures)
    above = [("true cameras, from above", scene.true_cameras, truth)]
    if scene.predicted_cameras is not None and scene.predicted_cameras.extrinsics.isfinite().all():
        above.append(("predicted, from above", scene.predicted_cameras, predicted))
    side = max(160, len(body) // 2 - drawing.TEXT_HEIGHT)
    maps = [
        part for name, cameras, depth in above for part in (drawing.text(name, side), _from_above(cameras, depth, side))
    ]
    block = drawing.row([body, drawing.scale_bar(len(body), near, far), drawing.stack(maps)])
    return drawing.stack([drawing.text(f"{scene.name}: {', '.join(ROW_LABELS)}", block.shape[1]), block])


def _from_above(cameras: Cameras, depth: np.ndarray, side: int) -> np.ndarray:
    """All cameras of a scene, and points of these depths [views, H, W] seen by the first of them."""
    extrinsics, intrinsics = cameras.extrinsics.double().numpy(), cameras.intrinsics.double().numpy()
    seen = zip(depth, extrinsics, intrinsics, strict=False)  # there may be more cameras than depths
    points = np.concatenate([drawing.unproject(np.where(d > 0, d, np.nan), e, k) for d, e, k in seen], axis=1).T
    points = points[np.isfinite(points).all(axis=1)]
    return drawing.from_above(extrinsics, intrinsics, points[:: len(points) // MAX_POINTS + 1], side)
