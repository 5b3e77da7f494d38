"""Metrics that mean something outside the training: poses in degrees, depths and points against the truth.

All are computed on the device and batched over scenes; B = scenes, S = views, P = S(S-1)/2 pairs of views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.evaluation.depths import DELTA, depth_metrics
from train.evaluation.points import point_errors
from train.evaluation.poses import ACCURACY_LIMITS, AUC_LIMITS, fov_error, pair_errors, pose_metrics
from train.objective.targets import Batch
from vggt.geometry import (
    decode_cameras,
    decode_pose,
    invert_se3,
    transform_points,
    unproject,
)


@dataclass(frozen=True)
class Metric:
    """label and meaning are for people, form for str.format; heads: those of the model that it needs."""

    label: str
    meaning: str
    heads: tuple[str, ...]
    form: str = "{:.3f}"
    higher_is_better: bool = False


def _metrics() -> dict[str, Metric]:
    degrees, percent, pose = "{:.1f} degrees", "{:.1%}", ("camera",)
    found = {}
    for limit in reversed(AUC_LIMITS):
        meaning = f"fraction of right pairs of views, over limits up to {limit} degrees"
        found[f"auc_{limit}"] = Metric(f"pose AUC@{limit}", meaning, pose, higher_is_better=True)
    found["rotation_deg"] = Metric("camera rotation error", "between two views; 0 is perfect", pose, degrees)
    direction = "between the directions from one view to another; random ones are off by 57"
    found["translation_deg"] = Metric("camera direction error", direction, pose, degrees)
    found["fov_deg"] = Metric("field of view error", "mean of height and width", pose, degrees)
    for part in ("rotation", "translation"):
        for limit in ACCURACY_LIMITS:
            label = f"{part} within {limit} degrees"
            found[f"{part}_acc_{limit}"] = Metric(label, "fraction of the pairs of views", pose, percent, True)
    unit = "in units of the scene's mean point distance"
    labels = {"": "depth error", "_image": "depth error, scaled by image", "_raw": "depth error, unscaled"}
    scalings = {"": "after one scale a scene", "_image": "after one scale an image", "_raw": "as it is predicted"}
    for suffix, how in scalings.items():
        meaning = f"mean fraction of the true depth, {how}"
        found[f"depth_abs_rel{suffix}"] = Metric(labels[suffix], meaning, ("depth",), percent)
        found[f"depth_rmse{suffix}"] = Metric("depth RMSE", f"{unit}, {how}", ("depth",))
        for i in (1, 2, 3):
            label = f"depth within {DELTA**i:.3g}x"
            found[f"depth_delta_{i}{suffix}"] = Metric(
                label, f"fraction of the pixels, {how}", ("depth",), percent, True
            )
    sources = {"points": ("depth", ("camera", "depth")), "point_map": ("point head", ("point",))}
    meanings = {
        "accuracy": "from predicted points to the nearest true ones",
        "completeness": "from true points to the nearest predicted ones",
        "chamfer": "mean of accuracy and completeness",
    }
    for source, (of, heads) in sources.items():
        for name, meaning in meanings.items():
            found[f"{source}_{name}"] = Metric(f"{name} of points ({of})", f"{meaning}, aligned, {unit}", heads)
    return found


METRICS = _metrics()
HEADLINE = ("auc_30", "rotation_deg", "translation_deg", "depth_abs_rel", "points_chamfer")  # what runs are judged by


def scene_metrics(predictions: dict[str, Any], batch: Batch) -> dict[str, float]:
    """All METRICS that are defined for a scene, from predictions and a batch of one. NaN: a prediction is not finite.

    No pose metrics without a camera head or a second view; no depth metrics without a depth head or true depth;
    `points` come from depth and cameras, `point_map` from the point head.
    """
    found: dict[str, Tensor] = {}
    height, width = batch["images"].shape[-2:]
    has_truth = bool(batch["has_scale"][0])
    if "pose_enc" in predictions and batch["images"].shape[1] > 1:
        extrinsics, intrinsics = decode_pose(predictions["pose_enc"].double(), height, width)
        found |= pose_metrics(*pair_errors(extrinsics, batch["extrinsics"].double()))
        found["fov_deg"] = fov_error(intrinsics, batch["intrinsics"].double(), height, width)
    if "depth" in predictions and has_truth:
        found |= depth_metrics(predictions["depth"][..., 0].float(), batch["depth"], batch["mask"])
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
        extrinsics, intrinsics = decode_cameras(predictions["pose_enc"].double(), height, width)
        rays = unproject(predictions["depth"][..., 0].double(), intrinsics)
        found["points"] = transform_points(invert_se3(extrinsics), rays).float()
    if "world_points" in predictions:
        found["point_map"] = predictions["world_points"].float()
    return found
