"""Operations by formula, against those that torch counts."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from train.engine.optim import freeze
from vggt import VGGT, VGGTConfig, preset
from vggt.flops import step_flops
from vggt.lora import add_lora

TRAINS = {
    "heads": ("*aggregator*",),
    "everything": (),
    "adapters": ("*aggregator*",),
    "all but the encoder": ("*patch_embed*",),
    "the last blocks": ("*patch_embed*", "*camera_token", "*register_token", "*blocks.0.*", "*blocks.1.*"),
}


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("name", ["tiny", pytest.param("1b", marks=pytest.mark.slow)])
def test_operations_by_formula_are_those_that_torch_counts(name, trains, monkeypatch):
    """On tensors without content, of scenes of several views of odd sizes; nothing is computed again."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    config = preset(name, heads=("camera", "depth", "point"), head_chunk=None, recompute=False)
    with torch.device("meta"):
        model = VGGT(config)
    freeze(model, TRAINS[trains])
    if trains == "adapters":
        add_lora(model, ("aggregator.*_blocks.*attn.qkv", "aggregator.global_blocks.*mlp.fc1"), rank=4, alpha=4)
    shape = (2, 3, 3, 9 * config.patch_size, 6 * config.patch_size)
    with FlopCounterMode(display=False) as forward:
        out = model(torch.empty(shape, device="meta"))
    with FlopCounterMode(display=False) as backward:
        sum(x.mean() for x in (*out["pose_enc_list"], out["depth"], out["depth_conf"], out["world_points"])).backward()
    found = step_flops(model, 2, 3, *shape[3:])
    assert sum(part.forward for part in found.values()) == forward.get_total_flops()
    assert sum(part.backward for part in found.values()) == pytest.approx(backward.get_total_flops(), rel=1e-4)


def test_an_image_takes_the_published_model_three_and_a_half_teraflops():
    """Of 518 x 518 pixels, forward: 72 blocks of 12 squares of their width, each token by each, and a head."""
    with torch.device("meta"):
        found = step_flops(VGGT(VGGTConfig(heads=("camera", "depth"))), 1, 2, 518, 518)
    width, tokens = 1024, 37 * 37 + 5

    def blocks(sequence):
        return 24 * tokens * (24 * width**2 + 4 * sequence * width)

    patches = 2 * 37**2 * 3 * 14**2 * width
    assert found["encoder"].forward == 2 * (blocks(tokens) + patches)
    assert found["frame"].forward == 2 * blocks(tokens)
    assert found["global"].forward == 2 * blocks(2 * tokens)
    assert sum(part.forward for part in found.values()) / 2e12 == pytest.approx(3.52, abs=0.01)
