"""Which parameters train, how fast, and how far in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.runtime.typed import documented


@dataclass(frozen=True, kw_only=True)
class LrFactor:
    """Parameters whose names match a pattern learn `factor` times as fast."""

    names: str
    factor: float

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"factor: expected more than 0, found {self.factor}; model.freeze stops learning")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float = documented(5e-5, "peak learning rate")
    lr_factors: tuple[LrFactor, ...] = documented(
        (), 'parts with another learning rate: [{names: "*camera_head*", factor: 0.1}]'
    )
    weight_decay: float = documented(
        0.05, "AdamW's; never applied to norms, biases, scales, tokens and position embeddings"
    )
    warmup: float = documented(
        0.05, "fraction of the steps during which the learning rate rises, before it follows a cosine"
    )
    clip: float = documented(1.0, "largest gradient norm of the aggregator and of each head")

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise ValueError("lr and clip: expected more than 0; weight_decay: expected at least 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a fraction of the steps from 0 to below 1, found {self.warmup}")


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Take the parameters that a pattern matches out of training. Raises ValueError for a pattern that matches none."""
    for pattern in patterns:
        for name in _matching(model, pattern, "model.freeze"):
            model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"model.freeze: {list(patterns)} leaves nothing to train")


def _matching(model: nn.Module, pattern: str, key: str) -> list[str]:
    """The names of the parameters that a pattern matches. Raises ValueError if there are none."""
    names = [name for name, _ in model.named_parameters() if fnmatch(name, pattern)]
    if not names:
        modules = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"{key}: {pattern!r} matches no parameter; the modules are {modules}")
    return names


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over what trains, without weight decay on norms, biases, scales, tokens and position embeddings.

    Of several factors for a parameter the last one counts. Raises ValueError for one that matches none.
    """
    factors: dict[str, float] = {}
    for entry in config.lr_factors:
        names = _matching(model, entry.names, "optim.lr_factors")
        if not any(model.get_parameter(name).requires_grad for name in names):
            raise ValueError(f"optim.lr_factors: all that {entry.names!r} matches is frozen; see model.freeze")
        factors |= dict.fromkeys(names, entry.factor)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_weight = parameter.ndim >= 2 and name.endswith("weight")
            key = (config.weight_decay if is_weight else 0.0, factors.get(name, 1.0))
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": held, "weight_decay": decay, "lr_factor": factor} for (decay, factor), held in groups.items()],
        lr=config.lr,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Linear warm-up, then a cosine to zero; a function of the step alone. Returns the learning rate."""
    progress = (step + 0.5) / total  # the middle of the step: the last one counts, too
    if progress < config.warmup:
        factor = progress / config.warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / (1 - config.warmup)))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * factor * group["lr_factor"]
    return config.lr * factor


def clip_gradients(model: nn.Module, limit: float) -> dict[str, Tensor]:
    """Scale the gradients of each module to a norm of at most `limit`; returns the norms before, as tensors."""
    norms = {}
    for name, module in model.named_children():
        parameters = [p for p in module.parameters() if p.grad is not None]
        if parameters:
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            norms[name.removesuffix("_head")] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms
