"""Contact sheets: what the model saw, what it says, what is true and how far off it is, cameras seen from above."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from shards import drawing
from shards.geometry import unproject
from shards.writer import atomic_file
from train.evaluation.scene_result import Cameras, SceneResult

SHEET_FILE = "contact_sheet.png"  # of a run
MAX_VIEWS = 6
MOST_ERROR = 0.2  # of the true depth
MAX_POINTS = 4000  # in a picture from above


def contact_sheet(scenes: list[SceneResult], title: str) -> np.ndarray:
    """RGB [H, W, 3]: a block a scene, one below the other."""
    blocks = [scene_block(scene) for scene in scenes]
    width = max(block.shape[1] for block in blocks)
    return drawing.stack([drawing.text(title, width), *blocks])


def save_picture(path: Path, image: np.ndarray) -> None:
    """An RGB picture [H, W, 3] as a file. Raises OSError."""
    with atomic_file(path) as file:
        file.write(cv2.imencode(path.suffix, image[..., ::-1])[1].tobytes())


def _finite(values: Tensor) -> np.ndarray:
    """The values, NaN where they are infinite: both are drawn alike."""
    return torch.where(values.isfinite(), values, torch.nan).numpy()


def scene_block(scene: SceneResult) -> np.ndarray:
    """RGB [H, W, 3]: rows of images, predicted and true depth, error and confidence, named on top; columns are views.

    Cameras from above on the right. Gray where the truth is unknown. Near is red, far is blue; a color stands for the
    same depth everywhere in the scene. Predicted depth is scaled as for the depth error.
    """
    views = min(MAX_VIEWS, len(scene.images))
    truth = np.where(scene.mask[:views].numpy(), scene.truth[:views].numpy(), 0)
    predicted = None if scene.predicted is None else _finite(scene.predicted[:views] * scene.scale)
    near, far = drawing.near_and_far(truth if truth.any() or predicted is None else predicted)
    rows = {"input": (scene.images[:views].numpy().transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)}
    if predicted is not None:
        rows["predicted depth (scaled)"] = drawing.color_depth(predicted, near, far)
    rows["true depth"] = drawing.color_depth(truth, near, far)
    if predicted is not None and scene.confidence is not None:
        error = np.abs(predicted - truth) / np.where(truth > 0, truth, np.nan)
        rows["error (black 0, white 20%)"] = drawing.color_amount(error / MOST_ERROR)
        confidence = np.log(_finite(scene.confidence[:views]))
        low, high = np.nan_to_num(np.nanpercentile(np.append(confidence, 0), [1, 99]))
        rows["confidence (black low)"] = drawing.color_amount((confidence - low) / max(high - low, 1e-9))
    body = drawing.stack([drawing.row(list(row)) for row in rows.values()])
    above = [("true cameras, from above", scene.true_cameras, truth)]
    if scene.predicted_cameras is not None and scene.predicted_cameras.extrinsics.isfinite().all():
        # Not scaled as depth is, for the cameras are not.
        depth = truth if scene.predicted is None else _finite(scene.predicted[:views])
        above.append(("predicted, from above", scene.predicted_cameras, depth))
    side = max(160, len(body) // 2 - drawing.TEXT_HEIGHT)
    maps = [
        part for name, cameras, depth in above for part in (drawing.text(name, side), _top_down(cameras, depth, side))
    ]
    block = drawing.row([body, drawing.scale_bar(len(body), near, far), drawing.stack(maps)])
    return drawing.stack([drawing.text(f"{scene.name}: {', '.join(rows)}", block.shape[1]), block])


def _top_down(cameras: Cameras, depth: np.ndarray, side: int) -> np.ndarray:
    """All cameras of a scene, and points of these depths [views, H, W] seen by the first of them."""
    extrinsics, intrinsics = cameras.extrinsics.double().numpy(), cameras.intrinsics.double().numpy()
    seen = zip(depth, extrinsics, intrinsics, strict=False)  # there may be more cameras than depths
    points = np.concatenate([unproject(np.where(d > 0, d, np.nan), e, k) for d, e, k in seen], axis=1).T
    points = points[np.isfinite(points).all(axis=1)]
    return drawing.top_down(extrinsics, intrinsics, points[:: len(points) // MAX_POINTS + 1], side)
