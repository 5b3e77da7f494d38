"""Scenes of the plan, read from the shards, cropped and stacked: what a step needs, as small as it can be sent.

A batch is a dict; B = scenes, S = views:
    images      uint8 [B, S, 3, H, W]
    depth       float16 [B, S, H, W], times depth_scale float32 [B, S]; 0 = unknown
    extrinsics  float64 [B, S, 3, 4], camera-from-world
    intrinsics  float64 [B, S, 3, 3], pixels of the cropped images
    colour      float32 [B, S, 9], the colour jitter of each view (train.augment)
    keys        list of B lists of S WebDataset keys
    after       DataState once this batch is used
    bad         frames that were damaged and replaced; tried: frames that were read for that
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from shards import DamagedMemberError, ShardSet
from shards.codecs import decode_depth, decode_jpeg
from shards.pixels import nearest
from train.augment import draw_colour, no_colour
from train.plan import DataConfig, DataState, Scene, Step, StepShape, advance, plan_step

log = logging.getLogger(__name__)

CROP_RANGE = (0.8, 1.2)  # of each side, at most 1
MARGIN_PIXELS = 4
MARGIN_SHARE = 0.3  # of the longer target side, the most of a triangular distribution
MAX_WORKERS = 8
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Split:
    """The sequences of one split of a shard set, numbered from 0."""

    def __init__(self, shard_set: ShardSet, split: str) -> None:
        rows = shard_set.sequences[shard_set.split(split)]
        if not len(rows):
            has = ", ".join(shard_set.dataset["splits"])
            raise ValueError(
                f"{shard_set.root}: has no {split} split, only {has}; see data.train_split, data.val_split"
            )
        self.shard_set = shard_set
        self.first = rows["first"].astype(np.int64)
        self.lengths = rows["count"].astype(np.int64)


def load_step(split: Split, step: Step) -> dict[str, Any]:
    """Read and stack a step's scenes. Raises DamagedMemberError if nothing of the split can be read."""
    scenes = [load_scene(split, scene, step.shape) for scene in step.scenes]
    batch: dict[str, Any] = {
        name: torch.from_numpy(np.stack([scene[name] for scene in scenes]))
        for name in ("images", "depth", "depth_scale", "extrinsics", "intrinsics", "colour")
    }
    batch["keys"] = [scene["keys"] for scene in scenes]
    batch["bad"] = sum(scene["bad"] for scene in scenes)
    batch["tried"] = sum(scene["tried"] for scene in scenes)
    batch["after"] = step.after
    return batch


def load_scene(split: Split, scene: Scene, shape: StepShape) -> dict[str, Any]:
    """One scene as numpy arrays without the batch axis.

    A frame that cannot be read gives way to another of its sequence, a sequence without any to the next one, by
    rules that depend on the scene alone, so they are the same under any workers and ranks. Raises DamagedMemberError
    if no frame of any sequence can be read.
    """
    bad, tried = 0, 0
    for sequence in range(scene.sequence, scene.sequence + len(split.lengths)):
        sequence %= len(split.lengths)
        wanted = [frame % int(split.lengths[sequence]) for frame in scene.frames]
        rng = None if scene.seed is None else np.random.default_rng(scene.seed)
        views, missed = _load_views(split, sequence, wanted, shape, rng)
        bad, tried = bad + missed, tried + missed + len(views)
        if views:
            break
    else:
        raise DamagedMemberError(f"{split.shard_set.root}: no frame can be read; pack it again")
    # Where too few are left, views repeat, as in a sequence that is too short.
    views = [views[i % len(views)] for i in range(len(scene.frames))]
    stacked: dict[str, Any] = {
        name: np.stack([view[name] for view in views])
        for name in ("images", "depth", "depth_scale", "extrinsics", "intrinsics")
    }
    stacked["colour"] = no_colour(len(views)) if rng is None else draw_colour(rng, len(views))
    return stacked | {"keys": [view["key"] for view in views], "bad": bad, "tried": tried}


def _load_views(
    split: Split, sequence: int, wanted: list[int], shape: StepShape, rng: np.random.Generator | None
) -> tuple[list[dict[str, Any]], int]:
    """The wanted frames of a sequence, or others in their place; and how many could not be read."""
    order = np.random.default_rng((sequence, *wanted)).permutation(int(split.lengths[sequence]))
    substitutes = iter([int(i) for i in order if i not in wanted])
    views: list[dict[str, Any]] = []
    bad = 0
    for first_choice in wanted:
        frame: int | None = first_choice
        while frame is not None:
            try:
                views.append(load_view(split.shard_set, int(split.first[sequence]) + frame, shape, rng))
                break
            except (ValueError, OSError) as error:
                log.warning("a frame is replaced by another: %s", error)
                bad += 1
                frame = next(substitutes, None)
    return views, bad


def load_view(shard_set: ShardSet, frame: int, shape: StepShape, rng: np.random.Generator | None) -> dict[str, Any]:
    """Decode and crop one frame to `shape`, at random if there is an rng. Raises ValueError if it is damaged."""
    jpeg, depth_bytes = shard_set.read(frame)
    row = shard_set.frames[frame]
    intrinsics = row["intrinsics"].copy()
    centre = (float(intrinsics[0, 2]), float(intrinsics[1, 2]))
    scale = crop_scale((int(row["height"]), int(row["width"])), centre, shape, rng)
    try:
        image, eighths = decode_jpeg(jpeg, scale)
        depth = None if depth_bytes is None else decode_depth(depth_bytes, int(row["height"]), int(row["width"]))
    except ValueError as error:
        raise DamagedMemberError(f"{shard_set.root}: {shard_set.key(frame)}: {error}") from error
    intrinsics[:2, :2] *= scale
    intrinsics[:2, 2] = (shape.width - 1) / 2, (shape.height - 1) / 2
    return {
        "key": shard_set.key(frame),
        "images": crop_image(image, eighths / 8, centre, scale, shape).transpose(2, 0, 1),
        "depth": np.zeros((shape.height, shape.width), np.float16)
        if depth is None
        else crop_depth(depth, centre, scale, shape),
        "depth_scale": np.float32(row["depth_scale"]),
        "extrinsics": row["extrinsics"],
        "intrinsics": intrinsics,
    }


def crop_scale(
    size: tuple[int, int], centre: tuple[float, float], shape: StepShape, rng: np.random.Generator | None
) -> float:
    """Target pixels a source pixel, so that `shape`, centred on the principal point, lies within the image.

    size: height and width of the image; centre: principal point x, y. With an rng each side is first cut to a random
    share of itself about the principal point, and a random margin is left around the target.
    """
    sides = [2 * min(c + 0.5, n - 0.5 - c) for c, n in zip(centre, size[::-1], strict=True)]  # width, height
    margin = 0.0
    if rng is not None:
        sides = [side * min(1.0, rng.uniform(*CROP_RANGE)) for side in sides]
        margin = MARGIN_PIXELS + rng.triangular(0, 0, MARGIN_SHARE) * max(shape.height, shape.width)
    return max((shape.width + margin) / sides[0], (shape.height + margin) / sides[1])


def crop_image(
    image: np.ndarray, decoded: float, centre: tuple[float, float], scale: float, shape: StepShape
) -> np.ndarray:
    """Resample an image that was decoded at a share of its size, with the principal point in the target's centre.

    `centre` and `scale` are those of the undecoded image. Returns [H, W, 3].
    """
    step = decoded / scale
    x, y = (
        (c + 0.5) * decoded - 0.5 - (n - 1) / 2 * step for c, n in zip(centre, (shape.width, shape.height), strict=True)
    )
    return cv2.warpAffine(
        image,
        np.array([[step, 0, x], [0, step, y]]),
        (shape.width, shape.height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def crop_depth(depth: np.ndarray, centre: tuple[float, float], scale: float, shape: StepShape) -> np.ndarray:
    """The same crop of a depth map, each pixel taken from its nearest one: depths are never averaged. [H, W]."""
    columns = nearest((np.arange(shape.width) - (shape.width - 1) / 2) / scale + centre[0], depth.shape[1])
    rows = nearest((np.arange(shape.height) - (shape.height - 1) / 2) / scale + centre[1], depth.shape[0])
    return depth[rows][:, columns]


class TrainingSteps(IterableDataset):
    """The steps of one rank from `state` up to `last_step`. Worker w of W loads every W-th of them."""

    def __init__(
        self,
        split: Split,
        config: DataConfig,
        *,
        seed: int,
        state: DataState,
        last_step: int,
        max_img_per_gpu: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.split, self.config, self.seed = split, config, seed
        self.state, self.last_step = state, last_step
        self.max_img_per_gpu, self.rank, self.world_size = max_img_per_gpu, rank, world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        ranks = {"max_img_per_gpu": self.max_img_per_gpu, "world_size": self.world_size}
        state = self.state
        while state.step < self.last_step:
            if (state.step - self.state.step) % count == number:
                step = plan_step(self.config, self.split.lengths, self.seed, state, rank=self.rank, **ranks)
                yield load_step(self.split, step)
            state = advance(self.config, self.seed, state, **ranks)


class ValidationSteps(IterableDataset):
    """The steps of a validation plan. Worker w of W loads every W-th of them."""

    def __init__(self, split: Split, steps: list[Step]) -> None:
        self.split, self.steps = split, steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for step in self.steps[number::count]:
            yield load_step(self.split, step)


def make_loader(dataset: IterableDataset, workers: int, pin_memory: bool) -> StatefulDataLoader:
    """Runs the dataset in worker processes, whole batches in order. Where we are is in the batches, not in here.

    Workers are forked from a server without threads: forked from a trainer that has already computed something,
    they wait for ever on locks of thread pools that did not come along.
    """
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's, not ours to mend
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train.loader"])
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
        forkserver.ensure_running()  # it ignores what is ignored now
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return StatefulDataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=start_worker,
    )


def start_worker(_: int) -> None:
    """Leave stopping to the trainer: a signal to the whole process group must not take the next batch away from it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(1)  # there is a worker a core


def worker_count(configured: int | None, ranks_here: int) -> int:
    """Worker processes a rank: as configured, else one for each core that is left beside the ranks, 1 to 8."""
    if configured is not None:
        return configured
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_WORKERS, cores // ranks_here - 1))
