"""Errors of cameras."""

from __future__ import annotations

import torch
from torch import Tensor

from vggt.geometry import encode_pose, relative_pose

ACCURACY_LIMITS = (5, 15, 30)  # degrees
AUC_LIMITS = (3, 5, 15, 30)


def pair_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of all relative poses i < j of camera-from-world poses [..., S, 3, 4], in degrees: two of [..., P]."""
    i, j = torch.triu_indices(*[truth.shape[-3]] * 2, offset=1, device=truth.device)
    relative = [relative_pose(x[..., i, :, :], x[..., j, :, :]) for x in (predicted, truth)]
    return relative_errors(*relative)


def relative_errors(predicted: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of relative poses [..., 3, 4] in degrees, two of [...].

    The first is the angle of the rotation between predicted and true rotation. The second is the angle between the
    translations, folded to at most 90 degrees, as their sign is ignored; a zero translation counts as 90 degrees.
    (As in the published evaluation, see tests/golden.) A global similarity changes neither.
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


def pose_metrics(rotation: Tensor, translation: Tensor) -> dict[str, Tensor]:
    """Means, accuracies and AUCs [...] of pair errors [..., P] in degrees; an AUC takes the larger error of a pair."""
    worse = torch.maximum(rotation, translation)  # NaN if either is
    found = {f"auc_{t}": pose_auc(worse, t) for t in AUC_LIMITS}
    for name, errors in (("rotation", rotation), ("translation", translation)):
        found[f"{name}_deg"] = errors.mean(-1)
        found |= {f"{name}_acc_{t}": accuracy(errors, t) for t in ACCURACY_LIMITS}
    return found


def accuracy(errors: Tensor, limit: float) -> Tensor:
    """The fraction of errors [..., N] below the limit: [...], NaN if one of them is."""
    return torch.where(errors.isnan().any(-1), torch.nan, (errors < limit).double().mean(-1))


def pose_auc(errors: Tensor, limit: int) -> Tensor:
    """Area under the fraction of errors [..., N] below an angle, 0 to `limit` degrees, in 1-degree bins: [...].

    The mean over t = 1 .. limit of the fraction of errors below t; the last also counts those equal to t (as in
    numpy's histogram, which the published evaluation uses). NaN if an error is.
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
