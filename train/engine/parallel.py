"""How ranks share a model: each a copy, gradients averaged (ddp), or each a part of every tensor (fsdp)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from train.engine.optim import Optimizers
from train.runtime.distributed import World
from vggt import VGGT
from vggt.layers import Attention, Mlp

Strategy = Literal["ddp", "fsdp"]


def distribute(model: VGGT, strategy: Strategy, *, bf16: bool, world: World) -> nn.Module:
    """The model, set up for joint training; unchanged for a single rank. Every rank must hold equal weights.

    With fsdp, parameters are sharded over the ranks, in place. bf16: whether ranks exchange the parameters of the
    aggregator's linear layers as bf16, as bf16 autocast would round them at every use anyway; everything else, and
    all gradients, are exchanged as float32.
    """
    if world.size == 1:
        return model
    if strategy == "ddp":
        # Of a convolution of 1 x 1, whose gradient may lie in memory in either of two ways.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return shard(model, bf16=bf16, world=world)


def shard(model: VGGT, *, bf16: bool, world: World) -> VGGT:
    """What `distribute` does for fsdp, also for a single rank."""
    model.aggregator.keep_every_block()  # each pass through a block gathers its weights
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dim(parameter, world.size))

    for module in model.aggregator.modules():
        if isinstance(module, Attention | Mlp):
            fully_shard(unit_layers(module), mesh=mesh, mp_policy=policy, shard_placement_fn=place)
    # FSDP warns of in-place edits of module outputs; no caller does any.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    in_float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    for name, module in model.named_children():
        if name != "aggregator":
            fully_shard(module, mesh=mesh, mp_policy=in_float32, shard_placement_fn=place)
    fully_shard(model, mesh=mesh, mp_policy=in_float32, shard_placement_fn=place)
    return model


def unit_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of an attention or an MLP whose weights fsdp gathers together."""
    return [layer for layer in module.children() if isinstance(layer, nn.Linear)]


def shard_dim(parameter: nn.Parameter, ranks: int) -> int:
    """The axis along which ranks divide a parameter, which is filled up to a multiple of them.

    The first, but for tokens and positions [1, ..., dim]: of 64 ranks each would get a copy, 63 of them to be
    thrown away, of the 1.4 million numbers of the positions at every gathering.
    """
    last = parameter.ndim - 1
    return last if parameter.shape[0] < ranks and parameter.shape[last] % ranks == 0 else 0


@contextmanager
def gradient_sync(model: nn.Module, shared: bool) -> Iterator[None]:
    """shared: whether the backward passes inside exchange gradients between ranks; if not, they accumulate here.

    fsdp always exchanges them: its purpose is to avoid whole gradients on each rank.
    """
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not shared else nullcontext():
        yield


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of what `distribute` made of it."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def full_state_dict(state: Any, world: World) -> Any:
    """A state dict with whole tensors where there are parts, on the main rank. Every rank must call it."""
    if isinstance(state, dict):
        return {key: full_state_dict(value, world) for key, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if world.is_main else None


def load_optimizer(optimizer: torch.optim.Optimizer | Optimizers, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, whole, into this one, whose parameters may be parts; its settings stay."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            for name, value in values.items():
                if value.shape == parameter.shape:  # not the number of steps
                    placed = value.to(parameter.device)
                    values[name] = distribute_tensor(placed, parameter.device_mesh, parameter.placements)
    optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
