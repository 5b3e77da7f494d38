from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import time

import cv2
import numpy as np
import pytest
from conftest import BIN, vggt_prep

import shards
from shards.codecs import decode_depth


def source_options(captures):
    return ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")


def tree(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def editable(captures, tmp_path):
    """A copy of the captures that a test may damage."""
    shutil.copytree(captures, tmp_path / "captures")
    return tmp_path / "captures"


def annotations(captures):
    for path in sorted((captures / "annotations").glob("*_train.jgz")):
        yield path, json.loads(gzip.decompress(path.read_bytes()))


def first_sequence(captures):
    path, content = next(annotations(captures))
    name = sorted(content)[0]
    return path, content, path.name.removesuffix("_train.jgz"), name


def test_any_number_of_workers_gives_the_same_bytes(captures, shard_dir, tmp_path):
    options = ("--short-side", 150, "--shard-frames", 60, "--workers", 1)
    done = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "one", *options)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "one") == tree(shard_dir)


def test_a_killed_pack_goes_on_to_the_same_bytes(captures, shard_dir, tmp_path):
    out = tmp_path / "killed"
    command = [BIN / "vggt-prep", "pack", *source_options(captures), "--out", out]
    command += ["--short-side", "150", "--shard-frames", "60", "--workers", "1"]
    made = {}
    for number in (0, 1):
        process = subprocess.Popen(
            list(map(str, command)), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 60
        while not (out / ".pack" / f"train-{number:06d}.json").exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(ValueError, match="no finished shard set"):
            shards.open(out)
        made[number] = (out / f"train-{number:06d}.tar").stat().st_mtime_ns
    done = vggt_prep(*map(str, command[1:]))
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(shard_dir)
    for number, time_made in made.items():  # what was whole is not made again
        assert (out / f"train-{number:06d}.tar").stat().st_mtime_ns == time_made


def test_a_damaged_set_is_made_again(captures, shard_dir, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_dir, out)
    (out / "train-000001.tar").unlink()
    (out / ".pack").mkdir()  # as a kill at the very end leaves it
    command = ("pack", *source_options(captures), "--out", out, "--short-side", 150, "--shard-frames", 60)
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(shard_dir)
    (out / "dataset.json").write_text("{")
    done = vggt_prep(*command)
    assert done.returncode == 1
    assert f"{out}/dataset.json: damaged" in done.stderr


def test_a_mended_dataset_packs_where_it_failed(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    image = editable / "co3d" / category / name / "images" / "frame000003.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:3000])
    command = ("pack", *source_options(editable), "--out", tmp_path / "out", "--max-bad", 0, "--shard-frames", 60)
    failed = vggt_prep(*command)
    assert failed.returncode == 1
    assert "1 of 192 frames are bad" in failed.stderr
    image.write_bytes(whole)
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert len(shards.open(tmp_path / "out").frames) == 192


def test_packing_again_does_nothing_and_another_way_is_refused(captures, shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    options = ("--short-side", 150, "--shard-frames", 60)
    before = (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns
    again = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "set", *options)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns == before
    other = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "set", "--short-side", 160)
    assert other.returncode == 1
    assert "holds shards of other options" in other.stderr
    category = sorted((captures / "co3d").iterdir())[0].name
    part = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "set", *options, "--category", category)
    assert part.returncode == 1
    assert "holds shards of another dataset" in part.stderr


def test_a_part_of_the_download_just_works(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    shutil.rmtree(editable / "co3d" / category / name)
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 annotated sequences skipped" in done.stdout
    assert len(shards.open(tmp_path / "out").sequences) == 7


def test_bad_frames_are_left_out_listed_and_limited(editable, tmp_path):
    path, content, category, name = first_sequence(editable)
    folder = editable / "co3d" / category / name
    image = folder / "images" / "frame000003.jpg"
    image.write_bytes(image.read_bytes()[:3000])
    content[name][7]["extri"][0][0] = float("nan")
    content[name].append({"filepath": f"{category}/{name}/images/../../../etc/passwd"})
    content[name].append(content[name][0])
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    command = ("pack", *source_options(editable), "--out", tmp_path / "out", "--min-frames", 20)
    failed = vggt_prep(*command, "--max-bad", 0.01)
    assert failed.returncode == 1
    assert "4 of 194 frames are bad" in failed.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    done = vggt_prep(*command, "--max-bad", 0.05)
    assert done.returncode == 0, done.stderr
    assert "1 frames left out: image is damaged" in done.stdout
    bad = json.loads((tmp_path / "out" / "report.json").read_text())["bad"]
    assert sorted(entry[1] for entry in bad) == [
        "annotated twice",
        "camera is not finite",
        "filepath is not <category>/<sequence>/images/<file>",
        "image is damaged",
    ]
    opened = shards.open(tmp_path / "out")
    assert len(opened.frames) == 8 * 24 - 2


def test_sequences_that_are_too_short_are_left_out(editable, tmp_path):
    path, content, category, name = first_sequence(editable)
    content[name] = content[name][:23]
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 sequences left out: too few usable frames" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["short"] == [[f"train/{category}/{name}", 23]]


def test_frames_without_depth_are_packed_as_camera_only(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    shutil.rmtree(editable / "co3d" / category / name / "depths")
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    opened = shards.open(tmp_path / "out")
    without = [i for i in range(len(opened.frames)) if not opened.frames[i]["depth_size"]]
    assert len(without) == 24
    assert {opened.key(i).rsplit("/", 1)[0] for i in without} == {f"{category}/{name}"}
    assert opened.read(without[0])[1] is None


def test_packed_bytes_are_the_source_where_nothing_is_resized(captures, tmp_path):
    done = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "out", "--short-side", 0, "--split", "test")
    assert done.returncode == 0, done.stderr
    opened = shards.open(tmp_path / "out")
    for i, row in enumerate(opened.frames):
        category, sequence, frame = opened.key(i).split("/")
        folder = captures / "co3d" / category / sequence
        jpeg, depth = opened.read(i)
        assert jpeg == (folder / "images" / f"{frame}.jpg").read_bytes()
        stored = decode_depth(depth, int(row["height"]), int(row["width"]))
        png = cv2.imread(str(folder / "depths" / f"{frame}.jpg.geometric.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(stored[stored > 0], png.view(np.float16)[stored > 0])


def test_info_says_what_is_there(shard_dir):
    done = vggt_prep("info", shard_dir)
    assert done.returncode == 0
    for text in ("192 frames (192 with depth)", "200 x 150", "short_side 150", "train", "test"):
        assert text in done.stdout


def empty_annotation(captures):
    next((captures / "annotations").iterdir()).write_bytes(b"")


def wrong_json(captures):
    next((captures / "annotations").iterdir()).write_bytes(gzip.compress(b"[1, 2]"))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, ("--co3d-dir", "/nowhere"), "--co3d-dir /nowhere: no such directory"),
        (None, ("--annotation-dir", "/nowhere"), "--annotation-dir /nowhere: no such directory"),
        (None, ("--annotation-dir", "EMPTY"), "expected files like apple_train.jgz"),
        (None, ("--co3d-dir", "EMPTY"), "no frame to pack"),
        (None, ("--category", "unicorn"), "--category unicorn: not annotated"),
        (None, ("--out", "/proc/nowhere/out"), "/proc/nowhere"),
        (None, ("--out", "FULL"), "not empty, and holds no shards"),
        (None, ("--out", "FILE"), "expected a directory"),
        (empty_annotation, (), "not a readable gzipped JSON file"),
        (wrong_json, (), "expected a JSON object"),
    ],
)
def test_bad_input_gets_one_clear_line(editable, tmp_path, change, arguments, message):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "thesis.txt").write_text("mine")
    (tmp_path / "FILE").write_text("")
    if change:
        change(editable)
    arguments = [str(tmp_path / a) if a.isupper() else a for a in arguments]
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out", *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("Error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert (tmp_path / "FULL" / "thesis.txt").read_text() == "mine"


def test_real_captures_pack(co3d_mini, tmp_path):
    options = ("--co3d-dir", co3d_mini / "co3d", "--annotation-dir", co3d_mini / "annotations", "--short-side", 240)
    done = vggt_prep("pack", *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    opened = shards.open(tmp_path / "out")
    assert len(opened.frames) == 150
    assert set(opened.frames["height"]) == {240}
