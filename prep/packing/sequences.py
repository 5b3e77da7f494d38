"""What needs all frames of a sequence: a common origin, and a check of camera distances and depths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prep.packing.frames import PackedFrame

MIN_DEPTH = 0.1  # over the distance of neighboring cameras: with less two views can share nothing
MAX_DEPTH = 300.0  # over the extent of the cameras: with more the views hardly differ
MAX_STRAY = 100.0  # distance of a camera from the middle of them over the extent


def recentered(frames: list[PackedFrame]) -> list[PackedFrame]:
    """The same frames, at least one, with the origin of the world at the median of their cameras' centers.

    Captures may come in coordinates of a country: 500 km from the origin, single precision leaves 3 cm.
    """
    origin = np.median(camera_centers(frames), axis=0)
    return [
        replace(frame, meta=replace(frame.meta, extrinsics=_moved(frame.meta.extrinsics, origin))) for frame in frames
    ]


def _moved(extrinsics: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Camera-from-world [3, 4] once `origin` is the world's origin."""
    rotation, translation = extrinsics[:, :3], extrinsics[:, 3]
    return np.column_stack([rotation, translation + rotation @ origin])


def camera_centers(frames: list[PackedFrame]) -> np.ndarray:
    """Places of the cameras in the world [n, 3]."""
    poses = np.stack([frame.meta.extrinsics for frame in frames])
    return -np.einsum("nij,ni->nj", poses[:, :, :3], poses[:, :, 3])


def doubtful_lengths(frames: list[PackedFrame]) -> str | None:
    """Why a camera or the unit of the depths is probably wrong; None if they may be right, or nothing can be said."""
    depths = [frame.median_depth for frame in frames if frame.median_depth is not None]
    centers = camera_centers(frames)
    distances = np.linalg.norm(centers - np.median(centers, axis=0), axis=1)
    extent, stray = np.quantile(distances, 0.9, method="lower"), int(distances.argmax())
    if distances[stray] > MAX_STRAY * extent > 0:
        return f"{frames[stray].meta.source}: its camera is {distances[stray] / extent:.2g} times as far out as most"
    if not depths or len(frames) < 2:
        return None
    depth, step = np.median(depths), np.median(np.linalg.norm(np.diff(centers, axis=0), axis=1))
    if depth < MIN_DEPTH * step:
        return f"depths are about {depth:.2g}, neighboring cameras {step:.2g} apart: are depths in another unit?"
    if depth > MAX_DEPTH * extent:
        return f"depths are about {depth:.2g}, most cameras within {extent:.2g}: another unit, or all from one place?"
    return None
