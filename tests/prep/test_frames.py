"""Frame processing against analytic planes: what is packed still lies on the plane, to a fraction of a pixel."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planes import plane_depth, stripes

from prep.importers.cameras import OpenCVCamera
from prep.importers.co3d import stereo_depth
from prep.importers.source import Distortion, Frame
from prep.packing.frames import FrameOptions, pack_frame
from prep.packing.lens import Lens
from prep.packing.reading import BadFrameError
from shards.codecs import decode_depth, decode_jpeg, encode_jpeg

LENS = Distortion(coefficients=(-0.1, 0.02, 0.0, 0.0))


@pytest.fixture
def make_frame(tmp_path):
    def make(height=240, width=320, *, depth=None, mask=None, k=None, extrinsics=None, scale=1.0):
        focal = 0.95 * max(height, width)
        k = np.array([[focal, 0, width / 2 + 3.3], [0, focal, height / 2 - 5.2], [0, 0, 1.0]]) if k is None else k
        v, u = np.mgrid[:height, :width]
        image = np.repeat(stripes(u, v)[..., None], 3, axis=-1).astype(np.uint8)
        (tmp_path / "image.jpg").write_bytes(encode_jpeg(image, quality=98))
        depth = plane_depth(k, height, width) if depth is None else depth
        cv2.imwrite(str(tmp_path / "depth.png"), depth.astype(np.float16).view(np.uint16))
        if mask is not None:
            cv2.imwrite(str(tmp_path / "mask.png"), mask)
        return Frame(
            name="frame000001",
            path="apple/1/images/frame000001.jpg",
            image=tmp_path / "image.jpg",
            depth=stereo_depth(tmp_path / "depth.png", scale),
            mask=None if mask is None else tmp_path / "mask.png",
            size=None,
            camera=OpenCVCamera(extrinsics=np.eye(4)[:3] if extrinsics is None else extrinsics, intrinsics=k),
        )

    return make


def offsets(packed):
    """How far each packed depth lies off the plane, in pixels of the packed image along x."""
    k = packed.meta.intrinsics
    depth = decode_depth(packed.depth, packed.meta.height, packed.meta.width).astype(float)
    expected = plane_depth(k, *depth.shape)
    slope = np.gradient(expected, axis=1)
    valid = depth > 0
    return ((depth - expected) / slope)[valid]


@pytest.mark.parametrize("change", [{"camera": LENS}, {"quarter_turns": 1}, {}])
def test_a_damaged_jpeg_is_refused_whatever_becomes_of_it(make_frame, change):
    """A block of zeros, as after a lost connection: OpenCV would fill in what it cannot read."""
    frame = make_frame(480, 640)
    lens = change.get("camera")
    frame = replace(frame, **change | ({"camera": replace(frame.camera, distortion=lens)} if lens else {}))
    assert pack_frame(frame, FrameOptions()).jpeg
    data = bytearray(frame.image.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2048] = bytes(2048)
    frame.image.write_bytes(data)
    with pytest.raises(BadFrameError, match="image is damaged"):
        pack_frame(frame, FrameOptions())


@pytest.mark.parametrize("k1", [-0.2, -0.45, -0.8, -1.5])
def test_no_lens_shows_anything_mirrored(k1):
    """Polynomials that bend back within the image, as of cameras that COLMAP has wrong."""
    k = np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]])
    lens = Lens(k, Distortion(coefficients=(k1, 0.0, 0.0, 0.0)), 480, 640)
    v, u = np.mgrid[:480:4, :640:4].astype(float)
    seen = lens.to_source(np.column_stack([u.ravel(), v.ravel()])).reshape(*u.shape, 2)
    assert (np.diff(seen[..., 0], axis=1) > 0).all()
    assert (np.diff(seen[..., 1], axis=0) > 0).all()


def test_a_lens_that_bends_back_nearly_everywhere_is_refused():
    k = np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]])
    with pytest.raises(BadFrameError, match="lens model bends back"):
        Lens(k, Distortion(coefficients=(-900.0, 0.0, 0.0, 0.0)), 480, 640)


@pytest.mark.parametrize(("height", "width"), [(1080, 1440), (1440, 1080), (719, 1281)])
@pytest.mark.parametrize("fraction", [0.3, 0.45, 0.5, 0.6, 0.65, 0.8, 0.95, 1.0])
def test_packed_depth_lies_on_the_plane(make_frame, height, width, fraction):
    frame = make_frame(height, width)
    short_side = round(fraction * min(height, width))
    packed = pack_frame(frame, FrameOptions(short_side=short_side))
    assert min(packed.meta.height, packed.meta.width) == short_side
    off = offsets(packed)
    assert abs(off.mean()) < 0.05
    assert np.median(np.abs(off)) < 0.35


@pytest.mark.parametrize("short_side", [324, 540, 701])
def test_packed_image_is_aligned_with_its_intrinsics(make_frame, short_side):
    frame = make_frame(1080, 1440)
    packed = pack_frame(frame, FrameOptions(short_side=short_side))
    image, _ = decode_jpeg(packed.jpeg)
    y, x = np.mgrid[: packed.meta.height, : packed.meta.width]
    old, new = frame.camera.intrinsics, packed.meta.intrinsics

    def expected(shift):
        u = (x + shift - new[0, 2]) / new[0, 0] * old[0, 0] + old[0, 2]
        v = (y + shift - new[1, 2]) / new[1, 1] * old[1, 1] + old[1, 2]
        return stripes(u, v)

    errors = {shift: np.abs(image[..., 0] - expected(shift)).mean() for shift in (-0.25, 0.0, 0.25)}
    assert errors[0.0] < 2
    assert errors[0.0] < 0.5 * min(errors[-0.25], errors[0.25])


def test_a_naive_resize_would_fail_that_test(make_frame):
    """cv2's nearest takes the pixel left of the middle when it halves: a systematic shift."""
    frame = make_frame(1080, 1440)
    packed = pack_frame(frame, FrameOptions(short_side=540))
    naive = cv2.resize(plane_depth(frame.camera.intrinsics, 1080, 1440), (720, 540), interpolation=cv2.INTER_NEAREST)
    expected = plane_depth(packed.meta.intrinsics, 540, 720)
    assert abs(((naive - expected) / np.gradient(expected, axis=1)).mean()) > 0.1


def test_small_images_keep_their_bytes(make_frame):
    frame = make_frame()
    for short_side in (0, 240, 648):
        packed = pack_frame(frame, FrameOptions(short_side=short_side))
        assert packed.jpeg == frame.image.read_bytes()
        assert np.array_equal(packed.meta.intrinsics, frame.camera.intrinsics)


def test_only_masked_in_positive_finite_depth_counts(make_frame):
    depth = np.full((240, 320), 2.0)
    depth[:10], depth[10:20], depth[20:30] = 0, np.inf, -1
    depth[30:40] = np.nan
    mask = np.full((240, 320), 255, np.uint8)
    mask[:, :50] = 128
    packed = pack_frame(make_frame(depth=depth, mask=mask), FrameOptions())
    stored = decode_depth(packed.depth, 240, 320)
    assert (stored[:40] == 0).all()
    assert (stored[:, :50] == 0).all()
    assert (stored[40:, 50:] == 2).all()


def test_the_far_cut_counts_valid_depths_only(make_frame):
    """Of a sparse map 2% is lost, not everything above the 98th percentile of a map of zeros."""
    rng = np.random.default_rng(0)
    depth = np.where(rng.random((240, 320)) < 0.1, rng.uniform(1, 5, (240, 320)), 0).astype(np.float16)
    packed = pack_frame(make_frame(depth=depth), FrameOptions())
    stored = decode_depth(packed.depth, 240, 320)
    lost = 1 - (stored > 0).sum() / (depth > 0).sum()
    assert 0.015 < lost < 0.025
    assert np.array_equal(stored[stored > 0], depth[stored > 0])  # what stays is bit-exact


ROTATION = np.eye(4)[:3]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.image.unlink(), "image is missing"),
        (lambda f: f.image.write_bytes(f.image.read_bytes()[:2000]), "image is damaged"),
        (lambda f: f.image.write_bytes(b""), "image is damaged"),
        (lambda f: f.image.write_bytes(b"an old film"), "image is damaged"),
        (lambda f: f.depth.path.unlink(), "depth is missing"),
        (lambda f: f.depth.path.write_bytes(f.depth.path.read_bytes()[:-500]), "depth is truncated"),
        (lambda f: f.depth.path.write_bytes(b"IEND\xaeB`\x82"), "depth is damaged"),
        (lambda f: cv2.imwrite(str(f.depth.path), np.ones((240, 320), np.uint8)), "depth is not a 16-bit gray PNG"),
        (lambda f: cv2.imwrite(str(f.depth.path), np.ones((240, 320, 3), np.uint16)), "depth is not a 16-bit gray PNG"),
        (lambda f: cv2.imwrite(str(f.depth.path), np.ones((10, 10), np.uint16)), "depth is not of the image's size"),
        (lambda f: cv2.imwrite(str(f.mask), np.ones((10, 10), np.uint8)), "depth mask is not of the image's size"),
        (lambda f: f.camera.extrinsics.__setitem__((0, 3), np.nan), "camera is not finite"),
        (lambda f: f.camera.extrinsics.__setitem__((0, 0), -1), "camera is not a rotation"),
        (lambda f: f.camera.extrinsics.__setitem__((0, 0), 1.1), "camera is not a rotation"),
        (lambda f: f.camera.intrinsics.__setitem__((0, 1), 2), "intrinsics are skewed"),
        (lambda f: f.camera.intrinsics.__setitem__((0, 0), -300), "intrinsics are not"),
        (lambda f: f.camera.intrinsics.__setitem__((1, 2), 230), "principal point is far from the center"),
        (lambda f: f.camera.intrinsics.__setitem__((0, 0), 1e300), "focal length is impossible"),
        (lambda f: f.camera.intrinsics.__imul__([[0.001], [0.001], [1]]), "focal length is impossible"),
        (lambda f: f.camera.intrinsics.__setitem__((0, 0), 2000), "fx and fy are too different"),
        (lambda f: f.camera.extrinsics.__setitem__((1, 3), 1e300), "camera is too far from the origin"),
        (lambda f: f.camera.extrinsics.__setitem__((1, 3), -2e9), "camera is too far from the origin"),
    ],
)
def test_a_frame_that_cannot_be_used_says_why(make_frame, change, reason):
    frame = make_frame(mask=np.full((240, 320), 255, np.uint8), extrinsics=np.eye(4)[:3])
    change(frame)
    with pytest.raises(BadFrameError, match=reason):
        pack_frame(frame, FrameOptions())


@given(st.integers(20, 90), st.integers(20, 90), st.integers(8, 60))
@settings(max_examples=30, deadline=None)
def test_any_size_packs_to_a_whole_frame(tmp_path_factory, height, width, short_side):
    folder = tmp_path_factory.mktemp("any")
    image = np.full((height, width, 3), 99, np.uint8)
    (folder / "i.jpg").write_bytes(encode_jpeg(image, quality=90))
    cv2.imwrite(str(folder / "d.png"), np.full((height, width), 1.5, np.float16).view(np.uint16))
    k = np.array([[50.0, 0, width / 2], [0, 50.0, height / 2], [0, 0, 1]])
    frame = Frame(
        name="f",
        path="a/b/images/f.jpg",
        image=folder / "i.jpg",
        depth=stereo_depth(folder / "d.png"),
        mask=None,
        size=None,
        camera=OpenCVCamera(extrinsics=np.eye(4)[:3], intrinsics=k),
    )
    packed = pack_frame(frame, FrameOptions(short_side=short_side))
    stored, _ = decode_jpeg(packed.jpeg)
    assert stored.shape[:2] == (packed.meta.height, packed.meta.width)
    assert (decode_depth(packed.depth, *stored.shape[:2]) == 1.5).all()
