"""Cameras as numbers. Axes: OpenCV (x right, y down, z forward); extrinsics: camera-from-world [R|t]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def invert_se3(pose: Tensor) -> Tensor:
    """The inverse of [R|t], by transposing R: [..., 3, 4] -> [..., 3, 4]."""
    rotation = pose[..., :3].transpose(-1, -2)
    return torch.cat([rotation, -rotation @ pose[..., 3:]], dim=-1)


def compose_se3(a: Tensor, b: Tensor) -> Tensor:
    """a after b: [..., 3, 4] x [..., 3, 4] -> [..., 3, 4]."""
    rotation = a[..., :3] @ b[..., :3]
    return torch.cat([rotation, a[..., :3] @ b[..., 3:] + a[..., 3:]], dim=-1)


def relative_pose(a: Tensor, b: Tensor) -> Tensor:
    """Camera a from camera b, of camera-from-world poses: [..., 3, 4] x [..., 3, 4] -> [..., 3, 4]."""
    return compose_se3(a, invert_se3(b))


def rotation_to_quaternion(rotation: Tensor) -> Tensor:
    """Rotations [..., 3, 3] -> unit quaternions x y z w [..., 4], w >= 0.

    The largest of the four components is found first and the others divided by it: values and gradients are stable
    at every angle, 180 degrees included (Shepperd 1978, Journal of Guidance and Control 1, 223). At 180 degrees
    itself, where q and -q are the same rotation with w = 0, either may come.
    """
    r = rotation
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    squares = torch.stack([*(1 + 2 * r[..., i, i] - trace for i in range(3)), 1 + trace], dim=-1)  # 4 * q^2
    (xy, xz, yz) = (r[..., i, j] + r[..., j, i] for i, j in ((0, 1), (0, 2), (1, 2)))
    (wx, wy, wz) = (r[..., i, j] - r[..., j, i] for i, j in ((2, 1), (0, 2), (1, 0)))
    x2, y2, z2, w2 = squares.unbind(-1)
    # Row i: 4 * q_i * (x, y, z, w).
    rows = torch.stack(
        [
            torch.stack([x2, xy, xz, wx], dim=-1),
            torch.stack([xy, y2, yz, wy], dim=-1),
            torch.stack([xz, yz, z2, wz], dim=-1),
            torch.stack([wx, wy, wz, w2], dim=-1),
        ],
        dim=-2,
    )
    best = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    quaternion = F.normalize(rows.gather(-2, best).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def quaternion_to_rotation(quaternion: Tensor) -> Tensor:
    """Quaternions x y z w of any length but 0 [..., 4] -> rotations [..., 3, 3]; differentiable."""
    x, y, z, w = quaternion.unbind(-1)
    s = 2 / (quaternion * quaternion).sum(-1)
    rows = [
        [1 - s * (y * y + z * z), s * (x * y - z * w), s * (x * z + y * w)],
        [s * (x * y + z * w), 1 - s * (x * x + z * z), s * (y * z - x * w)],
        [s * (x * z - y * w), s * (y * z + x * w), 1 - s * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, height: int, width: int) -> Tensor:
    """Camera-from-world [..., 3, 4] and pixel intrinsics [..., 3, 3] -> pose encodings [..., 9].

    Translation 3, quaternion x y z w 4, vertical and horizontal field of view in radians. The principal point is
    not encoded: the image is taken to be centered on it. Differentiable in both arguments.
    """
    fov_y = 2 * torch.atan(height / 2 / intrinsics[..., 1, 1])
    fov_x = 2 * torch.atan(width / 2 / intrinsics[..., 0, 0])
    quaternion = rotation_to_quaternion(extrinsics[..., :3])
    return torch.cat([extrinsics[..., 3], quaternion, fov_y[..., None], fov_x[..., None]], dim=-1)


def decode_pose(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pose encodings [..., 9] -> camera-from-world [..., 3, 4], intrinsics [..., 3, 3] in pixels.

    The principal point is (width / 2, height / 2), as in the published code: half a pixel off the center in this
    project's convention, where (0, 0) is the center of the first pixel. Differentiable; a field of view of 0 has
    an infinite focal length.
    """
    extrinsics = torch.cat([quaternion_to_rotation(encoding[..., 3:7]), encoding[..., :3, None]], dim=-1)
    fov_y, fov_x = encoding[..., 7], encoding[..., 8]
    intrinsics = encoding.new_zeros(*encoding.shape[:-1], 3, 3)
    intrinsics[..., 0, 0] = width / 2 / torch.tan(fov_x / 2)
    intrinsics[..., 1, 1] = height / 2 / torch.tan(fov_y / 2)
    intrinsics[..., 0, 2] = width / 2
    intrinsics[..., 1, 2] = height / 2
    intrinsics[..., 2, 2] = 1
    return extrinsics, intrinsics


def decode_cameras(encoding: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """As decode_pose, [..., 9] -> [..., 3, 4] and [..., 3, 3], with intrinsics as unproject takes them.

    Their (0, 0) is the center of the first pixel.
    """
    extrinsics, intrinsics = decode_pose(encoding, height, width)
    half = intrinsics.new_zeros(3, 3)
    half[:2, 2] = 0.5
    return extrinsics, intrinsics - half


def unproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth along z [..., H, W] and pixel intrinsics [..., 3, 3] -> points in the camera's frame [..., H, W, 3].

    Pixel (0, 0) is the center of the top-left pixel; points are in the units of the depth. Differentiable.
    """
    height, width = depth.shape[-2:]
    column = torch.arange(width, device=depth.device, dtype=depth.dtype)
    row = torch.arange(height, device=depth.device, dtype=depth.dtype)[:, None]
    k = intrinsics[..., None, None]
    x = (column - k[..., 0, 2, :, :]) / k[..., 0, 0, :, :]
    y = (row - k[..., 1, 2, :, :]) / k[..., 1, 1, :, :]
    x, y = torch.broadcast_tensors(x, y)
    return torch.stack([x * depth, y * depth, depth], dim=-1)


def transform_points(pose: Tensor, points: Tensor) -> Tensor:
    """[R|t] [..., 3, 4] applied to [..., H, W, 3]."""
    # Written out: GPUs may round what goes into a matrix product to 10 bits.
    columns = pose[..., None, None, :, :].unbind(-1)
    return sum((r * p[..., None] for r, p in zip(columns, points.unbind(-1), strict=False)), columns[3])
