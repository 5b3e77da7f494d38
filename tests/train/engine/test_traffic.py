"""What ranks exchange, by formula, against the bytes of the collectives that they call."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from runs import run_ranks

from train.engine.optim import freeze
from train.engine.traffic import step_traffic
from vggt import VGGT, VGGTConfig

RANKS = """
import sys
from collections import Counter
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
sys.path.insert(0, sys.argv[1])
from batches import make_batch
from train.config import load_config
from train.engine.adapters import attach
from train.engine.optim import freeze, make_optimizer
from train.engine.parallel import distribute
from train.engine.step import train_step
from train.engine.traffic import step_traffic
from train.runtime.distributed import start_world
from vggt import VGGT, preset

class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.bytes = Counter()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            tensors = [x for x in tree_leaves(args[:2]) if isinstance(x, torch.Tensor)]
            self.bytes[str(func).split(".")[1].strip("_")] += max(x.nbytes for x in tensors) if "base" in str(func) \\
                else sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))

SETTINGS = [[], ["model.freeze=[]", "accum_steps=1"], ['model.lora={names: ["aggregator.global*attn.*"], rank: 4}']]
FLAGS = 5 * 8

def compare(world):
    for strategy in ("ddp", "fsdp"):
        for number, settings in enumerate(SETTINGS):
            config = load_config(None, ["model.preset=tiny", "init=x", *settings])
            torch.manual_seed(0)
            model = VGGT(preset("tiny", heads=config.loss.heads)).train()
            freeze(model, config.model.freeze)
            if config.model.lora is not None:
                attach(model, config.model.lora)
            chunks = config.accum_steps
            expected = step_traffic(model, strategy, bf16=True, chunks=chunks, ranks=world.size)
            shared = distribute(model, strategy, bf16=True, world=world)
            optimizer, batch = make_optimizer(model, config.optim), make_batch(2)
            for _ in range(2):  # after its first step ddp arranges its buckets again
                train_step(shared, optimizer, batch, config, world)
            with Collectives() as counted:
                train_step(shared, optimizer, batch, config, world)
            names = ("allreduce", "allgather_base", "reduce_scatter_base")
            found = [counted.bytes.pop(name, 0) for name in names]
            formula = [expected.all_reduce + FLAGS, expected.all_gather, expected.reduce_scatter]
            assert found == formula, (found, formula)
            assert not counted.bytes, counted.bytes
            if world.is_main:
                print("equal", strategy, number, flush=True)

with start_world(tf32=False) as world:
    compare(world)
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_exchange_what_the_formula_says(tmp_path, processes):
    """Of heads, adapters and everything, in one chunk and in two, to the byte."""
    done = run_ranks(RANKS, tmp_path, ROOT / "tests", processes=processes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 6


def test_of_many_ranks_none_gathers_a_copy_of_the_positions_for_each():
    """1.4 million numbers on an axis of one, which ranks would divide among them by filling it up."""
    with torch.device("meta"):
        model = VGGT(VGGTConfig(heads=("camera", "depth")))
    freeze(model, ())
    few, many = (step_traffic(model, "fsdp", bf16=True, chunks=1, ranks=ranks) for ranks in (2, 64))
    assert many.all_gather < 1.001 * few.all_gather
    assert many.reduce_scatter < 1.001 * few.reduce_scatter
    numbers = sum(p.numel() for p in model.parameters())
    assert few.reduce_scatter == pytest.approx(4 * numbers, rel=1e-3)
    assert step_traffic(model, "ddp", bf16=True, chunks=1, ranks=64).sent == pytest.approx(
        8 * numbers * 63 / 64, rel=1e-6
    )
