from __future__ import annotations

import multiprocessing
import shutil

import numpy as np
import pytest
import torch

import shards
from shards.codecs import decode_jpeg
from shards.schema import row_crc
from train.loader import (
    Split,
    TrainingSteps,
    crop_depth,
    crop_image,
    crop_scale,
    load_scene,
    load_step,
    make_loader,
)
from train.plan import DataConfig, DataState, Scene, StepShape, validation_plan

CONFIG = DataConfig(width=84, views=(2, 4), aspect=(0.6, 1.0))


@pytest.fixture(scope="module")
def split(shard_dir):
    return Split(shards.open(shard_dir), "train")


def steps(split, *, workers=0, rank=0, world_size=1, last=6, state=None):
    dataset = TrainingSteps(
        split,
        CONFIG,
        seed=1,
        state=state or DataState(),
        last_step=last,
        max_img_per_gpu=8,
        rank=rank,
        world_size=world_size,
    )
    return list(make_loader(dataset, workers, pin_memory=False))


def same(a, b):
    assert a["keys"] == b["keys"]
    assert a["after"] == b["after"]
    for name in ("images", "depth", "depth_scale", "extrinsics", "intrinsics", "colour"):
        assert torch.equal(a[name], b[name]), name


def test_any_number_of_workers_gives_the_same_batches(split):
    alone = steps(split)
    assert len(alone) == 6
    for workers in (1, 2):
        for a, b in zip(alone, steps(split, workers=workers), strict=True):
            same(a, b)


def test_any_step_resumes_with_the_rest_of_the_stream(split):
    whole = steps(split)
    for a, b in zip(whole[4:], steps(split, state=whole[3]["after"], workers=2), strict=True):
        same(a, b)


def test_a_batch_is_small_and_of_the_stated_types(split):
    for batch in steps(split, last=3):
        b, s = batch["images"].shape[:2]
        h, w = batch["images"].shape[-2:]
        assert batch["images"].dtype == torch.uint8
        assert (batch["depth"].dtype, batch["depth"].shape) == (torch.float16, (b, s, h, w))
        assert (batch["extrinsics"].dtype, batch["extrinsics"].shape) == (torch.float64, (b, s, 3, 4))
        assert torch.allclose(batch["intrinsics"][..., 0, 2], torch.tensor((w - 1) / 2).double())
        assert torch.allclose(batch["intrinsics"][..., 1, 2], torch.tensor((h - 1) / 2).double())
        size = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
        assert size / (b * s) < 5.5 * h * w  # 3 bytes of colour, 2 of depth, the cameras


def plane(k, height, width):
    """Depth of the plane 0.3 x - 0.2 y + 0.93 z = 1 seen through k: [H, W]."""
    y, x = np.mgrid[:height, :width]
    return 1 / (0.3 * (x - k[0, 2]) / k[0, 0] - 0.2 * (y - k[1, 2]) / k[1, 1] + 0.93)


@pytest.mark.parametrize("size", [(648, 864), (864, 648), (240, 320)])
def test_crops_keep_the_geometry_to_a_fraction_of_a_pixel(size):
    rng = np.random.default_rng(0)
    height, width = size
    k = np.array([[0.9 * width, 0, width / 2 + 7.3], [0, 0.9 * width, height / 2 - 4.6], [0, 0, 1]])
    depth = plane(k, height, width)
    v, u = np.mgrid[:height, :width].astype(np.float32)
    ramp = np.stack([u / width * 200 + 20, v / height * 200 + 20, u * 0], axis=-1).astype(np.float32)
    for _ in range(20):
        shape = StepShape(2, 14 * int(rng.integers(6, 37)), 518)
        scale = crop_scale(size, (k[0, 2], k[1, 2]), shape, rng)
        cropped = np.diag([scale, scale, 1]) @ k
        cropped[:2, 2] = (shape.width - 1) / 2, (shape.height - 1) / 2
        found = crop_depth(depth, (k[0, 2], k[1, 2]), scale, shape)
        expected = plane(cropped, shape.height, shape.width)
        off = (found - expected) / np.gradient(expected, axis=1)
        assert abs(off.mean()) < 0.05 * max(1, scale)
        assert np.abs(off).max() < 1.1 * max(1, scale)  # half a source pixel along x, and along y times the slopes
        image = crop_image(ramp, 1.0, (k[0, 2], k[1, 2]), scale, shape)
        x = (np.arange(shape.width) - cropped[0, 2]) / scale + k[0, 2]
        y = (np.arange(shape.height) - cropped[1, 2]) / scale + k[1, 2]
        assert np.abs(image[..., 0] - (x / width * 200 + 20)).max() < 0.1 * 200 / width / scale + 0.02
        assert np.abs(image[..., 1] - (y / height * 200 + 20)[:, None]).max() < 0.1 * 200 / height / scale + 0.02
        assert x.min() > -0.5  # the crop lies within the image
        assert x.max() < width - 0.5
        assert y.min() > -0.5
        assert y.max() < height - 0.5


def test_reduced_decoding_does_not_shift_the_image(split):
    """The same crop from the whole image and from half of it shows the same thing at the same place."""
    jpeg, _ = split.shard_set.read(0)
    shape = StepShape(2, 56, 70)
    row = split.shard_set.frames[0]
    centre = (float(row["intrinsics"][0, 2]), float(row["intrinsics"][1, 2]))
    whole, _ = decode_jpeg(jpeg, 1.0)
    half, eighths = decode_jpeg(jpeg, 0.5)
    assert eighths == 4
    a = crop_image(whole, 1.0, centre, 0.5, shape).astype(float)
    errors = {}
    for shift in (-1, 0, 1):
        b = crop_image(half, 0.5, (centre[0] + shift, centre[1]), 0.5, shape).astype(float)
        errors[shift] = np.abs(a - b).mean()
    assert errors[0] < 0.7 * min(errors[-1], errors[1])


def test_views_agree_about_the_world(split):
    """A point seen in view 0 has, in view 1, the depth that view 1 says, wherever it is not hidden."""
    ok = seen = 0
    for batch in steps(split, last=4):
        depth = batch["depth"].double() * batch["depth_scale"][..., None, None]
        for scene in range(depth.shape[0]):
            e, k, d = batch["extrinsics"][scene], batch["intrinsics"][scene], depth[scene]
            v, u = torch.nonzero(d[0] > 0, as_tuple=True)
            rays = torch.linalg.solve(k[0], torch.stack([u.double(), v.double(), torch.ones(len(u))]))
            world = e[0, :, :3].T @ (rays * d[0, v, u] - e[0, :, 3:])
            p = k[1] @ (e[1, :, :3] @ world + e[1, :, 3:])
            x, y = (p[0] / p[2]).round().long(), (p[1] / p[2]).round().long()
            inside = (p[2] > 0) & (x >= 0) & (x < d.shape[2]) & (y >= 0) & (y < d.shape[1])
            there = d[1, y[inside], x[inside]]
            error = (there - p[2][inside]).abs() / p[2][inside]
            ok += int(((there > 0) & (error < 0.03)).sum())
            seen += int(((there > 0) & (p[2][inside] < 1.03 * there)).sum())
    assert seen > 1000
    assert ok / seen > 0.85


def damaged_split(shard_dir, tmp_path, frames):
    shutil.copytree(shard_dir, tmp_path / "damaged")
    opened = shards.open(tmp_path / "damaged")
    split = Split(opened, "train")
    for sequence, frame in frames:
        row = opened.frames[int(split.first[sequence]) + frame]
        with (tmp_path / "damaged" / opened.tars[row["tar"]]).open("r+b") as file:
            file.seek(int(row["jpg_offset"]) + int(row["jpg_size"]) // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
    return split


def test_a_damaged_frame_gives_way_to_another_of_its_sequence(shard_dir, split, tmp_path, caplog):
    broken = damaged_split(shard_dir, tmp_path, [(2, 5), (2, 6)])
    scene, shape = Scene(2, (5, 0, 6), 11), StepShape(3, 56, 84)
    good, replaced = load_scene(split, scene, shape), load_scene(broken, scene, shape)
    assert (good["bad"], replaced["bad"], replaced["tried"]) == (0, 2, 5)
    assert replaced["keys"][1] == good["keys"][1]
    assert not set(replaced["keys"]) & {good["keys"][0], good["keys"][2]}
    assert len(set(replaced["keys"])) == 3
    assert replaced["images"].shape == good["images"].shape
    assert "frame000006" in caplog.text
    assert load_scene(broken, scene, shape)["keys"] == replaced["keys"]


def test_a_sequence_without_a_readable_frame_gives_way_to_the_next(shard_dir, split, tmp_path):
    broken = damaged_split(shard_dir, tmp_path, [(0, frame) for frame in range(24)])
    shape = StepShape(2, 56, 84)
    replaced = load_scene(broken, Scene(0, (1, 2), 5), shape)
    assert replaced["bad"] == 24
    assert replaced["keys"] == load_scene(split, Scene(1, (1, 2), 5), shape)["keys"]
    for tar in (tmp_path / "damaged").glob("*.tar"):
        tar.unlink()
    shards.reader._descriptors.clear()
    with pytest.raises(shards.DamagedMemberError, match="no frame can be read"):
        load_scene(broken, Scene(0, (1, 2), None), shape)


def test_validation_batches_are_always_the_same(split):
    config = DataConfig(width=84, val_scenes=3, val_views=3)
    plan = validation_plan(config, split.lengths, 0, 1)
    for a, b in zip([load_step(split, s) for s in plan], [load_step(split, s) for s in plan], strict=True):
        same(a, b)
        assert (a["colour"][..., 4:] <= 0).all()  # no colour jitter


def test_a_split_that_is_not_there_is_named(shard_dir):
    opened = shards.open(shard_dir)
    with pytest.raises(ValueError, match="has no val split, only"):
        Split(opened, "val")


def read_in_child(split, frame, queue):
    queue.put(split.shard_set.read(frame))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_read_the_same_bytes_however_they_start(split, method):
    expected = split.shard_set.read(3)  # the parent has the tar open
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(split, 3, queue))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_camera_only_frames_have_no_depth(split, tmp_path, shard_dir):
    shutil.copytree(shard_dir, tmp_path / "set")
    frames = np.load(tmp_path / "set" / "frames.npy")
    frames["depth_size"] = 0
    for row in frames:
        row["row_crc"] = row_crc(row)
    np.save(tmp_path / "set" / "frames.npy", frames)
    batch = load_step(Split(shards.open(tmp_path / "set"), "train"), validation_plan(CONFIG, split.lengths, 0, 1)[0])
    assert (batch["depth"] == 0).all()
