from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_command
from web import served

import shards
import train.data.batches
import train.data.loader
from shards.codecs import decode_jpeg
from shards.geometry import are_scattered
from shards.schema import row_crc
from train.config import load_config
from train.data.batches import TrainingSteps
from train.data.crops import crop_depth, crop_image, crop_scale
from train.data.loader import NoDataError, stream
from train.data.plan import DataConfig, DataState, Scene, ShardSource, Step, StepShape, TrainingPlan, validation_plan
from train.data.scenes import _CROP, _JITTER, load_step
from train.data.split import Split, read_step
from train.data.workers import make_loader
from train.evaluation.validation import Validator
from train.runtime.distributed import World
from train.runtime.stop import StopRequest
from vggt import VGGT, preset

CONFIG = DataConfig(width=84, views=(2, 4), aspect=(0.6, 1.0))


@pytest.fixture(scope="module")
def split(shard_dir):
    return Split([shards.open(shard_dir)], "train")


def steps(split, *, workers=0, rank=0, world_size=1, last=6, state=None, max_img=8, config=CONFIG):
    plan = TrainingPlan(config=config, lengths=split.lengths, seed=1, max_img_per_gpu=max_img, world_size=world_size)
    dataset = TrainingSteps(split, plan, rank, state or plan.start(), last)
    return list(make_loader(dataset, workers, pin_memory=False))


def same(a, b):
    assert a["keys"] == b["keys"]
    assert a["after"] == b["after"]
    for name in ("images", "depth", "depth_scale", "extrinsics", "intrinsics", "color_jitter"):
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
        assert size / (b * s) < 5.5 * h * w  # 3 bytes of color, 2 of depth, the cameras


def plane(k, height, width):
    """Depth of the plane 0.3 x - 0.2 y + 0.93 z = 1 seen through k: [H, W]."""
    y, x = np.mgrid[:height, :width]
    return 1 / (0.3 * (x - k[0, 2]) / k[0, 0] - 0.2 * (y - k[1, 2]) / k[1, 1] + 0.93)


@pytest.mark.parametrize("width", [28, 224, 1120])
def test_each_point_of_sparse_depth_in_a_crop_is_in_one_pixel_of_it(width):
    """Of several the one nearest to its center: also where the crop is much smaller, or larger, than the image."""
    rng = np.random.default_rng(width)
    depth = np.zeros((480, 640), np.float16)
    rows, columns = rng.integers(0, 480, 300), rng.integers(0, 640, 300)
    depth[rows, columns] = rng.uniform(1, 5, 300)
    shape = StepShape(2, width // 2 // 14 * 14, width)
    center, scale = (322.3, 238.6), width / 600
    expected = {}
    for y, x in zip(*np.nonzero(depth), strict=True):
        exact = [
            (v - c) * scale + (n - 1) / 2 for v, c, n in ((y, center[1], shape.height), (x, center[0], shape.width))
        ]
        place = tuple(map(round, exact))
        if 0 <= place[0] < shape.height and 0 <= place[1] < shape.width:
            off = np.hypot(exact[0] - place[0], exact[1] - place[1])
            expected[place] = min(expected.get(place, (np.inf, 0)), (off, depth[y, x]))
    found = crop_depth(depth, center, scale, shape)
    assert {(int(y), int(x)): found[y, x] for y, x in zip(*np.nonzero(found), strict=True)} == {
        place: value for place, (_, value) in expected.items()
    }


def test_coarse_depth_is_as_far_in_small_crops_as_in_large_ones():
    """Of several samples in a pixel the nearest to the camera would be too near."""
    k = np.array([[500.0, 0, 319.5], [0, 500, 239.5], [0, 0, 1]])
    truth = plane(k, 480, 640) * np.random.default_rng(3).uniform(0.9, 1.1, (480, 640))
    depth = np.zeros((480, 640), np.float16)
    depth[1::3, 1::3] = truth[1::3, 1::3]
    for width in (56, 112, 518):
        shape, scale = StepShape(2, width // 2 // 14 * 14, width), width / 600
        found = crop_depth(depth, (319.5, 239.5), scale, shape)
        small = k * [[scale, 1, 1], [1, scale, 1], [1, 1, 1]]
        small[:2, 2] = (shape.width - 1) / 2, (shape.height - 1) / 2
        ratio = found[found > 0] / plane(small, shape.height, shape.width)[found > 0]
        assert np.mean(ratio) == pytest.approx(1, abs=4e-3)


def test_samples_of_coarse_depth_are_kept_by_a_crop_and_dense_depth_is_picked():
    coarse = np.zeros((648, 864), np.float16)
    coarse[1::3, 1::3] = 2  # as of a phone's sensor
    shape, center = StepShape(2, 392, 518), (431.5, 323.5)
    scale = 518 / 864
    kept = np.count_nonzero(crop_depth(coarse, center, scale, shape))
    assert kept > 0.99 * np.count_nonzero(coarse)
    dense = np.full((648, 864), 2, np.float16)
    dense[:, :700] = 0  # of an object before nothing
    assert not are_scattered(dense)
    assert not are_scattered(np.zeros((4, 4), np.float16))


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
    jpeg, _ = split.shard_sets[0].read(0)
    shape = StepShape(2, 56, 70)
    row = split.shard_sets[0].frames[0]
    center = (float(row["intrinsics"][0, 2]), float(row["intrinsics"][1, 2]))
    whole, _ = decode_jpeg(jpeg, 1.0)
    half, eighths = decode_jpeg(jpeg, 0.5)
    assert eighths == 4
    a = crop_image(whole, 1.0, center, 0.5, shape).astype(float)
    errors = {}
    for shift in (-1, 0, 1):
        b = crop_image(half, 0.5, (center[0] + shift, center[1]), 0.5, shape).astype(float)
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


def one_scene(split, scene, shape):
    return load_step(split, Step(shape, (scene,), DataState(1, ())))


def damaged_split(shard_dir, tmp_path, frames):
    """The training split with a flipped bit in these (sequence, frame)s."""
    shutil.copytree(shard_dir, tmp_path / "damaged")
    opened = shards.open(tmp_path / "damaged")
    split = Split([opened], "train")
    for sequence, frame in frames:
        row = opened.frames[split.first[0][sequence] + frame]
        tar = tmp_path / "damaged" / opened.tars[row["tar"]]
        data = bytearray(tar.read_bytes())
        data[int(row["jpg_offset"]) + 40] ^= 1
        tar.write_bytes(data)
    return split


def test_a_damaged_frame_gives_way_to_another_of_its_sequence_the_same_in_any_topology(
    split, shard_dir, tmp_path, caplog
):
    broken = damaged_split(shard_dir, tmp_path, [(2, 5), (2, 6)])
    scene, shape = Scene(0, 2, (5, 0, 6), 11), StepShape(3, 56, 84)
    good, replaced = one_scene(split, scene, shape), one_scene(broken, scene, shape)
    (tar,) = replaced["bad"]
    assert tar.startswith(str(tmp_path / "damaged" / "train-"))
    assert (replaced["bad"][tar], replaced["tried"], good["bad"], good["tried"]) == (2, 5, {}, 3)
    assert tar in caplog.text
    (keys,), (before,) = replaced["keys"], good["keys"]
    assert keys[1] == before[1]
    assert torch.equal(replaced["images"][0, 1], good["images"][0, 1])  # what is whole is as it was
    assert len({*keys}) == 3
    assert {key.rpartition("/")[0] for key in keys} == {before[0].rpartition("/")[0]}
    assert one_scene(broken, scene, shape)["keys"] == replaced["keys"]


def test_a_sequence_without_a_usable_frame_is_left_out_of_a_validation_and_no_other_counts_twice(shard_dir, tmp_path):
    broken = damaged_split(shard_dir, tmp_path, [(1, frame) for frame in range(24)])
    config = load_config(None, ["init=a", "precision=fp32", "data.width=56", "data.val_views=2"])
    alone = World(0, 1, 1, torch.device("cpu"))
    validator = Validator(
        neighbors=(None,),
        split=broken,
        data=config.data,
        loss=config.loss,
        precision="fp32",
        world=alone,
        workers=0,
        stop=StopRequest(),
    )
    result = validator.validate(VGGT(preset("tiny", heads=("camera", "depth"))))
    rows = broken.shard_sets[0].sequences[broken.shard_sets[0].split("train")]
    assert result.names == [f"{row['category'].decode()}/{row['name'].decode()}" for row in rows]
    assert [bool(figures) for figures in result.by_scene] == [True, False, True, True, True, True, True]


def test_a_sequence_without_a_usable_frame_gives_way_to_any_other(shard_dir, tmp_path, monkeypatch):
    """Not to its neighbors alone, which lie in the same damaged tar; and each is given up early."""
    monkeypatch.setattr("train.data.scenes.MAX_DAMAGED", 10)
    broken = damaged_split(shard_dir, tmp_path, [(s, frame) for s in (0, 1, 2) for frame in range(24)])
    shape = StepShape(2, 56, 84)
    found = set()
    for frame in range(1, 12):
        scene = Scene(0, 0, (frame, frame + 1), 5)
        replaced = one_scene(broken, scene, shape)
        assert 10 <= sum(replaced["bad"].values()) <= 33
        assert one_scene(broken, scene, shape)["keys"] == replaced["keys"]
        found |= {key.rpartition("/")[0] for (keys,) in [replaced["keys"]] for key in keys}
    assert len(found) > 1
    for tar in (tmp_path / "damaged").glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(shards.DamagedMemberError, match=r"train-00000\d.tar: none of \d+ frames .* can be used"):
        one_scene(broken, Scene(0, 0, (1, 2), None), shape)
    for tar in (tmp_path / "damaged").glob("*.tar"):
        tar.unlink()
    shards.open_files._descriptors.clear()
    with pytest.raises(FileNotFoundError, match=r"train-000000.tar: no such file"):
        one_scene(broken, Scene(0, 0, (1, 2), None), shape)


def test_crops_and_colors_are_drawn_apart():
    """Two uses of one seed must not be one stream, which a zero at its end does not prevent."""
    draws = [
        np.random.default_rng(key).random() for key in ((5, *tail) for tail in ((_CROP, 0), (_CROP, 1), (_JITTER,)))
    ]
    assert len(set(draws)) == 3


def test_validation_batches_are_always_the_same(split):
    config = DataConfig(width=84, val_scenes=3, val_views=3)
    plan, _ = validation_plan(config, split.lengths, 0, 1)
    for a, b in zip([load_step(split, s) for s in plan], [load_step(split, s) for s in plan], strict=True):
        same(a, b)
        assert (a["color_jitter"][..., 4:] <= 0).all()  # no color jitter


def test_a_split_that_is_not_there_is_named(shard_dir):
    opened = shards.open(shard_dir)
    with pytest.raises(ValueError, match="has no val split, only"):
        Split([opened], "val")


def read_in_child(split, frame, queue):
    queue.put(split.shard_sets[0].read(frame))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_read_the_same_bytes_however_they_start(split, method):
    expected = split.shard_sets[0].read(3)  # the parent has the tar open
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
    batch = load_step(
        Split([shards.open(tmp_path / "set")], "train"), validation_plan(CONFIG, split.lengths, 0, 1)[0][0]
    )
    assert (batch["depth"] == 0).all()


def hashed(batches):
    """What each scene is: its keys, and a hash of its arrays, by step."""
    out = []
    for batch in batches:
        arrays = [batch[name].numpy() for name in ("images", "depth", "extrinsics", "intrinsics", "color_jitter")]
        for i, keys in enumerate(batch["keys"]):
            digest = hashlib.sha256(b"".join(np.ascontiguousarray(array[i]).tobytes() for array in arrays)).hexdigest()
            out.append((batch["after"].step, tuple(keys), digest))
    return out


EIGHT = DataConfig(width=56, views=(2, 2), aspect=(0.5, 1.0))  # scenes a step, of all ranks


def world(split, world_size, workers):
    """Three steps of eight scenes, of all ranks in order."""
    ranks = [
        steps(split, workers=workers, rank=r, world_size=world_size, last=3, max_img=16 // world_size, config=EIGHT)
        for r in range(world_size)
    ]
    return [scene for batches in zip(*ranks, strict=True) for batch in batches for scene in hashed([batch])]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_any_workers_yield_the_same_scenes_views_and_pixels(split, workers):
    assert world(split, 1, workers) == world(split, 1, 0)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_world_yields_the_same_scenes_views_and_pixels(split, world_size):
    assert world(split, world_size, 0) == world(split, 1, 0)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (4, 1)])
def test_damaged_frames_are_replaced_by_the_same_in_any_topology(shard_dir, tmp_path, world_size, workers):
    broken = damaged_split(shard_dir, tmp_path, [(s, f) for s in range(7) for f in range(0, 24, 3)])
    assert world(broken, world_size, workers) == world(broken, 1, 0)


@pytest.mark.slow
def test_any_world_with_any_workers_yields_the_same_scenes_views_and_pixels(split):
    expected = world(split, 1, 0)
    for world_size in (2, 4, 8):
        for workers in (1, 2, 5):
            assert world(split, world_size, workers) == expected, (world_size, workers)


def test_fifty_random_positions_resume_to_the_rest_of_the_stream(split):
    batches = steps(split, last=60)
    whole = hashed(batches)
    for number, stop in enumerate(np.random.default_rng(0).permutation(59)[:50]):
        after = batches[stop]["after"]
        last, workers = (60, 2) if number % 10 == 0 else (min(60, after.step + 8), 0)
        rest = hashed(steps(split, state=after, last=last, workers=workers))
        assert rest == [scene for scene in whole if after.step < scene[0] <= last]


def test_two_shard_sets_are_mixed_in_one_batch(shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "other")
    sources = tuple(ShardSource(path=str(path)) for path in (shard_dir, tmp_path / "other"))
    config = DataConfig(shards=sources, width=56, views=(2, 2))
    both = Split([shards.open(source.path) for source in sources], "train")
    assert [len(part) for part in both.lengths] == [7, 7]
    batches = steps(both, config=config, last=4, max_img=16, workers=1)
    assert all(sum(batch["after"].positions) == 8 * batch["after"].step for batch in batches)
    assert min(batches[-1]["after"].positions) > 5


def damage(rng, tar, kind):
    """A flipped bit, an end that is missing, or two stretches of bytes that changed places."""
    data = bytearray(tar.read_bytes())
    if kind == "flip":
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del data[int(rng.integers(len(data))) :]
    else:
        a, b = sorted(int(x) for x in rng.integers(0, len(data) - 600, 2))
        size = min(512, b - a)
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    tar.unlink()  # it may be open
    tar.write_bytes(data)


@pytest.mark.parametrize("kind", ["flip", "cut", "swap"])
def test_corrupt_members_never_reach_the_trainer(shard_dir, split, tmp_path, kind):
    shutil.copytree(shard_dir, tmp_path / "set")
    broken = Split([shards.open(tmp_path / "set")], "train")
    rng = np.random.default_rng(1)
    for tar in sorted((tmp_path / "set").glob("train-*.tar")):
        for _ in range(1 if kind == "cut" else 20):
            damage(rng, tar, kind)
    seen = replaced = 0
    for sequence in range(7):
        for first in range(0, 24, 4):
            batch = one_scene(broken, Scene(0, sequence, tuple(range(first, first + 4)), None), StepShape(4, 56, 84))
            replaced += sum(batch["bad"].values())
            for place, key in enumerate(batch["keys"][0]):
                alone = one_scene(split, scene_of_key(split, key), StepShape(1, 56, 84))
                for name in ("images", "depth", "depth_scale", "extrinsics", "intrinsics"):
                    assert torch.equal(batch[name][0, place], alone[name][0, 0]), name
                seen += 1
    assert seen == 7 * 24
    assert replaced > 5


def scene_of_key(split, key):
    opened = split.shard_sets[0]
    row = next(i for i in range(len(opened.frames)) if opened.key(i) == key)
    sequence = int(np.searchsorted(split.first[0], row, side="right")) - 1
    return Scene(0, sequence, (row - int(split.first[0][sequence]),), None)


def loader_processes():
    # -ww: where COLUMNS is set, ps cuts its lines there, before the word that is looked for.
    found = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    servers = {pid for pid, ppid, command in rows if int(ppid) == os.getpid() and "forkserver" in command}
    return [int(pid) for pid, ppid, _ in rows if ppid in servers]


def test_a_killed_worker_is_replaced_and_nothing_is_lost(split, monkeypatch, caplog):
    monkeypatch.setattr(train.data.loader.time, "sleep", lambda seconds: None)
    plan = TrainingPlan(config=CONFIG, lengths=split.lengths, seed=1, max_img_per_gpu=8, world_size=1)
    whole = hashed(steps(split, last=30))
    before = set(loader_processes())
    batches = stream(lambda last: TrainingSteps(split, plan, 0, last or plan.start(), 30), range(30), 2, False)
    found = [next(batches)]
    started = set(loader_processes()) - before
    assert len(started) == 2
    for pid in started:
        os.kill(pid, signal.SIGKILL)
    found += list(batches)
    assert hashed(found) == whole
    assert "new workers continue from the last batch" in caplog.text


def test_a_batch_that_is_lost_on_its_way_is_noticed(split):
    """In the middle, and at the end, where torch just stops."""
    plan = TrainingPlan(config=CONFIG, lengths=split.lengths, seed=1, max_img_per_gpu=8, world_size=1)
    second = plan.after(plan.start())
    for begin, last in ((second, 4), (plan.start(), 3)):
        batches = stream(lambda _: TrainingSteps(split, plan, 0, begin, last), range(4), 0, False)  # noqa: B023
        with pytest.raises(NoDataError, match=r"the batch of step \d never came out of its worker process"):
            list(batches)


@pytest.mark.slow
def test_workers_that_hang_are_told_and_end_the_run(split, monkeypatch, caplog):
    """Stopped with a batch in the queue, which torch then asks them for without a limit of time."""
    monkeypatch.setattr(train.data.loader, "PATIENCE", 3)
    monkeypatch.setattr(train.data.loader, "TELL_EVERY", 1)
    plan = TrainingPlan(config=CONFIG, lengths=split.lengths, seed=1, max_img_per_gpu=8, world_size=1)
    before = set(loader_processes())
    batches = stream(lambda last: TrainingSteps(split, plan, 0, last or plan.start(), 12), range(12), 2, False)
    next(batches)
    time.sleep(2)
    for pid in set(loader_processes()) - before:
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(NoDataError, match=r"the batch of step \d never came out of its worker process, which hangs"):
        list(batches)
    assert "no data for 1 s: is the storage slow, or shared memory full? After 3 s the run stops" in caplog.text


def test_a_batch_waits_for_shared_memory_and_is_refused_if_there_never_is_enough(monkeypatch):
    free = [10, 150, 1000]
    monkeypatch.setattr(train.data.batches, "_free_shared_memory", lambda: free.pop(0) if len(free) > 1 else free[0])
    monkeypatch.setattr(train.data.batches.time, "sleep", lambda seconds: None)
    train.data.batches.wait_for_shared_memory(100, 1)
    assert free == [1000]
    monkeypatch.setattr(train.data.batches, "SHARED_MEMORY_PATIENCE", 0)
    with pytest.raises(
        shards.StorageError, match=r"/dev/shm: 0.0 MB are free, .* --shm-size=8g\), or lower data.workers"
    ):
        train.data.batches.wait_for_shared_memory(10**9, 0)


class DyingSteps(torch.utils.data.IterableDataset):
    """Its worker is killed, or its code is wrong, before there is a batch."""

    def __init__(self, kind):
        self.kind = kind

    def __iter__(self):
        if self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a bug")


@pytest.mark.slow
def test_workers_that_die_again_and_again_end_the_data_and_bugs_are_not_taken_for_that(monkeypatch):
    monkeypatch.setattr(train.data.loader.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"data.workers=1: they die again and again"):
        list(stream(lambda last: DyingSteps("killed"), range(1), 1, False))
    with pytest.raises(RuntimeError, match="a bug"):
        list(stream(lambda last: DyingSteps("wrong"), range(1), 1, False))


ABANDONED = """
import sys
import shards
from train.data.batches import TrainingSteps
from train.data.split import Split
from train.data.workers import make_loader
from train.data.plan import DataConfig, TrainingPlan
split = Split([shards.open(sys.argv[1])], "train")
config = DataConfig(width=56, views=(2, 2))
plan = TrainingPlan(config=config, lengths=split.lengths, seed=1, max_img_per_gpu=4, world_size=1)
kept = iter(make_loader(TrainingSteps(split, plan, 0, plan.start(), 1000), 2, pin_memory=False))
next(kept)
sys.kept = kept  # as a traceback may keep it
sys.exit(3)
"""


def test_a_trainer_that_ends_in_the_middle_does_not_wait_for_its_workers(shard_dir):
    assert run_command("python", "-c", ABANDONED, shard_dir, timeout=60).returncode == 3


def test_storage_that_is_gone_ends_the_data_with_its_url(shard_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    monkeypatch.setattr(shards.storage, "OUTAGE_PATIENCE", 0)
    with served(shard_dir) as server:
        remote = Split([shards.open(server.url)], "train")
        plan = TrainingPlan(config=CONFIG, lengths=remote.lengths, seed=1, max_img_per_gpu=8, world_size=1)
        batches = stream(lambda last: TrainingSteps(remote, plan, 0, last or plan.start(), 30), range(30), 0, False)
        next(batches)
        server.failures = 10**6
        with pytest.raises(ValueError, match=rf"{server.url}/train-.*\.tar: not to be read in 2 tries"):
            list(batches)


def used(pid):
    """Open files and bytes of resident memory of a process."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(list(Path(f"/proc/{pid}/fd").iterdir())), resident


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_open_files_and_memory_stay_flat_over_ten_thousand_scenes(split, workers):
    """Of the trainer and of its workers."""
    config = DataConfig(width=56, views=(2, 2), aspect=(0.5, 0.5))
    plan = TrainingPlan(config=config, lengths=split.lengths, seed=1, max_img_per_gpu=20, world_size=1)
    before = set(loader_processes())
    batches = stream(
        lambda last: TrainingSteps(split, plan, 0, last or plan.start(), 1000), range(1000), workers, False
    )
    measured = {}
    for number, _ in enumerate(batches):
        if number % 100 == 99:
            for pid in (os.getpid(), *(set(loader_processes()) - before)):
                measured.setdefault(pid, []).append(used(pid))
    assert len(measured) == 1 + workers
    for rows in measured.values():
        assert len(rows) == 10
        files = [count for count, _ in rows]
        assert min(files[5:]) <= max(files[:5])  # batches on their way are files, now more, now fewer
        assert rows[-2][1] - rows[1][1] < 6e6


LOADED = """
import sys
from torch.utils.data import DataLoader
import shards
from train.data.batches import TrainingSteps
from train.data.split import Split
from train.data.plan import DataConfig, TrainingPlan
if __name__ == "__main__":
    split = Split([shards.open(sys.argv[1])], "train")
    split.shard_sets[0].read(0)  # the parent has a file open
    config = DataConfig(width=84, views=(2, 4), aspect=(0.6, 1.0))
    plan = TrainingPlan(config=config, lengths=split.lengths, seed=1, max_img_per_gpu=8, world_size=1)
    dataset = TrainingSteps(split, plan, 0, plan.start(), 4)
    for batch in DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=sys.argv[2]):
        print(batch["keys"], int(batch["images"].long().sum()), float(batch["depth"].double().sum()))
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
def test_workers_load_the_same_however_they_start(split, shard_dir, tmp_path, method):
    (tmp_path / "loaded.py").write_text(LOADED)
    done = run_command("python", tmp_path / "loaded.py", shard_dir, method, timeout=100, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    expected = [
        f"{batch['keys']} {int(batch['images'].long().sum())} {float(batch['depth'].double().sum())}"
        for batch in steps(split, last=4)
    ]
    assert done.stdout.splitlines() == expected


def test_a_step_reads_hardly_more_bytes_than_its_members_have(shard_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with served(shard_dir) as server:
        remote = Split([shards.open(server.url)], "train")
        plan = TrainingPlan(config=CONFIG, lengths=remote.lengths, seed=1, max_img_per_gpu=8, world_size=1)
        server.requests.clear()
        state, wanted = plan.start(), 0
        for _ in range(10):
            step = plan.step(state, 0)
            members = read_step(remote, step)
            distinct = {member for part in members for member in part}  # a frame that is drawn twice is read once
            wanted += sum(len(jpeg) + len(depth) for jpeg, depth in distinct)
            state = step.after
        ranges = [map(int, header.removeprefix("bytes=").split("-")) for _, _, header in server.requests]
        assert wanted <= sum(end - start + 1 for start, end in ranges) <= 1.05 * wanted
