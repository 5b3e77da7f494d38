"""Which parameters train, how fast, and how far in one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.engine.muon import Muon
from train.runtime.typed import documented
from vggt.layers import Block

MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")  # of a transformer block


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
    muon_lr: float | None = documented(
        None, "peak learning rate of Muon, for the matrices of transformer blocks; null: AdamW trains them, too"
    )
    lr_factors: tuple[LrFactor, ...] = documented(
        (), 'parts with another learning rate: [{names: "*camera_head*", factor: 0.1}]'
    )
    weight_decay: float = documented(
        0.05, "of AdamW and Muon; never applied to norms, biases, scales, tokens and position embeddings"
    )
    warmup: float = documented(
        0.05, "fraction of the steps during which the learning rate rises, before it follows a cosine"
    )
    clip: float = documented(1.0, "largest gradient norm of the aggregator and of each head")

    def __post_init__(self) -> None:
        rates = [self.lr, self.clip] + ([] if self.muon_lr is None else [self.muon_lr])
        if min(rates) <= 0 or self.weight_decay < 0:
            raise ValueError("lr, muon_lr and clip: expected more than 0; weight_decay: expected at least 0")
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


class Optimizers:
    """Several optimizers, each of its own parameters, as one: what the trainer needs of a torch.optim.Optimizer."""

    def __init__(self, *members: torch.optim.Optimizer) -> None:
        self.members = members

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    def step(self) -> None:
        for member in self.members:
            member.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.members:
            member.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As that of one optimizer: parameters are numbered through."""
        state, groups, first = {}, [], 0
        for member in self.members:
            part = member.state_dict()
            state |= {first + number: values for number, values in part["state"].items()}
            groups += [
                group | {"params": [first + number for number in group["params"]]} for group in part["param_groups"]
            ]
            first += sum(len(group["params"]) for group in part["param_groups"])
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The moments; groups and their settings stay as they are."""
        first = 0
        for member in self.members:
            groups = member.state_dict()["param_groups"]
            count = sum(len(group["params"]) for group in groups)
            state = {n - first: v for n, v in state_dict["state"].items() if first <= n < first + count}
            member.load_state_dict({"state": state, "param_groups": groups})
            first += count


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer | Optimizers:
    """AdamW over what trains, without weight decay on norms, biases, scales, tokens and position embeddings.

    With muon_lr, Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) has the matrices of transformer blocks.
    Of several factors for a parameter the last one counts. Raises ValueError for one that matches none.
    """
    factors: dict[str, float] = {}
    for entry in config.lr_factors:
        names = _matching(model, entry.names, "optim.lr_factors")
        if not any(model.get_parameter(name).requires_grad for name in names):
            raise ValueError(f"optim.lr_factors: all that {entry.names!r} matches is frozen; see model.freeze")
        factors |= dict.fromkeys(names, entry.factor)
    matrices = {f"{name}.{part}" for name, m in model.named_modules() if isinstance(m, Block) for part in MATRICES}
    adamw: dict[tuple[float, float], list[nn.Parameter]] = {}
    muon: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_weight = parameter.ndim >= 2 and name.endswith("weight")
        decay, factor = config.weight_decay if is_weight else 0.0, factors.get(name, 1.0)
        if config.muon_lr is not None and name in matrices:
            muon.setdefault((decay, factor * config.muon_lr / config.lr), []).append(parameter)
        else:
            adamw.setdefault((decay, factor), []).append(parameter)
    members: list[torch.optim.Optimizer] = []
    if adamw:
        members.append(torch.optim.AdamW(_groups(adamw), lr=config.lr, fused=True))
    if muon:
        members.append(Muon(_groups(muon), lr=config.lr))
    return members[0] if len(members) == 1 else Optimizers(*members)


def _groups(held: dict[tuple[float, float], list[nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameters by weight decay and factor of the learning rate, as optimizers take them."""
    return [{"params": part, "weight_decay": decay, "lr_factor": factor} for (decay, factor), part in held.items()]


def set_lr(optimizer: torch.optim.Optimizer | Optimizers, config: OptimConfig, step: int, total: int) -> float:
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
