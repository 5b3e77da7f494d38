"""What the loss needs, made on the device from what the loader sent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.objective.color_jitter import apply_color_jitter
from vggt.geometry import invert_se3, relative_pose, transform_points, unproject

MIN_VALID = 100  # a scene's scale is defined by more valid points than that
SCALE_RANGE = (1e-6, 1e6)

Batch = dict[str, Tensor]


def prepare(batch: dict[str, Any], device: torch.device, with_points: bool) -> Batch:
    """A loader's batch -> tensors on the device, in float32 and in normalized units:

        images       [B, S, 3, H, W] in [0, 1]
        extrinsics   [B, S, 3, 4] camera-from-world, world = the first camera
        intrinsics   [B, S, 3, 3] pixels
        depth        [B, S, H, W]; mask: where it counts, bool [B, S, H, W]
        points       [B, S, H, W, 3] in the world (only with_points)
        scale        [B] input units a normalized one; has_scale: whether it is defined, bool [B]

    A scene without a defined scale has an empty mask: it supervises rotation and field of view only.
    """
    color = batch["color_jitter"].numpy()
    batch = {
        k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, Tensor) and k != "color_jitter"
    }
    images = batch["images"].float() / 255
    images = apply_color_jitter(images.flatten(0, 1), color.reshape(-1, color.shape[-1])).view_as(images)
    depth = batch["depth"].float() * batch["depth_scale"][..., None, None]
    mask = depth > 0
    intrinsics = batch["intrinsics"].float()
    extrinsics, depth, points, scale = normalize_scenes(batch["extrinsics"], intrinsics, depth, mask)
    has_scale = mask.sum((1, 2, 3)) > MIN_VALID
    mask = mask & has_scale[:, None, None, None]
    out = {"images": images, "extrinsics": extrinsics, "intrinsics": intrinsics, "depth": depth, "mask": mask}
    out |= {"scale": scale, "has_scale": has_scale}
    return out | ({"points": points} if with_points else {})


def normalize_scenes(
    extrinsics: Tensor, intrinsics: Tensor, depth: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the world to each scene's first camera, and divide lengths by the mean distance of its valid points.

    extrinsics [B, S, 3, 4] camera-from-world in any float type, intrinsics [B, S, 3, 3] pixels, depth [B, S, H, W],
    mask bool [B, S, H, W]. Returns extrinsics, depth, world points [B, S, H, W, 3] and the scale [B], as depth's type.
    The poses are composed in the type they come in: coordinates far from the origin need float64.
    """
    relative = relative_pose(extrinsics, extrinsics[:, :1])
    points = transform_points(invert_se3(relative).to(depth.dtype), unproject(depth, intrinsics))
    relative = relative.to(depth.dtype)
    distance = points.norm(dim=-1) * mask
    scale = (distance.sum((1, 2, 3)) / (mask.sum((1, 2, 3)) + 1e-3)).clamp(*SCALE_RANGE)
    rotation, translation = relative[..., :3], relative[..., 3:] / scale[:, None, None, None]
    relative = torch.cat([rotation, translation], dim=-1)
    return relative, depth / scale[:, None, None, None], points / scale[:, None, None, None, None], scale
