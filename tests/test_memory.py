"""What a run needs of memory, said before, and what to lower when it lacks."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT, run_command
from runs import SCRATCH, run_trainer, trainer
from test_parallel import NO_QUANTILE

from train.config import load_config
from train.distributed import World
from train.memory import estimate_memory, said_out_of_memory
from train.optim import freeze
from vggt import VGGT, preset
from vggt.memory import hold_in_bf16

ALONE = World(0, 1, 1, torch.device("cpu"))
# GB of the process at its peak, measured by bench/model.py memory: camera and depth head trained at 266x518 in float32,
# without the optimizer, by number of views.
MEASURED = {2: 6.36, 4: 6.42, 8: 6.66, 16: 6.75}


def estimate(name, *overrides, size=1):
    config = load_config(ROOT / "train" / "configs" / name, ["init=vggt.pt", *overrides])
    with torch.device("meta"):
        model = VGGT(preset(config.model.preset, heads=config.loss.heads, head_chunk=config.model.head_chunk))
    freeze(model, config.model.freeze)
    if config.model.aggregator_dtype == "bf16":
        hold_in_bf16(model.aggregator)
    return estimate_memory(model, config, World(0, size, size, torch.device("cpu")))


@pytest.mark.parametrize("views", MEASURED)
def test_the_estimate_is_near_what_was_measured(views):
    options = (f"data.views=[{views},{views}]", f"max_img_per_gpu={views}", "accum_steps=1", "precision=fp32")
    found = estimate("default.yaml", *options, "data.aspect=[0.5136,0.5136]")
    assert (found.weights + found.training / 3 + found.chunk) / 1e9 == pytest.approx(MEASURED[views], rel=0.1)


def test_what_needs_less_memory_is_estimated_lower():
    whole = estimate("default.yaml").total
    assert estimate("default.yaml", "accum_steps=4").total < whole
    assert estimate("default.yaml", "max_img_per_gpu=24", "accum_steps=2").total < whole
    assert estimate("default.yaml", "model.aggregator_dtype=bf16").total < whole - 1.7e9
    assert estimate("default.yaml", "model.head_chunk=null").total > whole
    assert estimate("small_gpu.yaml").total < 12e9  # a GPU of 16 GB, with its context and fragments
    assert estimate("full.yaml", size=64).total < estimate("full.yaml", size=8).total < estimate("full.yaml").total


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
        said_out_of_memory(images, config, ALONE, 7),
    ):
        raise error
    for words in ("5 scenes of 2 views of 42x56", "3 chunks", "accum_steps (3)", "max_img_per_gpu (48)", "head_chunk"):
        assert words in str(caught.value)
    with pytest.raises(RuntimeError, match="a bug"), said_out_of_memory(images, config, ALONE, 7):
        raise RuntimeError("a bug")


GREEDY = """
import torch
import train.main
def greedy(*arguments, **options):
    torch.empty(10**15)  # more than there is: as on a GPU, an exception of the allocator
if __name__ == "__main__":
    train.main.train_step = greedy
    train.main.main()
"""


def test_a_run_without_memory_ends_with_one_line(shard_dir, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    arguments = trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=2")[2:]
    done = run_command("python", tmp_path / "greedy.py", *arguments, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 1
    assert "Error: step 1: out of memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dry_run_tries_the_heaviest_step_and_writes_nothing(shard_dir, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in (
        "memory a process, beside PyTorch itself: about",
        "dry run: the heaviest of the next 1,000 steps",
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
