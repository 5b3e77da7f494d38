"""Contact sheets: what the model saw, what it says, what is true, depths on one scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from shards import drawing

MAX_VIEWS = 6
ROW_LABELS = ("input", "predicted depth", "true depth")


@dataclass(frozen=True)
class SceneResult:
    """images [S, 3, H, W] in [0, 1]; predicted and true depth [S, H, W] in the same units; mask: where it is known."""

    name: str
    images: Tensor
    predicted: Tensor
    truth: Tensor
    mask: Tensor


def contact_sheet(scenes: list[SceneResult], title: str) -> np.ndarray:
    """RGB [H, W, 3]: three rows a scene (input, predicted depth, true depth), one column a view, a scale of depths.

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
    truth = np.where(scene.mask[:views].numpy(), scene.truth[:views].numpy(), 0)
    predicted = scene.predicted[:views].numpy()
    near, far = drawing.near_and_far(truth if truth.any() else predicted)
    images = (scene.images[:views].numpy().transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)
    rows = [images, drawing.colour_depth(predicted, near, far), drawing.colour_depth(truth, near, far)]
    pictures = [drawing.row(row) for row in rows]
    label = drawing.text(f"{scene.name}: {', '.join(ROW_LABELS)}", pictures[0].shape[1])
    body = drawing.stack([label, *pictures])
    return np.concatenate([body, drawing.scale_bar(len(body), near, far)], axis=1)
