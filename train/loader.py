"""Scenes of the plan, read from the shards, cropped and stacked: what a step needs, as small as it can be sent.

A batch is a dict; B = scenes, S = views:
    images      uint8 [B, S, 3, H, W]
    depth       float16 [B, S, H, W], times depth_scale float32 [B, S]; 0 = unknown
    extrinsics  float64 [B, S, 3, 4], camera-from-world
    intrinsics  float64 [B, S, 3, 3], pixels of the cropped images
    colour      float32 [B, S, 9], the colour jitter of each view (train.augment)
    keys        list of B lists of S WebDataset keys
    after       DataState once this batch is used
    bad         frames that were damaged and replaced, {file: how many}; tried: frames that were read for that
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from multiprocessing import forkserver, resource_tracker
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from shards import DamagedIndexError, DamagedMemberError, ShardSet, StorageError
from shards.codecs import decode_depth, decode_jpeg
from shards.pixels import nearest
from shards.processes import end_with_parent
from shards.schema import FRAMES_FILE
from train.augment import draw_colour, no_colour
from train.plan import DataState, Scene, Step, StepShape, TrainingPlan
from train.stop import STOP_SIGNALS, Interrupted, StopRequest

log = logging.getLogger(__name__)

CROP_RANGE = (0.8, 1.2)  # of each side, at most 1
MARGIN_PIXELS = 4
MARGIN_SHARE = 0.3  # of the longer target side, the most of a triangular distribution
MAX_WORKERS = 8
_CROP, _COLOUR = 1, 2  # uses of a scene's seed; not 0, which a seed sequence cannot tell from nothing
MAX_DAMAGED = 200  # frames of a scene: beyond that there is no point in looking for others
NEVER = 10**9  # batches: what StatefulDataLoader would remember of its workers is not needed
MAX_DEATHS = 3  # of workers, without a batch in between

Arrays = dict[str, np.ndarray]


class Split:
    """The sequences of one split of some shard sets: their first rows and lengths, numbered from 0 within each set."""

    def __init__(self, shard_sets: Sequence[ShardSet], split: str) -> None:
        self.shard_sets = tuple(shard_sets)
        rows = [shard_set.sequences[shard_set.split(split)] for shard_set in shard_sets]
        for shard_set, part in zip(shard_sets, rows, strict=True):
            if not len(part):
                has = ", ".join(shard_set.dataset["splits"])
                raise ValueError(f"{shard_set}: has no {split} split, only {has}; see data.train_split, data.val_split")
        self.first = tuple(part["first"].astype(np.int64) for part in rows)
        self.lengths = tuple(part["count"].astype(np.int64) for part in rows)
        for shard_set in shard_sets:
            len(shard_set.frames)  # a remote index is fetched once, here, and a damaged one is an error now


Members = tuple[bytes, bytes | None] | DamagedMemberError  # JPEG and depth of a frame, or why there are none


def read_step(split: Split, step: Step) -> list[list[Members]]:
    """The members of each scene's frames, read in as few requests as possible. Raises StorageError."""
    members: list[list[Members]] = [[] for _ in step.scenes]
    for source, shard_set in enumerate(split.shard_sets):
        places = [i for i, scene in enumerate(step.scenes) if scene.source == source]
        frames = [frame_rows(split, step.scenes[i]) for i in places]
        found = iter(shard_set.try_read_many([frame for part in frames for frame in part]))
        for i, part in zip(places, frames, strict=True):
            members[i] = [next(found) for _ in part]
    return members


def frame_rows(split: Split, scene: Scene) -> list[int]:
    """The rows of a scene's frames in the index of its shard set."""
    return [int(split.first[scene.source][scene.sequence]) + frame for frame in scene.frames]


def load_step(split: Split, step: Step, members: list[list[Members]] | None = None) -> dict[str, Any]:
    """Decode a step's scenes into a batch; members: what read_step gave, if it has been called.

    Raises DamagedMemberError if no frame of a set can be used, StorageError if it cannot be reached.
    """
    members = members or read_step(split, step)
    # Every view is written where it belongs: fresh memory costs more than decoding does if it is copied twice.
    arrays = empty_arrays(len(step.scenes), step.shape)
    keys, bad, tried = [], Counter[str](), 0
    for i, (scene, part) in enumerate(zip(step.scenes, members, strict=True)):
        out = {name: array[i] for name, array in arrays.items()}
        found, missed = load_scene(split, scene, step.shape, part, out)
        keys.append(found)
        bad += missed
        tried += len(set(found)) + missed.total()
    batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return batch | {"keys": keys, "bad": dict(bad), "tried": tried, "after": step.after}


def blank_batch(step: Step) -> dict[str, Any]:
    """Of the shape of a step's batch, with nothing in it: for a rank that has no data, while others have theirs."""
    arrays = empty_arrays(len(step.scenes), step.shape)
    for array in arrays.values():
        array[...] = 0
    for name in ("extrinsics", "intrinsics"):
        arrays[name][...] = np.eye(*arrays[name].shape[-2:])
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"keys": [], "bad": {}, "tried": 0}


def empty_arrays(scenes: int, shape: StepShape) -> Arrays:
    """The arrays of a batch, to be filled."""
    views, pixels = (scenes, shape.views), (shape.height, shape.width)
    return {
        "images": np.empty((*views, 3, *pixels), np.uint8),
        "depth": np.empty((*views, *pixels), np.float16),
        "depth_scale": np.empty(views, np.float32),
        "extrinsics": np.empty((*views, 3, 4), np.float64),
        "intrinsics": np.empty((*views, 3, 3), np.float64),
        "colour": np.empty((*views, 9), np.float32),
    }


def load_scene(
    split: Split, scene: Scene, shape: StepShape, members: list[Members], out: Arrays
) -> tuple[list[str], Counter[str]]:
    """Fill `out`, arrays without the scenes' axis, with a scene; members: those of its frames.

    Returns the keys of its views, and how many frames were damaged, by file. Such a frame gives way to another of its
    sequence, a sequence without any to the next one, by rules that depend on the scene alone, so they are the same
    under any workers and ranks. Raises DamagedMemberError if no frame of any sequence can be used.
    """
    lengths, shard_set = split.lengths[scene.source], split.shard_sets[scene.source]
    keys, bad = _load_views(split, scene, shape, members, out)
    for other in range(scene.sequence + 1, scene.sequence + len(lengths)):
        if keys or bad.total() > MAX_DAMAGED:
            break
        other %= len(lengths)
        wanted = tuple(frame % int(lengths[other]) for frame in scene.frames)
        scene = replace(scene, sequence=other, frames=wanted)
        members = shard_set.try_read_many(frame_rows(split, scene))
        keys, missed = _load_views(split, scene, shape, members, out)
        bad += missed
    if not keys:
        raise DamagedMemberError(FRAMES_FILE, "none of its frames can be used; pack it again", shard_set)
    found = len(keys)
    for place in range(found, shape.views):  # where too few are left, views repeat, as in too short a sequence
        keys.append(keys[place % found])
        for array in out.values():
            array[place] = array[place % found]
    if scene.seed is None:
        out["colour"][:] = no_colour(shape.views)
    else:
        out["colour"][:] = draw_colour(np.random.default_rng((scene.seed, _COLOUR)), shape.views)
    return keys, bad


def _load_views(
    split: Split, scene: Scene, shape: StepShape, members: list[Members], out: Arrays
) -> tuple[list[str], Counter[str]]:
    """Fill `out` with the frames of a scene, or others of its sequence in their place; as many as there are."""
    shard_set, first = split.shard_sets[scene.source], int(split.first[scene.source][scene.sequence])
    length = int(split.lengths[scene.source][scene.sequence])
    order = np.random.default_rng((scene.sequence, *scene.frames)).permutation(length)
    substitutes = iter([int(i) for i in order if i not in scene.frames])
    keys: list[str] = []
    bad: Counter[str] = Counter()
    for place, (first_choice, member) in enumerate(zip(scene.frames, members, strict=True)):
        frame: int | None = first_choice
        while frame is not None:
            rng = None if scene.seed is None else np.random.default_rng((scene.seed, _CROP, place))
            try:
                load_view(shard_set, first + frame, member, shape, rng, {k: v[len(keys), ...] for k, v in out.items()})
                keys.append(shard_set.key(first + frame))
                break
            except DamagedMemberError as error:
                _tell_once(f"a frame is replaced by another: {error}")
                bad[error.file] += 1
                if bad.total() > MAX_DAMAGED:
                    raise
            frame = next(substitutes, None)
            if frame is not None:
                (member,) = shard_set.try_read_many([first + frame])
    return keys, bad


@cache
def _tell_once(text: str) -> None:
    """A warning that a process gives once: a frame is drawn again and again."""
    log.warning(text)


def load_view(
    shard_set: ShardSet, frame: int, members: Members, shape: StepShape, rng: np.random.Generator | None, out: Arrays
) -> None:
    """Decode a frame and crop it to `shape`, at random if there is an rng, into `out`, arrays of one view.

    Raises DamagedMemberError.
    """
    if isinstance(members, DamagedMemberError):
        raise members
    row = shard_set.row(frame)
    size = int(row["height"]), int(row["width"])
    centre = (float(row["intrinsics"][0, 2]), float(row["intrinsics"][1, 2]))
    scale = crop_scale(size, centre, shape, rng)
    jpeg, depth_bytes = members
    try:
        image, eighths = decode_jpeg(jpeg, scale)
        depth = None if depth_bytes is None else decode_depth(depth_bytes, *size)
    except ValueError as error:
        raise DamagedMemberError(shard_set.tars[row["tar"]], f"{shard_set.key(frame)}: {error}", shard_set) from error
    cv2.split(crop_image(image, eighths / 8, centre, scale, shape), list(out["images"]))
    out["depth"][:] = 0 if depth is None else crop_depth(depth, centre, scale, shape)
    out["depth_scale"][...] = row["depth_scale"]
    out["extrinsics"][:] = row["extrinsics"]
    out["intrinsics"][:] = row["intrinsics"]
    out["intrinsics"][:2, :2] *= scale
    out["intrinsics"][:2, 2] = (shape.width - 1) / 2, (shape.height - 1) / 2


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


def sequence_name(split: Split, scene: Scene) -> str:
    """category/sequence of a scene of the plan, which need not be that of what was loaded for it."""
    rows = split.shard_sets[scene.source].sequences
    row = rows[np.searchsorted(rows["first"], split.first[scene.source][scene.sequence])]
    return f"{bytes(row['category']).decode()}/{bytes(row['name']).decode()}"


class TrainingSteps(IterableDataset):
    """The batches of one rank from `state` up to `last_step`. Worker w of W loads every W-th of them."""

    def __init__(self, split: Split, plan: TrainingPlan, rank: int, state: DataState, last_step: int) -> None:
        self.split, self.plan, self.rank, self.state, self.last_step = split, plan, rank, state, last_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return load_ahead(self.split, self._mine())

    def _mine(self) -> Iterator[Step]:
        number, count = _worker()
        state = self.state
        while state.step < self.last_step:
            if (state.step - self.state.step) % count == number:
                yield self.plan.step(state, self.rank)
            state = self.plan.after(state)


class ValidationSteps(IterableDataset):
    """The batches of a validation plan. Worker w of W loads every W-th of them."""

    def __init__(self, split: Split, steps: list[Step]) -> None:
        self.split, self.steps = split, steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, count = _worker()
        return load_ahead(self.split, iter(self.steps[number::count]))


def _worker() -> tuple[int, int]:
    """The number of this worker process, and how many there are."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def load_ahead(split: Split, steps: Iterator[Step]) -> Iterator[dict[str, Any]]:
    """The batch of each step; a worker reads the next one while this one is decoded: waiting for storage costs little.

    (Not so the trainer itself, without workers: a stop would have to wait for the thread that reads.) What ends the
    data for good is the last item, {"error": what to tell the user}: exceptions of a worker process arrive with its
    traceback for a message.
    """
    try:
        if get_worker_info() is None:
            yield from (load_step(split, step) for step in steps)
        else:
            yield from _load_ahead(split, steps)
    except (DamagedIndexError, DamagedMemberError, StorageError, FileNotFoundError) as error:
        yield {"error": str(error)}


def _load_ahead(split: Split, steps: Iterator[Step]) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(1) as reader:
        step = next(steps, None)
        members = step and reader.submit(read_step, split, step)
        while step is not None and members is not None:
            following = next(steps, None)
            ahead = following and reader.submit(read_step, split, following)
            yield load_step(split, step, members.result())
            step, members = following, ahead


class NoDataError(ValueError):
    """There are no more batches to be had; the message says why and what to do."""


def next_batch(batches: Iterator[dict[str, Any]], stop: StopRequest) -> dict[str, Any] | NoDataError | None:
    """The next batch, or why there is none to be had; None: a signal asked to stop while it was waited for."""
    try:
        with stop.interruptible():
            return next(batches)
    except Interrupted:
        return None
    except NoDataError as error:
        return error


def stream(
    make: Callable[[DataState | None], IterableDataset], workers: int, pin_memory: bool
) -> Iterator[dict[str, Any]]:
    """The batches of make(None), across the death of worker processes: then make(state of the last batch) goes on.

    Raises NoDataError if data cannot be had, or workers die again and again.
    """
    state: DataState | None = None
    deaths = 0
    while True:
        loader = None
        try:
            loader = iter(make_loader(make(state), workers, pin_memory))  # a worker may die already here
            for batch in loader:
                if "error" in batch:
                    raise NoDataError(batch["error"])
                state, deaths = batch["after"], 0
                yield batch
            return
        except Interrupted:
            kill_workers()  # while the loader is held: when it goes, it waits 5 seconds for each
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if not workers or not _is_death(error):
                raise
            deaths += 1
            if deaths > MAX_DEATHS:
                raise NoDataError(
                    f"data.workers={workers}: they die again and again; is memory short? {error}"
                ) from error
            log.warning("%s; new workers go on from the last batch in %d s", error, 2**deaths)
        del loader
        time.sleep(2**deaths)


def _is_death(error: Exception) -> bool:
    """Whether a worker died: torch says so, or a batch was on its way out of it and the connection broke.

    What code in a worker raises comes as "Caught ... in DataLoader worker".
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        return any(words in text for words in ("exited unexpectedly", "is killed by signal"))
    return not text.startswith("Caught ")


def make_loader(dataset: IterableDataset, workers: int, pin_memory: bool) -> StatefulDataLoader:
    """Runs the dataset in worker processes, whole batches in order. Where we are is in the batches, not in here.

    Workers are forked from a server without threads: forked from a trainer that has already computed something,
    they wait for ever on locks of thread pools that did not come along.
    """
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's, not ours to mend
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: they wait for storage
    context = None
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train.loader"])
        resource_tracker.ensure_running()  # it unblocks signals, so not in between
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            # What is blocked now stays so in it and in the workers. Stopping is left to the trainer: a signal to the
            # whole process group must not take the next batch away from it.
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return StatefulDataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=start_worker,
        snapshot_every_n_steps=NEVER,
    )


def start_worker(_: int) -> None:
    """End with the trainer: torch looks for the parent, which is the server that forked the worker."""
    end_with_parent()
    cv2.setNumThreads(1)  # there is a worker a core


@atexit.register
def kill_workers() -> None:
    """At the end of a trainer, however it ends: asked by SIGTERM, as Python does it, they would not, and it would wait.

    Registered after what multiprocessing does at exit, it comes before.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def worker_count(configured: int | None, ranks_here: int) -> int:
    """Worker processes a rank: as configured, else one for each core that is left beside the ranks, 1 to 8."""
    if configured is not None:
        return configured
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_WORKERS, cores // ranks_here - 1))
