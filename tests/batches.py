"""Batches of nothing in particular, and the gradients they give."""

from __future__ import annotations

import torch

from train.config import load_config
from train.engine.step import forward_backward
from vggt import VGGT, preset

NO_QUANTILE = ["model.preset=tiny", "model.freeze=[]", "precision=fp32", "loss.valid_range=0", "loss.point=1"]


def make_batch(scenes, views=2, seed=0, height=42, width=56):
    """A batch as train.objective.targets makes it, of nothing in particular."""
    g = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(scenes, views, 3, 3, generator=g)).Q
    k = torch.tensor([[60.0, 0, 28], [0, 60, 20], [0, 0, 1]]).expand(scenes, views, 3, 3)
    shape = (scenes, views, height, width)
    return {
        "images": torch.rand(scenes, views, 3, *shape[2:], generator=g),
        "extrinsics": torch.cat([rotation, torch.randn(scenes, views, 3, 1, generator=g)], dim=-1),
        "intrinsics": k,
        "depth": torch.rand(shape, generator=g) + 0.5,
        "points": torch.randn(*shape, 3, generator=g),
        "mask": torch.rand(shape, generator=g) > 0.3,
        "scale": torch.ones(scenes),
        "has_scale": torch.ones(scenes, dtype=torch.bool),
    }


def make_model(config):
    torch.manual_seed(0)
    return VGGT(preset("tiny", heads=config.loss.heads, head_chunk=1)).train()


def gradients(model, batch, chunks, config):
    config = load_config(None, [*config, f"accum_steps={chunks}"])
    model.zero_grad()
    forward_backward(model, batch, config)
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
