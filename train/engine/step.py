"""One training step: chunks forward and backward, clipping, and one small all-reduce that decides for all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.engine.optim import Optimizers, clip_gradients
from train.engine.parallel import gradient_sync, unwrap
from train.engine.settings import TrainConfig
from train.objective.losses import losses, normalizer_of
from train.objective.targets import Batch
from train.runtime.distributed import World
from train.runtime.precision import autocast
from train.runtime.profiler import part


@dataclass(frozen=True)
class StepOutcome:
    """terms and norms: loss terms and gradient norms, tensors on the device; has_scale: 1.0 there if the scale of any
    scene was defined, else 0.0. The rest is the same on every rank.
    """

    terms: dict[str, Tensor]
    norms: dict[str, Tensor]
    has_scale: Tensor
    finite: bool
    stop: bool
    abandoned: bool
    bad: int
    tried: int


def forward_backward(model: nn.Module, batch: Batch, config: TrainConfig) -> dict[str, Tensor]:
    """Accumulate the gradients of a batch in at most accum_steps chunks of scenes, none of them empty.

    Ranks share gradients in the last chunk only. Returns the loss terms of the batch, detached.
    """
    normalizer = normalizer_of(batch, config.loss)
    scenes = batch["images"].shape[0]
    totals: dict[str, Tensor] = {}
    chunks = min(config.accum_steps, scenes)
    parts = {name: value.tensor_split(chunks) for name, value in batch.items()}
    for i in range(chunks):
        chunk = {name: part[i] for name, part in parts.items()}
        with gradient_sync(model, i == chunks - 1):
            with autocast(config.precision, chunk["images"].device):
                predictions = model(chunk["images"], matching=config.loss.match > 0)
            with part("losses"):
                terms = losses(predictions, chunk, normalizer, config.loss)
            with part("backward"):
                terms["loss_objective"].backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach()
    return totals


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    batch: Batch,
    config: TrainConfig,
    world: World,
    *,
    stop: bool = False,
    abandon: bool = False,
    bad: int = 0,
    tried: int = 0,
) -> StepOutcome:
    """Update the parameters, unless some rank abandons the step or has a loss or gradient that is not finite.

    A rank without data abandons it: it takes part only to let others go on. stop, abandon, bad and tried are
    this rank's; the outcome's are over all ranks.
    """
    terms = forward_backward(model, batch, config)
    with part("clipping"):
        norms = clip_gradients(unwrap(model), config.optim.clip)
    finite = torch.stack([terms["loss_objective"], *norms.values()]).isfinite().all()
    # The step's only wait for the device, and the only all-reduce beside those of gradients and (fsdp) their norms.
    told = (finite.new_full((), float(value), dtype=torch.float64) for value in (stop, abandon, bad, tried))
    flags = torch.stack([(~finite).double(), *told])  # filled on the device: a copy from here would wait for it, too
    broken, stops, abandoned, all_bad, all_tried = world.sum(flags).tolist()
    if not broken and not abandoned:
        with part("optimizer"):
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    has_scale = batch["has_scale"].any().double()
    return StepOutcome(terms, norms, has_scale, not broken, stops > 0, abandoned > 0, int(all_bad), int(all_tried))
