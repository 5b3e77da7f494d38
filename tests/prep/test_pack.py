from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import BIN, run_command, vggt_prep

import shards
from prep.importers.cameras import OpenCVCamera
from prep.importers.co3d import Co3D
from prep.importers.source import Frame, Sequence
from prep.packing.executors import process_pool
from prep.packing.pack import pack
from prep.packing.plan import PackError, PackOptions, ShardJob, make_plan
from prep.packing.shard import pack_shard
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


PACK_OPTIONS = ("--short-side", 150, "--shard-frames", 60)


def start_pack(captures, out, *options):
    command = [BIN / "vggt-prep", "pack", *source_options(captures), "--out", out, *PACK_OPTIONS, *options]
    return subprocess.Popen(
        list(map(str, command)), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish_pack(captures, out):
    done = vggt_prep("pack", *source_options(captures), "--out", out, *PACK_OPTIONS)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(captures, shard_dir, tmp_path):
    out, rng = tmp_path / "killed", np.random.default_rng(5)
    began = time.monotonic()
    finish_pack(captures, tmp_path / "whole")
    whole = time.monotonic() - began
    finished = 0
    for _ in range(20):
        process = start_pack(captures, out)
        try:
            process.wait(timeout=rng.uniform(0.2, 0.9) * whole)
            finished += 1
            shutil.rmtree(out)  # again from the start
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert finished < 15
    finish_pack(captures, out)
    assert tree(out) == tree(shard_dir)


def own_children(pid):
    """The processes that one has started itself; workers are those of its server."""
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in done.stdout.split()]


def children(pid):
    found = own_children(pid)
    return found + [grandchild for child in found for grandchild in children(child)]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_clean_and_said_and_the_same_command_goes_on(captures, shard_dir, tmp_path, number):
    out = tmp_path / "stopped"
    process = start_pack(captures, out)
    wait_for(lambda: list((out / ".pack").glob("train-*.json")))
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does it
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "stopped; finished shards are kept, and the same command continues from there\n"
    finish_pack(captures, out)
    assert tree(out) == tree(shard_dir)


def test_a_second_pack_into_the_same_place_is_refused(captures, shard_dir, tmp_path):
    first = start_pack(captures, tmp_path / "out")
    wait_for(lambda: (tmp_path / "out" / ".pack" / "job.json").exists())
    first.send_signal(signal.SIGSTOP)  # it must not be done before the second begins
    second = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "out", *PACK_OPTIONS)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "another pack is at work there" in second.stderr
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert tree(tmp_path / "out") == tree(shard_dir)


@pytest.mark.slow
def test_what_a_damaged_set_left_out_is_still_reported_when_it_is_repaired(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    image = editable / "co3d" / category / name / "images" / "frame000003.jpg"
    image.write_bytes(image.read_bytes()[:3000])
    command = ("pack", *source_options(editable), "--out", tmp_path / "out", "--min-frames", 20, *PACK_OPTIONS)
    assert vggt_prep(*command).returncode == 0
    whole = tree(tmp_path / "out")
    assert b"image is damaged" in whole["report.json"]
    (tmp_path / "out" / "train-000001.tar").unlink()
    failed = vggt_prep(*command, "--max-bad", 0)
    assert failed.returncode == 1
    assert "1 frame is bad" in failed.stderr
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == whole
    assert "1 frame left out: image is damaged" in done.stdout


def test_a_task_of_a_pack_that_is_gone_writes_nothing(captures, tmp_path):
    """As a Dask worker comes to it after its client was killed, and another pack was begun in the same place."""
    source = Co3D(captures / "co3d", captures / "annotations")
    (job, *_), _ = make_plan(source, PackOptions(), False)
    (tmp_path / ".pack").mkdir()
    (tmp_path / ".pack" / "job.json").write_text("{}")
    with pytest.raises(PackError, match="the pack that this shard was for is over"):
        pack_shard(job, tmp_path, PackOptions(), "0" * 64)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["job.json"]


def test_a_task_of_another_pack_does_not_replace_a_tar_of_a_finished_set(captures, shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    job = ShardJob("train", "train-000000", [], b"")
    with pytest.raises(PackError, match="the pack that this shard was for is over"):
        pack_shard(job, tmp_path / "set", PackOptions(), "0" * 64)
    assert tree(tmp_path / "set") == tree(shard_dir)


@pytest.mark.slow
def test_a_worker_that_is_ended_from_outside_is_said(captures, shard_dir, tmp_path):
    process = start_pack(captures, tmp_path / "out", "--workers", 1)
    wait_for(lambda: list((tmp_path / "out").glob("*.tmp")))
    (worker,) = [pid for pid in children(process.pid) if not children(pid) and pid not in own_children(process.pid)]
    os.kill(worker, signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a worker process died" in errors
    assert "Traceback" not in errors
    finish_pack(captures, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(shard_dir)


def test_options_may_be_changed_after_a_pack_that_made_nothing(captures, tmp_path):
    command = ("pack", *source_options(captures), "--out", tmp_path / "out", "--split", "test")
    failed = vggt_prep(*command, "--min-frames", 25)
    assert failed.returncode == 1
    assert "no sequence has 25 usable frames" in failed.stderr
    assert vggt_prep(*command, "--min-frames", 24).returncode == 0


def test_workers_end_with_a_parent_that_is_killed(captures, tmp_path):
    process = start_pack(captures, tmp_path / "out")
    wait_for(lambda: (tmp_path / "out" / ".pack").exists() and len(children(process.pid)) >= 4)
    family = children(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(is_alive(pid) for pid in family), 20)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from prep.cli import main
main(sys.argv[2:])
"""


def test_a_full_disk_is_said_and_leaves_nothing_half_made(captures, shard_dir, tmp_path):
    """Here a file cannot grow beyond half a tar; a full disk fails in the same write."""
    limit = max(path.stat().st_size for path in shard_dir.glob("*.tar")) // 2
    out = tmp_path / "out"
    arguments = (limit, "pack", *source_options(captures), "--out", out, *PACK_OPTIONS)
    done = run_command("python", "-c", LIMITED, *arguments)
    assert done.returncode == 1
    assert "train-0000" in done.stderr
    assert ".tar: cannot be written, is the disk full? (File too large)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(out.glob("*.tmp"))
    assert all(path.read_bytes() == (shard_dir / path.name).read_bytes() for path in out.glob("*.tar"))
    assert not (out / "dataset.json").exists()
    finish_pack(captures, out)
    assert tree(out) == tree(shard_dir)


@pytest.mark.slow
@pytest.mark.dist
def test_a_dask_cluster_makes_the_same_bytes(captures, shard_dir, tmp_path):
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    missing = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "out", "--scheduler", address)
    assert missing.returncode == 1
    assert f"--scheduler {address}: cannot be reached" in missing.stderr
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    scheduler = subprocess.Popen(
        [BIN / "dask", "scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"],
        **quiet,
    )
    worker = [BIN / "dask", "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    workers = [subprocess.Popen([*worker, "--local-directory", tmp_path / str(i)], **quiet) for i in range(2)]
    try:
        out = tmp_path / "out"
        command = ("pack", *source_options(captures), "--out", out, *PACK_OPTIONS, "--scheduler", address)

        def packed():
            done = vggt_prep(*command)
            coming = "has no workers" in done.stderr or "cannot be reached" in done.stderr
            assert done.returncode == 0 or coming, done.stderr
            return done.returncode == 0

        wait_for(packed)  # the workers need a while to come
        assert tree(out) == tree(shard_dir)
    finally:
        for process in [*workers, scheduler]:
            process.terminate()
            process.wait(timeout=20)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_names_with_spaces_and_letters_of_any_language_pack(editable, tmp_path):
    path, content, category, name = first_sequence(editable)
    new_category, new_name = "café tasse", "séq 1.2 ž"
    (editable / "co3d" / category).rename(editable / "co3d" / new_category)
    folder = editable / "co3d" / new_category / name
    folder.rename(folder.with_name(new_name))
    entries = content[name]
    for i, entry in enumerate(entries):
        old = editable / "co3d" / new_category / new_name / "images" / f"frame{i + 1:06d}.jpg"
        new = old.with_name(f"vue n.{i:02d} ü.jpg")
        for part, suffix in (("images", ""), ("depths", ".geometric.png")):
            (old.parents[1] / part / f"{old.name}{suffix}").rename(old.parents[1] / part / f"{new.name}{suffix}")
        mask = old.parents[1] / "depth_masks" / f"{old.stem}.png"
        mask.rename(mask.with_name(f"{new.stem}.png"))
        entry["filepath"] = f"{new_category}/{new_name}/images/{new.name}"
    path.unlink()
    path.with_name(f"{new_category}_train.jgz").write_bytes(gzip.compress(json.dumps({new_name: entries}).encode()))
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out", "--category", new_category)
    assert done.returncode == 0, done.stderr
    opened = shards.open(tmp_path / "out")
    assert opened.key(3) == "café tasse/séq 1.2 ž/vue n%2E03 ü"
    for command in (("verify",), ("preview", "--out", tmp_path / "p.html")):
        done = vggt_prep(command[0], tmp_path / "out", *command[1:])
        assert done.returncode == 0, done.stderr
    assert "train/café tasse/séq 1.2 ž" in (tmp_path / "p.html").read_text()


def test_of_a_damaged_set_only_what_is_damaged_is_made_again(captures, shard_dir, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_dir, out)
    (out / "train-000001.tar").unlink()
    changed = out / "train-000000.tar"
    changed.write_bytes(bytes(512) + changed.read_bytes()[512:])
    (out / "frames.npy").unlink()
    whole = [path for path in out.glob("*.tar") if path != changed]
    before = {path: path.stat().st_ino for path in whole}
    (out / ".pack").mkdir()  # as a kill at the very end leaves it
    command = ("pack", *source_options(captures), "--out", out, "--short-side", 150, "--shard-frames", 60)
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(shard_dir)
    assert len(before) > 1
    assert {path: path.stat().st_ino for path in whole} == before
    # Killed while it was repaired: what is missing is back, what is damaged is not yet.
    changed.write_bytes(bytes(512) + changed.read_bytes()[512:])
    (out / ".pack").mkdir()
    record = {key: json.loads((shard_dir / "dataset.json").read_text())[key] for key in ("source", "options")}
    (out / ".pack" / "job.json").write_text(json.dumps(record))
    (out / "frames.npy.12345678.tmp").touch()
    assert vggt_prep(*command).returncode == 0
    assert tree(out) == tree(shard_dir)
    (out / "dataset.json").write_text("{")
    done = vggt_prep(*command)
    assert done.returncode == 1
    assert f"{out}/dataset.json: damaged" in done.stderr


def test_a_repaired_dataset_packs_where_it_failed(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    image = editable / "co3d" / category / name / "images" / "frame000003.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:3000])
    command = ("pack", *source_options(editable), "--out", tmp_path / "out", "--max-bad", 0, "--shard-frames", 60)
    failed = vggt_prep(*command)
    assert failed.returncode == 1
    assert "1 frame is bad" in failed.stderr
    assert "--max-bad allows 0 in all" in failed.stderr
    image.write_bytes(whole)
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert len(shards.open(tmp_path / "out").frames) == 192


def test_a_file_replaced_between_two_parts_of_a_pack_is_in_the_set_as_it_is_now(editable, tmp_path):
    """A shard of the first part may hold what the file was before."""
    images = sorted((editable / "co3d").glob("*/*/images/frame000003.jpg"))
    whole = images[0].read_bytes()
    images[0].write_bytes(whole[:3000])
    command = ("pack", *source_options(editable), "--max-bad", 0, "--shard-frames", 60)
    assert vggt_prep(*command, "--out", tmp_path / "out").returncode == 1
    finished = [json.loads(path.read_bytes()) for path in (tmp_path / "out" / ".pack").glob("train-*.json")]
    assert any(not record["bad"] for record in finished)
    images[0].write_bytes(whole)
    for image in images[1:]:
        shutil.copy(image.with_name("frame000004.jpg"), image)
    for out in ("out", "fresh"):
        done = vggt_prep(*command, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_finished_shards_stay_while_the_disk_with_the_images_is_away(editable, tmp_path):
    images = sorted((editable / "co3d").glob("*/*/images"))
    broken = images[0] / "frame000003.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:3000])
    command = ("pack", *source_options(editable), "--max-bad", 0, "--shard-frames", 60, "--out", tmp_path / "out")
    assert vggt_prep(*command).returncode == 1
    records = {path: path.read_bytes() for path in (tmp_path / "out" / ".pack").glob("train-*.json")}
    good = {path for path, content in records.items() if not json.loads(content)["bad"]}
    assert good
    for folder in images:
        folder.rename(folder.with_name("away"))
    assert vggt_prep(*command).returncode == 1
    assert all(path.read_bytes() == records[path] for path in good)
    for folder in images:
        folder.with_name("away").rename(folder)
    broken.write_bytes(whole)
    times = {path.stem: (tmp_path / "out" / f"{path.stem}.tar").stat().st_mtime_ns for path in good}
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / "out" / f"{name}.tar").stat().st_mtime_ns == time for name, time in times.items())


def test_a_stop_is_heard_though_a_worker_hangs(captures, tmp_path):
    """As one does that waits for a disk of the network."""
    process = start_pack(captures, tmp_path / "out", "--workers", 2)
    wait_for(lambda: list((tmp_path / "out" / ".pack").glob("train-*.json")))
    workers = [pid for child in own_children(process.pid) for pid in own_children(child)]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    assert len(workers) >= 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_options_of_captures_are_refused_with_co3d(captures, tmp_path):
    for option in (("--every", 5), ("--test", "x"), ("--depth-range", 1, 2), ("--format", "tum"), ("--metric",)):
        done = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "out", *option)
        assert done.returncode == 1
        assert "are for captures: not with --co3d-dir" in done.stderr


def test_a_depth_mask_that_is_missing_is_bad_and_sequences_without_any_are_told(editable, tmp_path, caplog):
    folders = sorted((editable / "co3d").glob("*/*"))
    shutil.rmtree(folders[0] / "depth_masks")
    next((folders[1] / "depth_masks").iterdir()).unlink()
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out", "--max-bad", 0.1, "--min-frames", 1)
    assert done.returncode == 0, done.stderr
    assert "1 frame left out: depth mask is missing" in done.stdout
    assert f"1 sequences without depth_masks/, all of whose depth counts ({folders[0]})" in caplog.text


def test_packing_again_does_nothing_and_another_way_is_refused(captures, shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    options = ("--short-side", 150, "--shard-frames", 60)
    before = (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns
    (tmp_path / "set" / "report.json").unlink()
    again = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "set", *options)
    assert again.returncode == 0, again.stderr
    assert "packed before: nothing to do" in again.stdout
    assert "report.json is gone or damaged: what was left out is not known" in again.stdout
    assert (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns == before
    other = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "set", "--short-side", 160)
    assert other.returncode == 1
    assert "holds shards of other options (short_side is 150 there and 160 here" in other.stderr
    category = sorted((captures / "co3d").iterdir())[0].name
    part = vggt_prep("pack", *source_options(captures), "--out", tmp_path / "set", *options, "--category", category)
    assert part.returncode == 1
    assert "holds shards of another dataset" in part.stderr


def test_what_changed_since_a_set_was_packed_is_said_and_made_again_where_its_tar_is_removed(
    editable, tmp_path, caplog
):
    out = tmp_path / "set"
    command = ("pack", *source_options(editable), "--out", out, "--short-side", 150, "--shard-frames", 60, "--no-pairs")
    assert vggt_prep(*command).returncode == 0
    first, before = shards.open(out), tree(out)
    frames, name = first.frames.copy(), first.sequences[0]["name"].decode()
    for path in (editable / "co3d").glob(f"*/{name}/depths/*"):
        bits = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), (bits.view(np.float16) / 2).view(np.uint16))
    for image in sorted((editable / "co3d").glob(f"*/{name}/images/*"))[:20]:
        image.write_bytes(image.read_bytes()[:1000])
    done = vggt_prep(*command)
    assert "packed before: nothing to do" in done.stdout
    assert (
        "files of train-000000 have other sizes or times than when it was packed; to pack them again, rem"
        in caplog.text
    )
    assert tree(out) == before
    (out / first.tars[1]).unlink()
    assert vggt_prep(*command).returncode == 0  # not the first one: what is there may be worse, as here
    assert tree(out) == before
    (out / first.tars[0]).unlink()
    assert "20 x image is damaged" in vggt_prep(*command).stderr
    done = vggt_prep(*command, "--max-bad", 0.2, "--min-frames", 1)
    assert done.returncode == 1  # other options: another set
    for image in (editable / "co3d").glob(f"*/{name}/images/*"):
        source = next(path for path in image.parent.iterdir() if path.stat().st_size > 1000)
        image.write_bytes(source.read_bytes())
    assert vggt_prep(*command).returncode == 0
    again = shards.open(out)
    same = again.frames["depth_crc"] == frames["depth_crc"]
    assert same[again.frames["sequence"] > 0].all()
    assert not same[again.frames["sequence"] == 0].any()


def test_a_refused_repair_of_a_finished_set_leaves_its_tars_as_they_are(editable, tmp_path):
    """Also when it is tried again: those that have bad frames would lose more."""
    out = tmp_path / "set"
    command = ("pack", *source_options(editable), "--out", out, "--short-side", 150, "--shard-frames", 24, "--no-pairs")
    _, _, category, name = first_sequence(editable)
    images = sorted((editable / "co3d" / category / name / "images").iterdir())
    images[3].write_bytes(images[3].read_bytes()[:1000])
    assert vggt_prep(*command, "--min-frames", 20, "--max-bad", 0.1).returncode == 0
    (out / "train-000001.tar").unlink()
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    images[5].unlink()
    for _ in range(3):
        done = vggt_prep(*command, "--min-frames", 20, "--max-bad", 0)
        assert done.returncode == 1
        assert {name: (out / name).read_bytes() for name in before} == before
    assert vggt_prep(*command, "--min-frames", 20, "--max-bad", 0.1).returncode == 0
    assert {name: (out / name).read_bytes() for name in before} == before
    assert vggt_prep("verify", out).returncode == 0


def test_a_shard_that_was_left_out_is_made_once_its_files_are_there(editable, tmp_path, caplog):
    out = tmp_path / "set"
    command = ("pack", *source_options(editable), "--out", out, "--short-side", 150, "--shard-frames", 24)
    _, _, category, name = first_sequence(editable)
    images = sorted((editable / "co3d" / category / name / "images").iterdir())
    for image in images[1:]:
        image.rename(tmp_path / image.name)
    done = vggt_prep(*command, "--max-bad", 1)
    assert "left out: too few usable frames" in done.stdout
    before = shards.open(out).frames["jpg_crc"].tolist()
    assert "packed before: nothing to do" in vggt_prep(*command).stdout  # nothing was repaired
    images[0].rename(tmp_path / images[0].name)
    assert "packed before: nothing to do" in vggt_prep(*command).stdout  # nor was it by removing more
    (tmp_path / images[0].name).rename(images[0])
    for image in images[1:]:
        (tmp_path / image.name).rename(image)
    assert "packed before: nothing to do" in vggt_prep(*command).stdout  # runs on it go on
    assert "nothing of train-000000 could be used, but the files have changed since; to try again" in caplog.text
    (out / "train-000003.tar").unlink()
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert "files of theirs have other sizes or times now: train-000000" in caplog.text
    after = shards.open(out).frames["jpg_crc"].tolist()
    assert len(after) == len(before) + 24
    assert {*before} < {*after}
    assert "packed before: nothing to do" in vggt_prep(*command).stdout


@pytest.mark.parametrize(("finished", "another"), [(True, True), (False, True), (False, False)])
def test_changes_are_seen_in_a_shard_of_which_an_image_is_missing(
    editable, tmp_path, caplog, monkeypatch, finished, another
):
    """another: whether one more is gone once files have changed."""
    _, _, category, name = first_sequence(editable)
    images = sorted((editable / "co3d" / category / name / "images").iterdir())
    command = ("pack", *source_options(editable), "--out", tmp_path / "set", "--short-side", 150, "--max-bad", 0.1)
    command = (*command, "--shard-frames", 24, "--min-frames", 20, "--no-pairs")
    images[3].unlink()
    if not finished:

        def stopped(*_):
            raise PackError("stopped")

        monkeypatch.setattr("prep.packing.pack.finish", stopped)
    assert vggt_prep(*command).returncode == (0 if finished else 1)
    monkeypatch.undo()
    for image in images[5:]:
        image.write_bytes(images[0].read_bytes())
    if another:
        images[4].unlink()
    assert vggt_prep(*command).returncode == 0
    pictures = len(np.unique(shards.open(tmp_path / "set").frames["jpg_crc"][:23]))
    if finished:
        assert "files of train-000000 have other sizes or times than when it was packed" in caplog.text
        assert pictures == 23
        made_of = tmp_path / "set" / "made_of.json"
        made_of.write_text(json.dumps(dict.fromkeys(json.loads(made_of.read_text()))))  # as older versions did
        caplog.clear()
        assert "packed before: nothing to do" in vggt_prep(*command).stdout
        assert caplog.text == ""
    elif another:  # a disk may not be mounted: what there is stays
        assert "some of their files have changed, and others are missing now: train-000000" in caplog.text
        assert pictures == 23
    else:
        assert "made again, as files of theirs have other sizes or times now: train-000000" in caplog.text
        assert pictures == 4


def test_a_part_of_the_download_just_works(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    shutil.rmtree(editable / "co3d" / category / name)
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 annotated sequence skipped" in done.stdout
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
    assert "4 frames are bad, and --max-bad allows 1 in all" in failed.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    done = vggt_prep(*command, "--max-bad", 0.05)
    assert done.returncode == 0, done.stderr
    assert "1 frame left out: image is damaged" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    bad = [entry for shard in report.values() for entry in shard["bad"]]
    assert sorted(entry[1] for entry in bad) == [
        "annotated path is not <category>/<sequence>/images/<file>",
        "annotated twice",
        "camera is not finite",
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
    assert "1 sequence left out: too few usable frames" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == {"train-000000": {"bad": [], "short": [[f"train/{category}/{name}", 23]], "doubtful": []}}


def test_frames_without_depth_are_packed_as_camera_only(editable, tmp_path):
    _, _, category, name = first_sequence(editable)
    shutil.rmtree(editable / "co3d" / category / name / "depths")
    done = vggt_prep("pack", *source_options(editable), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for command in (("verify",), ("preview", "--out", tmp_path / "p.html")):
        checked = vggt_prep(command[0], tmp_path / "out", *command[1:])
        assert checked.returncode == 0, checked.stderr
    assert (tmp_path / "p.html").read_text().count("depth known at 0% of pixels") == 1
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


class MyDataset:
    """Someone's own captures: what the README says another dataset takes."""

    def __init__(self, folder):
        self.folder = folder
        self.skipped = {}

    def describe(self):
        return {"kind": "mine"}

    def identity(self, frame):
        return str(frame.image)

    def sequences(self):
        images = sorted(self.folder.glob("*/*/images/*.jpg"))[:3]
        k = np.array([[300, 0, 160], [0, 300, 120], [0, 0, 1.0]])
        camera = OpenCVCamera(extrinsics=np.eye(4)[:3], intrinsics=k)
        frames = [
            Frame(
                name=image.stem,
                path=image.name,
                image=image,
                size=None,
                depth=None,
                mask=None,
                camera=camera,
            )
            for image in images
        ]
        yield Sequence(split="train", category="mine", name="one", frames=frames, bad=[])


def test_another_dataset_is_one_class(captures, tmp_path):
    landscape = captures / "co3d"
    with process_pool(1, ["prep.packing.pack"]) as pool:
        options = PackOptions(min_frames=1)
        result = pack(MyDataset(landscape), tmp_path / "out", options, pool, max_bad=1, parallel=1)
    assert result.splits["train"]["frames"] + len(result.bad) == 3
    assert shards.open(tmp_path / "out").dataset["source"]["kind"] == "mine"


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
        (None, ("--out", "s3://bucket/set"), "expected a place on this machine"),
        (None, ("--max-bad", "nan"), "nan is not a number"),
        (None, ("--annotation-dir", "/no/:x:/[red]dir"), "--annotation-dir /no/:x:/[red]dir: no such directory"),
        (None, ("--set-list", "fewview_dev"), "not with --annotation-dir"),
        (None, ("--scheduler", "bogus"), "expected an address like tcp://host:8786"),
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
    assert done.returncode in (1, 2)
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


def test_names_are_printed_as_they_are_and_quoted_where_they_are_to_be_typed(captures, tmp_path):
    """Not as markup, nor as pictures: `:x:` is a red cross for the library that prints."""
    folder = tmp_path / "my :x: [red]data"
    done = vggt_prep("synth", "--out", folder, "--scenes", 8, "--frames", 1)
    assert f"--co3d-dir '{folder}/co3d' --annotation-dir '{folder}/annotations'" in done.stdout
    missing = vggt_prep("info", folder)
    assert f"--out '{folder}'" in missing.stderr
    out = tmp_path / "set :x: [red]"
    packed = vggt_prep("pack", *source_options(captures), "--out", out, "--short-side", 40)
    assert f"\n{out}: " in packed.stdout
    assert vggt_prep("info", out).stdout.startswith(f"{out}: ")


def test_sound_tars_of_a_set_stay_when_its_source_cannot_be_read(editable, tmp_path):
    """Whatever else of the set was lost: the report, and another tar."""
    out = tmp_path / "out"
    command = ("pack", *source_options(editable), "--out", out, "--shard-frames", 60)
    assert vggt_prep(*command).returncode == 0
    (out / "report.json").unlink()
    gone, *sound = sorted(out.glob("*.tar"))
    gone.unlink()
    before = {path.name: path.read_bytes() for path in sound}
    assert len(before) > 1
    for images in (editable / "co3d").glob("*/*/images"):
        images.rename(images.with_name("away"))
    failed = vggt_prep(*command)
    assert failed.returncode == 1
    assert "frames are bad" in failed.stderr
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == before
    for images in (editable / "co3d").glob("*/*/away"):
        images.rename(images.with_name("images"))
    done = vggt_prep(*command)
    assert done.returncode == 0, done.stderr
    assert "its report was lost: it may lack frames" in done.stdout
    assert {path.name: path.read_bytes() for path in sound} == before
    assert gone.exists()


def test_a_report_that_is_the_users_own_is_not_overwritten(captures, tmp_path):
    (tmp_path / "report.json").write_text('{"title": "mine"}')
    done = vggt_prep("pack", *source_options(captures), "--out", tmp_path)
    assert done.returncode == 1
    assert "not empty, and holds no shards" in done.stderr
    assert (tmp_path / "report.json").read_text() == '{"title": "mine"}'
