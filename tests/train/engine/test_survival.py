"""What a run lives through, and what it never does: lose what was trained, erase history, or wait for ever."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from conftest import ROOT, run_command
from runs import SCRATCH, WORKER, assert_same_run, run_trainer, start, trainer
from web import RangeHandler, served

import shards
from shards.locks import locked
from train.data.batches import TrainingSteps
from train.data.loader import NoDataError, stream
from train.data.plan import DataConfig, TrainingPlan
from train.data.split import Split
from train.engine.folder import check_place
from train.report.logger import Reporter
from train.runtime.jsonl import read_jsonl

STEPS = ["max_steps=2000", "checkpoint.every=5000", WORKER]


def wait_for_step(out, step, process, timeout=150):
    end = time.monotonic() + timeout
    while not any(line["step"] >= step for line in read_jsonl(out / "metrics.jsonl")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"step {step} was not reached"
        time.sleep(0.02)


def ends_within(process, seconds):
    """What it said; it must end by itself in this time."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def last_step(out):
    return read_jsonl(out / "metrics.jsonl")[-1]["step"]


def saved_step(out):
    return torch.load(out / "checkpoints" / "latest", weights_only=True)["data"]["step"]


# A signal saves


HANGS = """
from datetime import timedelta
import torch.distributed as dist
from train.runtime import stop
stop.REPEATED = 0.5
stop.StopRequest().listen()
print("hangs", flush=True)
dist.HashStore().wait(["never"], timedelta(seconds=60))
"""


def test_a_signal_that_is_given_again_kills_also_what_hangs_outside_of_python():
    """SIGTERM or SIGINT, that is; after SIGUSR1, which schedulers send ahead, the first of them is not given again."""
    command = [sys.executable, "-c", HANGS]
    hung = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert [process.stdout.readline() for process in hung] == ["hangs\n"] * 3
        for names in zip(("TERM", "TERM", None), ("USR1", "TERM", None), ("INT", "HUP", "TERM"), strict=True):
            for process, name in zip(hung, names, strict=True):
                if name is not None:
                    process.send_signal(signal.Signals[f"SIG{name}"])
            time.sleep(0.8)
        assert [process.poll() for process in hung] == [-signal.SIGKILL, None, -signal.SIGKILL]
    finally:
        for process in hung:
            process.kill()
            process.communicate()


def test_what_cannot_be_written_any_more_ends_a_run_that_saves_first(shard_dir, tmp_path):
    """As on a full disk; checkpoints may lie on another."""
    out = tmp_path / "run"
    process = start(trainer(shard_dir, out, *SCRATCH, *STEPS))
    wait_for_step(out, 2, process)
    (out / "metrics.jsonl").rename(out / "kept.jsonl")
    (out / "metrics.jsonl").mkdir()
    said = ends_within(process, 60)
    assert process.returncode == 1
    assert "metrics.jsonl: cannot be written (Is a directory); what was trained is saved at step" in said
    assert saved_step(out) >= read_jsonl(out / "kept.jsonl")[-1]["step"]


def test_a_process_that_waits_for_others_says_so(shard_dir, tmp_path):
    """As in a pod whose environment is that of a job of many."""
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [str(part) for part in trainer(shard_dir, tmp_path / "run", *SCRATCH)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == "WORLD_SIZE=2: waiting for the other processes at localhost:0\n"
    process.terminate()
    process.communicate(timeout=30)


# Nothing is erased


def test_without_a_whole_checkpoint_no_start_erases_what_is_left_of_a_run(shard_dir, tmp_path):
    """Not the first one, not the second one, and not those after somebody has tidied up."""
    out = tmp_path / "run"
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=3", "checkpoint.keep=2")
    assert done.returncode == 0, done.stderr
    history = {name: (out / name).read_bytes() for name in ("metrics.jsonl", "validation.jsonl", "config.yaml")}
    for path in (out / "checkpoints").glob("step-*.pt"):
        path.write_bytes(path.read_bytes()[:1000])

    def refused(message):
        done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=3", "checkpoint.keep=2")
        assert done.returncode == 1
        assert re.search(message, done.stderr), done.stderr
        assert "Traceback" not in done.stderr
        assert {name: (out / name).read_bytes() for name in history} == history

    for _ in range(2):
        refused(r"none of the checkpoints is whole \(there is best, latest, step-00000002")
    shutil.rmtree(out / "checkpoints")
    refused(r"metrics\.jsonl goes up to step 3, but its checkpoints are gone")


def test_what_was_killed_before_its_first_checkpoint_starts_again_but_as_no_other_run(shard_dir, tmp_path):
    out = tmp_path / "run"
    process = start(trainer(shard_dir, out, *SCRATCH, *STEPS))
    wait_for_step(out, 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    other = run_trainer(shard_dir, out, *SCRATCH, "max_steps=2", "checkpoint.every=5000", "optim.lr=2e-3")
    assert "was trained with optim.lr=0.001, now it is optim.lr=0.002" in other.stderr
    assert any(line["step"] == 2 for line in read_jsonl(out / "metrics.jsonl"))
    (out / "config.yaml").write_text("init: nu")
    cut_off = run_trainer(shard_dir, out, *SCRATCH, "max_steps=2")
    assert f"{out}/config.yaml: empty or cut off" in cut_off.stderr


def test_a_checkpoint_under_another_name_or_an_exported_one_is_not_resumed_from(shard_dir, tmp_path):
    out = tmp_path / "run"
    assert run_trainer(shard_dir, out, *SCRATCH, "max_steps=2").returncode == 0
    folder = out / "checkpoints"
    shutil.copy(folder / "step-00000001.pt", folder / "step-00000099.pt")
    before = {path.name for path in folder.iterdir()}
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=3")
    assert "step-00000099.pt: holds step 1: remove it, or name it after that step" in done.stderr
    assert {path.name for path in folder.iterdir()} >= before
    torch.save({"model": {}}, folder / "step-00000099.pt")
    done = run_trainer(shard_dir, out, *SCRATCH, "max_steps=3")
    assert "step-00000099.pt: not a checkpoint of the trainer, it has no config, data, optimizer, shards" in done.stderr


def test_a_second_trainer_in_the_same_place_is_refused_and_changes_nothing(shard_dir, tmp_path):
    out = tmp_path / "run"
    process = start(trainer(shard_dir, out, *SCRATCH, *STEPS))
    wait_for_step(out, 2, process)
    second = run_trainer(shard_dir, out, *SCRATCH, *STEPS)
    assert second.returncode == 1
    assert f"Error: {out}: another trainer is at work there; give another out_dir" in second.stderr
    wait_for_step(out, last_step(out) + 2, process)  # the first one goes on
    os.killpg(process.pid, signal.SIGTERM)
    ends_within(process, 60)
    steps = [line["step"] for line in read_jsonl(out / "metrics.jsonl") if line["split"] == "train"]
    assert steps == list(range(1, saved_step(out) + 1))


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = f"from pathlib import Path; from shards.locks import locked\nwith locked(Path({str(tmp_path)!r}), 'busy'):\n"
    holder = subprocess.Popen([sys.executable, "-c", code + " print('held', flush=True); input()"], cwd=ROOT,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=r"^busy$"), locked(tmp_path, "busy"):
        pass
    holder.kill()
    holder.communicate()
    with locked(tmp_path, "busy"):
        pass


def test_lines_of_a_log_that_are_no_text_or_no_step_are_passed_over(tmp_path):
    lines = [
        b'{"step": 1, "split": "train"}',
        b"\xff\xfe{",
        b"3",
        b'{"split": "train"}',
        b'{"step": "x"}',
        b'{"step": 2, "split": "train"}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    with Reporter(tmp_path, is_main=True, first_step=1, total_steps=9, resumed=True):
        assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file system that is full")
@pytest.mark.parametrize("size", ["16k", *(pytest.param(size, marks=pytest.mark.slow) for size in ("8k", "140k"))])
def test_a_disk_that_is_full_from_the_start_is_one_clear_line(shard_dir, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        done = run_trainer(shard_dir, disk / "run", *SCRATCH, "max_steps=3")
        assert done.returncode == 1
        assert re.search(rf"^Error: {disk}/run/\S+: cannot be written, is the disk full\?", done.stderr, re.MULTILINE)
        assert "Traceback" not in done.stderr
        assert not [*disk.rglob("*.tmp")]
    finally:
        subprocess.run(["umount", disk], check=True)


# A stop is heard


@pytest.mark.parametrize("how", ["terminal", *(pytest.param(h, marks=pytest.mark.slow) for h in ("nohup", "silent"))])
def test_a_lost_terminal_saves_the_run_unless_it_is_to_be_ignored(shard_dir, tmp_path, how):
    """The terminal takes what is printed with it: each line after that is an error, also if no signal says so."""
    out = tmp_path / "run"
    ignore = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]  # as nohup does
    command = [*(ignore if how == "nohup" else []), *map(str, trainer(shard_dir, out, *SCRATCH, *STEPS))]
    master, slave = pty.openpty()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # these tests may run under nohup themselves
    )
    os.close(slave)
    os.set_blocking(master, False)
    while not any(line["step"] >= 2 for line in read_jsonl(out / "metrics.jsonl")):
        assert process.poll() is None
        with suppress(OSError):
            os.read(master, 1 << 16)  # or it would wait for somebody to read
        time.sleep(0.02)
    if how == "silent":
        os.close(master)
        wait_for_step(out, last_step(out) + 3, process)
        os.kill(process.pid, signal.SIGTERM)
    elif how == "nohup":
        os.kill(process.pid, signal.SIGHUP)
        reached = last_step(out)
        wait_for_step(out, reached + 2, process)
        os.kill(process.pid, signal.SIGTERM)
    else:
        os.close(master)
        os.kill(process.pid, signal.SIGHUP)
        os.kill(process.pid, signal.SIGHUP)  # the shell's, after the system's
    assert process.wait(60) == 0
    assert saved_step(out) >= 2
    assert (out / "requeue").exists()


def test_whoever_reads_what_a_run_prints_may_go(shard_dir, tmp_path):
    out = tmp_path / "run"
    process = start(trainer(shard_dir, out, *SCRATCH, *STEPS))
    wait_for_step(out, 1, process)
    process.stdout.close()
    wait_for_step(out, last_step(out) + 3, process)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 0
    assert saved_step(out) == last_step(out)


@pytest.mark.parametrize(
    ("number", "dry"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_the_first_step_ends_it_at_once(shard_dir, tmp_path, number, dry):
    """Here while data does not come: in a dry run, or in the validation at the start."""
    out = tmp_path / "run"
    with served(shard_dir, RangeHandler) as server:
        server.stalled = ".tar"
        process = start(trainer(server.url, out, *SCRATCH, *STEPS) + (["--dry-run"] if dry else []))
        end = time.monotonic() + 90
        while not any(".tar" in path for method, path, _ in server.requests if method == "GET"):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.05)
        os.killpg(process.pid, number)
        said = ends_within(process, 20)
    assert "Traceback" not in said
    if dry:
        assert process.returncode == -number
        assert not out.exists()
    else:
        assert process.returncode == 0, said
        assert "stopped before the first step" in said
        assert (out / "requeue").exists()
        assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.dist])])
def test_a_stop_is_heard_while_data_does_not_come_and_nothing_is_lost(shard_dir, tmp_path, processes):
    out = tmp_path / "run"
    with served(shard_dir, RangeHandler) as server:
        process = start(trainer(server.url, out, *SCRATCH, *STEPS, processes=processes))
        wait_for_step(out, 2, process)
        server.stalled = "train-"
        time.sleep(5)  # what had been loaded ahead is used up
        reached = last_step(out)
        process.send_signal(signal.SIGTERM)
        said = ends_within(process, 25)
    assert processes > 1 or "Traceback" not in said  # torchrun prints its own
    assert (out / "requeue").exists()
    assert saved_step(out) == reached


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_a_stop_is_heard_in_a_validation_and_the_validation_is_made_up_for(shard_dir, tmp_path, processes):
    out = tmp_path / "run"
    options = ("max_steps=4", "val_every=2", "checkpoint.every=3", WORKER)
    with served(shard_dir, RangeHandler) as server:
        process = start(trainer(server.url, out, *SCRATCH, *options, processes=processes))
        wait_for_step(out, 1, process)  # after the validation at the start
        server.stalled = "test-"
        wait_for_step(out, 2, process)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        ends_within(process, 25)
    assert (out / "requeue").exists()
    assert saved_step(out) == 2
    assert [line["step"] for line in read_jsonl(out / "validation.jsonl")] == [0]
    done = run_trainer(shard_dir, out, *SCRATCH, *options, processes=processes)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_jsonl(out / "validation.jsonl")] == [0, 2, 4]


# What comes and goes under it


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_data_that_is_gone_for_good_ends_the_run_but_what_was_trained_is_saved(shard_dir, tmp_path, processes):
    shutil.copytree(shard_dir, tmp_path / "set")
    out = tmp_path / "run"
    with served(tmp_path / "set", RangeHandler) as server:
        process = start(trainer(server.url, out, *SCRATCH, *STEPS, processes=processes))
        wait_for_step(out, 2, process)
        for tar in (tmp_path / "set").glob("train-*.tar"):
            tar.unlink()
        said = ends_within(process, 90)
    assert process.returncode == 1
    assert re.search(r"Error: http\S+train-\S+: not to be read in 6 tries: .*; what was trained is saved at step", said)
    assert not (out / "requeue").exists()
    assert saved_step(out) == last_step(out)


def test_an_outage_of_minutes_is_waited_for(shard_dir, monkeypatch):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    monkeypatch.setattr(shards.storage, "OUTAGE_PAUSE", 0.05)
    with served(shard_dir, RangeHandler) as server:
        opened = shards.open(server.url)
        frames = opened.frames
        server.failures = 15
        assert opened.read(0) == shards.open(shard_dir).read(0)
        assert len(frames) == 192


def test_a_set_that_is_replaced_under_a_run_is_noticed_by_new_workers(shard_dir, captures, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    split = Split([shards.open(tmp_path / "set")], "train")
    plan = TrainingPlan(config=DataConfig(width=56), lengths=split.lengths, seed=0, max_img_per_gpu=4, world_size=1)

    def steps(last):
        return TrainingSteps(split, plan, 0, last or plan.start(), 3)

    assert len(list(stream(steps, range(3), 1, False))) == 3
    shutil.rmtree(tmp_path / "set")
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    packed = run_command("vggt-prep", "pack", *source, "--out", tmp_path / "set", "--short-side", 100)
    assert packed.returncode == 0, packed.stderr
    with pytest.raises(NoDataError, match=r"set: was replaced or removed while it was in use"):
        list(stream(steps, range(3), 1, False))


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_and_workers_that_are_stopped_for_a_while_go_on(shard_dir, tmp_path):
    for name, pause in (("whole", False), ("paused", True)):
        process = start(trainer(shard_dir, tmp_path / name, *SCRATCH, "max_steps=30", WORKER, processes=2))
        wait_for_step(tmp_path / name, 3, process)
        if pause:
            listed = subprocess.run(["pgrep", "-f", str(tmp_path / name)], capture_output=True, text=True, check=True)
            others = [int(pid) for pid in listed.stdout.split() if int(pid) != process.pid]
            assert len(others) >= 2
            for pid in others:
                os.kill(pid, signal.SIGSTOP)
                time.sleep(1.5)
                os.kill(pid, signal.SIGCONT)
        said = ends_within(process, 120)
        assert process.returncode == 0, said
    assert_same_run(tmp_path / "whole", tmp_path / "paused", 30)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_somebody_who_may_not_write_is_told_where_and_shards_need_only_be_read(shard_dir, tmp_path_factory):
    from train.engine.folder import locked_folder

    place = tmp_path_factory.mktemp("others")
    shutil.copytree(shard_dir, place / "set")
    (place / "run").mkdir()
    modes = {folder: folder.stat().st_mode for folder in (*place.parents, place, place / "set", place / "run")}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o055)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            opened = shards.open(place / "set")
            assert opened.read(0)
            try:
                with locked_folder(place / "run"):
                    pass
            except OSError as error:
                code = 0 if f"{place}/run/lock" in str(error) else 2
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for folder, mode in modes.items():
        folder.chmod(mode)
    assert ended == 0


def test_a_dry_run_finds_that_a_run_could_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="file is not a folder that you may write to; give another out_dir"):
            check_place(out)
    check_place(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
