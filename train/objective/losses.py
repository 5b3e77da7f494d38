"""The losses of VGGT (arXiv:2503.11651), each a sum over a denominator.

The denominators come from the masks of a rank's whole batch, so that the terms of its chunks add up to those of the
batch, and so do their gradients (to rounding; with a quantile each chunk filters its own values). No term makes the
host wait for the device. Where the values differ on purpose from the published ones: docs/differences.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from train.objective.matching import match_loss
from train.objective.targets import MIN_VALID, Batch
from train.runtime.typed import documented
from vggt.config import HEADS
from vggt.geometry import encode_pose

ITERATION_DECAY = 0.6  # weight of an iteration of the camera head, relative to the next one
FOV_WEIGHT = 0.5
CONFIDENCE_WEIGHT = 0.2
MAX_ERROR = 100.0  # beyond it an error pulls no harder
MIN_FILTERED = 1000  # values that a quantile filter needs, and must leave
OBJECTIVE = "loss_objective"  # the name of their weighted sum
GRADIENT_SCALES = 4
NORMAL_SCALES = 3


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses; a head is built, and trained, if its weight is not 0."""

    camera: float = documented(5.0, "weight of the camera loss; 0: no camera head")
    depth: float = documented(1.0, "weight of the depth loss; 0: no depth head")
    point: float = documented(0.0, "weight of the point map loss; 0: no point head")
    match: float = documented(
        0.0, "weight of the loss that teaches attention to match, for small models from scratch; 0: none"
    )
    camera_norm: Literal["l1", "l2"] = documented("l1", "norm of the camera errors: l1 or l2")
    depth_gradient: Literal["grad", "grad_conf", "normal"] = documented(
        "grad", "third term of the depth loss: grad or grad_conf"
    )
    point_gradient: Literal["grad", "grad_conf", "normal"] = documented(
        "normal", "third term of the point loss: grad, grad_conf or normal"
    )
    valid_range: float = documented(0.98, "quantile above which errors do not count; 0: all count")

    def __post_init__(self) -> None:
        if min(self.camera, self.depth, self.point, self.match) < 0 or not self.heads:
            raise ValueError(
                "camera, depth, point: expected weights of at least 0, one of them more; match: at least 0"
            )
        if self.depth_gradient == "normal":
            raise ValueError("depth_gradient: normals are for points; expected grad or grad_conf")
        if self.valid_range >= 1:
            raise ValueError(
                f"valid_range: expected a quantile under 1, or at most 0 for none, found {self.valid_range}"
            )

    @property
    def heads(self) -> tuple[str, ...]:
        return tuple(head for head in HEADS if getattr(self, head, 0) > 0)


@dataclass(frozen=True)
class Normalizer:
    """Counts over a rank's whole batch; those of pixels are tensors on the device."""

    views: int
    scaled_views: Tensor  # of the scenes with a defined scale
    valid: Tensor  # pixels
    gate: Tensor  # 1.0 if there are enough valid pixels, else 0.0
    valid_at: list[Tensor]  # pixels at each scale of the gradient term
    normals_at: list[Tensor]  # pairs of a pixel and a normal at each scale of the normal term
    matches: Tensor  # pairs of a valid pixel and another view


def normalizer_of(batch: Batch, config: LossConfig) -> Normalizer:
    mask = batch["mask"]  # [B, S, H, W]
    scenes, views = mask.shape[:2]
    valid = mask.sum()
    normals = []
    if config.point > 0 and config.point_gradient == "normal":
        normals = [normal_masks(subsample(mask, s)).sum().clamp(min=1) for s in range(NORMAL_SCALES)]
    return Normalizer(
        views=scenes * views,
        scaled_views=(batch["has_scale"].sum() * views).clamp(min=1),
        valid=valid.clamp(min=1),
        gate=(valid >= MIN_VALID).float(),
        valid_at=[subsample(mask, s).sum().clamp(min=1) for s in range(GRADIENT_SCALES)],
        normals_at=normals,
        matches=(valid * (views - 1)).clamp(min=1),
    )


def losses(predictions: dict[str, Any], batch: Batch, normalizer: Normalizer, config: LossConfig) -> dict[str, Tensor]:
    """The terms of a chunk of scenes, scalars: loss_objective and what it is the sum of.

    predictions: what vggt.VGGT returns for the chunk; batch: its part of what train.objective.targets.prepare returns;
    normalizer: that of the batch that it is a chunk of.
    """
    terms: dict[str, Tensor] = {}
    objective = torch.zeros((), device=batch["mask"].device)
    if config.camera > 0:
        terms |= camera_loss(predictions["pose_enc_list"], batch, normalizer, config)
        objective = objective + config.camera * terms["loss_camera"]
    dense = (
        ("depth", config.depth, config.depth_gradient, "depth", "depth"),
        ("point", config.point, config.point_gradient, "world_points", "points"),
    )
    for name, weight, gradient, predicted, target in dense:
        if weight > 0:
            truth = batch[target] if name == "point" else batch[target][..., None]
            conf = predictions[f"{predicted}_conf"]
            part = dense_loss(
                predictions[predicted], conf, truth, batch["mask"], normalizer, gradient, config.valid_range
            )
            terms |= {f"loss_{term}_{name}": value for term, value in part.items()}
            objective = objective + weight * torch.stack(list(part.values())).sum()
    if "matching_logits" in predictions:  # in training only
        terms["loss_match"] = match_loss(predictions["matching_logits"], batch) / normalizer.matches
        objective = objective + config.match * terms["loss_match"]
    return {OBJECTIVE: objective} | terms


def needs_scale(term: str) -> bool:
    """Whether a term is 0 without scenes of a defined scale, which would pass for perfect."""
    return term in ("loss_T", "loss_match") or (term.startswith("loss_") and term.endswith(("_depth", "_point")))


def camera_loss(encodings: list[Tensor], batch: Batch, normalizer: Normalizer, config: LossConfig) -> dict[str, Tensor]:
    """Encodings of each of R iterations [B, S, 9] against the true cameras: loss_camera, loss_T, loss_R, loss_FL."""
    height, width = batch["images"].shape[-2:]
    truth = encode_pose(batch["extrinsics"], batch["intrinsics"], height, width)
    error = torch.stack(encodings) - truth  # [R, B, S, 9]
    rounds = len(encodings)
    weights = ITERATION_DECAY ** torch.arange(rounds - 1, -1, -1, device=truth.device) / rounds
    totals: dict[str, Tensor] = {}
    for name, part in (("loss_T", slice(0, 3)), ("loss_R", slice(3, 7)), ("loss_FL", slice(7, 9))):
        group, count = error[..., part], normalizer.views
        view = group.abs() if config.camera_norm == "l1" else group.norm(dim=-1, keepdim=True)
        if name == "loss_T":
            view = torch.where(batch["has_scale"][:, None, None], view.clamp(max=MAX_ERROR), 0)
            count = normalizer.scaled_views
        totals[name] = (view.mean(-1).sum((1, 2)) * weights).sum() / count
    total = totals["loss_T"] + totals["loss_R"] + FOV_WEIGHT * totals["loss_FL"]
    return {"loss_camera": total} | totals


def dense_loss(
    predicted: Tensor,
    conf: Tensor,
    truth: Tensor,
    mask: Tensor,
    normalizer: Normalizer,
    gradient: str,
    valid_range: float,
) -> dict[str, Tensor]:
    """predicted, truth [B, S, H, W, C], conf and mask [B, S, H, W] -> terms conf, reg, grad."""
    error = (truth - predicted).norm(dim=-1) if truth.shape[-1] > 1 else (truth - predicted).abs()[..., 0]
    fraction = normalizer.gate * mask.sum() / normalizer.valid
    weighted = error * conf - CONFIDENCE_WEIGHT * conf.log()
    if gradient == "normal":
        smooth = normal_term(predicted, truth, mask, normalizer.normals_at)
    else:
        smooth = gradient_term(predicted - truth, mask, normalizer.valid_at, conf if gradient == "grad_conf" else None)
    return {
        "conf": fraction * filtered_mean(weighted, mask, valid_range),
        "reg": fraction * filtered_mean(error, mask, valid_range),
        "grad": normalizer.gate * smooth,
    }


def filtered_mean(values: Tensor, mask: Tensor, valid_range: float) -> Tensor:
    """The mean of the masked values below their quantile valid_range (nearest rank), or of all if it is <= 0.

    With over MIN_FILTERED values, values are clamped; they are filtered only if over MIN_FILTERED remain.
    """
    count = mask.sum()
    if valid_range <= 0:
        return torch.where(mask, values, 0).sum() / count.clamp(min=1)
    clamped = values.clamp(max=MAX_ERROR)
    # The quantile lies among so many of the largest values, however many are valid: their number is known here.
    most = math.floor((1 - valid_range) * (values.numel() - 1) + 0.5) + 1
    largest = clamped.detach().masked_fill(~mask, -torch.inf).flatten().topk(most).values
    last = count - 1
    rank_from_top = (last - (valid_range * last.double()).round().long()).clamp(0, most - 1)
    # Not largest[rank_from_top]: a single index is fetched by the host.
    kept = mask & (clamped < largest.index_select(0, rank_from_top[None]))
    enough = (count > MIN_FILTERED) & (kept.sum() > MIN_FILTERED)
    kept = torch.where(enough, kept, mask)
    values = torch.where(count > MIN_FILTERED, clamped, values)
    return torch.where(kept, values, 0).sum() / kept.sum().clamp(min=1)


def subsample(x: Tensor, scale: int) -> Tensor:
    """Every 2^scale-th row and column of [B, S, H, W, ...]."""
    return x[:, :, :: 2**scale, :: 2**scale]


def gradient_term(error: Tensor, mask: Tensor, counts: list[Tensor], conf: Tensor | None) -> Tensor:
    """Differences of the error [B, S, H, W, C] between neighbors that are both valid, at several scales.

    conf [B, S, H, W] weights each difference by the confidence of its right or lower pixel.
    """
    total = error.new_zeros(())
    for scale, count in enumerate(counts):
        e, m = subsample(error, scale), subsample(mask, scale)[..., None]
        c = None if conf is None else subsample(conf, scale)[..., None]
        for axis in (2, 3):
            size = e.shape[axis]
            later, earlier = (slice(1, size), slice(0, size - 1))
            pick = (slice(None),) * axis
            difference = (e[(*pick, later)] - e[(*pick, earlier)]).abs().clamp(max=MAX_ERROR)
            difference = torch.where(m[(*pick, later)] & m[(*pick, earlier)], difference, 0)
            if c is not None:
                weight = c[(*pick, later)]
                difference = difference * weight - CONFIDENCE_WEIGHT * weight.log()
            total = total + difference.sum() / (count * error.shape[-1])
    return total / len(counts)


def neighbors(x: Tensor) -> list[Tensor]:
    """The upper, left, lower and right neighbor of each pixel of [B, S, H, W, ...], zero beyond the border."""
    up, left = torch.zeros_like(x), torch.zeros_like(x)
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    up[:, :, 1:], left[:, :, :, 1:] = x[:, :, :-1], x[:, :, :, :-1]
    down[:, :, :-1], right[:, :, :, :-1] = x[:, :, 1:], x[:, :, :, 1:]
    return [up, left, down, right]


def normal_masks(mask: Tensor) -> Tensor:
    """Where each of the four normals of a pixel exists: [4, B, S, H, W]."""
    around = neighbors(mask)
    return torch.stack([mask & around[i] & around[(i + 1) % 4] for i in range(4)])


def normals(points: Tensor) -> Tensor:
    """Unit normals of each pixel's four corners, up x left, left x down, ...: [4, B, S, H, W, 3]."""
    rays = [neighbor - points for neighbor in neighbors(points)]
    crosses = torch.stack([torch.linalg.cross(rays[i], rays[(i + 1) % 4]) for i in range(4)])
    return torch.nn.functional.normalize(crosses, dim=-1)


def normal_term(predicted: Tensor, truth: Tensor, mask: Tensor, counts: list[Tensor]) -> Tensor:
    """1 - cos between predicted and true normals of point maps [B, S, H, W, 3], at several scales."""
    total = predicted.new_zeros(())
    for scale, count in enumerate(counts):
        exists = normal_masks(subsample(mask, scale))
        cosine = (normals(subsample(predicted, scale)) * normals(subsample(truth, scale))).sum(-1)
        total = total + torch.where(exists, 1 - cosine, 0).sum() / count
    return total / len(counts)
