"""Errors of depth maps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

DELTA = 1.25
Alignment = Literal["image", "scene", "none"]


def depth_metrics(predicted: Tensor, truth: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """depth_errors [B] under each alignment, by the names in METRICS."""
    found = {}
    alignments: dict[str, Alignment] = {"": "scene", "_image": "image", "_raw": "none"}
    for suffix, align in alignments.items():
        errors = depth_errors(predicted, truth, mask, align)
        found |= {f"depth_{name}{suffix}": value for name, value in errors.items()}
    return found


def depth_errors(predicted: Tensor, truth: Tensor, mask: Tensor, align: Alignment) -> dict[str, Tensor]:
    """Errors over the masked pixels of each scene, of depths [B, S, H, W] and mask bool: [B] each, NaN without a pixel.

    abs_rel: mean |p - t| / t; rmse: root of the mean (p - t)^2; delta_i: fraction of max(p / t, t / p) < 1.25^i, after
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
