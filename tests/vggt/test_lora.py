"""Low-rank adapters: nothing changes before the first step, and merged weights do what the adapted model does."""

from __future__ import annotations

import pytest
import torch
from golden_figures import golden_weights, load_json
from torch import nn

from vggt import VGGT, preset
from vggt.lora import LoraLinear, add_lora, merge
from vggt.memory import hold_in_bf16

NAMES = ("aggregator*attn.qkv", "aggregator*attn.proj")


@pytest.fixture
def model():
    model = VGGT(preset("tiny"))
    model.load_state_dict(golden_weights(load_json("tiny_manifest.json")))
    model.aggregator.requires_grad_(False)
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return torch.rand(1, 3, 3, 56, 70, generator=torch.Generator().manual_seed(0))


def outputs(model, images, *, bf16=False):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        found = model(images)
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "held in bf16"])
def test_an_adapted_model_is_the_original_to_the_bit_before_its_first_step(model, images, precision):
    if precision == "held in bf16":
        hold_in_bf16(model.aggregator)
    before = outputs(model, images, bf16=precision != "fp32")
    add_lora(model, NAMES, rank=4, alpha=8)
    after = outputs(model, images, bf16=precision != "fp32")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    layer = model.get_submodule("aggregator.global_blocks.0.attn.qkv")
    assert isinstance(layer, LoraLinear)
    assert isinstance(layer, nn.Linear)
    assert layer.lora_down.dtype == torch.float32
    assert layer.lora_down.abs().max() > 0
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if name.startswith("aggregator")} == {"lora_down", "lora_up"}


def test_merged_weights_do_what_the_adapted_model_does(model, images):
    base = {name: value.clone() for name, value in model.state_dict().items()}
    before = outputs(model, images)
    add_lora(model, NAMES, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_up.data.normal_(std=0.02, generator=generator)
    adapted = outputs(model, images)
    trained = {name: value for name, value in model.state_dict().items() if "lora" in name or "camera_head" in name}
    plain = VGGT(preset("tiny")).eval()
    plain.load_state_dict(merge(base, trained, scale=2.0))
    merged = outputs(plain, images)
    for name, value in adapted.items():
        scale = value.abs().max()
        assert (merged[name] - value).abs().max() <= 1e-5 * scale, name
    assert any((before[name] - value).abs().max() > 1e-3 * value.abs().max() for name, value in adapted.items())


def test_small_corrections_of_half_precision_weights_are_not_lost():
    generator = torch.Generator().manual_seed(0)
    base = {"weight": torch.randn(6, 8, generator=generator).bfloat16(), "bias": torch.ones(6).half()}
    small = {
        n: 1e-3 * torch.randn(*size, generator=generator) for n, size in (("lora_down", (2, 8)), ("lora_up", (6, 2)))
    }
    merged = merge(base, small | {"bias": torch.full((6,), 1 + 1e-5)}, scale=1.0)
    exact = base["weight"].double() + (small["lora_up"] @ small["lora_down"]).double()
    assert (merged["weight"] - exact).abs().max() < 3e-7  # in bf16 all of the 1e-6 would be lost
    assert torch.equal(merged["bias"], torch.full((6,), 1 + 1e-5))


@pytest.mark.parametrize(
    ("names", "rank", "words"),
    [
        (("aggregator*atn.qkv",), 4, r"names: 'aggregator\*atn.qkv' matches no linear layer; some are .*fc2"),
        (("*norm1",), 4, r"names: '\*norm1' matches no linear layer"),
        (("*",), 4, "names: camera_head.*trains itself; add it to model.freeze, or leave it out"),
        (NAMES, 0, "rank: expected 1 to 64, the width of aggregator.*, found 0"),
        (NAMES, 65, "rank: expected 1 to 64, the width of aggregator.*, found 65"),
    ],
)
def test_what_cannot_be_adapted_is_said_and_nothing_is_changed(model, names, rank, words):
    with pytest.raises(ValueError, match=words):
        add_lora(model, names, rank, alpha=4)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_adapters_of_another_model_are_not_merged(model):
    base = model.state_dict()
    name = "aggregator.global_blocks.0.attn.qkv."
    pair = {name + "lora_down": torch.zeros(2, 64), name + "lora_up": torch.zeros(190, 2)}
    with pytest.raises(ValueError, match=f"{name}weight is not there, or has another shape"):
        merge(base, pair, scale=1.0)
