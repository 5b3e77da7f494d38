"""From source files through the shards to a batch: image, depth and intrinsics still lie on each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from planes import plane_depth, stripes

import shards
from prep.importers.cameras import OpenCVCamera
from prep.importers.co3d import stereo_depth
from prep.importers.source import Frame
from prep.packing.frames import FrameOptions, pack_frame
from shards.build_index import rebuild_index
from shards.codecs import encode_jpeg
from shards.writer import write_tar
from train.data.plan import DataState, Scene, Step, StepShape
from train.data.scenes import load_step
from train.data.split import Split

SIZES = {"landscape": (1080, 1440), "portrait": (1440, 1080), "small": (480, 640)}


def intrinsics(height, width):
    focal = 0.95 * max(height, width)
    return np.array([[focal, 0, width / 2 + 13.3], [0, focal, height / 2 - 9.2], [0, 0, 1.0]])


@pytest.fixture(scope="module", params=SIZES)
def plane(request, tmp_path_factory):
    """A set of one sequence that sees the analytic plane, and the intrinsics of its source."""
    folder = tmp_path_factory.mktemp(request.param)
    height, width = SIZES[request.param]
    k = intrinsics(height, width)
    v, u = np.mgrid[:height, :width]
    image = np.repeat(stripes(u, v)[..., None], 3, axis=-1).astype(np.uint8)
    (folder / "image.jpg").write_bytes(encode_jpeg(image, quality=98))
    cv2.imwrite(str(folder / "depth.png"), plane_depth(k, height, width).astype(np.float16).view(np.uint16))
    frame = Frame(
        name="one",
        path="a/b/images/one.jpg",
        image=folder / "image.jpg",
        size=None,
        depth=stereo_depth(folder / "depth.png"),
        mask=None,
        camera=OpenCVCamera(extrinsics=np.eye(4)[:3], intrinsics=k),
    )
    packed = pack_frame(frame, FrameOptions())
    (folder / "set").mkdir()
    members = {"jpg": packed.jpeg, "depth.zst": packed.depth, "json": packed.meta.to_json()}
    write_tar(folder / "set" / "train-000000.tar", [{"__key__": f"a/b/{i}", **members} for i in range(2)])
    with ThreadPoolExecutor(1) as pool:
        rebuild_index(folder / "set", pool)
    return Split([shards.open(folder / "set")], "train"), k


@pytest.mark.parametrize("shape", [StepShape(2, 518, 518), StepShape(2, 182, 518), StepShape(2, 126, 182)])
def test_batches_keep_image_depth_and_intrinsics_together_to_a_fraction_of_a_pixel(plane, shape):
    """Whole decodes and reduced ones, enlarged and shrunk, with random crops."""
    split, source = plane
    offsets = []
    for seed in range(8):
        batch = load_step(split, Step(shape, (Scene(0, 0, (0, 1), seed),), DataState(1, (0,))))
        for view in range(2):
            k = batch["intrinsics"][0, view].numpy()
            depth = batch["depth"][0, view].double().numpy()
            expected = plane_depth(k, shape.height, shape.width)
            off = ((depth - expected) / np.gradient(expected, axis=1))[depth > 0]
            # Where pixels are enlarged, the nearest one may be half of a larger one away.
            enlarged = max(1.0, k[0, 0] / split.shard_sets[0].frames[0]["intrinsics"][0, 0])
            assert np.median(np.abs(off)) < 0.45 * enlarged  # the nearest pixel was taken twice
            offsets.append(off.mean())
            check_image(batch["images"][0, view, 0].numpy(), k, source)
    assert abs(np.mean(offsets)) < 0.05


def check_image(image, k, source):
    """The stripes lie where the intrinsics say, a quarter of a pixel aside they do not."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    errors = {}
    for shift in (-0.25, 0.0, 0.25):
        u = (x + shift - k[0, 2]) / k[0, 0] * source[0, 0] + source[0, 2]
        v = (y + shift - k[1, 2]) / k[1, 1] * source[1, 1] + source[1, 2]
        errors[shift] = np.abs(image - stripes(u, v)).mean()
    assert errors[0.0] < min(errors[-0.25], errors[0.25])
    if k[0, 0] > 0.4 * source[0, 0]:  # smaller, and the stripes themselves are blurred
        assert errors[0.0] < 3
