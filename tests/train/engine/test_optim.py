"""Which parameters learn, how fast, and how far: against the definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from train.engine.optim import LrFactor, OptimConfig, clip_gradients, freeze, make_optimizer, set_lr
from train.engine.parallel import load_optimizer
from vggt import VGGT, preset
from vggt.config import HEADS


def tiny(heads=("camera", "depth")):
    return VGGT(preset("tiny", heads=heads))


def settings(model, optimizer):
    """Name -> the options of its group, of what the optimizer moves."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_the_default_glob_freezes_the_aggregator_and_nothing_else():
    model = tiny()
    freeze(model, ("*aggregator*",))
    moved = settings(model, make_optimizer(model, OptimConfig()))
    expected = {name for name, _ in model.named_parameters() if not name.startswith("aggregator.")}
    assert set(moved) == expected
    with pytest.raises(ValueError, match=r"model.freeze: 'agregator\*' matches no parameter; the modules are aggr"):
        freeze(model, ("agregator*",))
    with pytest.raises(ValueError, match="leaves nothing to train"):
        freeze(model, ("*",))


def test_weights_decay_and_norms_biases_scales_tokens_and_positions_do_not():
    model = tiny()
    moved = settings(model, make_optimizer(model, OptimConfig(weight_decay=0.05)))
    for name, group in moved.items():
        module = model.get_submodule(name.rpartition(".")[0])
        decays = isinstance(module, torch.nn.Linear | torch.nn.modules.conv._ConvNd) and name.endswith("weight")
        assert group["weight_decay"] == (0.05 if decays else 0.0), name
    assert {group["weight_decay"] for group in moved.values()} == {0.05, 0.0}


def test_factors_by_glob_change_learning_rates_and_nothing_else():
    model = tiny()
    factors = (LrFactor(names="*camera_head*", factor=0.1), LrFactor(names="*camera_head.trunk*", factor=0.5))
    config = OptimConfig(lr=1e-3, lr_factors=factors)
    optimizer = make_optimizer(model, config)
    highest = set_lr(optimizer, config, 5, 100)
    for name, group in settings(model, optimizer).items():
        factor = 0.5 if name.startswith("camera_head.trunk") else 0.1 if name.startswith("camera_head") else 1
        assert group["lr"] == pytest.approx(highest * factor), name
    with pytest.raises(ValueError, match=r"optim.lr_factors: 'camera\*head' matches no parameter"):
        make_optimizer(model, OptimConfig(lr_factors=(LrFactor(names="camera*head", factor=2),)))


@pytest.mark.parametrize("total", [40, 16000])
def test_the_schedule_is_a_warm_up_and_a_cosine_of_progress(total):
    """The same curve whatever the number of steps: a function of progress, taken in the middle of each step."""
    config = OptimConfig(lr=2.0, warmup=0.05)
    optimizer = make_optimizer(tiny(), config)
    for fraction in (0.01, 0.04, 0.05, 0.3, 0.525, 0.9, 0.999):
        step = int(fraction * total)
        progress = (step + 0.5) / total
        warm, cosine = progress / 0.05, (1 + math.cos(math.pi * (progress - 0.05) / 0.95)) / 2
        assert set_lr(optimizer, config, step, total) == pytest.approx(2 * (warm if progress < 0.05 else cosine))


def test_each_module_is_clipped_by_its_own_norm():
    model = tiny()
    scales = {"aggregator": 1e-9, "camera_head": 1.0, "depth_head": 100.0}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, scales[name.partition(".")[0]])
    before = {name: module_norm(model, name) for name in scales}
    norms = clip_gradients(model, 1.0)
    assert norms.keys() == {"aggregator", "camera", "depth"}
    for name, norm in before.items():
        assert float(norms[name.removesuffix("_head")]) == pytest.approx(norm, rel=1e-4)
        assert module_norm(model, name) == pytest.approx(min(norm, 1.0), rel=1e-3)


def module_norm(model, name):
    squares = [p.grad.double().square().sum() for p in model.get_submodule(name).parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def test_every_trained_parameter_belongs_to_exactly_one_clip_group():
    """Of any head: gradients in none would be neither clipped nor checked for NaN."""
    model = tiny(HEADS)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    norms = clip_gradients(model, 1e-3)
    assert set(norms) == {"aggregator", *HEADS}
    assert sum(float(norm) ** 2 for norm in norms.values()) == pytest.approx(
        sum(p.numel() for p in parameters.values())
    )
    clipped = sum(float(p.grad.norm()) ** 2 for p in parameters.values())
    assert clipped == pytest.approx(len(norms) * 1e-6, rel=1e-3)


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest_and_both_are_restored():
    """A state that was saved continues as if it had not been: to the bit."""
    config = OptimConfig(lr=1e-3, muon_lr=1e-2, lr_factors=(LrFactor(names="*camera_head*", factor=0.5),))
    torch.manual_seed(0)
    model = tiny()
    optimizer = make_optimizer(model, config)
    moved = settings(model, optimizer)
    assert set(moved) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved["aggregator.global_blocks.0.attn.qkv.weight"]["lr_factor"] == 10
    assert moved["camera_head.trunk.0.mlp.fc1.weight"]["lr_factor"] == 5
    assert moved["camera_head.embed_pose.weight"]["lr_factor"] == 0.5
    assert moved["aggregator.patch_embed.patch_embed.proj.weight"]["lr_factor"] == 1
    ends = []
    for resumed in (False, True):
        model, generator = tiny(), torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        optimizer = make_optimizer(model, config)
        for step in range(4):
            if resumed and step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = make_optimizer(model, config)
                load_optimizer(optimizer, saved)
            set_lr(optimizer, config, step, 4)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
