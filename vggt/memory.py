"""Activation checkpointing: spend a second forward to keep fewer activations, only where a graph is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, x: Tensor, *args: Any) -> Tensor:
    """block(x, *args), keeping only its input if anything in it needs a gradient. x and result: [B, N, dim]."""
    needs_graph = x.requires_grad or next(block.parameters()).requires_grad
    if block.training and needs_graph and torch.is_grad_enabled():
        return checkpoint(block, x, *args, use_reentrant=False)  # pyright: ignore[reportReturnType]
    return block(x, *args)


def map_frames(
    function: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], chunk: int | None
) -> tuple[Tensor, ...]:
    """function(inputs) over chunks of the first axis (frames), each recomputed in the backward pass.

    inputs: tensors [N, ...]; the results are tensors [N, ...]. chunk None: all frames at once, nothing recomputed.
    The values and gradients do not depend on the chunk.
    """
    if chunk is None:
        return function(inputs)
    parts = []
    for part in zip(*(x.split(chunk) for x in inputs), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, list(part), use_reentrant=False))
        else:
            parts.append(function(list(part)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
