"""Figures that mean something outside the training: poses in degrees, depths and points against the truth.

All are computed on the device and batched over scenes; B = scenes, S = views, P = S(S-1)/2 pairs of views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from train.prepare import Batch
from vggt.geometry import (
    decode_pose,
    encode_pose,
    invert_se3,
    relative_pose,
    transform_points,
    unproject,
)

ACCURACY_LIMITS = (5, 15, 30)  # degrees
AUC_LIMITS = (3, 5, 15, 30)
DELTA = 1.25
QUERY_POINTS, CLOUD_POINTS = 4_000, 20_000  # of a scene: whose nearest neighbours are looked for, and among which
DISTANCES_AT_ONCE = 50_000_000

Alignment = Literal["image", "scene", "none"]


@dataclass(frozen=True)
class Figure:
    """label and meaning are for people, form for str.format; heads: those of the model that it needs."""

    label: str
    meaning: str
    heads: tuple[str, ...]
    form: str = "{:.3f}"
    higher_is_better: bool = False


def _figures() -> dict[str, Figure]:
    degrees, percent, pose = "{:.1f} degrees", "{:.1%}", ("camera",)
    found = {}
    for limit in reversed(AUC_LIMITS):
        meaning = f"share of right pairs of views, over limits up to {limit} degrees"
        found[f"auc_{limit}"] = Figure(f"pose AUC@{limit}", meaning, pose, higher_is_better=True)
    found["rotation_deg"] = Figure("camera rotation error", "between two views; 0 is perfect", pose, degrees)
    direction = "of the way between two views; a guess gives 57"
    found["translation_deg"] = Figure("camera direction error", direction, pose, degrees)
    found["fov_deg"] = Figure("field of view error", "mean of height and width", pose, degrees)
    for part in ("rotation", "translation"):
        for limit in ACCURACY_LIMITS:
            label = f"{part} within {limit} degrees"
            found[f"{part}_acc_{limit}"] = Figure(label, "share of the pairs of views", pose, percent, True)
    unit = "in units of the scene's mean point distance"
    labels = {"": "depth error", "_image": "depth error, scaled by image", "_raw": "depth error, unscaled"}
    scalings = {"": "after one scale a scene", "_image": "after one scale an image", "_raw": "as it is predicted"}
    for suffix, how in scalings.items():
        meaning = f"mean share of the true depth, {how}"
        found[f"depth_abs_rel{suffix}"] = Figure(labels[suffix], meaning, ("depth",), percent)
        found[f"depth_rmse{suffix}"] = Figure("depth RMSE", f"{unit}, {how}", ("depth",))
        for i in (1, 2, 3):
            label = f"depth within {DELTA**i:.3g}x"
            found[f"depth_delta_{i}{suffix}"] = Figure(label, f"share of the pixels, {how}", ("depth",), percent, True)
    sources = {"points": ("depth", ("camera", "depth")), "point_map": ("point head", ("point",))}
    meanings = {
        "accuracy": "from predicted points to the nearest true ones",
        "completeness": "from true points to the nearest predicted ones",
        "chamfer": "mean of accuracy and completeness",
    }
    for source, (of, heads) in sources.items():
        for name, meaning in meanings.items():
            found[f"{source}_{name}"] = Figure(f"{name} of points ({of})", f"{meaning}, aligned, {unit}", heads)
    return found


FIGURES = _figures()


def scene_figures(predictions: dict[str, Any], batch: Batch) -> dict[str, float]:
    """All of FIGURES that are defined for one scene; predictions and batch are of one. NaN: a prediction is not finite.

    There are none of poses without a camera head or a second view, none of depth without a depth head or true depth;
    `points` come from depth and cameras, `point_map` from the point head.
    """
    found: dict[str, Tensor] = {}
    height, width = batch["images"].shape[-2:]
    has_truth = bool(batch["has_scale"][0])
    if "pose_enc" in predictions and batch["images"].shape[1] > 1:
        extrinsics, intrinsics = decode_pose(predictions["pose_enc"].double(), height, width)
        found |= pose_figures(*pair_errors(extrinsics, batch["extrinsics"].double()))
        found["fov_deg"] = fov_error(intrinsics, batch["intrinsics"].double(), height, width)
    if "depth" in predictions and has_truth:
        found |= depth_figures(predictions["depth"][..., 0].float(), batch["depth"], batch["mask"])
    if has_truth:
        # In float64, also because GPUs may round products of float32 to 10 bits.
        rays = unproject(batch["depth"].double(), batch["intrinsics"].double())
        truth = transform_points(invert_se3(batch["extrinsics"].double()), rays).float()
        for source, points in predicted_points(predictions, height, width).items():
            errors = point_errors(points.flatten(1, 3), truth.flatten(1, 3), batch["mask"].flatten(1))
            found |= {f"{source}_{name}": value for name, value in errors.items()}
    if not found:
        return {}
    values = torch.stack([value[0].double() for value in found.values()]).tolist()  # the host waits only here
    return dict(zip(found, values, strict=True))


def predicted_points(predictions: dict[str, Any], height: int, width: int) -> dict[str, Tensor]:
    """World points [B, S, H, W, 3]: `points` of depth and cameras, `point_map` of the point head, as there are."""
    found = {}
    if "pose_enc" in predictions and "depth" in predictions:
        extrinsics, intrinsics = decode_pose(predictions["pose_enc"].double(), height, width)
        rays = unproject(predictions["depth"][..., 0].double(), intrinsics)
        found["points"] = transform_points(invert_se3(extrinsics), rays).float()
    if "world_points" in predictions:
        found["point_map"] = predictions["world_points"].float()
    return found


# Cameras


def pair_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of all relative poses i < j of camera-from-world poses [..., S, 3, 4], in degrees: two of [..., P]."""
    i, j = torch.triu_indices(*[truth.shape[-3]] * 2, offset=1, device=truth.device)
    relative = [relative_pose(x[..., i, :, :], x[..., j, :, :]) for x in (predicted, truth)]
    return relative_errors(*relative)


def relative_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of relative poses [..., 3, 4] in degrees, two of [...].

    The first is the angle of the rotation between predicted and true rotation. The second is the angle between the
    translations, folded to at most 90 degrees, as their sign is not told apart; no translation has no direction, which
    counts as 90 degrees. (The published evaluation's, see tests/golden.) A global similarity changes neither.
    """
    product = predicted[..., :3].transpose(-1, -2) @ truth[..., :3]
    cosine = (product.diagonal(dim1=-1, dim2=-2).sum(-1) - 1) / 2
    # atan2 keeps small angles that acos would lose.
    axis = torch.stack([product[..., a, b] - product[..., b, a] for a, b in ((2, 1), (0, 2), (1, 0))], dim=-1)
    rotation = torch.atan2(axis.norm(dim=-1) / 2, cosine)
    a, b = predicted[..., 3], truth[..., 3]
    translation = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1).abs()).rad2deg()
    no_way = (a == 0).all(-1) | (b == 0).all(-1)
    return rotation.rad2deg(), torch.where(no_way, torch.full_like(translation, 90), translation)


def pose_figures(rotation: Tensor, translation: Tensor) -> dict[str, Tensor]:
    """Means, accuracies and AUCs [...] of pair errors [..., P] in degrees; an AUC takes the larger error of a pair."""
    worse = torch.maximum(rotation, translation)  # NaN if either is
    found = {f"auc_{t}": pose_auc(worse, t) for t in AUC_LIMITS}
    for name, errors in (("rotation", rotation), ("translation", translation)):
        found[f"{name}_deg"] = errors.mean(-1)
        found |= {f"{name}_acc_{t}": accuracy(errors, t) for t in ACCURACY_LIMITS}
    return found


def accuracy(errors: Tensor, limit: float) -> Tensor:
    """The share of errors [..., N] below the limit: [...], NaN if one of them is."""
    return torch.where(errors.isnan().any(-1), torch.nan, (errors < limit).double().mean(-1))


def pose_auc(errors: Tensor, limit: int) -> Tensor:
    """Area under the share of errors [..., N] (degrees) below an angle, from 0 to `limit`, in bins of a degree: [...].

    The mean over t = 1 .. limit of the share of errors below t, the last with those that equal it (as numpy's histogram
    has it, and so the published evaluation). NaN if an error is.
    """
    edges = torch.arange(1, limit + 1, device=errors.device)
    below = errors[..., None] < edges
    below[..., -1] |= errors == limit
    return torch.where(errors.isnan().any(-1), torch.nan, below.double().mean((-1, -2)))


def fov_error(predicted: Tensor, truth: Tensor, height: int, width: int) -> Tensor:
    """Mean |difference| of the vertical and horizontal fields of view of intrinsics [..., S, 3, 3]: degrees [...]."""
    none = torch.eye(3, 4, dtype=truth.dtype, device=truth.device).expand(*truth.shape[:-2], 3, 4)
    fields = [encode_pose(none, x, height, width)[..., 7:] for x in (predicted, truth)]
    return (fields[0] - fields[1]).abs().mean((-1, -2)).rad2deg()


# Depth


def depth_figures(predicted: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """depth_errors [B] under each alignment, by the names in FIGURES."""
    found = {}
    alignments: dict[str, Alignment] = {"": "scene", "_image": "image", "_raw": "none"}
    for suffix, align in alignments.items():
        errors = depth_errors(predicted, truth, mask, align)
        found |= {f"depth_{name}{suffix}": value for name, value in errors.items()}
    return found


def depth_errors(predicted: Tensor, truth: Tensor, mask: Tensor, align: Alignment) -> dict[str, Tensor]:
    """Errors over the masked pixels of each scene, of depths [B, S, H, W] and mask bool: [B] each, NaN without a pixel.

    abs_rel: mean |p - t| / t; rmse: root of the mean (p - t)^2; delta_i: share of max(p / t, t / p) < 1.25^i, after
    Eigen et al. 2014. align: p is multiplied by median(t) / median(p) of each image or of the scene, or left alone.
    """
    p, t = predicted * depth_scale(predicted, truth, mask, align), torch.where(mask, truth, 1)
    ratio = torch.where(p <= 0, torch.inf, torch.maximum(p / t, t / p))
    found = {"abs_rel": _mean((p - t).abs() / t, mask), "rmse": _mean((p - t) ** 2, mask).sqrt()}
    for i in (1, 2, 3):
        found[f"delta_{i}"] = _mean(torch.where(ratio.isnan(), ratio, (ratio < DELTA**i).to(ratio.dtype)), mask)
    return found


def depth_scale(predicted: Tensor, truth: Tensor, mask: Tensor, align: Alignment) -> Tensor:
    """What aligns predicted depths [B, S, H, W] with true ones, to be multiplied with them: see depth_errors."""
    if align == "none":
        return predicted.new_ones(())
    over = (2, 3) if align == "image" else (1, 2, 3)
    return _median(truth, mask, over) / _median(predicted, mask, over)


def _median(values: Tensor, mask: Tensor, over: tuple[int, ...]) -> Tensor:
    """The lower median of the masked values over the last axes, kept as ones: NaN without any."""
    flat = torch.where(mask, values, torch.nan).flatten(-len(over))
    return flat.nanmedian(dim=-1).values[(...,) + (None,) * len(over)]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the masked values of each scene [B], in float64."""
    return torch.where(mask, values, 0).double().sum((1, 2, 3)) / mask.sum((1, 2, 3))


# Points


def point_errors(predicted: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """accuracy, completeness and chamfer [B] of clouds [B, N, 3] whose points correspond where the mask [B, N] is set.

    The predicted cloud is laid over the true one by the similarity that fits the pairs best. accuracy is the mean
    distance of a predicted point from its nearest true one, completeness of a true one from its nearest predicted one,
    chamfer their mean, as on DTU (Jensen et al. 2014) and in the VGGT paper. Of each cloud QUERY_POINTS, evenly chosen,
    look for their neighbours among CLOUD_POINTS, so even two samples of one surface keep a distance of the order of
    the spacing of those.
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
    """The distance of each of the points [B, N, 3] from the nearest of a cloud [B, M, 3]: [B, N]."""
    at_once = max(1, DISTANCES_AT_ONCE // (len(points) * cloud.shape[1]))
    exact = "donot_use_mm_for_euclid_dist"  # the other way loses small distances to rounding, and is no faster here
    parts = [torch.cdist(part, cloud, compute_mode=exact).amin(-1) for part in points.split(at_once, dim=1)]
    return torch.cat(parts, dim=1)
