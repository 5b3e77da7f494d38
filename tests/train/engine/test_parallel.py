"""Ranks that share a model: the same gradients and curves however they do, and one checkpoint for all of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
import torch.distributed as dist
from batches import NO_QUANTILE, gradients, make_batch, make_model
from conftest import BIN, ROOT
from runs import SCRATCH, checkpoint, metrics, run_ranks, run_trainer, start, trainer, wait_for
from torch.nn.parallel import DistributedDataParallel

from train.config import load_config


@pytest.mark.parametrize("scenes", [1, 2, 3, 5])
def test_any_number_of_chunks_gives_the_gradient_of_one(scenes):
    """Also more chunks than scenes, and chunks of unequal size."""
    model, batch = make_model(load_config(None, NO_QUANTILE)), make_batch(scenes)
    whole = gradients(model, batch, 1, NO_QUANTILE)
    largest = max(value.abs().max() for value in whole.values())
    for chunks in (2, 3, 4, 5, 9):
        for name, value in gradients(model, batch, chunks, NO_QUANTILE).items():
            assert (value - whole[name]).abs().max() <= 1e-5 * largest, (chunks, name)


@pytest.fixture
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_chunks_need_as_many_all_reduces_as_one(alone):
    config = load_config(None, NO_QUANTILE)
    model = DistributedDataParallel(make_model(config), forward_sync_buffers=False)
    reduced = []

    def count(_, bucket):
        reduced.append(bucket.index())
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, count)
    numbers = []
    for chunks in (1, 1, 2, 4):  # twice: after its first step DDP arranges its buckets again
        reduced.clear()
        gradients(model, make_batch(4), chunks, NO_QUANTILE)
        numbers.append(len(reduced))
    assert numbers[1] > 0
    assert numbers[1:] == [numbers[1]] * 3


RANKS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from batches import NO_QUANTILE, gradients, make_batch, make_model
from train.config import load_config
from train.runtime.distributed import start_world
from train.engine.parallel import distribute, full_state_dict

def compare(world):
    batches = [make_batch(3, seed=rank) for rank in range(world.size)]
    expected = None
    for batch in batches:
        part = gradients(make_model(load_config(None, NO_QUANTILE)), batch, 1, NO_QUANTILE)
        expected = part if expected is None else {name: expected[name] + value for name, value in part.items()}
    for strategy in ("ddp", "fsdp"):
        model = distribute(make_model(load_config(None, NO_QUANTILE)), strategy, bf16=False, world=world)
        for chunks in (1, 2, 3):
            found = full_state_dict(gradients(model, batches[world.rank], chunks, NO_QUANTILE), world)
            if not world.is_main:
                continue
            largest = max(value.abs().max() for value in expected.values()) / world.size
            off = max((value - expected[name] / world.size).abs().max() for name, value in found.items())
            assert found.keys() == expected.keys()
            assert off <= 1e-5 * largest, (strategy, chunks, off, largest)
            print("equal", strategy, chunks, flush=True)

with start_world(tf32=False) as world:
    compare(world)  # what holds the process group is gone before it ends
"""


@pytest.mark.dist
def test_the_gradient_of_ranks_is_the_mean_of_theirs_whatever_the_strategy_and_chunks(tmp_path):
    done = run_ranks(RANKS, tmp_path, ROOT / "tests")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 6


def close(a, b, tolerance):
    assert a.keys() == b.keys()
    for line, terms in a.items():
        for name, value in terms.items():
            assert value == pytest.approx(b[line][name], rel=tolerance, abs=tolerance), (line, name)


@pytest.mark.slow
@pytest.mark.dist
def test_fsdp_and_ddp_have_the_same_curve_and_a_checkpoint_moves_between_them(shard_dir, tmp_path):
    """Also to a single process and back; the curve is that of a run that changed nothing but its ranks."""
    options = {"processes": 2}
    for strategy in ("ddp", "fsdp"):
        done = run_trainer(shard_dir, tmp_path / strategy, *SCRATCH, "max_steps=6", f"strategy={strategy}", **options)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    close(metrics(tmp_path / "ddp"), metrics(tmp_path / "fsdp"), 1e-5)
    one, two = (checkpoint(tmp_path / strategy, 6) for strategy in ("ddp", "fsdp"))
    assert one["model"].keys() == two["model"].keys()
    assert all((one["model"][name] - two["model"][name]).abs().max() < 1e-4 for name in one["model"])
    for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        moved = tmp_path / f"{strategy}-{other}"
        shutil.copytree(tmp_path / strategy, moved, symlinks=True)
        for step in (4, 5, 6):
            (moved / "checkpoints" / f"step-{step:08d}.pt").unlink()
        done = run_trainer(shard_dir, moved, *SCRATCH, "max_steps=6", f"strategy={other}", **options)
        assert done.returncode == 0, done.stderr
        assert "resuming" in done.stdout
        close(metrics(moved), metrics(tmp_path / "ddp"), 1e-5)
    runs = {}
    for strategy in ("ddp", "fsdp"):
        alone = runs[strategy] = tmp_path / f"{strategy}-alone"
        shutil.copytree(tmp_path / strategy, alone, symlinks=True)
        done = run_trainer(shard_dir, alone, *SCRATCH, "max_steps=8")
        assert done.returncode == 0, done.stderr
    close(metrics(runs["ddp"]), metrics(runs["fsdp"]), 1e-4)


GATHERS = """
import sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from torch.utils._python_dispatch import TorchDispatchMode
from train.engine.parallel import distribute
from train.runtime.distributed import start_world
from vggt import VGGT, preset

class Gathers(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "all_gather" in str(func) or "allgather" in str(func)
        return func(*args, **(kwargs or {}))

def count(world):
    torch.manual_seed(0)
    model = distribute(VGGT(preset("tiny", heads=("camera",))), "fsdp", bf16=False, world=world)
    for views in (2, 2, 8):
        with Gathers() as gathers:
            torch.stack(model(torch.rand(1, views, 3, 28, 42))["pose_enc_list"]).square().mean().backward()
        if world.is_main:
            print("gathers", gathers.count, flush=True)

with start_world(tf32=False) as world:
    count(world)
"""


@pytest.mark.slow
@pytest.mark.dist
def test_fsdp_gathers_weights_as_often_for_many_views_as_for_few(tmp_path):
    done = run_ranks(GATHERS, tmp_path, ROOT / "tests")
    assert done.returncode == 0, done.stderr
    counts = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("gathers")]
    assert counts[1] == counts[2] > 10


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_bf16_and_a_frozen_aggregator_held_in_it_train_with_either_strategy(shard_dir, published, tmp_path, strategy):
    options = [f"init={published}", "precision=bf16", f"strategy={strategy}", "max_steps=2"]
    for held in ("fp32", "bf16"):
        out = tmp_path / held
        done = run_trainer(shard_dir, out, *options, f"model.aggregator_dtype={held}", processes=2)
        assert done.returncode == 0, done.stderr
    close(metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16"), 1e-6)
    everything = run_trainer(shard_dir, tmp_path / "all", *options, "model.freeze=[]", processes=2)
    assert everything.returncode == 0, everything.stderr


POISONED = """
import sys
import train.engine.run
import train.main
from train.runtime.distributed import start_world
prepare = train.engine.run.prepare
def poisoned(raw, device, **options):
    import os
    batch = prepare(raw, device, **options)
    if os.environ["RANK"] == "1" and raw["after"].step in (2, 3):
        batch["depth"] = batch["depth"] * float("nan")
    return batch
if __name__ == "__main__":
    train.engine.run.prepare = poisoned
    train.main.main()
"""


@pytest.mark.slow
@pytest.mark.dist
def test_nan_on_one_of_two_ranks_skips_the_step_on_both(shard_dir, tmp_path):
    arguments = trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=4")[2:]
    done = run_ranks(POISONED, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped on all ranks") == 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [(line["step"], line["split"]) for line in map(json.loads, lines)]
    assert [step for step, split in steps if split == "skipped"] == [2, 3]
    assert [step for step, split in steps if split == "train"] == [1, 4]
    before, after = (checkpoint(tmp_path / "run", step)["model"] for step in (1, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_brings_back_the_job_of_a_killed_worker_and_the_curve_goes_on(shard_dir, tmp_path):
    whole = run_trainer(shard_dir, tmp_path / "whole", *SCRATCH, "max_steps=6", processes=2)
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    command = [str(part) for part in trainer(shard_dir, out, *SCRATCH, "max_steps=6", processes=2)]
    assert command[0] == str(BIN / "torchrun")
    process = start([command[0], "--max-restarts=2", "--shutdown-timeout=5", *command[1:]])
    wait_for(out / "checkpoints" / "step-00000002.pt", process)
    listed = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    worker = [int(pid) for pid, parent, text in rows if int(parent) == process.pid and "train/main.py" in text][-1]
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=150)
    assert process.returncode == 0, said
    assert "resuming" in said
    close(metrics(tmp_path / "whole"), metrics(out), 0)
