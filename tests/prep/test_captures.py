"""Captures in the layouts that people have: the same cameras and depths, whatever the layout."""

from __future__ import annotations

import base64
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pycolmap
import pytest
from conftest import vggt_prep
from golden_figures import SHARED
from layout_writers import ALL, WRITERS, rendered, write_depth, write_image
from scipy.spatial.transform import Rotation

import shards
from prep.importers.cameras import interpolated
from prep.importers.captures import CaptureOptions, Captures, Split, _assign, _last_images
from prep.importers.source import Distortion
from prep.packing.lens import Lens
from prep.packing.plan import PackError, PackOptions, make_plan
from shards.codecs import decode_depth, decode_jpeg
from shards.splits import shared_places

REAL = SHARED / "captures"
MOST = dict.fromkeys(WRITERS, 60.0) | {"tum": 13.0}  # meters that 16 bits hold


@pytest.fixture(scope="module")
def views():
    return rendered()


def pack(folder, out, *options):
    done = vggt_prep("pack", folder, "--out", out, "--test-tail", 0.5, "--min-frames", 1, "--workers", 1, *options)
    assert done.returncode == 0, done.stderr
    return shards.open(out)


def depth_of(opened, number):
    row = opened.frames[number]
    size, stored = (int(row["height"]), int(row["width"])), opened.read(number)[1]
    return np.zeros(size) if stored is None else decode_depth(stored, *size).astype(float) * row["depth_scale"]


def in_order(opened):
    """Numbers of the frames, by name."""
    return np.argsort(opened.frames["name"], kind="stable")


def relative(poses):
    """Poses relative to the first: recentering does not change them."""
    full = [np.vstack([pose, [0, 0, 0, 1]]) for pose in poses]
    return np.array([pose @ np.linalg.inv(full[0]) for pose in full])


@pytest.mark.parametrize("layout", WRITERS)
def test_cameras_and_depths_are_those_of_the_scene_in_every_layout(views, tmp_path, layout):
    WRITERS[layout](tmp_path / "capture", views)
    k = views[0].intrinsics
    camera = ",".join(map(repr, map(float, (k[0, 0], k[1, 1], k[0, 2], k[1, 2]))))
    opened = pack(tmp_path / "capture", tmp_path / "set", *(("--intrinsics", camera) if layout == "tum" else ()))
    order = in_order(opened)
    assert len(order) == len(views)
    tolerance = 1e-5 if layout == "tum" else 1e-6
    for half in (slice(0, 4), slice(4, 8)):  # the sequences of the two splits, each about its own middle
        truth = relative([view.cam_from_world for view in views[half]])
        assert np.abs(relative(opened.frames["extrinsics"][order[half]]) - truth).max() < tolerance
    for number, view in zip(order, views, strict=True):
        assert np.abs(opened.frames["intrinsics"][number] - view.intrinsics).max() < 1e-9
        found, known = depth_of(opened, number), (view.depth > 0) & (view.depth < MOST[layout])
        assert ((found > 0) == known)[view.depth < MOST[layout]].all()
        assert np.abs(found[known] / view.depth[known] - 1).max() < 2e-3
        image, _ = decode_jpeg(opened.read(number)[0])
        assert np.abs(image.astype(float) - view.image).mean() < 6


def test_smaller_images_keep_depth_and_cameras_together(views, tmp_path):
    """Points of the depth at half the size lie on the surface that is seen at full size."""
    WRITERS["frames"](tmp_path / "capture", views)
    small = pack(tmp_path / "capture", tmp_path / "small", "--short-side", 100)
    for number, view in zip(in_order(small), views, strict=True):
        row, depth = small.frames[number], depth_of(small, number)
        v, u = np.nonzero(depth)
        factor = np.array(view.depth.shape) / depth.shape
        x, y = (u + 0.5) * factor[1] - 0.5, (v + 0.5) * factor[0] - 0.5
        k = row["intrinsics"]
        ray = (u - k[0, 2]) / k[0, 0]
        assert np.allclose(ray, (x - view.intrinsics[0, 2]) / view.intrinsics[0, 0], atol=1e-6)
        near = [
            view.depth[np.rint(y + dy).astype(int), np.rint(x + dx).astype(int)]
            for dx in (-0.5, 0.4)
            for dy in (-0.5, 0.4)
        ]
        assert (np.abs(np.array(near) / depth[v, u] - 1).min(axis=0) < 2e-3).mean() > 0.999


CAMERAS = {
    "PINHOLE": [300, 305, 162, 118],
    "SIMPLE_RADIAL": [300, 160, 120, -0.15],
    "OPENCV": [300, 305, 162, 118, -0.25, 0.08, 1e-3, -2e-3],
    "OPENCV_FISHEYE": [200, 203, 158, 121, 0.05, -0.02, 0.01, -0.002],
}
NORMAL, DISTANCE = np.array([0.1, -0.2, 0.97]) / np.linalg.norm([0.1, -0.2, 0.97]), 2.0


def stripes(points):
    """A pattern on the plane, by two of the world's coordinates."""
    return 127 + 60 * np.sin(9 * points[..., 0]) + 60 * np.sin(9 * points[..., 1])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("model", CAMERAS)
def test_distorted_images_of_colmap_become_those_of_a_pinhole_camera(tmp_path, model, binary):
    """Written by pycolmap, whose camera also renders: a plane of stripes, with points on it."""
    height, width = 240, 320
    camera = pycolmap.Camera.create_from_model_name(1, model, 300.0, width, height)
    camera.params = CAMERAS[model]
    y, x = np.mgrid[:height, :width]
    pixels = np.column_stack([x.reshape(-1) + 0.5, y.reshape(-1) + 0.5]).astype(float)  # from the corner
    rays = np.column_stack([np.array(camera.cam_from_img(pixels)), np.ones(len(pixels))])
    rng = np.random.default_rng(0)
    model_of = pycolmap.Reconstruction()
    model_of.add_camera_with_trivial_rig(camera)
    poses, seen = [], []
    on_plane = np.column_stack([rng.uniform(-0.6, 0.6, (400, 2)), np.zeros(400)])
    on_plane[:, 2] = (DISTANCE - on_plane[:, :2] @ NORMAL[:2]) / NORMAL[2]
    for i in range(6):
        rotation = Rotation.from_euler("xyz", rng.uniform(-8, 8, 3), degrees=True).as_matrix()
        pose = np.column_stack([rotation, -rotation @ rng.uniform(-0.15, 0.15, 3)])
        poses.append(pose)
        direction = rays @ rotation  # in the world
        center = -rotation.T @ pose[:, 3]
        points = center + direction * ((DISTANCE - NORMAL @ center) / (direction @ NORMAL))[:, None]
        write_image(tmp_path / "p" / "images" / f"{i}.png", np.repeat(stripes(points).reshape(height, width, 1), 3, -1))
        in_camera = on_plane @ rotation.T + pose[:, 3]
        seen.append(np.array([camera.img_from_cam(point) for point in in_camera]))
    for i, (pose, keypoints) in enumerate(zip(poses, seen, strict=True)):
        image = pycolmap.Image(name=f"{i}.png", keypoints=keypoints, camera_id=1, image_id=i + 1)
        model_of.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pose))
    for number, point in enumerate(on_plane):
        track = pycolmap.Track()
        for i in range(len(poses)):
            track.add_element(i + 1, number)
        model_of.add_point3D(point, track, np.zeros(3, np.uint8))
    model_of.update_point_3d_errors()
    sparse = tmp_path / "p" / "sparse" / "0"
    sparse.mkdir(parents=True)
    (model_of.write_binary if binary else model_of.write_text)(str(sparse))
    opened = pack(tmp_path / "p", tmp_path / "set", "--short-side", 180, "--quality", 100, "--trust")
    assert len(opened.frames) == 6
    for row, pose in zip(opened.frames[in_order(opened)], poses, strict=True):
        assert np.abs(row["extrinsics"][:, :3] - pose[:, :3]).max() < 1e-6
    for number in range(6):
        row, depth = opened.frames[number], depth_of(opened, number)
        rotation, t, k = row["extrinsics"][:, :3], row["extrinsics"][:, 3], row["intrinsics"]
        h, w = depth.shape
        v, u = np.nonzero(depth)
        assert len(v) > 50
        points = (
            np.column_stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(len(u))]) * depth[v, u, None]
        )
        split_origin = origin_of(opened, number, poses)
        world = (points - t) @ rotation + split_origin
        # A point's depth stands at the middle of its pixel, so up to half a pixel beside the point.
        assert np.abs(world @ NORMAL - DISTANCE).max() < 0.8 * DISTANCE / k[0, 0]
        image, _ = decode_jpeg(opened.read(number)[0])
        y, x = np.mgrid[:h, :w]
        direction = np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones((h, w))], -1) @ rotation
        center = -rotation.T @ t + split_origin
        points = center + direction * ((DISTANCE - NORMAL @ center) / (direction @ NORMAL))[..., None]
        error = np.abs(image[..., 0] - stripes(points))
        assert error.mean() < 3
        corners = [error[:8, :8], error[:8, -8:], error[-8:, :8], error[-8:, -8:]]
        assert max(part.mean() for part in corners) < 5


def origin_of(opened, number, poses):
    """Where the origin of a frame's sequence lies in the world of the test."""
    sequence = opened.sequences[opened.frames["sequence"][number]]
    first, count = int(sequence["first"]), int(sequence["count"])
    names = [int(name) for name in opened.frames["name"][first : first + count]]
    return np.median([-poses[i][:, :3].T @ poses[i][:, 3] for i in names], axis=0)


@pytest.mark.parametrize(
    "distortion",
    [
        Distortion(coefficients=(-0.3, 0.1, 1e-3, 2e-3, -0.01)),
        Distortion(coefficients=(0.2, -0.05, 0, 0)),
        Distortion(coefficients=(0.1, -0.02, 0.01, 0.0), fisheye=True),
    ],
)
def test_a_lens_there_and_back_and_every_pixel_of_its_pinhole_image_was_seen(distortion):
    k = np.array([[300.0, 0, 170], [0, 310, 115], [0, 0, 1]])
    lens = Lens(k, distortion, 240, 320)
    rng = np.random.default_rng(0)
    pixels = rng.uniform((0, 0), (319, 239), (500, 2))
    assert np.abs(lens.from_source(lens.to_source(pixels)) - pixels).max() < 1e-6
    edge = [(x, y) for x in range(320) for y in (0, 239)] + [(x, y) for x in (0, 319) for y in range(240)]
    seen = lens.to_source(np.array(edge, float))
    assert (seen > -0.51).all()
    assert (seen < np.array([319.51, 239.51])).all()


def test_coarse_depth_supervises_a_pixel_a_sample_and_is_not_spread(views, tmp_path):
    WRITERS["scannet"](tmp_path / "capture", views)
    for path in (tmp_path / "capture" / "depth").glob("*.png"):
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.ascontiguousarray(depth[2::5, 2::5]))
    opened = pack(tmp_path / "capture", tmp_path / "set")
    number = in_order(opened)[0]
    depth, view = depth_of(opened, number), views[0]
    v, u = np.nonzero(depth)
    samples = view.depth[2::5, 2::5]
    assert len(v) == (samples > 0).sum()
    assert np.abs(depth[v, u] / view.depth[v, u] - 1).max() < 2e-3  # at the middle of the 5 x 5 pixels


def test_frames_without_an_image_or_a_pose_are_counted(views, tmp_path):
    """Poses that were lost are no sign of a damaged download: they do not count against --max-bad."""
    WRITERS["scannet"](tmp_path / "capture", views)
    for lost in (2, 3):
        (tmp_path / "capture" / "pose" / f"{lost}.txt").write_text("-inf " * 16)
    options = ("--test-tail", 0.5, "--min-frames", 1, "--trust")
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "set", *options)
    assert done.returncode == 0, done.stderr
    assert "6 frames; 2 left out: 2 x pose is not finite (color/2.jpg)" in " ".join(done.stdout.split())
    (tmp_path / "capture" / "color" / "5.jpg").unlink()
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "other", *options, "--max-bad", 0.5)
    assert done.returncode == 0, done.stderr
    assert "1 frame left out: image is missing" in done.stdout


def test_depth_of_a_camera_of_its_own_is_put_where_the_image_sees_it(views, tmp_path):
    """ScanNet's: other intrinsics and size than the color camera's, in the same place."""
    WRITERS["scannet"](tmp_path / "capture", views)
    k = views[0].intrinsics
    own = np.array([[0.8 * k[0, 0], 0, k[0, 2] - 30.25], [0, 0.8 * k[1, 1], k[1, 2] - 20.5], [0, 0, 1]])
    full = np.eye(4)
    full[:3, :3] = own
    np.savetxt(tmp_path / "capture" / "intrinsic" / "intrinsic_depth.txt", full)
    for i, view in enumerate(views):
        h, w = view.depth.shape
        y, x = np.mgrid[: int(0.7 * h), : int(0.7 * w)]
        u = (x - own[0, 2]) / 0.8 + k[0, 2]
        v = (y - own[1, 2]) / 0.8 + k[1, 2]
        rows, columns = (np.rint(places).astype(int).clip(0, n - 1) for places, n in ((v, h), (u, w)))
        seen = (u >= -0.5) & (u <= w - 0.5) & (v >= -0.5) & (v <= h - 0.5)
        write_depth(tmp_path / "capture" / "depth" / f"{i}.png", np.where(seen, view.depth[rows, columns], 0), 1e-3)
    for short_side, least in ((0, 0.3), (100, 0.5)):  # scattered; picked
        options = ("--short-side", short_side, "--trust")
        opened = pack(tmp_path / "capture", tmp_path / f"set{short_side}", *options)
        for number, view in zip(in_order(opened), views, strict=True):
            found = depth_of(opened, number)
            factor = np.array(view.depth.shape) / found.shape
            rows, columns = np.nonzero(found)
            y, x = (rows + 0.5) * factor[0] - 0.5, (columns + 0.5) * factor[1] - 0.5
            near = [
                view.depth[np.rint(y + dy).astype(int).clip(0, view.depth.shape[0] - 1),
                           np.rint(x + dx).astype(int).clip(0, view.depth.shape[1] - 1)]
                for dx in (-1, 0, 1) for dy in (-1, 0, 1)
            ]  # fmt: skip
            least_near, most_near = np.min(near, axis=0) * 0.998, np.max(near, axis=0) * 1.002
            assert ((found[rows, columns] > least_near) & (found[rows, columns] < most_near)).mean() > 0.995
            assert least < len(rows) / found.size < 0.75


def test_masks_with_an_opaque_channel_count_and_missing_ones_are_told(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    content = json.loads(path.read_text())
    for i, entry in enumerate(content["frames"]):
        entry["mask_path"] = f"masks/{i}.png"
        if i != 3:
            mask = np.full((*views[i].depth.shape, 4), 255, np.uint8)
            mask[:, : mask.shape[1] // 2, :3] = 0
            (tmp_path / "capture" / "masks").mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / "capture" / entry["mask_path"]), mask)
    path.write_text(json.dumps(content))
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "set", "--min-frames", 1, "--trust")
    assert done.returncode == 0, done.stderr
    assert "7 frames; 1 left out: 1 x mask_path: no such file (images/im 003.png)" in done.stdout
    depth = depth_of(shards.open(tmp_path / "set"), 0)
    assert (depth[:, : depth.shape[1] // 2] == 0).all()
    assert (depth[:, depth.shape[1] // 2 :] > 0).any()


def test_images_of_one_rounded_time_and_numbers_without_zeros_keep_their_order(views, tmp_path):
    WRITERS["tum"](tmp_path / "tum", views)
    for name in ("rgb", "depth"):
        path = tmp_path / "tum" / f"{name}.txt"
        lines = [line.split() for line in path.read_text().splitlines()[1:]]
        path.write_text("".join(f"{float(time):.1f} {file}\n" for time, file in lines))
    (tum,) = Captures([tmp_path / "tum"], CaptureOptions(intrinsics=(1, 1, 1, 1))).found
    assert len(tum.frames) + len(tum.unusable) == len(views)
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    text = path.read_text()
    for i in reversed(range(len(views))):
        text = text.replace(f"im {i:03d}.png", f"{7 + i}.png")
        (tmp_path / "capture" / "images" / f"im {i:03d}.png").rename(tmp_path / "capture" / "images" / f"{7 + i}.png")
    path.write_text(text)
    (capture,) = Captures([tmp_path / "capture"], CaptureOptions()).found
    assert [frame.name for frame in capture.frames] == [str(7 + i) for i in range(len(views))]


def test_folders_that_are_no_captures_are_told(views, tmp_path):
    WRITERS["frames"](tmp_path / "all" / "good", views)
    (tmp_path / "all" / "broken").mkdir()
    done = vggt_prep("pack", tmp_path / "all", "--out", tmp_path / "set", "--trust", "--min-frames", 1)
    assert "PASSED OVER, as no captures of a known layout: broken" in done.stdout


def test_an_image_of_two_models_of_a_project_is_in_one_split(views, tmp_path):
    """Each model reconstructs some of the images; those at the end are for testing, in whatever model they are."""
    WRITERS["frames"](tmp_path / "project", views)
    found = Captures([tmp_path / "project"], CaptureOptions(split=Split(tail=0.25)))
    (whole,) = found.found
    models = [replace(whole, name="0", frames=whole.frames[3:]), replace(whole, name="1", frames=whole.frames[:7])]
    last = _last_images(models, 0.25, 1)
    assert [frame.image in last for frame in whole.frames] == [False] * 6 + [True] * 2
    found.found, found.tail, found.split = models, None, {"1"}
    with pytest.raises(PackError, match="is in the train and in the test split, with 3 more frames"):
        make_plan(found, PackOptions(), allow_shared_frames=False)


def test_the_same_photographs_in_another_capture_are_not_tested_on(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "first", views)
    WRITERS["nerfstudio"](tmp_path / "again", [replace(v, cam_from_world=v.cam_from_world + 1e-4) for v in views])
    found = Captures([tmp_path / "first", tmp_path / "again"], CaptureOptions(split=Split(names=("again",))))
    with pytest.raises(PackError, match="is in the train and in the test split, with 7 more frames"):
        make_plan(found, PackOptions(), allow_shared_frames=False)


@pytest.mark.parametrize("lens", [{"is_fisheye": True}, {"camera_model": "OPENCV_FISHEYE"}])
def test_a_fisheye_is_one_by_either_of_its_names(views, tmp_path, lens):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    values = json.loads(path.read_text())
    values.pop("camera_model", None)
    path.write_text(json.dumps(values | {"k1": 0.1} | lens))
    (capture,) = Captures([tmp_path / "capture"], CaptureOptions()).found
    assert capture.frames[0].camera.distortion == Distortion(coefficients=(0.1, 0, 0, 0), fisheye=True)


@pytest.mark.parametrize("layout", ["nerfstudio", "wai", "polycam", "record3d", "arkitscenes"])
def test_numbers_that_are_none_are_reasons_and_no_tracebacks(views, tmp_path, layout):
    WRITERS[layout](tmp_path / "capture", views)
    for path in sorted((tmp_path / "capture").rglob("*.json")) + sorted((tmp_path / "capture").rglob("*.pincam")):
        text = path.read_text()
        for size in ("240", "320"):
            text = text.replace(f" {size}", " Infinity").replace(f"{size} ", "inf ")
        path.write_text(text)
    done = vggt_prep("check", tmp_path / "capture")
    assert done.returncode == 1
    assert "Infinity" in done.stdout + done.stderr or "infinity" in done.stdout + done.stderr


def test_a_lens_of_numbers_that_are_none_is_no_camera(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    path.write_text(path.read_text().replace('"frames"', '"k1": NaN, "frames"', 1))
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "set", "--trust")
    assert done.returncode == 1
    assert "8 frames are bad" in done.stderr
    assert "8 x camera is not finite" in done.stderr


def test_absolute_paths_are_those_of_the_folder_by_whatever_name_it_is_called(views, tmp_path, monkeypatch):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    content = json.loads(path.read_text())
    for entry in content["frames"]:
        for key in ("file_path", "depth_file_path"):
            entry[key] = str(tmp_path / "capture" / entry[key])
    content["frames"][0] |= {"depth_file_path": None, "mask_path": None}
    path.write_text(json.dumps(content))
    (tmp_path / "link").symlink_to(tmp_path / "capture")
    monkeypatch.chdir(tmp_path)
    for name in ("capture", "link"):
        (capture,) = Captures([Path(name)], CaptureOptions()).found
        assert [frame.name for frame in capture.frames] == [f"im {i:03d}" for i in range(len(views))]
        assert [frame.depth is None for frame in capture.frames] == [True] + [False] * (len(views) - 1)
    content["frames"][1]["file_path"] = "/elsewhere/1.png"
    path.write_text(json.dumps(content))
    (capture,) = Captures([Path("capture")], CaptureOptions()).found
    assert capture.unusable == [("/elsewhere/1.png", f"its path is absolute, and not in {tmp_path / 'capture'}")]


def test_a_name_that_is_no_text_is_told(views, tmp_path):
    WRITERS["sevenscenes"](tmp_path / "capture", views)
    for path in (tmp_path / "capture").glob("*000.*"):
        os.rename(os.fsencode(path), os.fsencode(path).replace(b"000", b"\xff"))
    with pytest.raises(ValueError, match="is no UTF-8; rename it"):
        Captures([tmp_path / "capture"], CaptureOptions())


@pytest.mark.parametrize("scale", [0, -1, "NaN"])
def test_a_scale_that_would_lose_all_depths_is_told(views, tmp_path, scale):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"applied_scale": scale}))
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "set", "--trust")
    assert done.returncode == 1
    assert f"transforms.json: applied_scale {str(scale).lower()}: expected more than 0" in done.stdout + done.stderr


def test_a_field_of_view_alone_makes_a_camera(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    content = json.loads(path.read_text())
    for entry in content["frames"]:
        for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
            del entry[key]
    path.write_text(json.dumps(content | {"camera_angle_x": 1.2}))
    opened = pack(tmp_path / "capture", tmp_path / "set", "--trust")
    height, width = views[0].depth.shape
    focal = width / 2 / np.tan(0.6)
    k = [[focal, 0, width / 2 - 0.5], [0, focal, height / 2 - 0.5], [0, 0, 1]]
    assert np.abs(opened.frames["intrinsics"] - np.array(k)).max() < 1e-9


def test_a_field_of_view_beside_other_numbers_of_the_camera_takes_only_the_place_of_the_focal_length(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    path = tmp_path / "capture" / "transforms.json"
    content = json.loads(path.read_text())
    for entry in content["frames"]:
        del entry["fl_x"], entry["fl_y"]
    path.write_text(json.dumps(content | {"camera_angle_x": 1.2, "k1": 0.1}))
    (capture,) = Captures([tmp_path / "capture"], CaptureOptions()).found
    camera, (height, width) = capture.frames[0].camera, views[0].depth.shape
    assert camera.distortion == Distortion(coefficients=(0.1, 0, 0, 0, 0))
    _, k = camera.opencv(height, width)
    assert k[0, 0] == k[1, 1] == pytest.approx(width / 2 / np.tan(0.6))
    assert np.allclose(k[:2, 2], views[0].intrinsics[:2, 2])
    for values, words in (({"camera_model": "EQUIRECTANGULAR"}, "cannot be undistorted"), ({"k5": 0.1}, "k4 to k6")):
        path.write_text(json.dumps(content | {"camera_angle_x": 1.2} | values))
        with pytest.raises(ValueError, match=words):
            Captures([tmp_path / "capture"], CaptureOptions())


def test_the_lenses_of_the_datasets_own_cameras_are_undone(views, tmp_path):
    WRITERS["tum"](tmp_path / "rgbd_dataset_freiburg1_desk", views)
    WRITERS["tum"](tmp_path / "rgbd_dataset_freiburg3_desk", views)
    found = [Captures([folder], CaptureOptions()).found[0] for folder in sorted(tmp_path.iterdir())]
    assert found[0].frames[0].camera.distortion.coefficients[0] == 0.2624
    assert found[1].frames[0].camera.distortion is None
    given = Captures([tmp_path / "rgbd_dataset_freiburg1_desk"], CaptureOptions(intrinsics=(1, 1, 1, 1))).found[0]
    assert given.frames[0].camera.distortion is None


def test_a_pipe_in_place_of_an_image_is_no_reason_to_wait(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "capture", views)
    image = sorted((tmp_path / "capture" / "images").iterdir())[0]
    image.unlink()
    os.mkfifo(image)
    done = vggt_prep(
        "pack", tmp_path / "capture", "--out", tmp_path / "set", "--trust", "--max-bad", 0.5, "--min-frames", 1
    )
    assert "1 frame left out" in done.stdout


def test_poses_are_between_two_or_at_their_time():
    poses = np.stack([np.eye(4)] * 3)
    poses[:, 0, 3] = [0, 1, 2]
    times = np.array([1.0, 1.1, 1.9])
    assert interpolated(1.05, times, poses, 0.2)[0, 3] == pytest.approx(0.5)
    assert interpolated(0.999, times, poses, 0.2)[0, 3] == 0
    for time in (0.9, 1.5, 2.0):
        with pytest.raises(ValueError, match="no pose near the time of the image"):
            interpolated(time, times, poses, 0.2)


def test_of_several_arrays_the_one_called_depth_is_taken(views, tmp_path):
    WRITERS["frames"](tmp_path / "capture", views)
    table = tmp_path / "capture" / "frames.csv"
    table.write_text(table.read_text().replace(".npy", ".npz"))
    for i, view in enumerate(views):
        arrays = {"confidence": np.ones_like(view.depth), "depth": view.depth}
        arrays |= {"other": arrays.pop("depth")} if i == 0 else {}
        np.savez(tmp_path / "capture" / "d" / f"{i:03d}.npz", **arrays)
    opened = pack(tmp_path / "capture", tmp_path / "set", "--trust", "--max-bad", 0.5)
    assert len(opened.frames) == len(views) - 1
    assert np.abs(depth_of(opened, in_order(opened)[0])[100] - views[1].depth[100]).max() < 0.02


def test_frames_of_a_slow_camera_are_left_out_and_depths_beyond_a_range_are_unknown(views, tmp_path):
    slow = [view for view in views for _ in range(3)]
    WRITERS["frames"](tmp_path / "capture", slow)
    options = ("--min-motion", 1, 0.02, "--depth-range", 1.0, 2.5, "--trust")
    opened = pack(tmp_path / "capture", tmp_path / "set", *options)
    assert [name.decode() for name in np.sort(opened.frames["name"])] == [f"i-{3 * i:03d}" for i in range(len(views))]
    for number, view in zip(in_order(opened), views, strict=True):
        assert ((depth_of(opened, number) > 0) == ((view.depth >= 1.0) & (view.depth <= 2.5))).mean() > 0.999
    said = json.loads((tmp_path / "set" / "dataset.json").read_text())["source"]
    assert (said["min_motion"], said["depth_range"]) == ([1, 0.02], [1.0, 2.5])
    done = vggt_prep(
        "pack", tmp_path / "capture", "--out", tmp_path / "set", "--test-tail", 0.5, "--min-frames", 1, *options
    )
    assert "packed before: nothing to do" in done.stdout, done.stderr
    table = tmp_path / "capture" / "frames.csv"
    lines = table.read_text().splitlines()
    lines[4] = ",".join([*lines[4].split(",")[:2], "nan", *lines[4].split(",")[3:]])
    table.write_text("\n".join(lines))
    (capture,) = Captures([tmp_path / "capture"], CaptureOptions(min_motion=(1, 0.02))).found
    assert len(capture.frames) == len(views) + 1  # a pose that is not finite is told when packing, and hides nothing


def test_heic_images_are_read_and_damaged_ones_named(views, tmp_path):
    import pillow_heif

    WRITERS["frames"](tmp_path / "capture", views)
    table = tmp_path / "capture" / "frames.csv"
    table.write_text(table.read_text().replace(".jpg", ".heic"))
    for i, view in enumerate(views):
        path = tmp_path / "capture" / "i" / f"{i:03d}.heic"
        h, w = view.depth.shape
        pillow_heif.from_bytes("RGB", (w, h), np.ascontiguousarray(view.image).tobytes()).save(path, quality=95)
    opened = pack(tmp_path / "capture", tmp_path / "set")
    for number, view in zip(in_order(opened), views, strict=True):
        assert np.abs(decode_jpeg(opened.read(number)[0])[0].astype(float) - view.image).mean() < 4
    path.write_bytes(path.read_bytes()[:600])
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "b", "--max-bad", 0.5, "--min-frames", 1)
    assert "1 frame left out: image is damaged" in done.stdout, done.stderr


def test_a_short_capture_is_tested_on_as_many_frames_as_a_sequence_needs(views, tmp_path):
    WRITERS["frames"](tmp_path / "capture", views * 2)
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "set", "--trust", "--allow-shared-frames")
    assert done.returncode == 0, done.stderr
    assert sorted(shards.open(tmp_path / "set").sequences["count"]) == [5, 11]  # a fifth would be 3


def test_splits_are_by_capture_or_by_the_end_of_each(views, tmp_path):
    for name in "abcde":
        WRITERS["sevenscenes"](tmp_path / "all" / name, views[:5])
    for options, test in (
        ((), {"c"}),
        (("--test", "a", "--test", "d"), {"a", "d"}),
        (("--test-fraction", 0.4), {"b", "d"}),
    ):
        done = vggt_prep("pack", tmp_path / "all", "--out", tmp_path / "set", "--allow-shared-frames", *options)
        assert done.returncode == 0, done.stderr
        rows = shards.open(tmp_path / "set").sequences
        assert {row["name"].decode() for row in rows if row["split"] == b"test"} == test
        assert len(rows) == 5
        shutil.rmtree(tmp_path / "set")
    done = vggt_prep("pack", tmp_path / "all" / "a", "--out", tmp_path / "set", "--min-frames", 1)
    assert "testing on the last frames of each capture: places that are trained on" in done.stdout
    assert [row["count"] for row in shards.open(tmp_path / "set").sequences] == [4, 1]


def test_models_of_one_colmap_project_are_of_one_split_and_damaged_depths_are_named(views, tmp_path):
    """The places are what is drawn for testing, so none of a place's captures is trained on."""
    for name in "abcd":
        WRITERS["sevenscenes"](tmp_path / "all" / name, views[:5])
    found = Captures([tmp_path / "all"], CaptureOptions()).found
    twice = [replace(capture, site=tmp_path / "all" / "b") if capture.name == "c" else capture for capture in found]
    test, _ = _assign(twice, Split(fraction=0.4))
    assert test == {"b", "c"}
    (tmp_path / "all" / "a" / "frame-000001.depth.png").write_bytes(b"no picture")
    done = vggt_prep("pack", tmp_path / "all" / "a", "--out", tmp_path / "set", "--min-frames", 1, "--max-bad", 0.5)
    assert "1 frame left out: depth" in done.stdout, done.stderr


def test_sequences_of_one_room_are_of_one_split_or_it_is_said(tmp_path):
    views = rendered(frames=2)
    for room in "abcd":
        for number in (1, 2):
            WRITERS["sevenscenes"](tmp_path / "all" / room / f"seq-0{number}", views)
            WRITERS["scannet"](tmp_path / "scans" / f"scene000{'abcd'.index(room)}_0{number}", views)
    for folder in ("all", "scans"):
        found = Captures([tmp_path / folder], CaptureOptions())
        tested = [capture.name for capture in found.found if capture.name in found.split]
        assert len(tested) == 2
        assert len({name.rpartition("-" if folder == "all" else "_")[0] for name in tested}) == 1
        assert not found.torn
    found = Captures([tmp_path / "all"], CaptureOptions(split=Split(names=("a-seq-01", "b-seq-01", "b-seq-02"))))
    assert found.torn == ["a-seq-01"]
    one_room = Captures([tmp_path / "all" / "a"], CaptureOptions())
    assert one_room.same_places
    with pytest.raises(ValueError, match="all captures are of one place: give --test-tail"):
        Captures([tmp_path / "all" / "a"], CaptureOptions(split=Split(fraction=0.5)))
    options = ("--test", "seq-01", "--min-frames", 1, "--trust", "--no-pairs", "--out", tmp_path / "set")
    done = vggt_prep("pack", tmp_path / "all" / "a", *options, "--allow-shared-frames")
    assert "tested on, though others of the same place are trained on: seq-01" in done.stdout
    opened = shards.open(tmp_path / "set")
    assert shared_places([(opened, "train")], [(opened, "test")]).sequences == 1


@pytest.mark.parametrize("numbers", [("--depth-range", 0.2, "inf"), ("--min-motion", "nan", 0.1)])
def test_limits_that_are_no_numbers_are_refused(views, tmp_path, numbers):
    WRITERS["frames"](tmp_path / "capture", views[:2])
    done = vggt_prep("pack", tmp_path / "capture", "--out", tmp_path / "set", *numbers)
    assert done.returncode != 0
    assert "expected" in done.stderr
    assert numbers[0] in done.stderr


def test_intrinsics_are_refused_where_the_layout_has_its_own(views, tmp_path):
    for name in WRITERS:
        WRITERS[name](tmp_path / name, views[:2])
        options = CaptureOptions(intrinsics=(300.0, 300.0, 159.5, 119.5))
        if name in ("tum", "sevenscenes"):
            (capture,) = Captures([tmp_path / name], options).found
            assert capture.frames[0].camera.opencv(240, 320)[1][0, 0] == 300
        else:
            with pytest.raises(ValueError, match=f"--intrinsics is for tum and sevenscenes; {name} says its own"):
                Captures([tmp_path / name], options)


def test_depth_of_which_nothing_counts_is_doubtful_and_said_to_be_none(views, tmp_path):
    WRITERS["frames"](tmp_path / "capture", views)
    options = ("--out", tmp_path / "set", "--trust", "--depth-range", 200, 5000, "--min-frames", 1)
    done = vggt_prep("pack", tmp_path / "capture", *options)
    assert done.returncode == 0, done.stderr
    assert "DOUBTFUL: train/captures/capture: 6 of 6 depth maps hold no known depth" in done.stdout
    assert "8 frames without depth" in done.stdout
    assert "8 frames (0 with depth)" in vggt_prep("info", tmp_path / "set").stdout


def test_depths_of_numpy_and_masks_of_vggt_omega_count(views, tmp_path):
    WRITERS["unified"](tmp_path / "capture", views)
    for i, view in enumerate(views):
        (tmp_path / "capture" / "depths" / f"{i:03d}.exr").unlink()
        np.save(tmp_path / "capture" / "depths" / f"{i:03d}.npy", view.depth.astype(np.float32))
        mask = np.ones(view.depth.shape, np.uint8)
        mask[:, :100] = 0
        (tmp_path / "capture" / "masks").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "capture" / "masks" / f"{i:03d}.png"), mask)
    opened = pack(tmp_path / "capture", tmp_path / "set", "--trust", "--short-side", 0)
    for number, view in zip(in_order(opened), views, strict=True):
        assert np.allclose(depth_of(opened, number)[:, 100:], view.depth[:, 100:], rtol=1e-3)
        assert not depth_of(opened, number)[:, :100].any()


def test_a_capture_without_a_usable_frame_and_two_frames_of_one_name_are_errors(views, tmp_path):
    WRITERS["scannet"](tmp_path / "lost", views)
    for path in (tmp_path / "lost" / "pose").iterdir():
        path.write_text("-inf " * 16)
    done = vggt_prep("pack", tmp_path / "lost", "--out", tmp_path / "set")
    assert done.returncode == 1
    assert "lost: has no usable frame: 8 x pose is not finite (color/0.jpg)" in " ".join(done.stderr.split())
    WRITERS["frames"](tmp_path / "twice", views)
    lines = (tmp_path / "twice" / "frames.csv").read_text().splitlines()
    (tmp_path / "twice" / "frames.csv").write_text("\n".join([*lines, lines[1]]))
    done = vggt_prep("pack", tmp_path / "twice", "--out", tmp_path / "set")
    assert done.returncode == 1
    assert "twice: a frame is listed twice" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["empty"], "empty: holds no capture of a known layout. Looked for colmap: sparse/ and images/"),
        (["gone"], "gone: no such folder"),
        (["two"], "two: may be nerfstudio or tum: say which with --format"),
        (["two", "--format", "nerfstudio"], "expected a list `frames` that is not empty"),
        (["two", "--format", "tum"], "TUM's layout does not say the camera: give --intrinsics fx,fy,cx,cy"),
        (["two", "--category", "x"], "are for --co3d-dir"),
        (["seven", "--depth-range", 9, 0.1], "--depth-range 9 0.1: expected 0 <= NEAR < FAR"),
        ([], "give either folders of captures, or --co3d-dir"),
        (["seven", "--test", "x"], "--test x: no such capture; there are seven"),
    ],
)
def test_what_cannot_be_packed_is_said(views, tmp_path, arguments, words):
    for name in ("empty", "two"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "two" / "transforms.json").write_text("{}")
    for name in ("rgb.txt", "groundtruth.txt"):
        (tmp_path / "two" / name).write_text("")
    WRITERS["sevenscenes"](tmp_path / "seven", views[:1])
    given = [tmp_path / name if name in ("empty", "gone", "two", "seven") else name for name in arguments]
    done = vggt_prep("pack", *given, "--out", tmp_path / "set")
    assert done.returncode == 1
    assert words in " ".join(done.stderr.split())


@pytest.mark.skipif(not REAL.exists(), reason="no real captures beside this checkout")
def test_four_layouts_of_one_real_capture_give_the_same(tmp_path, caplog):
    """COLMAP began twice: of its models, that of 7 images is wrong, and they are in that of 30, too."""
    options = {"tum": ("--intrinsics", "585,585,320,240")}
    sets = {
        name: pack(REAL / name, tmp_path / name, "--trust", *options.get(name, ()))
        for name in ("sevenscenes", "tum", "nerfstudio")
    }
    one = sets["sevenscenes"]
    for name, tolerance in (("nerfstudio", 1e-6), ("tum", 2e-5)):  # its quaternions are rounded
        other = sets[name]
        assert np.abs(one.frames["extrinsics"] - other.frames["extrinsics"]).max() < tolerance
        assert (one.frames["intrinsics"] == other.frames["intrinsics"]).all()
        assert (one.frames["jpg_crc"] == other.frames["jpg_crc"]).all()
        assert max(np.abs(depth_of(one, i) - depth_of(other, i)).max() for i in range(30)) == 0
    done = vggt_prep("pack", REAL / "colmap", "--out", tmp_path / "colmap", "--min-frames", 1)
    assert done.returncode == 0, done.stderr
    assert "sparse/0: left out, as most of its 7 images are in the larger" in caplog.text
    sparse = shards.open(tmp_path / "colmap")
    assert len(sparse.frames) == 30
    assert [name.decode() for name in sparse.sequences["name"]] == ["colmap-1"] * 2
    assert np.abs(sparse.frames["intrinsics"][:, 0, 0] / 585 - 1).max() < 0.2
    said = json.loads((tmp_path / "colmap" / "dataset.json").read_text())["source"]["captures"]
    assert {entry["depth"] for entry in said.values()} == {"sparse"}


def test_preview_says_the_kind_of_depth_and_shows_points_as_dots(views, tmp_path):
    ALL["colmap"](tmp_path / "project", views)
    pack(tmp_path / "project", tmp_path / "set", "--trust")
    done = vggt_prep("preview", tmp_path / "set", "--out", tmp_path / "look.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "look.html").read_text()
    assert "sparse depth, lengths in no known unit" in page
    assert "their single points, by depth" in page
    pictures = [
        cv2.imdecode(np.frombuffer(base64.b64decode(part.partition('"')[0]), np.uint8), cv2.IMREAD_COLOR).astype(int)
        for part in page.split("base64,")[1:]
    ]
    colored = [(np.ptp(picture, axis=2) > 120).sum() for picture in pictures]
    assert len(colored) == 3 * len(shards.open(tmp_path / "set").sequences)
    del colored[2::3]  # images beside their neighbors
    assert min(colored) > 500  # a dot of a hundred points is nine pixels
