"""What ranks tell each other in a step, by formula: before there are any, and for as many as one likes.

Counted are weights and gradients. What else there is (five flags, a norm a module) is under a kilobyte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from train.engine.parallel import Strategy, shard_dim, unit_layers
from vggt import VGGT
from vggt.layers import Block

FLOAT32, BFLOAT16 = 4, 2  # bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors, whole, that `ranks` ranks exchange in a step."""

    ranks: int
    all_reduce: int = 0
    all_gather: int = 0
    reduce_scatter: int = 0

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, and receives, if they stand in a ring (Patarasuk and Yuan 2009, JPDC 69, 117)."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Unit:
    """Parameters that fsdp gathers together. flows: whether a backward pass goes through them."""

    parameters: list[nn.Parameter]
    gathered_bytes: int  # of a number
    flows: bool


def step_traffic(model: VGGT, strategy: Strategy, *, bf16: bool, chunks: int, ranks: int) -> Traffic:
    """Of a step in so many chunks. bf16: as for train.engine.parallel.distribute.

    ddp adds up the gradients once. fsdp gathers all weights in each chunk, once more those that a backward pass goes
    through (but for the outermost, which stay), and one unit that torch fetches ahead in vain; gradients are
    scattered in each chunk.
    """
    if ranks == 1:
        return Traffic(1)
    if strategy == "ddp":
        return Traffic(ranks, all_reduce=FLOAT32 * sum(p.numel() for p in model.parameters() if p.requires_grad))
    *units, outermost = _units(model, bf16)
    again = [unit for unit in units if unit.flows]
    ahead = [unit for unit in units if not unit.flows][-1:]
    gathered = sum(
        _padded(unit.parameters, ranks) * unit.gathered_bytes for unit in [*units, outermost, *again, *ahead]
    )
    trained = [p for unit in [*units, outermost] for p in unit.parameters if p.requires_grad]
    return Traffic(ranks, all_gather=chunks * gathered, reduce_scatter=chunks * FLOAT32 * _padded(trained, ranks))


def _units(model: VGGT, bf16: bool) -> Iterator[Unit]:
    """As train.engine.parallel.distribute makes them, in the order in which they run; the outermost is last."""
    aggregator = model.aggregator
    flows = _trains(aggregator.patch_embed.patch_embed) or _trains(aggregator.patch_embed, recurse=False)
    pairs = zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)
    inner = set()
    for block in (*aggregator.patch_embed.blocks, *(block for pair in pairs for block in pair)):
        assert isinstance(block, Block)
        for before, module in ((block.norm1, block.attn), (block.norm2, block.mlp)):
            parameters = [p for layer in unit_layers(module) for p in layer.parameters()]
            flows = flows or _trains(before) or any(p.requires_grad for p in parameters)
            inner |= {*parameters}
            yield Unit(parameters, BFLOAT16 if bf16 else FLOAT32, flows)
    for name, module in model.named_children():
        if name != "aggregator":
            inner |= {*module.parameters()}
            yield Unit(list(module.parameters()), FLOAT32, True)
    yield Unit([p for p in model.parameters() if p not in inner], FLOAT32, True)


def _trains(module: nn.Module, *, recurse: bool = True) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse))


def _padded(parameters: Iterable[nn.Parameter], ranks: int) -> int:
    """Numbers, with those that make the axis along which a parameter is divided a multiple of the ranks."""
    total = 0
    for p in parameters:
        size = p.shape[shard_dim(p, ranks)]
        total += p.numel() // size * math.ceil(size / ranks) * ranks
    return total
