"""How much two views see of each other, against scenes where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from shards.overlap import View, views_of

HEIGHT, WIDTH, FOCAL = 300, 400, 350.0
K = np.array([[FOCAL, 0, (WIDTH - 1) / 2], [0, FOCAL, (HEIGHT - 1) / 2], [0, 0, 1]])


def camera(x=0.0, z=0.0, turned=0.0):
    """Camera-from-world of a camera at (x, 0, z), turned about the vertical, in degrees."""
    angle = np.radians(turned)
    rotation = np.array([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]])
    return np.column_stack([rotation, -rotation @ [x, 0, z]])


def rays(extrinsics):
    """Directions in the world [H, W, 3] of unit depth along the axis."""
    v, u = np.mgrid[:HEIGHT, :WIDTH]
    in_camera = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones((HEIGHT, WIDTH))], axis=-1)
    return in_camera @ extrinsics[:, :3]


def wall_depth(extrinsics, box=False):
    """Depth of the wall z = 4, and of a screen |x| < 0.5 at z = 2 before it, as half floats: [H, W]."""
    center, directions = -extrinsics[:, :3].T @ extrinsics[:, 3], rays(extrinsics)
    with np.errstate(divide="ignore"):
        depth = (4 - center[2]) / directions[..., 2]
        screen = (2 - center[2]) / directions[..., 2]
    if box:
        hit = (screen > 0) & (np.abs(center[0] + screen * directions[..., 0]) < 0.5)
        depth = np.where(hit, screen, depth)
    return np.where(depth > 0, depth, 0).astype(np.float16)


def view(extrinsics, depth, scale=1.0):
    return View(depth, (HEIGHT, WIDTH), np.column_stack([extrinsics[:, :3], extrinsics[:, 3] * scale]), K)


def overlap(*views):
    return float(views_of(views).overlaps(np.array([[0, 1]]))[0])


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_of_a_wall_seen_from_two_places_the_overlap_is_known(shift):
    first, second = camera(), camera(shift)
    expected = max(0.0, 1 - shift * FOCAL / 4 / WIDTH)
    views = [view(e, wall_depth(e)) for e in (first, second)]
    assert overlap(*views) == pytest.approx(expected, abs=0.01)


def test_a_close_view_and_a_wide_one_overlap_as_little_as_the_wide_one_sees_of_the_close_one():
    near, far = camera(z=2.0), camera()
    views = view(far, wall_depth(far)), view(near, wall_depth(near))
    seen = views_of(views)
    assert seen.seen(np.array([1]), 0)[0] == pytest.approx(1, abs=0.01)
    assert overlap(*views) == pytest.approx(0.25, abs=0.02)
    assert overlap(*views[::-1]) == overlap(*views)


def test_back_to_back_views_see_nothing_of_each_other():
    depth = np.full((HEIGHT, WIDTH), 3, np.float16)
    assert overlap(view(camera(), depth), view(camera(turned=180), depth)) == 0


def test_what_something_hides_is_not_seen():
    """Of the wall that the first view sees, the screen hides the second one's part; the screen itself is seen."""
    first, second = camera(), camera(0.5)
    hidden = views_of([view(first, wall_depth(first)), view(second, wall_depth(second, box=True))])
    # The screen is 1 wide at a distance of 2, so it covers 2 of the wall, all of it inside the first view.
    both = 1 - 0.5 * FOCAL / 4 / WIDTH
    covered = 2 * FOCAL / 4 / WIDTH
    assert hidden.seen(np.array([0]), 1)[0] == pytest.approx(both - covered, abs=0.03)


@pytest.mark.parametrize("scale", [1e-3, 0.37, 1000.0])
def test_a_similarity_changes_nothing(scale):
    first, second = camera(), camera(1.2, 0.4, 10)
    one = [view(e, wall_depth(e, box=True)) for e in (first, second)]
    turn = camera(5.0, -3.0, 77)
    other = []
    for e in (first, second):
        moved = np.column_stack([e[:, :3] @ turn[:, :3].T, e[:, 3] - e[:, :3] @ turn[:, :3].T @ turn[:, 3]])
        other.append(view(moved, wall_depth(e, box=True).astype(np.float64) * scale, scale))
    assert overlap(*other) == pytest.approx(overlap(*one), abs=1 / 255)


def test_a_few_points_tell_what_dense_depth_does():
    rng = np.random.default_rng(0)
    cameras = [camera(x, turned=turned) for x, turned in ((0, 0), (0.6, 5), (1.5, -5), (2.5, 10))]
    dense = [view(e, wall_depth(e)) for e in cameras]
    points = np.stack([rng.uniform(-6, 8, 12000), rng.uniform(-2, 2, 12000), np.full(12000, 4.0)])
    sparse = []
    for e in cameras:
        x, y, z = e[:, :3] @ points + e[:, 3:]
        u, v = np.rint(x / z * FOCAL + K[0, 2]).astype(int), np.rint(y / z * FOCAL + K[1, 2]).astype(int)
        inside = (z > 0) & (u >= 0) & (v >= 0) & (u < WIDTH) & (v < HEIGHT)
        depth = np.zeros((HEIGHT, WIDTH), np.float16)
        depth[v[inside], u[inside]] = z[inside]
        assert 0.005 < (depth > 0).mean() < 0.05
        sparse.append(view(e, depth))
    pairs = np.stack(np.triu_indices(4, 1), axis=1)
    assert views_of(sparse).overlaps(pairs) == pytest.approx(views_of(dense).overlaps(pairs), abs=0.08)


def test_noisy_depth_agrees_with_itself():
    rng = np.random.default_rng(0)
    cameras = [camera(x) for x in np.linspace(0, 1, 6)]
    pairs = np.array([[0, 5], [0, 1]])
    exact = views_of(view(e, wall_depth(e)) for e in cameras).overlaps(pairs)
    noisy = [view(e, (wall_depth(e) * rng.normal(1, 0.02, (HEIGHT, WIDTH))).astype(np.float16)) for e in cameras]
    assert views_of(noisy).overlaps(pairs) == pytest.approx(exact, abs=0.05)


def test_without_depth_the_cameras_give_a_guess():
    """Cameras in a circle that look at its center: the axes say how far it is."""
    cameras = []
    for turned in (0, 15, 30, 90, 180):
        angle = np.radians(turned)
        cameras.append(camera(-4 * np.sin(angle), 4 - 4 * np.cos(angle), turned))
    made = views_of(view(e, None) for e in cameras)
    assert not made.has_depth.any()
    values = made.overlaps(np.array([[0, 1], [0, 2], [0, 3]]))
    assert values[0] > 0.7
    assert (np.diff(values) < 0).all()
    assert overlap(view(cameras[0], None), view(camera(turned=180), None)) == 0  # back to back
