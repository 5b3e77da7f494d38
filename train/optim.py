"""Which parameters train, how fast, and how far in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

CLIP_GROUPS = {"aggregator": "aggregator", "camera": "camera_head", "depth": "depth_head", "point": "point_head"}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = 5e-5
    weight_decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError("lr and clip: expected more than 0; weight_decay: expected at least 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps from 0 to below 1, found {self.warmup}")


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Take the parameters that a pattern matches out of training. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        matched = [p for name, p in model.named_parameters() if fnmatch(name, pattern)]
        if not matched:
            modules = ", ".join(name for name, _ in model.named_children())
            raise ValueError(f"model.freeze: {pattern!r} matches no parameter; the modules are {modules}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model.freeze: {list(patterns)} leaves nothing to train")


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over what trains, without weight decay on norms, biases, scales, tokens and position embeddings."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim >= 2 and name.endswith("weight")
            (decayed if is_weight else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    fused = any(p.is_cuda for p in decayed + plain)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero; a function of the step alone. Returns the learning rate."""
    progress = (step + 0.5) / total  # the middle of the step: the last one counts, too
    if progress < config.warmup:
        factor = progress / config.warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor
    return config.lr * factor


def clip_gradients(model: nn.Module, limit: float) -> dict[str, Tensor]:
    """Scale the gradients of each module to a norm of at most `limit`; returns the norms before, as tensors."""
    norms = {}
    for group, module in CLIP_GROUPS.items():
        parameters = [p for p in getattr(model, module, nn.Module()).parameters() if p.grad is not None]
        if parameters:
            norms[group] = nn.utils.clip_grad_norm_(parameters, limit)
    return norms
