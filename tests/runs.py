"""Runs of the trainer as users start it, of the smallest model on small images."""

from __future__ import annotations

import json
import os
import subprocess
import time

import torch
from conftest import BIN, ROOT, run_command

# Every step is a checkpoint. The trainer loads its data itself: a worker takes as long to start as all of a short run.
SMALL = [
    *("model.preset=tiny", "precision=fp32", "data.width=56", "data.views=[2, 3]", "data.val_scenes=2"),
    *("data.val_views=3", "max_img_per_gpu=6", "accum_steps=2", "log_every=1", "optim.lr=1e-3"),
    *("checkpoint.every=1", "checkpoint.keep=20", "val_every=100", "data.workers=0"),
]
SCRATCH = ["model.freeze=[]"]
WORKER = "data.workers=1"
LOCAL = ["--nnodes=1", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def trainer(shard_dir, out, *overrides, processes=1, config=None):
    launch = [BIN / "python"] if processes == 1 else [BIN / "torchrun", *LOCAL, f"--nproc_per_node={processes}"]
    command = [*launch, "train/main.py", *(["--config", config] if config else [])]
    return [*command, f"data.shards={shard_dir}", f"out_dir={out}", *SMALL, *overrides]


def run_trainer(*arguments, **options):
    command = trainer(*arguments, **options)
    return run_command(command[0].name, *command[1:], OMP_NUM_THREADS="1")


def run_ranks(code, tmp_path, *arguments, processes=2, **environment):
    """A script, run by torchrun, that may import the project and these tests."""
    (tmp_path / "ranks.py").write_text(code)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    launch = [*LOCAL, f"--nproc_per_node={processes}", tmp_path / "ranks.py"]
    return run_command("torchrun", *launch, *arguments, **environment)


def start(command):
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path, process, timeout=120):
    end = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def checkpoint(out, step):
    return torch.load(out / "checkpoints" / f"step-{step:08d}.pt", weights_only=True)


def metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], line["split"]): {k: v for k, v in line.items() if k.startswith("loss")} for line in lines}


def assert_same_run(a, b, step):
    one, two = checkpoint(a, step), checkpoint(b, step)
    assert one["data"] == two["data"]
    for name, value in one["model"].items():
        assert torch.equal(value, two["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, two["optimizer"]["state"][index][name])
    assert metrics(a) == metrics(b)
