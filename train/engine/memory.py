"""What a step needs of memory: tried by a dry run, and what to lower if there is not enough."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from train.data.plan import DataState, Step, TrainingPlan, scenes_per_rank
from train.data.scenes import load_step
from train.data.split import Split
from train.engine.optim import Optimizers
from train.engine.settings import TrainConfig
from train.engine.step import train_step
from train.objective.losses import OBJECTIVE
from train.objective.targets import prepare
from train.runtime.distributed import World

DRY_RUN_STEPS = 1000  # steps that a dry run looks for the largest of


def peak_gb(device: torch.device) -> float:
    """The most memory so far: on a GPU what tensors took, on a CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def explain_oom(images: torch.Tensor, config: TrainConfig, world: World, step: int) -> Iterator[None]:
    """Raises ValueError with the numbers of the step and what to lower, if memory does not suffice for it.

    images: those of the step, [B, S, 3, H, W].
    """
    try:
        yield
    except RuntimeError as error:  # on a CPU it is a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        scenes, views, _, height, width = images.shape
        raise ValueError(
            f"step {step}: out of memory, {peak_gb(world.device):.1f} GB at its peak, with {scenes} scenes of {views} "
            f"views of {height}x{width} a process in {min(config.accum_steps, scenes)} chunks. Raise accum_steps "
            f"({config.accum_steps}), lower model.head_chunk ({config.model.head_chunk}), set strategy=fsdp or, if the "
            f"aggregator is frozen, model.aggregator_dtype=bf16, or lower max_img_per_gpu ({config.max_img_per_gpu}) "
            f"with data.views ({list(config.data.views)}); the same command resumes from the last checkpoint"
        ) from error


def dry_run(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Optimizers,
    split: Split,
    plan: TrainingPlan,
    state: DataState,
) -> str:
    """Try the largest of the next steps, and say what it took. The model is spoilt after that."""
    count = min(DRY_RUN_STEPS, max(1, config.total_steps - state.step))
    step = largest_step(plan, state, world.rank, config, count)
    began = time.perf_counter()
    raw = load_step(split, step)
    loaded = time.perf_counter()
    outcome = None
    with explain_oom(raw["images"], config, world, step.after.step):
        for _ in range(2):  # the first makes the optimizer's moments, at its end
            batch = prepare(raw, world.device, with_points=config.loss.point > 0)
            outcome = train_step(model, optimizer, batch, config, world, tried=raw["tried"])
    assert outcome is not None
    loss, shape = float(outcome.terms[OBJECTIVE]), step.shape  # waits for the device
    took = time.perf_counter() - loaded
    return (
        f"dry run: the largest of the next {count:,} steps ({len(step.scenes)} scenes of {shape.views} views of "
        f"{shape.height}x{shape.width} a process) was read in {loaded - began:.1f} s and trained on twice in "
        f"{took:.1f} s, objective {loss:.3f}{'' if outcome.finite else ' (NOT FINITE)'}, with "
        f"{peak_gb(world.device):.1f} GB at its peak. Nothing was written"
    )


def largest_step(plan: TrainingPlan, state: DataState, rank: int, config: TrainConfig, count: int) -> Step:
    """Of the next `count` steps the one whose largest chunk has the most pixels."""
    largest, most = state, 0
    for _ in range(count):
        shape = plan.shape(state.step)
        pixels = _chunk_images(config, shape.views) * shape.height * shape.width
        if pixels > most:
            largest, most = state, pixels
        state = plan.after(state)
    return plan.step(largest, rank)


def _chunk_images(config: TrainConfig, views: int) -> int:
    """The images of the largest chunk of a step with scenes of so many views."""
    scenes = scenes_per_rank(config.max_img_per_gpu, views)
    return -(-scenes // min(config.accum_steps, scenes)) * views
