"""Activation checkpointing: spend a second forward to keep fewer activations, only where a graph is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FRAMES = 2  # that go through the encoder at a time, if it is computed again


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), recomputed in the backward pass instead of keeping activations; any shapes.

    The random state is not restored for that: nothing in the model is random.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def needs_graph(x: Tensor, *modules: nn.Module) -> bool:
    """Whether a gradient will flow to x, of any shape [...], or to the weights of these modules."""
    trains = any(p.requires_grad for module in modules for p in module.parameters())
    return torch.is_grad_enabled() and (x.requires_grad or trains)


def map_frames(function: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], chunk: int | None) -> Tensor:
    """function(inputs) over chunks of the first axis (frames), each recomputed in the backward pass.

    inputs: tensors [N, ...]; the result is a tensor [N, ...]. chunk None: all frames at once, nothing recomputed.
    The values and gradients do not depend on the chunk.
    """
    if chunk is None:
        return function(inputs)
    parts = zip(*(x.split(chunk) for x in inputs), strict=True)
    return torch.cat([recompute(lambda *tensors: function([*tensors]), *part) for part in parts])


def hold_in_bf16(module: nn.Module) -> None:
    """Turn the weights of a frozen module's linear layers into bf16, in place: half the memory, for autocast only.

    Under bf16 autocast the results are the same to the bit, as it would round these weights at every use. Norms,
    scales and tokens stay as they are. Raises ValueError if a linear layer trains: it would lose its small steps.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        if any(p.requires_grad for p in layer.parameters()):
            raise ValueError(f"{name} trains: only frozen layers can be held in bf16; freeze the whole module first")
    for layer in layers.values():
        layer.to(torch.bfloat16)
