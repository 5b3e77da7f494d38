from __future__ import annotations

import copy

import torch

from train.engine.muon import Muon


def test_muon_on_all_matrices_at_once_steps_as_torch_s_on_each():
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 8), (24, 8), (8, 8), (8, 32), (24, 8))]
    theirs = copy.deepcopy(mine)
    optimizers = (
        Muon([{"params": mine[:4], "weight_decay": 0.1}, {"params": mine[4:]}], lr=0.02),
        torch.optim.Muon(
            [{"params": theirs[:4], "weight_decay": 0.1}, {"params": theirs[4:], "weight_decay": 0.0}], lr=0.02
        ),
    )
    for _ in range(3):
        for parameter, other in zip(mine, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, other in zip(mine, theirs, strict=True):
        assert (parameter - other).abs().max() < 1e-3 * other.abs().max()  # bf16 inside
        assert (parameter - other).abs().mean() < 1e-4
