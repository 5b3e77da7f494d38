from __future__ import annotations

import gzip
import json
import subprocess

import cv2
import numpy as np
import pytest
from conftest import BIN, run_command, vggt_prep

from prep.synth.orbit import landscape_and_portrait, make_orbit
from prep.synth.render import Box, Camera, Ground, Sphere, look_at, render
from prep.synth.rooms import HELD_OUT_ORBIT
from prep.synth.synth import FAMILIES, stereo_depth
from prep.synth.turntable import make_scene


def distance_to_surface(scene, points):
    """Distance of points [N, 3] to the nearest surface, from the definitions of the shapes alone, in float64."""
    distances = []
    for shape in scene.shapes:
        if isinstance(shape, Ground):
            beyond = np.maximum(np.hypot(points[:, 0], points[:, 1]) - shape.radius, 0)
            distances.append(np.hypot(points[:, 2], beyond))
        elif isinstance(shape, Sphere):
            distances.append(np.abs(np.linalg.norm(points - shape.center, axis=1) - shape.radius))
        else:
            assert isinstance(shape, Box)
            c, s = np.cos(shape.yaw), np.sin(shape.yaw)
            x, y, z = (points - shape.center).T
            local = np.stack([c * x + s * y, -s * x + c * y, z], axis=1)
            q = np.abs(local) - shape.half_size
            outside = np.linalg.norm(np.maximum(q, 0), axis=1)
            distances.append(np.abs(outside + np.minimum(q.max(axis=1), 0)))
    return np.min(distances, axis=0)


def unproject(depth, camera):
    """World points [N, 3] of the pixels with depth, in float64, by the definition of a pinhole camera."""
    rows, columns = np.nonzero(depth > 0)
    rays = np.linalg.solve(camera.intrinsics, np.stack([columns, rows, np.ones(len(rows))]))
    in_camera = rays * depth[rows, columns].astype(np.float64)
    rotation, translation = camera.cam_from_world[:, :3], camera.cam_from_world[:, 3:]
    return (rotation.T @ (in_camera - translation)).T


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_rendered_depth_lands_on_the_analytic_surface(family, index):
    rng = np.random.default_rng((5, index))
    scene = family.make_scene(rng, family.categories[index % len(family.categories)])
    for camera in family.make_cameras(rng, unit=scene.unit, frames=3):
        image, depth, cosine = render(scene, camera)
        assert image.shape == (camera.height, camera.width, 3)
        exact = np.where(np.isfinite(depth), depth, 0)
        assert (exact > 0).mean() > 0.5
        assert distance_to_surface(scene, unproject(exact, camera)).max() < 2e-4 * scene.unit
        # As written: half floats, 11 bits; what the mask lets through is no worse than their rounding.
        bits, mask = stereo_depth(rng, depth, cosine)
        kept = np.where(mask > 128, bits.view(np.float16).astype(np.float32), 0)
        assert 0.3 < (kept > 0).mean() < 0.97
        limit = np.abs(kept[kept > 0]).max() * 2**-11 * 2
        assert distance_to_surface(scene, unproject(kept, camera)).max() < limit
        wrong = (mask <= 128) & (bits > 0)
        assert wrong.any()  # there is something that the mask must keep out


def test_a_rendered_point_appears_where_the_camera_projects_it():
    """Pixel centers are at whole numbers, x right, y down: a small sphere is seen around its projected center."""
    texture = np.ones((8, 8, 3), np.float32)
    sphere = Sphere(center=np.float32([0.3, -0.2, 0.4]), radius=0.05, texture=texture, tile=1.0)
    scene = make_scene(np.random.default_rng(0), "balls")
    scene = type(scene)(shapes=(sphere,), light=scene.light, unit=1)
    k = np.array([[200.0, 0, 75.3], [0, 210.0, 61.8], [0, 0, 1]])
    camera = Camera(
        cam_from_world=look_at(np.array([2.0, 1, 1.5]), np.zeros(3), 0.3), intrinsics=k, height=120, width=160
    )
    _, depth, _ = render(scene, camera)
    rows, columns = np.nonzero(np.isfinite(depth))
    center = k @ (camera.cam_from_world @ [0.3, -0.2, 0.4, 1])
    assert columns.mean() == pytest.approx(center[0] / center[2], abs=0.3)
    assert rows.mean() == pytest.approx(center[1] / center[2], abs=0.3)


def test_rooms_for_testing_are_walked_around_by_120_degrees():
    cameras = make_orbit(np.random.default_rng(0), HELD_OUT_ORBIT, 2.0, 24, landscape_and_portrait(60))
    assert {(camera.height, camera.width) for camera in cameras} <= {(60, 80), (80, 60)}
    centers = np.array([-camera.cam_from_world[:, :3].T @ camera.cam_from_world[:, 3] for camera in cameras])
    azimuth = np.unwrap(np.arctan2(centers[:, 1], centers[:, 0]))
    assert abs(np.degrees(azimuth[-1] - azimuth[0])) == pytest.approx(120, abs=5)


def test_captures_are_in_the_layout_of_co3d(captures):
    names = sorted(path.name for path in (captures / "annotations").iterdir())
    assert any(name.endswith("_train.jgz") for name in names)
    assert any(name.endswith("_test.jgz") for name in names)
    sizes = set()
    for name in names:
        for sequence, frames in json.loads(gzip.decompress((captures / "annotations" / name).read_bytes())).items():
            assert len(frames) == 24
            category = name.rsplit("_", 1)[0]
            folder = captures / "co3d" / category / sequence
            for frame in frames:
                image = cv2.imread(str(captures / "co3d" / frame["filepath"]))
                stem = frame["filepath"].rsplit("/", 1)[1].removesuffix(".jpg")
                depth = cv2.imread(str(folder / "depths" / f"{stem}.jpg.geometric.png"), cv2.IMREAD_UNCHANGED)
                mask = cv2.imread(str(folder / "depth_masks" / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
                assert image.shape[:2] == depth.shape == mask.shape
                assert depth.dtype == np.uint16
                rotation = np.array(frame["extri"])[:, :3]
                assert np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-12
                sizes.add(depth.shape)
    assert sizes == {(240, 320), (320, 240)}  # landscape and portrait


def test_the_same_seed_gives_the_same_files_with_any_number_of_workers(tmp_path):
    trees = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        done = vggt_prep("synth", "--out", out, "--scenes", 8, "--frames", 1, "--seed", 3, "--workers", workers)
        assert done.returncode == 0, done.stderr
        trees.append({str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
    assert trees[0] == trees[1]
    again = vggt_prep("synth", "--out", tmp_path / "1", "--scenes", 8, "--frames", 1, "--seed", 3)
    assert again.returncode == 0
    assert "rendered before" in again.stdout
    other = vggt_prep("synth", "--out", tmp_path / "1", "--scenes", 8, "--frames", 1, "--seed", 4)
    assert other.returncode == 1
    assert "not this rendering" in other.stderr


def test_of_two_renderings_into_one_place_the_second_is_refused_and_the_first_finishes(tmp_path):
    options = ("synth", "--out", tmp_path / "out", "--scenes", 12, "--frames", 8)
    command = [BIN / "vggt-prep", *options]
    first, second = (
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    ends = [process.communicate(timeout=100) for process in (first, second)]
    codes = sorted((first.returncode, second.returncode))
    refused = [errors for (_, errors), process in zip(ends, (first, second), strict=True) if process.returncode]
    assert codes[0] == 0, ends
    assert all("another vggt-prep synth is at work there" in errors for errors in refused), ends
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = run_command("vggt-prep", *options)
    assert "rendered before" in again.stdout


def test_an_interrupted_rendering_is_made_again(tmp_path):
    left = tmp_path / ".out.unfinished-synth" / "content" / "co3d"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"x")
    done = run_command("vggt-prep", "synth", "--out", tmp_path / "out", "--scenes", 8, "--frames", 1)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("half.jpg"))
    (tmp_path / "out" / "synth.json").write_text("")
    again = run_command("vggt-prep", "synth", "--out", tmp_path / "out", "--scenes", 8, "--frames", 1)
    assert "exists, and is not this rendering" in again.stderr


def test_a_link_to_an_empty_folder_is_filled_and_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    done = vggt_prep("synth", "--out", tmp_path / "out", "--scenes", 8, "--frames", 1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "synth.json").is_file()
