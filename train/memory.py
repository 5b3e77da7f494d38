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
from train.plan import DataState, Step, TrainingPlan, image_height, scenes_per_rank
from train.prepare import prepare
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
    heads = [sum(p.numel() for p in m.parameters()) for name, m in model.named_children() if name != "aggregator"]
    gathered = 2 * max(heads) * FLOAT if share > 1 else 0  # of one head at a time, weights and gradients
    pixels = image_height(config.data.width, config.data.aspect[1]) * config.data.width
    trains = any(p.requires_grad for p in model.aggregator.parameters())
    low, high = config.data.views
    images = max(_chunk_images(config, views) for views in range(low, high + 1))
    return MemoryEstimate(
        weights=sum(p.numel() * p.element_size() for p in parameters) / share,
        training=trained * 3 * FLOAT / share + gathered,  # gradient and two moments
        chunk=_chunk_bytes(model.config, images, pixels, bf16=config.precision == "bf16", trains=trains),
    )


def _chunk_images(config: TrainConfig, views: int) -> int:
    """The images of the largest chunk of a step with scenes of so many views."""
    scenes = scenes_per_rank(config.max_img_per_gpu, views)
    return -(-scenes // min(config.accum_steps, scenes)) * views


def _chunk_bytes(model: VGGTConfig, images: int, pixels: int, *, bf16: bool, trains: bool) -> float:
    """What a chunk of that many images makes: tokens that are kept, one block at work, one run of a dense head."""
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
def said_out_of_memory(images: torch.Tensor, config: TrainConfig, world: World, step: int) -> Iterator[None]:
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
            f"with data.views ({list(config.data.views)}); the same command goes on from the last checkpoint"
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
    count = min(REHEARSED, max(1, config.total_steps - state.step))
    step = heaviest(plan, state, world.rank, config, count)
    began = time.perf_counter()
    raw = load_step(split, step)
    loaded = time.perf_counter()
    outcome = None
    with said_out_of_memory(raw["images"], config, world, step.after.step):
        for _ in range(2):  # the first makes the optimizer's moments, at its end
            batch = prepare(raw, world.device, with_points=config.loss.point > 0)
            outcome = train_step(model, optimizer, batch, config, world, tried=raw["tried"])
    assert outcome is not None
    loss, shape = float(outcome.terms["loss_objective"]), step.shape  # waits for the device
    took = time.perf_counter() - loaded
    return (
        f"dry run: the heaviest of the next {count:,} steps ({len(step.scenes)} scenes of {shape.views} views of "
        f"{shape.height}x{shape.width} a process) was read in {loaded - began:.1f} s and trained on twice in "
        f"{took:.1f} s, objective {loss:.3f}{'' if outcome.finite else ' (NOT FINITE)'}, with "
        f"{peak_gb(world.device):.1f} GB at its peak. Nothing was written"
    )


def heaviest(plan: TrainingPlan, state: DataState, rank: int, config: TrainConfig, count: int) -> Step:
    """Of the next `count` steps the one whose largest chunk has the most pixels."""
    found, most = plan.step(state, rank), 0
    for _ in range(count):
        shape = plan.shape(state.step)
        pixels = _chunk_images(config, shape.views) * shape.height * shape.width
        if pixels > most:
            found, most = plan.step(state, rank), pixels
        state = plan.after(state)
    return found
