"""Predictions as something to look at: a colored point cloud, with the cameras drawn into it."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vggt.geometry import decode_cameras, invert_se3, transform_points, unproject
from vggt.weights import whole_file

MAX_POINTS = 1_000_000  # what viewers still turn smoothly
CAMERA_SIZE = 0.06  # depth of a drawn camera, in median distances of the points from the first camera
EDGE_POINTS = 150
EDGES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1))  # of a pyramid, its tip first


def point_cloud(predictions: dict[str, Tensor], images: Tensor, keep: float) -> tuple[np.ndarray, np.ndarray]:
    """Points [M, 3] in the world of the predicted cameras, whose first is about its origin, and colors uint8 [M, 3].

    predictions: VGGT's for one scene, with cameras and depth; images [S, 3, H, W] in [0, 1]. Of all
    pixels the fraction `keep` that the model is most confident of is taken, MAX_POINTS of them at most.
    """
    extrinsics, intrinsics = decode_cameras(predictions["pose_enc"][0], *images.shape[-2:])
    rays = unproject(predictions["depth"][0, ..., 0], intrinsics)
    points, confidence = transform_points(invert_se3(extrinsics), rays), predictions["depth_conf"][0]
    points, confidence = points.reshape(-1, 3), confidence.flatten()
    confidence = torch.where(points.isfinite().all(-1), confidence, -torch.inf)
    chosen = confidence.topk(max(round(keep * len(confidence)), 1)).indices
    chosen = chosen[confidence[chosen] > -torch.inf].cpu()
    if len(chosen) > MAX_POINTS:
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:MAX_POINTS]]
    colors = (images.permute(0, 2, 3, 1).reshape(-1, 3).cpu()[chosen] * 255).round().byte()
    return points.cpu()[chosen].float().numpy(), colors.numpy()


def camera_pyramids(extrinsics: Tensor, intrinsics: Tensor, height: int, width: int, size: float) -> Tensor:
    """Tip and base, the image at depth `size`, of cameras [S, 3, 4] and [S, 3, 3]: points of the world [S, 5, 3].

    intrinsics: (0, 0) is the center of the first pixel.
    """
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]]).to(intrinsics) - 0.5
    rays = (corners - intrinsics[:, None, :2, 2]) / intrinsics.diagonal(dim1=1, dim2=2)[:, None, :2]
    base = size * torch.cat([rays, torch.ones_like(rays[..., :1])], dim=-1)
    return transform_points(invert_se3(extrinsics), torch.cat([torch.zeros_like(base[:, :1]), base], dim=1)[:, None])[
        :, 0
    ]


def camera_wireframes(pose_enc: Tensor, height: int, width: int, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Cameras [S, 9] as pyramids of dots: points [M, 3], colors uint8 [M, 3] from red (the first) to blue (the last).

    A pyramid's tip is the camera's center, its base the image at depth `size`.
    """
    pyramids = camera_pyramids(*decode_cameras(pose_enc.cpu(), height, width), height, width, size)
    fraction = torch.linspace(0, 1, EDGE_POINTS)[:, None]
    points, colors = [], []
    for i, pyramid in enumerate(pyramids):
        points += [pyramid[a] * (1 - fraction) + pyramid[b] * fraction for a, b in EDGES]
        hue = 2 / 3 * i / max(len(pose_enc) - 1, 1)
        colors.append(np.tile(np.array(colorsys.hsv_to_rgb(hue, 1, 1)) * 255, (len(EDGES) * EDGE_POINTS, 1)))
    return torch.cat(points).numpy(), np.concatenate(colors).round().astype(np.uint8)


def linear(colors: np.ndarray) -> np.ndarray:
    """sRGB as uint8 in linear light (IEC 61966-2-1), also as uint8, which has few steps for dark colors."""
    c = colors / 255
    return (np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) * 255).round().astype(np.uint8)


def write_scene(path: Path, predictions: dict[str, Tensor], images: Tensor, keep: float) -> int:
    """Write cloud and cameras to a .glb or .ply; returns the number of the cloud's points.

    predictions, images [S, 3, H, W] and keep: see point_cloud.

    A .ply keeps the world's axes, OpenCV's (y down, z forward), and sRGB; a .glb has the axes of glTF (y up, z back)
    and its linear colors.
    Raises ValueError if a camera is not finite, or no point is.
    """
    import trimesh  # an extra: only needed here

    points, colors = point_cloud(predictions, images, keep)
    if not len(points) or not predictions["pose_enc"].isfinite().all():
        raise ValueError("the model's cameras or all of its points are not finite: is the checkpoint whole?")
    height, width = images.shape[-2:]
    size = CAMERA_SIZE * float(np.median(np.linalg.norm(points, axis=1)))
    camera_points, camera_colors = camera_wireframes(predictions["pose_enc"][0], height, width, size)
    count = len(points)
    points, colors = np.concatenate([points, camera_points]), np.concatenate([colors, camera_colors])
    kind = path.suffix.lower().removeprefix(".")
    with whole_file(path) as temporary:
        if kind == "glb":
            points = points * np.array([1, -1, -1], np.float32)
            trimesh.Scene([trimesh.PointCloud(points, linear(colors))]).export(temporary, file_type=kind)
        else:
            trimesh.PointCloud(points, colors).export(temporary, file_type=kind)
    return count
