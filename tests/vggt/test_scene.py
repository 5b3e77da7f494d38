"""python -m vggt: photographs and a checkpoint to a file that viewers open."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
import torch
import trimesh
from conftest import run_command
from golden_figures import golden_weights, load_json

from vggt import VGGT, preset
from vggt.geometry import encode_pose
from vggt.images import find_images, load_images
from vggt.scene import camera_wireframes, linear, point_cloud, write_scene

HEIGHT, WIDTH = 28, 42


def plane_scene():
    """Two cameras that look along z at the plane z = 4 of the first one's frame; the second is moved and turned."""
    angle = 0.3
    turn = torch.tensor([[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]).float()
    center = torch.tensor([1.0, 0.2, 0])
    extrinsics = torch.eye(4)[:3].repeat(2, 1, 1)
    extrinsics[1] = torch.cat([turn, -(turn @ center)[:, None]], dim=1)
    intrinsics = torch.tensor([[40.0, 0, WIDTH / 2], [0, 40, HEIGHT / 2], [0, 0, 1]]).repeat(2, 1, 1)
    pixels = torch.stack(torch.meshgrid(torch.arange(WIDTH), torch.arange(HEIGHT), indexing="xy"), -1).float()
    rays = torch.cat(
        [(pixels + 0.5 - torch.tensor([WIDTH / 2, HEIGHT / 2])) / 40, torch.ones(HEIGHT, WIDTH, 1)], dim=-1
    )
    world_rays = torch.einsum("sji,hwj->shwi", extrinsics[:, :, :3], rays)  # R^T ray
    depth = (4 - torch.tensor([0.0, center[2]]))[:, None, None] / world_rays[..., 2]
    predictions = {
        "pose_enc": encode_pose(extrinsics, intrinsics, HEIGHT, WIDTH)[None],
        "depth": depth[None, ..., None],
        "depth_conf": torch.rand(1, 2, HEIGHT, WIDTH) + 1,
    }
    return predictions, torch.rand(2, 3, HEIGHT, WIDTH), center


def test_points_of_all_views_meet_where_the_surface_is():
    predictions, images, _ = plane_scene()
    predictions["depth_conf"][0, 0] += 10  # points come by confidence
    points, colors = point_cloud(predictions, images, keep=1.0)
    assert len(points) == len(colors) == 2 * HEIGHT * WIDTH
    assert np.abs(points[:, 2] - 4).max() < 1e-4
    assert np.abs(points[: HEIGHT * WIDTH, :2].mean(0)).max() < 1e-5, "pixels are about the middle of the image"


def test_only_the_most_confident_finite_points_are_kept_in_their_own_color():
    predictions, images, _ = plane_scene()
    images[1, :, 3, 5] = torch.tensor([1.0, 0.5, 0])
    predictions["depth_conf"][0, 1, 3, 5] = 10
    points, colors = point_cloud(predictions, images, keep=1 / (2 * HEIGHT * WIDTH))
    assert points.shape == (1, 3)
    assert colors.tolist() == [[255, 128, 0]]
    predictions["depth"][0, 0] = torch.inf
    points, _ = point_cloud(predictions, images, keep=1.0)
    assert len(points) == HEIGHT * WIDTH
    assert np.isfinite(points).all()


def test_cameras_are_drawn_where_they_stand_and_as_they_look():
    predictions, _, center = plane_scene()
    points, colors = camera_wireframes(predictions["pose_enc"][0], HEIGHT, WIDTH, size=0.5)
    first, second = points.reshape(2, -1, 3)
    assert np.abs(first).min(0).max() < 1e-6  # its tip is the origin
    assert first[:, 2].max() == pytest.approx(0.5, abs=1e-6)
    assert np.abs(first[:, 0]).max() == pytest.approx(0.5 * WIDTH / 2 / 40, abs=1e-5)
    assert np.abs(second - center.numpy()).sum(1).min() < 1e-5
    assert colors[0].tolist() == [255, 0, 0]
    assert colors[-1].tolist() == [0, 0, 255]


@pytest.mark.parametrize(("suffix", "axes"), [(".ply", [1, 1, 1]), (".glb", [1, -1, -1])])
def test_scenes_open_elsewhere_with_their_points_colors_and_axes(tmp_path, suffix, axes):
    predictions, images, _ = plane_scene()
    path = tmp_path / f"scene{suffix}"
    count = write_scene(path, predictions, images, keep=0.5)
    loaded = trimesh.load(path)
    cloud = loaded if suffix == ".ply" else next(iter(loaded.geometry.values()))
    expected, colors = point_cloud(predictions, images, keep=0.5)
    assert count == len(expected)
    assert np.allclose(cloud.vertices[:count], expected * axes, atol=1e-5)
    assert np.array_equal(cloud.colors[:count, :3], colors if suffix == ".ply" else linear(colors))
    assert len(cloud.vertices) > count  # and cameras


def test_linear_colors_are_those_of_the_standard():
    assert linear(np.array([0, 10, 128, 188, 255], np.uint8)).tolist() == [0, 1, 55, 128, 255]


def test_cameras_that_are_not_finite_are_no_scene(tmp_path):
    predictions, images, _ = plane_scene()
    predictions["pose_enc"][0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        write_scene(tmp_path / "scene.ply", predictions, images, keep=0.5)


def write_photographs(folder, shapes):
    folder.mkdir()
    for i, (height, width) in enumerate(shapes):
        ramp = np.linspace(0, 255, width).astype(np.uint8)
        image = np.repeat(np.repeat(ramp[None, :, None], height, axis=0), 3, axis=2)
        image[..., 0] = 200  # blue, in OpenCV's order
        cv2.imwrite(str(folder / f"{i}.png"), image)
    return folder


def test_photographs_are_scaled_and_cut_about_their_center(tmp_path):
    folder = write_photographs(tmp_path / "photos", [(60, 100), (90, 100), (30, 200), (400, 100)])
    (folder / "notes.txt").write_text("not an image")
    (folder / "._0.png").write_bytes(b"of another system")
    (folder / "more.png").mkdir()
    paths, others = find_images([folder])
    assert [p.name for p in others] == ["notes.txt"]
    assert [p.name for p in paths] == ["0.png", "1.png", "2.png", "3.png"]
    images = load_images(paths, preset("tiny"))
    assert images.shape == (4, 3, 42, 70)
    assert (images[:, 2] - 200 / 255).abs().max() < 0.01  # red, green, blue
    left, right = images[:, 0, :, 0].mean(1), images[:, 0, :, -1].mean(1)
    assert (left + right - 1).abs().max() < 0.05  # the same share is cut on both sides
    tall = load_images(paths[3:], preset("tiny"))
    assert tall.shape == (1, 3, 70, 70)


def test_photographs_are_as_wide_as_asked_for(tmp_path):
    paths, _ = find_images([write_photographs(tmp_path / "photos", [(60, 100)])])
    assert load_images(paths, preset("tiny"), 140).shape == (1, 3, 84, 140)
    with pytest.raises(ValueError, match="width 100: expected a multiple of 14"):
        load_images(paths, preset("tiny"), 100)


def test_what_is_no_photograph_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no images; expected files that end in"):
        find_images([tmp_path])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be read as an image"):
        load_images([tmp_path / "broken.jpg"], preset("tiny"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = VGGT(preset("tiny"))
    model.load_state_dict(golden_weights(load_json("tiny_manifest.json")))
    model.save_pretrained(folder)
    return folder


def test_the_command_writes_a_scene_and_says_what_it_holds(tmp_path, checkpoint):
    photographs = write_photographs(tmp_path / "photos", [(60, 100)] * 3)
    out = tmp_path / "new" / "scene.glb"
    done = run_command("python", "-m", "vggt", photographs, "--checkpoint", checkpoint, "--out", out, "--keep", 0.25)
    assert done.returncode == 0, done.stderr
    assert "3 images, cut to 70x42" in done.stdout
    assert f"{out}: {round(0.25 * 3 * 70 * 42):,} points, 3 cameras" in done.stdout
    assert trimesh.load(out).geometry


def test_a_folders_files_that_are_no_images_are_counted_and_named(tmp_path, checkpoint):
    photographs = write_photographs(tmp_path / "photos", [(60, 100)] * 2)
    for name in ("a.heic", "b.gif", ".hidden"):
        (photographs / name).write_bytes(b"x")
    arguments = ("--checkpoint", checkpoint, "--out", tmp_path / "s.glb")
    done = run_command("python", "-m", "vggt", photographs, *arguments)
    assert done.returncode == 0, done.stderr
    assert "2 files are no images that can be read, and skipped: a.heic, b.gif" in done.stderr
    shutil.rmtree(photographs)
    photographs.mkdir()
    (photographs / "a.heic").write_bytes(b"x")
    none = run_command("python", "-m", "vggt", photographs, *arguments)
    assert "no images (1 other files, such as a.heic)" in none.stderr


@pytest.mark.parametrize("suffix", [".glb", ".GLB", ".Glb"])
def test_a_scene_stands_upright_however_its_name_is_spelt(tmp_path, suffix):
    predictions = {
        "pose_enc": torch.tensor([[[0, 0, 0, 0, 0, 0, 1, 1.0, 1.0]]]),
        "depth": torch.full((1, 1, 14, 14, 1), 2.0),
        "depth_conf": torch.ones(1, 1, 14, 14),
    }
    images = torch.zeros(1, 3, 14, 14)
    images[..., :7, :] = 1  # the upper half is white
    path = tmp_path / f"scene{suffix}"
    write_scene(path, predictions, images, keep=1)
    (cloud,) = trimesh.load(path, file_type="glb").geometry.values()
    white = cloud.vertices[np.asarray(cloud.colors)[:, :3].min(1) == 255]
    assert white[:, 1].min() > 0, "y is up in glTF"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--checkpoint", "{checkpoint}", "--out", "scene.obj"),
            "scene.obj: expected a name that ends in .glb or .ply",
        ),
        (("--checkpoint", "absent.pt", "--out", "scene.glb"), "absent.pt: no such file"),
        (("--checkpoint", "absent.pt", "--out", "scene.glb", "--keep", "nan"), "--keep: expected a number"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, checkpoint, arguments, message):
    photographs = write_photographs(tmp_path / "photos", [(60, 100)])
    done = run_command("python", "-m", "vggt", photographs, *(a.format(checkpoint=checkpoint) for a in arguments))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
