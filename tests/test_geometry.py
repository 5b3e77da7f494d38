from __future__ import annotations

import math

import pytest
import torch
from golden_figures import GOLDEN, load_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt.geometry import (
    compose_se3,
    decode_pose,
    encode_pose,
    invert_se3,
    quaternion_to_rotation,
    rotation_to_quaternion,
    transform_points,
    unproject,
)

unit = st.floats(-1, 1, allow_nan=False)
angles = st.one_of(st.floats(0, math.pi), st.floats(math.pi - 1e-6, math.pi), st.floats(0, 1e-6))


def rotation(axis, angle):
    """Rodrigues' formula in float64."""
    x, y, z = axis
    k = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k


@given(st.tuples(unit, unit, unit).filter(lambda a: math.hypot(*a) > 0.1), angles)
@settings(max_examples=200, deadline=None)
def test_quaternions_give_back_every_rotation(axis, angle):
    axis = [a / math.hypot(*axis) for a in axis]
    r = rotation(axis, angle)
    q = rotation_to_quaternion(r)
    assert q[3] >= 0
    assert q.norm().item() == pytest.approx(1, abs=1e-12)
    assert (quaternion_to_rotation(q) - r).abs().max() < 1e-9


@given(st.lists(unit, min_size=4, max_size=4).filter(lambda q: math.hypot(*q) > 0.1), st.floats(0.1, 10))
@settings(max_examples=100, deadline=None)
def test_quaternions_of_any_length_are_rotations(q, scale):
    r = quaternion_to_rotation(torch.tensor(q, dtype=torch.float64) * scale)
    assert (r @ r.T - torch.eye(3)).abs().max() < 1e-9
    assert torch.linalg.det(r).item() == pytest.approx(1, abs=1e-9)


def test_pose_encoding_equals_published():
    g = load_tensors(GOLDEN / "pose_encoding.npz")
    height, width = g["image_hw"].tolist()
    encoding = encode_pose(g["extrinsics"], g["intrinsics"], height, width)
    assert (encoding - g["pose_enc"]).abs().max() < 1e-6
    extrinsics, intrinsics = decode_pose(encoding, height, width)
    assert (extrinsics - g["back_extrinsics"]).abs().max() < 1e-6
    assert (intrinsics - g["back_intrinsics"]).abs().max() < 1e-4


def test_inverse_undoes_a_pose():
    r = torch.stack([rotation([0, 0, 1], 0.3), rotation([0.6, 0.8, 0], 3.1)])
    pose = torch.cat([r, torch.randn(2, 3, 1, dtype=torch.float64)], dim=-1)
    identity = torch.eye(4, dtype=torch.float64)[:3].expand(2, 3, 4)
    assert (compose_se3(invert_se3(pose), pose) - identity).abs().max() < 1e-12
    assert (compose_se3(pose, invert_se3(pose)) - identity).abs().max() < 1e-12


def test_unprojected_pixels_project_back():
    k = torch.tensor([[50.0, 0, 9.5], [0, 40.0, 7.25], [0, 0, 1]], dtype=torch.float64)
    pose = torch.cat([rotation([0, 1, 0], 0.7), torch.tensor([[0.1], [2], [3]])], dim=1)
    depth = 1 + torch.rand(16, 20, dtype=torch.float64)
    world = transform_points(invert_se3(pose), unproject(depth, k))
    pixels = transform_points(pose, world) @ k.T
    assert (pixels[..., 2] - depth).abs().max() < 1e-12
    expected = torch.stack(torch.meshgrid(torch.arange(20), torch.arange(16), indexing="xy"), dim=-1)
    assert (pixels[..., :2] / pixels[..., 2:] - expected).abs().max() < 1e-9
