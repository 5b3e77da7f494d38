"""What of a depth file counts, and where it is put."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from prep.importers.source import DepthFile
from prep.packing.depth_files import read_float
from prep.packing.depths import Target, _known, _placed
from prep.packing.reading import BadFrameError


@pytest.fixture
def scene():
    return np.random.default_rng(0).uniform(0.5, 6, (48, 64)).astype(np.float32)


def target_of(source, size):
    factor = size[0] / source[0], size[1] / source[1]
    return Target(source, size, factor, None, np.array([[100.0, 0, 31.5], [0, 100, 23.5], [0, 0, 1]]))


@pytest.mark.parametrize("background", [np.inf, np.nan, 1000.0, 65504.0, 65535.0, 1e6, 1e10])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("farthest", [6, 33])
def test_what_renderers_write_where_there_is_nothing_is_unknown(scene, background, share, farthest):
    scene = scene * (farthest / 6)
    nothing = np.random.default_rng(1).random(scene.shape) < share
    assert nothing.any()
    known = _known(np.where(nothing, np.float32(background), scene))
    assert np.array_equal(known, np.where(nothing, 0, scene))


def test_blends_with_the_background_are_unknown_and_a_view_of_nothing_has_no_depth(scene):
    blended = scene.copy()
    blended[:20] = 65504
    blended[20] = np.linspace(2000, 60000, 64)
    assert np.array_equal(_known(blended) > 0, np.arange(48)[:, None].repeat(64, 1) > 20)
    assert not _known(np.full((48, 64), 65504, np.float32)).any()


@pytest.mark.parametrize("far", [2.0, 60.0])
def test_what_may_be_a_scene_is_kept(scene, far):
    """A wall that faces the camera, with a stray; something close before a far landscape; points in front of all."""
    wall = np.full((48, 64), far, np.float32)
    wall[0, 0] = 0.05
    assert np.array_equal(_known(wall), wall)
    assert np.array_equal(_known(wall[1:]), wall[1:])
    for part in (scene[:30] * far * 100, scene[:1] * 1e-3):
        mixed = scene.copy()
        mixed[: len(part)] = part
        assert np.array_equal(_known(mixed), mixed)


def test_the_largest_number_of_16_bits_is_no_depth(tmp_path, scene):
    millimeters = (scene * 1000).astype(np.uint16)
    millimeters[5:9], millimeters[20, 20] = 65535, 60000
    cv2.imwrite(str(tmp_path / "d.png"), millimeters)
    found = _placed(DepthFile(path=tmp_path / "d.png", unit=1e-3), target_of((48, 64), (48, 64)))
    assert np.allclose(found, np.where(millimeters == 65535, 0, millimeters) / 1e3)


@pytest.mark.parametrize("size", [(48, 64), (24, 32), (31, 41)])
def test_scattered_points_in_a_file_all_stay(tmp_path, size):
    rng = np.random.default_rng(2)
    values = np.zeros((480, 640), np.float32)
    values.flat[rng.choice(values.size, 60, replace=False)] = rng.uniform(1, 5, 60)
    np.save(tmp_path / "d.npy", values)
    found = _placed(DepthFile(path=tmp_path / "d.npy", encoding="float"), target_of((480, 640), size))
    assert np.count_nonzero(found) > 50  # few fall on one pixel


@pytest.mark.parametrize("share", [0.1, 0.45])
def test_scattered_depths_are_not_put_nearer_where_several_meet(tmp_path, share):
    rng = np.random.default_rng(4)
    values = rng.uniform(1.8, 2.2, (480, 640)).astype(np.float32)
    values[rng.random(values.shape) > share] = 0
    np.save(tmp_path / "d.npy", values)
    found = _placed(DepthFile(path=tmp_path / "d.npy", encoding="float"), target_of((480, 640), (160, 213)))
    assert found[found > 0].mean() == pytest.approx(2, abs=5e-3)


@pytest.mark.parametrize("coarse", [(240, 320), (120, 160), (160, 213)])
def test_coarse_depth_is_put_without_bias(tmp_path, coarse):
    """The depth of a slanted plane says where a sample belongs."""
    across = (np.arange(coarse[1]) + 0.5) * 640 / coarse[1] - 0.5  # in pixels of the image
    for axis, places in ((1, across), (0, (np.arange(coarse[0]) + 0.5) * 480 / coarse[0] - 0.5)):
        values = np.broadcast_to(places if axis else places[:, None], coarse) + 1000
        np.save(tmp_path / "d.npy", values.astype(np.float32))
        found = _placed(DepthFile(path=tmp_path / "d.npy", encoding="float"), target_of((480, 640), (480, 640)))
        put = np.nonzero(found)
        assert len(put[0]) > 0.99 * values.size
        assert abs(np.mean(put[axis] + 1000 - found[put])) < 0.01


CHANNELS = {
    ("Z", "A"): "Z",
    ("A", "Depth"): "Depth",
    ("ViewLayer.Combined.R", "ViewLayer.Combined.G", "ViewLayer.Depth.Z"): "ViewLayer.Depth.Z",
    ("ViewLayer.Combined.R", "ViewLayer.Depth.Z", "ViewLayer.Mist.Z"): "ViewLayer.Depth.Z",
    ("Depth.Z", "Normal.X", "Normal.Y", "Normal.Z"): "Depth.Z",
    ("Pass.Z", "Normal.X", "Normal.Y", "Normal.Z"): "Pass.Z",
    ("Combined.R", "Normal.X", "Normal.Y", "Normal.Z"): None,
    ("V",): "V",
    ("A", "Y"): "Y",
    ("confidence", "distance"): None,
    ("ViewLayer.Combined.R", "ViewLayer.Combined.G"): None,
}


@pytest.mark.parametrize(("names", "right"), CHANNELS.items())
def test_of_the_channels_of_an_exr_the_depth_is_read_or_none(tmp_path, scene, names, right):
    import OpenEXR

    channels = {name: scene if name == right else np.full_like(scene, 0.5) for name in names}
    header = {"type": OpenEXR.scanlineimage, "compression": OpenEXR.ZIP_COMPRESSION}
    OpenEXR.File(header, channels).write(str(tmp_path / "d.exr"))
    if right is None:
        with pytest.raises(BadFrameError, match="not just one is called Z or depth"):
            read_float(tmp_path / "d.exr")
    else:
        assert np.array_equal(read_float(tmp_path / "d.exr"), scene)


@pytest.mark.parametrize(("rows", "share"), [(36, 1.0), (30, 0.39)])
def test_depth_a_little_coarser_than_the_image_is_known_everywhere(tmp_path, rows, share):
    """Scattered, it would have holes, and crops would take it for a full map."""
    depth = np.random.default_rng(0).uniform(1, 2, (rows, rows * 4 // 3)).astype(np.float32)
    np.save(tmp_path / "d.npy", depth)
    placed = _placed(DepthFile(path=tmp_path / "d.npy", encoding="float"), target_of((96, 128), (48, 64)))
    assert (placed > 0).mean() == pytest.approx(share, abs=0.01)
