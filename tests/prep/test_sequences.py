"""Sequences as a whole: where their origin lies, whether their lengths fit, and which splits they are in."""

from __future__ import annotations

import gzip
import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import run_command, vggt_prep
from layout_writers import WRITERS, rendered
from runs import SCRATCH, run_trainer

import shards
from shards.splits import shared_places
from train.config import load_config
from train.data.split import Split
from train.engine.lineage import trained_before, trained_width, what_is_validated
from train.evaluate import what_is_known
from train.evaluation.protocol import Protocol, choose
from vggt.weights import fingerprint

OPTIONS = ("--short-side", 80)


def pack(captures, out, *options):
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    return vggt_prep("pack", *source, "--out", out, *OPTIONS, *options)


@pytest.fixture
def editable(captures, tmp_path):
    shutil.copytree(captures, tmp_path / "captures")
    return tmp_path / "captures"


def rewrite(captures, change, pattern="*.jgz"):
    """Apply change(split, sequences) to the annotation files, in place."""
    for path in sorted((captures / "annotations").glob(pattern)):
        content = json.loads(gzip.decompress(path.read_bytes()))
        change(path.stem.rpartition("_")[2], content)
        path.write_bytes(gzip.compress(json.dumps(content).encode()))


def poses(opened):
    return np.array(opened.frames["extrinsics"])


def centers(extrinsics):
    return -np.einsum("nij,ni->nj", extrinsics[:, :, :3], extrinsics[:, :, 3])


def test_coordinates_of_a_country_and_rounded_rotations_give_the_same_cameras_about_their_middle(editable, tmp_path):
    """Rotations off by 1e-4 would put a camera that is 500 km from the origin off by 50 m, if transposed."""
    far = np.array([500_000.0, 5_400_000.0, 300.0])
    rng = np.random.default_rng(0)
    assert pack(editable, tmp_path / "near").returncode == 0

    def move(split, sequences):
        for frames in sequences.values():
            for frame in frames:
                pose = np.array(frame["extri"])
                center = -pose[:, :3].T @ pose[:, 3]
                rotation = pose[:, :3] + rng.uniform(-1, 1, (3, 3)) * 1e-4
                frame["extri"] = np.column_stack([rotation, -rotation @ (center + far)]).tolist()

    rewrite(editable, move)
    done = pack(editable, tmp_path / "far")
    assert done.returncode == 0, done.stderr
    near, moved = shards.open(tmp_path / "near"), shards.open(tmp_path / "far")
    for row in moved.sequences:
        part = slice(int(row["first"]), int(row["first"]) + int(row["count"]))
        a, b = poses(near)[part], poses(moved)[part]
        assert np.abs(b[:, :, :3] @ b[:, :, :3].transpose(0, 2, 1) - np.eye(3)).max() < 1e-14
        assert np.abs(np.median(centers(b), axis=0)).max() < 1e-8
        assert np.abs(centers(a) - centers(b)).max() < 1e-8  # of the scene's unit; the middle of both is the origin
        assert np.abs(a[:, :, :3] - b[:, :, :3]).max() < 3e-4
    assert run_command("vggt-prep", "verify", tmp_path / "far").returncode == 0


def test_a_camera_far_from_all_others_is_said_when_packing(editable, tmp_path):
    def stray(split, sequences):
        for frames in sequences.values():
            frames[3]["extri"][0][3] += 3000

    rewrite(editable, stray, "balls_train.jgz")
    done = pack(editable, tmp_path / "set", "--category", "balls", "--split", "train")
    assert done.returncode == 0, done.stderr
    doubts = [line for line in done.stdout.splitlines() if line.startswith("DOUBTFUL: train/balls/")]
    assert doubts
    for line in doubts:
        assert "frame000004.jpg: its camera is" in line
        assert "times as far out as most" in line


def test_depth_in_another_unit_is_said_when_packing_and_by_the_check_of_the_data(editable, tmp_path):
    """Millimeters as whole numbers, read as half floats: the commonest mistake."""
    for path in (editable / "co3d").glob("*/*/depths/*.png"):
        depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).view(np.float16).astype(np.float32)
        millimeters = np.where(np.isfinite(depth), depth / np.median(depth[depth > 0]) * 2000, 0)  # a room
        cv2.imwrite(str(path), millimeters.clip(0, 60000).astype(np.uint16))
    done = pack(editable, tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("DOUBTFUL: ") == 6
    assert "DOUBTFUL: 3 more sequences" in done.stdout
    assert "are depths in another unit?" in done.stdout
    report = json.loads((tmp_path / "set" / "report.json").read_text())
    assert sum(len(part["doubtful"]) for part in report.values()) == 8
    settings = (f"data.shards={tmp_path / 'set'}", "data.width=84", "data.views=[2, 4]", "max_img_per_gpu=12")
    looked = run_command("python", "-m", "train.check_data", *settings, "--steps", 2, "--out", tmp_path)
    assert looked.returncode == 0, looked.stderr
    assert "Cameras, depth unit or intrinsics are probably wrong" in looked.stdout


def test_depth_in_the_right_unit_is_not_doubted(captures, tmp_path, co3d_mini):
    for source in (captures, co3d_mini):
        done = pack(source, tmp_path / source.name)
        assert done.returncode == 0, done.stderr
        assert "DOUBTFUL" not in done.stdout


@pytest.fixture(scope="module")
def known_places(captures, tmp_path_factory):
    """A set whose test split is the second half of what is trained on."""
    folder = tmp_path_factory.mktemp("known")
    shutil.copytree(captures, folder / "captures")
    for path in (folder / "captures" / "annotations").glob("*_test.jgz"):
        path.unlink()
    for path in (folder / "captures" / "annotations").glob("*_train.jgz"):
        content = json.loads(gzip.decompress(path.read_bytes()))
        halves = {name: (frames[::2], frames[1::2]) for name, frames in content.items()}
        for number, split in enumerate(("train", "test")):
            part = json.dumps({name: parts[number] for name, parts in halves.items()})
            path.with_name(path.name.replace("train", split)).write_bytes(gzip.compress(part.encode()))
    done = pack(folder / "captures", folder / "set", "--min-frames", 8)
    assert done.returncode == 0, done.stderr
    assert "7 sequences of the test split are also trained on (other frames of them)" in done.stdout
    return folder / "set"


def test_a_test_on_places_that_are_trained_on_is_called_that(known_places, tmp_path):
    """Also where the set that is evaluated on holds nothing to train on: then its checkpoint's run tells."""
    opened = shards.open(known_places)
    places = shared_places([(opened, "train")], [(opened, "test")])
    assert (places.sequences, places.tested, places.frames) == (7, 7, 0)
    done = pack(known_places.parent / "captures", tmp_path / "test", "--min-frames", 8, "--split", "test")
    assert done.returncode == 0, done.stderr
    done = run_trainer(known_places, tmp_path / "run", *SCRATCH, "max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "validating on 2 sequences of 7 of the test split, other frames of places that are trained on" in done.stdout
    assert "never trained on" not in done.stdout
    latest = shutil.copy(tmp_path / "run" / "checkpoints" / "latest", tmp_path / "copied.pt")
    parts, unknown = trained_before(str(latest))
    assert [(str(shard_set), split) for shard_set, split in parts] == [(str(known_places), "train")]
    assert unknown == []
    assert (trained_width(str(latest)), trained_width("facebook/VGGT-1B")) == (56, None)
    protocol = Protocol(min_frames=8, views=3, width=56)
    evaluator = SimpleNamespace(split=Split([opened], "test"), sequences=choose([opened], protocol))
    assert "other frames of places" in what_is_known([str(latest)], evaluator, "test", False)
    assert what_is_known(["nano"], evaluator, "test", False) == ""  # which never saw this set
    options = ("--shards", tmp_path / "test", "--checkpoint", latest, "--out", tmp_path / "eval")
    small = ("--min-frames", 8, "--views", 3, "--width", 56)
    evaluated = run_command("python", "-m", "train.evaluate", *options, *small, OMP_NUM_THREADS="1")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "7 sequences evaluated, other frames of places that are trained on. This does not tell" in evaluated.stdout
    assert "other frames of places" in (tmp_path / "eval" / "report.html").read_text()


def test_frames_that_are_trained_and_tested_on_are_refused_unless_that_is_asked_for(editable, exported, tmp_path):
    for path in (editable / "annotations").glob("*_train.jgz"):
        shutil.copy(path, path.with_name(path.name.replace("train", "test")))
    done = pack(editable, tmp_path / "set")
    assert done.returncode == 1
    assert "is in the train and in the test split, with 23 more frames of its sequence" in done.stderr
    assert not (tmp_path / "set").exists()
    done = pack(editable, tmp_path / "set", "--allow-shared-frames")
    assert done.returncode == 0, done.stderr
    run = run_trainer(tmp_path / "set", tmp_path / "run", *SCRATCH, "max_steps=1")
    assert run.returncode == 1
    assert "48 frames to test on are the same as frames to train on" in run.stderr
    assert "data.allow_shared_frames=true" in run.stderr
    run = run_trainer(tmp_path / "set", tmp_path / "run", *SCRATCH, "max_steps=1", "data.allow_shared_frames=true")
    assert run.returncode == 0, run.stderr
    assert "48 of whose frames are trained on" in run.stdout
    options = ("--shards", tmp_path / "set", "--checkpoint", exported, "--out", tmp_path / "eval", "--min-frames", 24)
    evaluated = run_command("python", "-m", "train.evaluate", *options, OMP_NUM_THREADS="1")
    assert evaluated.returncode == 1
    assert "or give --allow-shared-frames" in evaluated.stderr


def test_equal_names_in_sets_of_other_captures_are_called_that(shard_dir, tmp_path):
    assert vggt_prep("synth", "--out", tmp_path / "other", "--scenes", 8, "--frames", 24, "--seed", 8).returncode == 0
    assert pack(tmp_path / "other", tmp_path / "set").returncode == 0
    one, two = shards.open(shard_dir), shards.open(tmp_path / "set")
    assert set(one.sequences["name"]) == set(two.sequences["name"])
    found = shared_places([(two, "train")], [(one, "train")])
    assert (found.sequences, found.namesakes, found.frames) == (0, 7, 0)
    assert found.words == "named like sequences that are trained on, which may be the same places"
    for opened in (one, two):
        opened.dataset["source"]["annotations"]["other_test.jgz"] = "of a file that is empty in both"
    assert shared_places([(two, "train")], [(one, "train")]) == found
    assert shared_places([(one, "train"), (two, "train")], [(one, "test"), (two, "test")]).words == "never trained on"


def test_pictures_are_found_in_whatever_set_and_under_whatever_name_they_are_trained_on(editable, tmp_path):
    """Sets of one split each, of other annotations; and a second one to train on that hides nothing of the first."""
    for path in sorted((editable / "annotations").glob("*_train.jgz")):
        content = json.loads(gzip.decompress(path.read_bytes()))
        renamed = {f"other-{name}": frames for name, frames in content.items()}
        for name, frames in content.items():
            for frame in frames:
                frame["filepath"] = frame["filepath"].replace(name, f"other-{name}")
        for name in content:
            folder = editable / "co3d" / path.name.removesuffix("_train.jgz")
            (folder / f"other-{name}").symlink_to(folder / name)
        path.with_name(path.name.replace("train", "test")).write_bytes(gzip.compress(json.dumps(renamed).encode()))
    for split in ("train", "test"):
        assert pack(editable, tmp_path / split, "--split", split).returncode == 0
    train, test = (shards.open(tmp_path / split) for split in ("train", "test"))
    renamed = shared_places([(train, "train")], [(test, "test")])
    assert (renamed.sequences, renamed.frames) == (0, 168)
    same = shared_places([(train, "train"), (test, "test")], [(train, "train")])
    assert (same.tested, same.sequences, same.frames) == (7, 7, 168)
    assert shared_places([(train, "test")], [(test, "test")]).words == "never trained on"
    one = shared_places([(train, "train")], [(test, "test")], only={(0, 3)})
    assert (one.tested, one.frames) == (1, 24)


def test_frames_of_one_name_are_the_same_picture_in_another_size(captures, shard_dir, tmp_path):
    assert pack(captures, tmp_path / "smaller", "--short-side", 60).returncode == 0
    smaller, larger = shards.open(tmp_path / "smaller"), shards.open(shard_dir)
    assert shared_places([(smaller, "train")], [(larger, "train")]).frames == 168


def test_what_init_began_from_counts_as_trained_on(shard_dir, tmp_path):
    def checkpoint(name, shards, split, init):
        other = {"train": "test", "test": "train"}[split]
        config = {"data": {"shards": str(shards), "train_split": split, "val_split": other}, "init": init}
        torch.save({"config": config}, tmp_path / name)
        return str(tmp_path / name)

    first = checkpoint("first.pt", shard_dir, "test", None)
    second = checkpoint("second.pt", tmp_path / "gone", "train", first)
    parts, unknown = trained_before(second)
    assert [(str(shard_set), split) for shard_set, split in parts] == [(str(shard_dir), "test")]
    assert len(unknown) == 1
    assert "which cannot be compared with" in unknown[0]
    config = load_config(None, [f"init={second}", f"data.shards={shard_dir}"])
    splits = [Split([shards.open(shard_dir)], split) for split in ("train", "test")]
    with pytest.raises(ValueError, match="frames to test on are the same as frames to train on"):
        what_is_validated(config, *splits)
    assert trained_before(None) == ([], [])


def test_another_checkpoint_in_the_place_of_init_is_not_taken_for_it(shard_dir, tmp_path):
    """Its weights are not those that the run began from, so what it was trained on says nothing."""
    config = {"data": {"shards": str(shard_dir), "train_split": "train"}, "init": None}
    for value, known in ((0.0, True), (1.0, False)):
        torch.save({"config": config, "model": {"w": torch.full((3,), value)}}, tmp_path / "first.pt")
        if known:
            digest = fingerprint({"w": torch.zeros(3)})
            second = {"config": config | {"init": str(tmp_path / "first.pt")}, "init_fingerprint": digest}
            torch.save(second, tmp_path / "second.pt")
        parts, unknown = trained_before(str(tmp_path / "second.pt"))
        assert len(parts) == 1 + known
        assert (unknown == []) is known
    assert "another checkpoint is there now" in unknown[0]


def test_a_capture_is_known_under_another_name_and_in_another_size(tmp_path):
    WRITERS["frames"](tmp_path / "kitchen", rendered(frames=12))
    first = vggt_prep("pack", tmp_path / "kitchen", "--out", tmp_path / "a", "--trust")
    assert first.returncode == 0, first.stderr
    (tmp_path / "kitchen").rename(tmp_path / "renamed")
    options = ("--test", "renamed", "--short-side", 90, "--trust")
    second = vggt_prep("pack", tmp_path / "renamed", "--out", tmp_path / "b", *options)
    assert second.returncode == 0, second.stderr
    one, two = shards.open(tmp_path / "a"), shards.open(tmp_path / "b")
    found = shared_places([(one, "train")], [(two, "test")])
    assert (found.sequences, found.frames) == (1, 7)


def test_captures_of_other_things_by_one_rig_are_not_the_same(tmp_path):
    """Their cameras are equal to the byte, and so are the names of their frames."""
    for name, seed in (("cup", 3), ("shoe", 4)):
        WRITERS["frames"](tmp_path / name, rendered(frames=12, seed=seed))
    (tmp_path / "shoe" / "frames.csv").write_bytes((tmp_path / "cup" / "frames.csv").read_bytes())
    done = vggt_prep(
        "pack", tmp_path / "cup", tmp_path / "shoe", "--out", tmp_path / "set", "--test", "shoe", "--trust"
    )
    assert done.returncode == 0, done.stderr
    opened = shards.open(tmp_path / "set")
    assert not shared_places([(opened, "train")], [(opened, "test")]).any


def test_what_is_not_known_of_a_checkpoint_is_said(shard_dir, tmp_path):
    """Of one that does not say or is gone, and where another set took the place of the one trained on."""
    (tmp_path / "other.pt").write_bytes(b"no checkpoint")
    config = {"data": {"shards": str(shard_dir)}, "init": str(tmp_path / "gone.pt")}
    torch.save({"config": config, "shards": ["0" * 64]}, tmp_path / "moved.pt")
    for source, words in (
        (tmp_path / "other.pt", ["does not say"]),
        ("facebook/VGGT-1B", ["does not say"]),
        (tmp_path / "moved.pt", ["another shard set is there now", "gone.pt was trained on is not known"]),
    ):
        parts, unknown = trained_before(str(source))
        assert parts == []
        assert len(unknown) == len(words)
        assert all(word in line for word, line in zip(words, unknown, strict=True))
    config = load_config(None, [f"init={tmp_path / 'other.pt'}", f"data.shards={shard_dir}"])
    splits = [Split([shards.open(shard_dir)], split) for split in ("train", "test")]
    words = what_is_validated(config, *splits).words
    assert words.startswith("not trained on by this run; what ")
