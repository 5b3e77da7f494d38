"""A scene and what a model makes of it, to be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from train.evaluation.depths import depth_scale
from train.objective.targets import Batch
from vggt.geometry import decode_cameras


@dataclass(frozen=True)
class Cameras:
    """extrinsics [S, 3, 4] camera-from-world, intrinsics [S, 3, 3] pixels, (0, 0) the center of the first."""

    extrinsics: Tensor
    intrinsics: Tensor


@dataclass(frozen=True)
class SceneResult:
    """images [S, 3, H, W] in [0, 1]; predicted and true depth [S, H, W] in the same units, and the former's confidence.

    mask: where the truth is known [S, H, W]; scale: what aligns the predicted depth with it, 1 where nothing does;
    without a depth head there are no predicted depths, without a camera head no predicted cameras. On the CPU.
    """

    name: str
    images: Tensor
    predicted: Tensor | None
    confidence: Tensor | None
    scale: float
    truth: Tensor
    mask: Tensor
    true_cameras: Cameras
    predicted_cameras: Cameras | None


def scene_result(name: str, predictions: dict[str, Any], batch: Batch) -> SceneResult:
    """The first scene of a batch, to be drawn."""
    height, width = batch["images"].shape[-2:]
    cameras, depth, confidence, scale = None, None, None, 1.0
    if "pose_enc" in predictions:
        cameras = Cameras(*(x.cpu() for x in decode_cameras(predictions["pose_enc"][0].float(), height, width)))
    if "depth" in predictions:
        depth, confidence = predictions["depth"][0, ..., 0].float(), predictions["depth_conf"][0].float().cpu()
        scale = float(depth_scale(depth[None], batch["depth"][:1], batch["mask"][:1], "scene"))
        depth = depth.cpu()
    return SceneResult(
        name=name,
        images=batch["images"][0].cpu(),
        predicted=depth,
        confidence=confidence,
        scale=scale if np.isfinite(scale) else 1.0,
        truth=batch["depth"][0].cpu(),
        mask=batch["mask"][0].cpu(),
        true_cameras=Cameras(batch["extrinsics"][0].cpu(), batch["intrinsics"][0].cpu()),
        predicted_cameras=cameras,
    )
