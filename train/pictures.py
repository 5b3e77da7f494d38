"""Contact sheets: what the model saw, what it says, what is true, depths on one scale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

GAP, TEXT_HEIGHT, BAR_WIDTH, MAX_VIEWS = 6, 22, 90, 6
ROW_LABELS = ("input", "predicted depth", "true depth")
BACKGROUND, INK = 255, (40, 40, 40)
NEAR_FAR_PERCENTILES = (1, 99)


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
    padded = [
        cv2.copyMakeBorder(b, 0, GAP, 0, width - b.shape[1], cv2.BORDER_CONSTANT, value=(BACKGROUND,) * 3)
        for b in blocks
    ]
    header = _text(title, width)
    return np.concatenate([header, *padded])


def save_picture(path: Path, image: np.ndarray) -> None:
    cv2.imwrite(str(path), image[..., ::-1])


def _scene_block(scene: SceneResult) -> np.ndarray:
    views = min(MAX_VIEWS, len(scene.images))
    truth, mask = scene.truth[:views].numpy(), scene.mask[:views].numpy()
    predicted = scene.predicted[:views].numpy()
    known = truth[mask] if mask.any() else predicted
    near, far = np.percentile(known, NEAR_FAR_PERCENTILES)
    images = (scene.images[:views].numpy().transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)
    rows = [
        images,
        colour_depth(predicted, near, far),
        np.where(mask[..., None], colour_depth(truth, near, far), np.uint8(128)),
    ]
    lines = [_text(f"{scene.name}: {', '.join(ROW_LABELS)}", 10**4)]
    for row in rows:
        cells = [np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=BACKGROUND) for cell in row]
        lines.append(np.concatenate(cells, axis=1))
    width = lines[1].shape[1]
    body = np.concatenate([lines[0][:, :width], *lines[1:]])
    return np.concatenate([body, _scale_bar(body.shape[0], near, far)], axis=1)


def colour_depth(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth [..., H, W] -> RGB [..., H, W, 3]; near is red, far is blue."""
    share = 1 - np.clip((depth - near) / max(far - near, 1e-9), 0, 1)
    flat = (share * 255).astype(np.uint8).reshape(-1, 1)
    return cv2.applyColorMap(flat, cv2.COLORMAP_TURBO)[..., ::-1].reshape(*depth.shape, 3)


def _scale_bar(height: int, near: float, far: float) -> np.ndarray:
    bar = np.full((height, BAR_WIDTH, 3), BACKGROUND, np.uint8)
    top, bottom = TEXT_HEIGHT, height - GAP
    ramp = np.linspace(near, far, bottom - top, dtype=np.float32)[:, None].repeat(14, axis=1)
    bar[top:bottom, 4:18] = colour_depth(ramp, near, far)
    for share in (0, 0.5, 1):
        y = int(top + 10 + share * (bottom - top - 14))
        label = f"{near + share * (far - near):.2f}"
        cv2.putText(bar, label, (24, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    return bar


def _text(text: str, width: int) -> np.ndarray:
    line = np.full((TEXT_HEIGHT, width, 3), BACKGROUND, np.uint8)
    cv2.putText(line, text, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    return line
