"""Errors of point clouds, and the similarity that lays one over another."""

from __future__ import annotations

import cv2
import torch
from torch import Tensor

QUERY_POINTS, CLOUD_POINTS = 4_000, 20_000  # of a scene: queries, and the points they are compared with
DISTANCES_AT_ONCE = 50_000_000
FlannIndex = getattr(cv2, "flann_Index")  # noqa: B009, which OpenCV's type hints lack
KDTREE_SINGLE = 4  # of FLANN: one tree, for few dimensions


def point_errors(predicted: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """accuracy, completeness and chamfer [B] of clouds [B, N, 3] whose points correspond where the mask [B, N] is set.

    The similarity that fits the pairs best aligns the predicted cloud with the true one. accuracy is the mean
    distance of a predicted point from its nearest true one, completeness of a true one from its nearest predicted one,
    chamfer their mean, as on DTU (Jensen et al. 2014) and in the VGGT paper. QUERY_POINTS of each cloud are compared
    with CLOUD_POINTS of the other, all evenly chosen, so even two samples of one surface are about as far apart as
    the spacing of the latter.
    """
    scale, rotation, translation = umeyama(predicted, truth, mask)
    aligned = apply_similarity(scale, rotation, translation, predicted)
    clouds = [_evenly(points, mask, CLOUD_POINTS) for points in (aligned, truth)]
    queries = [_evenly(points, mask, QUERY_POINTS) for points in (aligned, truth)]
    found = {
        "accuracy": nearest_distances(queries[0], clouds[1]).mean(-1),
        "completeness": nearest_distances(queries[1], clouds[0]).mean(-1),
    }
    return found | {"chamfer": (found["accuracy"] + found["completeness"]) / 2}


def umeyama(source: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The similarity with the least mean square of |scale * R @ source + t - target| over the masked pairs.

    source, target [B, N, 3], mask bool [B, N]. Returns scale [B], rotation [B, 3, 3] and translation [B, 3] in float64;
    NaN for a scene without a pair or with a pair that is not finite. (Umeyama 1991, PAMI 13, 376.)
    """
    weight = (mask / mask.sum(-1, keepdim=True)).double()[..., None]
    x, y = (torch.where(mask[..., None], points.double(), 0) for points in (source, target))
    mean_x, mean_y = (weight * x).sum(1), (weight * y).sum(1)
    x, y = (x - mean_x[:, None]), (y - mean_y[:, None])
    covariance = (weight * y).transpose(1, 2) @ x
    broken = ~covariance.isfinite().all(-1).all(-1)
    u, singular, v = torch.linalg.svd(torch.where(broken[:, None, None], 0, covariance))
    sign = torch.ones_like(singular)
    sign[:, 2] = torch.where(torch.linalg.det(u) * torch.linalg.det(v) < 0, -1.0, 1.0)  # a rotation, no reflection
    rotation = u @ torch.diag_embed(sign) @ v
    scale = (singular * sign).sum(-1) / (weight * x * x).sum((1, 2))
    scale = torch.where(broken, torch.nan, scale)
    translation = mean_y - scale[:, None] * (rotation @ mean_x[..., None])[..., 0]
    return scale, rotation, translation


def apply_similarity(scale: Tensor, rotation: Tensor, translation: Tensor, points: Tensor) -> Tensor:
    """scale [B] * rotation [B, 3, 3] @ points [B, N, 3] + translation [B, 3]: [B, N, 3], in the points' type."""
    moved = scale[:, None, None] * (points.double() @ rotation.transpose(1, 2)) + translation[:, None]
    return moved.to(points.dtype)


def _evenly(points: Tensor, mask: Tensor, count: int) -> Tensor:
    """`count` of the masked points of each scene [B, count, 3], evenly spaced in their order.

    They repeat where there are fewer, and are NaN where there are none.
    """
    chosen = []
    for cloud, known in zip(points, mask, strict=True):
        cloud = cloud[known] if known.any() else cloud.new_full((1, 3), torch.nan)
        places = torch.arange(count, device=cloud.device) * len(cloud) // count
        chosen.append(cloud[places])
    return torch.stack(chosen)


def nearest_distances(points: Tensor, cloud: Tensor) -> Tensor:
    """The distance of each of the points [B, N, 3] from the nearest of a cloud [B, M, 3]: [B, N].

    NaN in a scene where a point or the cloud is not finite.
    """
    if points.device.type == "cpu":
        return torch.stack([_nearest_by_tree(*scene) for scene in zip(points, cloud, strict=True)])
    at_once = max(1, DISTANCES_AT_ONCE // (len(points) * cloud.shape[1]))
    exact = "donot_use_mm_for_euclid_dist"  # the other way loses small distances to rounding, and is no faster here
    parts = [torch.cdist(part, cloud, compute_mode=exact).amin(-1) for part in points.split(at_once, dim=1)]
    return torch.cat(parts, dim=1)


def _nearest_by_tree(points: Tensor, cloud: Tensor) -> Tensor:
    """The same for one scene [N, 3], [M, 3]: a k-d tree of OpenCV's FLANN, exact, is far faster than all distances."""
    if not (points.isfinite().all() and cloud.isfinite().all()):
        return torch.full_like(points[:, 0], torch.nan)
    tree = FlannIndex(cloud.float().numpy(), {"algorithm": KDTREE_SINGLE, "leaf_max_size": 10})
    _, squared = tree.knnSearch(points.float().numpy(), 1, params={"checks": -1})  # without a limit
    return torch.from_numpy(squared[:, 0]).sqrt().to(points.dtype)
