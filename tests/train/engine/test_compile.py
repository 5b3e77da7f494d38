"""Compiled blocks, in steps whose shapes change."""

from __future__ import annotations

import random

import pytest
import torch
from batches import make_batch
from torch import nn
from torch._dynamo.utils import counters

from train.config import load_config
from train.engine.adapters import attach
from train.engine.optim import freeze
from train.engine.step import forward_backward
from vggt import VGGT, preset
from vggt.layers import Block, compile_blocks

SETTINGS = {
    "heads": ["precision=fp32"],
    "everything": ["precision=fp32", "model.freeze=[]"],
    "adapters": ['model.lora={names: ["aggregator.global*attn.*"], rank: 4}'],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("setting", SETTINGS)
def test_blocks_are_compiled_a_few_times_whatever_the_shapes(setting, monkeypatch):
    """Each kind for batches of one and of more, with and without gradients; never beyond torch's limit."""
    eager = nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda self, dynamic: eager(self, dynamic=dynamic, backend="eager"))
    config = load_config(None, ["model.preset=tiny", "init=x", *SETTINGS[setting]])
    model = VGGT(preset("tiny", heads=config.loss.heads)).train()
    freeze(model, config.model.freeze)
    if config.model.lora is not None:
        attach(model, config.model.lora)
    model.aggregator.keep_every_block()
    torch.compiler.reset()
    counters.clear()
    compile_blocks(model)
    draw, compiled = random.Random(0), []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for step in range(20):
            views = (1, 2, 3, 6)[step % 4]
            batch = make_batch(6 // views, views, height=14 * draw.randint(2, 6), width=14 * draw.randint(3, 6))
            forward_backward(model, batch, config)
            with torch.no_grad():
                model(batch["images"][:1])
            compiled.append(counters["stats"]["unique_graphs"])
    assert not counters["graph_break"]
    assert compiled[-1] == compiled[3], "compiled again after each kind of shape had been seen"
    assert 5 <= compiled[-1] <= 30
