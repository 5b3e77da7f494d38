"""Layouts in the other forms that tools write them in: the same cameras and depths as in the usual one."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pycolmap
import pytest
from layout_writers import ALL, WRITERS, rendered, write_depth, write_exr, write_image

from prep.importers.captures import CaptureOptions, Captures, Split
from prep.importers.colmap import camera_of
from prep.importers.source import Distortion, SparsePoints
from prep.packing.frames import FrameOptions, pack_frame
from prep.packing.plan import PackOptions, make_plan
from prep.packing.reading import BadFrameError
from shards.codecs import decode_depth


@pytest.fixture(scope="module")
def views():
    return rendered()


def read(folder):
    (capture,) = Captures([folder], CaptureOptions()).found
    return capture


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def assert_packed(folder, views):
    """Cameras and depths are those of the scene."""
    for frame, view in zip(read(folder).frames, views, strict=True):
        packed = pack_frame(frame, FrameOptions())
        assert np.abs(packed.meta.intrinsics - view.intrinsics).max() < 1e-6
        assert np.abs(packed.meta.extrinsics - view.cam_from_world).max() < 1e-5
        depth = decode_depth(packed.depth, packed.meta.height, packed.meta.width) * packed.meta.depth_scale
        known = (view.depth > 0) & (view.depth < 60)
        assert np.abs(depth[known] / view.depth[known] - 1).max() < 2e-3


def assert_refused(folder, number, reason):
    with pytest.raises(BadFrameError, match=reason):
        pack_frame(read(folder).frames[number], FrameOptions())


def test_an_unpacked_r3d_and_record3ds_export_as_exr_are_read(views, tmp_path):
    WRITERS["record3d"](tmp_path / "r3d", views)
    (tmp_path / "r3d" / "metadata.json").rename(tmp_path / "r3d" / "metadata")
    WRITERS["record3d"](tmp_path / "exr", views)
    (tmp_path / "exr" / "rgbd").rename(tmp_path / "exr" / "rgb")
    for i, view in enumerate(views):
        (tmp_path / "exr" / "rgb" / f"{i}.depth").unlink()
        write_exr(tmp_path / "exr" / "depth" / f"{i}.exr", view.depth)
    for name in ("r3d", "exr"):
        assert_packed(tmp_path / name, views)


def write_with_info(folder, views, info):
    """As 12-Scenes, 3RScan and ScanNet's exporter: depth as PGM, by a camera of its own, which sees half the size."""
    WRITERS["sevenscenes"](folder, views)
    (folder / "camera-intrinsics.txt").unlink()
    for path in folder.glob("*.depth.png"):
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path.with_suffix(".pgm")), depth)
        path.unlink()
    (h, w), k = views[0].depth.shape, np.eye(4)
    k[:3, :3] = views[0].intrinsics
    text = " ".join(f"{x:.9f}" for x in k.ravel())
    lines = {"m_colorWidth": w, "m_colorHeight": h, "m_depthShift": 1000.0}
    lines |= {"m_calibrationColorIntrinsic": text, "m_calibrationDepthIntrinsic": text}
    (folder / info).write_text("m_versionNumber = 4\n" + "".join(f"{key} = {value}\n" for key, value in lines.items()))


@pytest.mark.parametrize("info", ["_info.txt", "../info.txt"])
def test_the_cameras_of_an_info_file_and_depths_as_pgm_are_read(views, tmp_path, info):
    folder = tmp_path / "scan" / "data"
    write_with_info(folder, views, info)
    assert_packed(folder, views)
    path = folder / "frame-000003.depth.pgm"
    path.write_bytes(path.read_bytes()[:-1])
    assert_refused(folder, 3, "depth is damaged")
    (folder / info).write_text("m_calibrationColorIntrinsic = 1 2 3\n")
    with pytest.raises(ValueError, match=r"info.txt: not readable as intrinsics \(it has no m_calibrationDepth"):
        read(folder)


def test_the_camera_of_seven_scenes_is_not_taken_for_images_of_another_size(views, tmp_path):
    WRITERS["sevenscenes"](tmp_path / "seq-01", views)
    (tmp_path / "seq-01" / "camera-intrinsics.txt").unlink()
    (tmp_path / "info.txt").write_text("somebody's notes")
    assert_refused(tmp_path / "seq-01", 0, "image is not of the annotated size")


def test_depth_that_was_scaled_without_its_own_camera_is_refused(views, tmp_path):
    WRITERS["scannet"](tmp_path / "scene", views)
    k = np.eye(4)
    k[:3, :3] = views[0].intrinsics
    np.savetxt(tmp_path / "scene" / "intrinsic" / "intrinsic_depth.txt", k)
    for path in (tmp_path / "scene" / "depth").iterdir():
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), depth[::2, ::2])
    assert_refused(tmp_path / "scene", 0, "depth is not of the size that its intrinsics are of")


def test_intrinsics_beside_the_folders_are_those_of_scannets_25k_frames(views, tmp_path):
    WRITERS["scannet"](tmp_path / "scene", views)
    (tmp_path / "scene/intrinsic/intrinsic_color.txt").rename(tmp_path / "scene/intrinsics_color.txt")
    assert_packed(tmp_path / "scene", views)


def test_arkits_larger_images_without_their_cameras_give_way_to_the_smaller_ones(views, tmp_path):
    WRITERS["arkitscenes"](tmp_path / "scan", views)
    for path in (tmp_path / "scan" / "lowres_wide").iterdir():
        write_image(tmp_path / "scan" / "vga_wide" / path.name, np.zeros((480, 640, 3), np.uint8))
    capture = read(tmp_path / "scan")
    assert {frame.image.parent.name for frame in capture.frames} == {"lowres_wide"}
    assert not capture.unusable


def test_depth_by_instant_ngps_keys_is_read_in_its_unit(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "scan", views)
    for i, view in enumerate(views):
        write_depth(tmp_path / "scan" / "depths" / f"{i:03d}.png", view.depth, 1 / 500)

    def edit(content):
        content["integer_depth_scale"] = 1 / 500
        for entry in content["frames"]:
            entry["depth_path"] = entry.pop("depth_file_path")

    change(tmp_path / "scan" / "transforms.json", edit)
    assert_packed(tmp_path / "scan", views)


def test_images_of_which_only_smaller_copies_are_there_are_read_from_those(views, tmp_path):
    """As in DL3DV, whose cameras are of the original images."""
    WRITERS["nerfstudio"](tmp_path / "scan", views)

    def edit(content):
        for entry in content["frames"]:
            del entry["depth_file_path"]
            entry |= {key: 4 * entry[key] for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")}

    change(tmp_path / "scan" / "transforms.json", edit)
    (tmp_path / "scan" / "images").rename(tmp_path / "scan" / "images_4")
    capture = read(tmp_path / "scan")
    for frame, view in zip(capture.frames, views, strict=True):
        assert frame.image.parent.name == "images_4"
        assert "images_4" not in frame.name
        _, k = frame.camera.opencv(*view.depth.shape)
        assert np.allclose(k, view.intrinsics)
        assert pack_frame(frame, FrameOptions()).meta.width == view.depth.shape[1]


def test_two_fields_of_view_make_pixels_that_are_not_square(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "scan", views)

    def edit(content):
        for entry in content["frames"]:
            del entry["fl_x"], entry["fl_y"]
            entry |= {"camera_angle_x": 1.2, "camera_angle_y": 0.8}

    change(tmp_path / "scan" / "transforms.json", edit)
    height, width = views[0].depth.shape
    for keys in ((), ("w", "h", "cx", "cy")):
        change(
            tmp_path / "scan" / "transforms.json",
            lambda content, keys=keys: [entry.pop(key) for entry in content["frames"] for key in keys],
        )
        _, k = read(tmp_path / "scan").frames[0].camera.opencv(height, width)
        assert k[0, 0] == pytest.approx(width / 2 / np.tan(0.6))
        assert k[1, 1] == pytest.approx(height / 2 / np.tan(0.4))


def test_radial_lenses_and_a_byte_order_mark_are_no_obstacle_to_transforms_json(views, tmp_path):
    WRITERS["nerfstudio"](tmp_path / "scan", views)
    path = tmp_path / "scan" / "transforms.json"
    change(path, lambda content: content.update(camera_model="SIMPLE_RADIAL", k1=0.1))
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read(tmp_path / "scan").frames[0].camera.distortion == Distortion(coefficients=(0.1, 0, 0, 0, 0))


def test_an_image_without_a_dense_map_has_that_of_points_and_it_is_said(views, tmp_path, caplog):
    ALL["colmap"](tmp_path / "scan", views)
    maps = tmp_path / "scan" / "stereo" / "depth_maps"
    maps.mkdir(parents=True)
    for i, view in enumerate(views):
        if i != 2:
            header = "{1}&{0}&1&".format(*view.depth.shape).encode()
            (maps / f"{i:03d}.png.geometric.bin").write_bytes(header + view.depth.astype("<f4").tobytes())
    depths = [frame.depth for frame in read(tmp_path / "scan").frames]
    assert [i for i, depth in enumerate(depths) if isinstance(depth, SparsePoints)] == [2]
    assert "has no map of 1 of 8 images" in caplog.text


def test_damaged_models_of_colmap_are_named(views, tmp_path):
    ALL["colmap"](tmp_path / "scan", views)
    path = tmp_path / "scan" / "sparse" / "0" / "images.bin"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="0: not readable as a model of COLMAP"):
        read(tmp_path / "scan")


def test_cameras_without_a_focal_length_are_refused_by_name():
    camera = pycolmap.Camera.create_from_model_name(1, "EQUIRECTANGULAR", 1.0, 200, 100)
    with pytest.raises(ValueError, match="camera model EQUIRECTANGULAR cannot be undistorted"):
        camera_of(camera)


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".jpg"])
def test_photographs_with_the_same_borders_are_not_the_same(tmp_path, suffix):
    (tmp_path / "scan").mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,depth,r11,r12,r13,t1,r21,r22,r23,t2,r31,r32,r33,t3,fx,fy,cx,cy"]
    for i in range(10):
        image = np.zeros((240, 320, 3), np.uint8)
        image[80:160, 100:200] = rng.integers(0, 255, (80, 100, 3))
        cv2.imwrite(str(tmp_path / "scan" / f"{i}{suffix}"), image, [cv2.IMWRITE_TIFF_COMPRESSION, 1])
        lines.append(f"{i}{suffix},,1,0,0,{i / 10},0,1,0,0,0,0,1,0,250,250,159.5,119.5")
    (tmp_path / "scan" / "frames.csv").write_text("\n".join(lines) + "\n")
    found = Captures([tmp_path / "scan"], CaptureOptions(split=Split(tail=0.2)))
    assert make_plan(found, PackOptions(min_frames=1), allow_shared_frames=False)
