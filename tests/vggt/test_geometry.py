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
    relative_pose,
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


poses = st.tuples(st.tuples(unit, unit, unit).filter(lambda a: math.hypot(*a) > 0.1), angles, st.tuples(*[unit] * 3))


def pose(axis, angle, translation):
    axis = [a / math.hypot(*axis) for a in axis]
    return torch.cat([rotation(axis, angle), 1e3 * torch.tensor(translation).double()[:, None]], dim=1)


@given(poses, st.floats(0.2, 5), st.floats(0.2, 5))
@settings(max_examples=100, deadline=None)
def test_pose_encodings_give_back_every_camera(camera, focal_x, focal_y):
    extrinsics, (height, width) = pose(*camera), (266, 518)
    k = torch.tensor([[focal_x * width, 0, width / 2], [0, focal_y * width, height / 2], [0, 0, 1]]).double()
    encoding = encode_pose(extrinsics, k, height, width)
    again, k_again = decode_pose(encoding, height, width)
    assert encoding.dtype == again.dtype == k_again.dtype == torch.float64
    assert (again - extrinsics).abs().max() < 1e-9
    assert ((k_again - k).abs() <= 1e-9 * k.abs()).all()
    assert (encode_pose(again, k_again, height, width)[:3] - encoding[:3]).abs().max() < 1e-9


@given(poses, poses)
@settings(max_examples=100, deadline=None)
def test_relative_poses_take_one_camera_to_the_other(a, b):
    a, b = pose(*a), pose(*b)
    assert (compose_se3(relative_pose(a, b), b) - a).abs().max() < 1e-9
    assert (compose_se3(invert_se3(a), a) - torch.eye(4)[:3]).abs().max() < 1e-9


@pytest.mark.parametrize("angle", [0, 1e-9, 0.5, math.pi / 2, 2.5, math.pi - 1e-3, math.pi - 1e-6])
def test_gradients_of_rotations_are_finite_and_right_at_every_angle(angle):
    """Along the rotations: a step of the angle turns quaternion and rotation as much as their gradients say."""

    def curve(turn):
        x, y, z = (torch.tensor([2.0, -1, 2]).double() / 3).unbind()
        k = torch.stack([torch.stack(row) for row in ((0 * x, -z, y), (z, 0 * x, -x), (-y, x, 0 * x))])
        return torch.eye(3, dtype=torch.float64) + turn.sin() * k + (1 - turn.cos()) * k @ k

    at = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rotation_to_quaternion(curve(t)), at, eps=1e-7, atol=1e-5)
    quaternion = rotation_to_quaternion(curve(at)).detach().requires_grad_()
    assert torch.autograd.gradcheck(quaternion_to_rotation, quaternion)
    half = at.detach() / 2  # q = (axis sin(angle / 2), cos(angle / 2))
    gradient = torch.autograd.functional.jacobian(lambda t: rotation_to_quaternion(curve(t)), at.detach())
    expected = torch.cat([torch.tensor([2.0, -1, 2]).double() / 3 * half.cos(), -half.sin()[None]]) / 2
    assert (gradient - expected).abs().max() < 1e-9


def test_what_is_differentiable_has_the_right_gradients():
    torch.manual_seed(3)
    k = torch.tensor([[50.0, 0, 1.5], [0, 40.0, 0.8], [0, 0, 1]], dtype=torch.float64)
    camera = pose((1, 2, -1), 0.7, (1e-3, 2e-3, 3e-3))
    depth = 1 + torch.rand(2, 3, dtype=torch.float64)
    encoding = encode_pose(camera, k, 28, 42)
    for function, arguments in (
        (
            lambda t, f: encode_pose(torch.cat([camera[:, :3], t], dim=1), k * f, 28, 42),
            (camera[:, 3:], torch.ones(3, 3).double()),
        ),
        (lambda e: decode_pose(e, 28, 42), (encoding,)),
        (unproject, (depth, k)),
        (transform_points, (camera, torch.rand(2, 3, 3, dtype=torch.float64))),
        (relative_pose, (camera, pose((0, 1, 1), 2.0, (1e-3, 0, 0)))),
    ):
        assert torch.autograd.gradcheck(function, [a.clone().requires_grad_() for a in arguments])


def test_pose_encoding_equals_published():
    g = load_tensors(GOLDEN / "pose_encoding.npz")
    height, width = g["image_hw"].tolist()
    encoding = encode_pose(g["extrinsics"], g["intrinsics"], height, width)
    assert (encoding - g["pose_enc"]).abs().max() < 1e-6
    extrinsics, intrinsics = decode_pose(encoding, height, width)
    assert (extrinsics - g["back_extrinsics"]).abs().max() < 1e-6
    assert (intrinsics - g["back_intrinsics"]).abs().max() < 1e-4


def test_unprojected_pixels_project_back():
    k = torch.tensor([[50.0, 0, 9.5], [0, 40.0, 7.25], [0, 0, 1]], dtype=torch.float64)
    pose = torch.cat([rotation([0, 1, 0], 0.7), torch.tensor([[0.1], [2], [3]])], dim=1)
    depth = 1 + torch.rand(16, 20, dtype=torch.float64)
    world = transform_points(invert_se3(pose), unproject(depth, k))
    pixels = transform_points(pose, world) @ k.T
    assert (pixels[..., 2] - depth).abs().max() < 1e-12
    expected = torch.stack(torch.meshgrid(torch.arange(20), torch.arange(16), indexing="xy"), dim=-1)
    assert (pixels[..., :2] / pixels[..., 2:] - expected).abs().max() < 1e-9
