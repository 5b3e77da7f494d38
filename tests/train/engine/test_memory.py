"""What a dry run tries, and what to lower when memory is short."""

from __future__ import annotations

import pytest
import torch
from batches import NO_QUANTILE
from conftest import ROOT, run_command
from runs import SCRATCH, run_trainer, trainer

from train.config import load_config
from train.engine.memory import explain_oom
from train.runtime.distributed import World

ALONE = World(0, 1, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: ..."),
    ],
)
def test_out_of_memory_says_the_numbers_of_the_step_and_what_to_lower(error):
    config, images = load_config(None, [*NO_QUANTILE, "accum_steps=3"]), torch.zeros(5, 2, 3, 42, 56)
    with (
        pytest.raises(ValueError, match="step 7: out of memory") as caught,
        explain_oom(images, config, ALONE, 7),
    ):
        raise error
    for words in ("5 scenes of 2 views of 42x56", "3 chunks", "accum_steps (3)", "max_img_per_gpu (48)", "head_chunk"):
        assert words in str(caught.value)
    with pytest.raises(RuntimeError, match="a bug"), explain_oom(images, config, ALONE, 7):
        raise RuntimeError("a bug")


GREEDY = """
import torch
import train.engine.run
import train.main
def greedy(*arguments, **options):
    torch.empty(10**15)  # more than there is: as on a GPU, an exception of the allocator
if __name__ == "__main__":
    train.engine.run.train_step = greedy
    train.main.main()
"""


def test_a_run_without_memory_ends_with_one_line(shard_dir, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    arguments = trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=2")[2:]
    done = run_command("python", tmp_path / "greedy.py", *arguments, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 1
    assert "Error: step 1: out of memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_tries_the_largest_step_and_writes_nothing(shard_dir, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in (
        "dry run: the largest of the next 1,000 steps",
        "Nothing was written",
    ):
        assert words in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_dry_run_of_a_run_that_is_there_checks_its_checkpoint_and_leaves_it(shard_dir, tmp_path):
    out = tmp_path / "run"
    assert run_trainer(shard_dir, out, *SCRATCH, "max_steps=1").returncode == 0
    leftover = out / "checkpoints" / "step-00000002.tmp"
    leftover.write_bytes(b"another process is writing it")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run_trainer(shard_dir, out, *SCRATCH, "max_steps=2", "--dry-run").returncode == 0
    other = run_trainer(shard_dir, out, *SCRATCH, "optim.lr=0.5", "--dry-run")
    assert other.returncode == 1
    assert "was trained with optim.lr=0.001, now it is optim.lr=0.5" in other.stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
