"""What a step needs of memory: estimated from the configuration, tried by a dry run, and what to lower if it lacks."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from train.config import TrainConfig
from train.distributed import World
from train.loader import Split, load_step
from train.plan import DataState, Step, StepShape, TrainingPlan, image_height, scenes_per_rank
from train.prepare import Batch, prepare
from train.step import train_step
from vggt import VGGT
from vggt.config import VGGTConfig

REHEARSED = 1000  # steps that a dry run takes the heaviest of
FLOAT = 4  # bytes
# Measured with bench/model.py: a chunk of 8 frames of 266x518 instead of 1 takes 2.06 GB more with 256 features.
HEAD_FLOATS = 2.1  # a pixel and feature, of the frames in a dense head
LOSS_FLOATS = 24  # a pixel: images, depths, masks, predictions, their gradients and terms of the loss


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes a process: weights; gradients and the optimizer's moments; what the largest chunk of a step makes."""

    weights: float
    training: float
    chunk: float

    @property
    def total(self) -> float:
        return self.weights + self.training + self.chunk

    def __str__(self) -> str:
        weights, training, chunk, total = (
            f"{size / 1e9:.2g} GB" for size in (self.weights, self.training, self.chunk, self.total)
        )
        return (
            f"about {total}: {weights} of weights, {training} of gradients and moments, {chunk} for a chunk of a step"
        )


def estimate_memory(model: VGGT, config: TrainConfig, world: World) -> MemoryEstimate:
    """What training takes at most, but for the CUDA context (some 0.5 GB), fragmentation, and PyTorch itself."""
    share = world.size if config.strategy == "fsdp" else 1
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    copies = 4 if world.size > 1 and config.strategy == "ddp" else 3  # gradient, two moments; DDP's buckets
    shape = StepShape(config.data.views[1], image_height(config.data.width, config.data.aspect[1]), config.data.width)
    trains = any(p.requires_grad for p in model.aggregator.parameters())
    low, high = config.data.views
    images = max(_chunk_images(config, views) for views in range(low, high + 1))
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in parameters) / share,
        training=trained * copies * FLOAT / share,
        chunk=_chunk_bytes(model.config, images, shape, bf16=config.precision == "bf16", trains=trains),
    )


def _chunk_images(config: TrainConfig, views: int) -> int:
    """The images of the largest chunk of a step with scenes of so many views."""
    scenes = scenes_per_rank(config.max_img_per_gpu, views)
    return -(-scenes // min(config.accum_steps, scenes)) * views


def _chunk_bytes(model: VGGTConfig, images: int, shape: StepShape, *, bf16: bool, trains: bool) -> float:
    """What a chunk of that many images makes: tokens that are kept, one block at work, one run of a dense head."""
    pixels = shape.height * shape.width
    tokens = images * (1 + model.registers + pixels // model.patch_size**2)
    width = tokens * model.embed_dim
    kept = len({model.depth - 1, *model.dense_layers}) * 2 * width * FLOAT
    block = width * (11 * (2 if bf16 else FLOAT) + 3 * FLOAT)  # q, k, v and the MLP's middle, before and after GELU
    if trains:  # every block keeps its input; one at a time is computed again, with gradients
        kept += (model.vit_depth + 2 * model.depth) * width * FLOAT
        block *= 2
    frames = min(images, model.head_chunk or images) if {"depth", "point"} & set(model.heads) else 0
    head = frames * pixels * model.dense_features * HEAD_FLOATS * FLOAT
    return kept + max(block, head) + images * pixels * LOSS_FLOATS * FLOAT


def peak_gb(device: torch.device) -> float:
    """The most memory so far: of the GPU what tensors took, on a CPU that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def said_out_of_memory(batch: Batch, config: TrainConfig, step: int) -> Iterator[None]:
    """Raises ValueError with the numbers of the step and what to lower, if memory does not suffice for it."""
    try:
        yield
    except RuntimeError as error:  # on a CPU it is a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        scenes, views, _, height, width = batch["images"].shape
        device = batch["images"].device
        raise ValueError(
            f"step {step}: out of memory, {peak_gb(device):.1f} GB at its peak, with {scenes} scenes of {views} views "
            f"of {height}x{width} a process in {min(config.accum_steps, scenes)} chunks. Raise accum_steps "
            f"({config.accum_steps}), lower model.head_chunk ({config.model.head_chunk}), set "
            f"model.aggregator_dtype=bf16 if it is frozen, or lower max_img_per_gpu ({config.max_img_per_gpu}) with "
            f"data.views ({list(config.data.views)}); the same command goes on from the last checkpoint"
        ) from error


def rehearse(
    config: TrainConfig,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    plan: TrainingPlan,
    state: DataState,
) -> str:
    """Try the heaviest of the next steps, and say what it took. The model is spoilt after that."""
    step = heaviest(plan, state, world.rank, config)
    began = time.perf_counter()
    raw = load_step(split, step)
    loaded = time.perf_counter()
    batch = prepare(raw, world.device, with_points=config.loss.point > 0)
    with said_out_of_memory(batch, config, step.after.step):
        outcome = train_step(model, optimizer, batch, config, world, stop=False, bad=0, tried=raw["tried"])
    loss = float(outcome.terms["loss_objective"])  # waits for the device
    shape = step.shape
    return (
        f"dry run: the heaviest of the next {REHEARSED:,} steps ({len(step.scenes)} scenes of {shape.views} views of "
        f"{shape.height}x{shape.width} a process) was read in {loaded - began:.1f} s and trained on in "
        f"{time.perf_counter() - loaded:.1f} s, objective {loss:.3f}{'' if outcome.finite else ' (NOT FINITE)'}, "
        f"with {peak_gb(world.device):.1f} GB at its peak. Nothing was written"
    )


def heaviest(plan: TrainingPlan, state: DataState, rank: int, config: TrainConfig) -> Step:
    """Of the next steps the one whose largest chunk has the most pixels."""
    found, most = plan.step(state, rank), 0
    for _ in range(REHEARSED):
        shape = plan.shape(state.step)
        pixels = _chunk_images(config, shape.views) * shape.height * shape.width
        if pixels > most:
            found, most = plan.step(state, rank), pixels
        state = plan.after(state)
    return found
