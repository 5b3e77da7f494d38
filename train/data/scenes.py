"""Scenes of the plan, decoded, cropped and stacked into a batch, as small as it can be sent.

A batch is a dict; B = scenes, S = views:
    images      uint8 [B, S, 3, H, W]
    depth       float16 [B, S, H, W], times depth_scale float32 [B, S]; 0 = unknown
    extrinsics  float64 [B, S, 3, 4], camera-from-world
    intrinsics  float64 [B, S, 3, 3], pixels of the cropped images
    color_jitter  float32 [B, S, 9], of each view (train.data.color_jitter)
    keys        list of B lists of S WebDataset keys
    after       DataState once this batch is used
    bad         frames that were damaged and replaced, {file: how many}; tried: frames that were read for that
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import cv2
import numpy as np
import torch

from shards.codecs import decode_depth, decode_jpeg
from shards.reader import DamagedMemberError, ShardSet
from train.data.color_jitter import draw_color_jitter, no_color_jitter
from train.data.crops import crop_depth, crop_image, crop_scale
from train.data.plan import Scene, Step, StepShape
from train.data.split import Members, Split, frame_rows, read_step

log = logging.getLogger(__name__)

_CROP, _JITTER = 1, 2  # uses of a scene's seed; not 0, as seed sequences ignore trailing zeros
MAX_DAMAGED = 50  # frames of a sequence: beyond that there is no point in looking for others of it
MAX_SEQUENCES = 20  # that may replace one
Arrays = dict[str, np.ndarray]


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


def blank_batch(shape: StepShape, scenes: int) -> dict[str, Any]:
    """A batch of this shape with nothing in it, for a rank without data while others have theirs."""
    arrays = empty_arrays(scenes, shape)
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
        "color_jitter": np.empty((*views, 9), np.float32),
    }


def load_scene(
    split: Split, scene: Scene, shape: StepShape, members: list[Members], out: Arrays
) -> tuple[list[str], Counter[str]]:
    """Fill `out`, arrays without the scenes' axis, with a scene; members: those of its frames.

    Returns the keys of its views, and how many frames were damaged, by file. Another frame of its sequence replaces
    a damaged one; if a sequence has no usable frame, one drawn from all replaces it, as its neighbors lie in the same
    file. The rules depend on the scene alone, not on workers or ranks. Raises DamagedMemberError if none can be used.
    """
    lengths, shard_set = split.lengths[scene.source], split.shard_sets[scene.source]
    keys, bad = _load_views(split, scene, shape, members, out)
    others = iter(() if keys else _others(scene, len(lengths)))
    while not keys and (other := next(others, None)) is not None:
        wanted = tuple(frame % int(lengths[other]) for frame in scene.frames)
        scene = replace(scene, sequence=other, frames=wanted)
        members = shard_set.try_read_many(frame_rows(split, scene))
        keys, missed = _load_views(split, scene, shape, members, out)
        bad += missed
    if not keys:
        ((worst, number),) = bad.most_common(1)
        tried = f"none of {bad.total()} frames that were tried can be used, {number} of them of this file"
        file = worst.removeprefix(f"{shard_set}/")
        raise DamagedMemberError(file, f"{tried}; vggt-prep verify says why", shard_set)
    found = len(keys)
    for place in range(found, shape.views):  # where too few are left, views repeat, as in too short a sequence
        keys.append(keys[place % found])
        for array in out.values():
            array[place] = array[place % found]
    if scene.seed is None:
        out["color_jitter"][:] = no_color_jitter(shape.views)
    else:
        out["color_jitter"][:] = draw_color_jitter(np.random.default_rng((scene.seed, _JITTER)), shape.views)
    return keys, bad


def _others(scene: Scene, sequences: int) -> list[int]:
    """The sequences of its set to try in place of a scene's."""
    order = np.random.default_rng((scene.sequence, *scene.frames)).permutation(sequences)
    return [int(i) for i in order if i != scene.sequence][:MAX_SEQUENCES]


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
            frame = next(substitutes, None) if bad.total() < MAX_DAMAGED else None
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
    center = (float(row["intrinsics"][0, 2]), float(row["intrinsics"][1, 2]))
    scale = crop_scale(size, center, shape, rng)
    jpeg, depth_bytes = members
    try:
        image, eighths = decode_jpeg(jpeg, scale)
        depth = None if depth_bytes is None else decode_depth(depth_bytes, *size)
    except ValueError as error:
        raise DamagedMemberError(shard_set.tars[row["tar"]], f"{shard_set.key(frame)}: {error}", shard_set) from error
    cv2.split(crop_image(image, eighths / 8, center, scale, shape), list(out["images"]))
    out["depth"][:] = 0 if depth is None else crop_depth(depth, center, scale, shape)
    out["depth_scale"][...] = row["depth_scale"]
    out["extrinsics"][:] = row["extrinsics"]
    out["intrinsics"][:] = row["intrinsics"]
    out["intrinsics"][:2, :2] *= scale
    out["intrinsics"][:2, 2] = (shape.width - 1) / 2, (shape.height - 1) / 2
