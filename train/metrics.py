"""Figures that mean something outside the training: pose errors in degrees, AUC, relative depth error."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt.geometry import relative_pose


def pair_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of all relative poses i < j between camera-from-world poses [S, 3, 4], in degrees: two of [S(S-1)/2].

    The first is the angle of the rotation between predicted and true relative rotation; the second the angle
    between the translations, folded to at most 90 degrees, as their sign is not told apart.
    """
    i, j = torch.triu_indices(len(truth), len(truth), offset=1)
    relative_p, relative_t = (relative_pose(x[i], x[j]) for x in (predicted, truth))
    product = relative_p[:, :, :3].transpose(1, 2) @ relative_t[:, :, :3]
    cosine = (product.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2
    # atan2 keeps small angles that acos would lose.
    axis = torch.stack([product[:, a, b] - product[:, b, a] for a, b in ((2, 1), (0, 2), (1, 0))], dim=1)
    rotation = torch.atan2(axis.norm(dim=1) / 2, cosine)
    a, b = relative_p[:, :, 3], relative_t[:, :, 3]
    translation = torch.atan2(torch.linalg.cross(a, b).norm(dim=1), (a * b).sum(1).abs())
    return rotation.rad2deg(), translation.rad2deg()


def pose_auc(errors: Tensor, threshold: int) -> float:
    """Area under the share of errors [N] (degrees) below an angle, from 0 to `threshold`, in bins of one degree."""
    counts = torch.histc(errors.float(), bins=threshold, min=0, max=threshold)
    return float((counts.cumsum(0) / len(errors)).mean())


def depth_abs_rel(predicted: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean |predicted - truth| / truth over the masked pixels of a scene, after one scale a scene (by the medians)."""
    p, t = predicted[mask], truth[mask]
    return ((p * (t.median() / p.median()) - t).abs() / t).mean()
