"""Geometry of stored frames: points of depths, and whether the depths of two views agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def unproject(depth: np.ndarray, extrinsics: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Points of the world [3, H * W] at each pixel's depth [H, W]."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width].reshape(2, -1).astype(np.float64)
    x, y = (u - intrinsics[0, 2]) / intrinsics[0, 0], (v - intrinsics[1, 2]) / intrinsics[1, 1]
    points = np.stack([x, y, np.ones_like(x)]) * depth.reshape(-1)
    return extrinsics[:, :3].T @ (points - extrinsics[:, 3:])


def project(points: np.ndarray, extrinsics: np.ndarray, intrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [2, N] and depths [N] at which a camera sees points of the world [3, N]; NaN behind it."""
    rays = extrinsics[:, :3] @ points + extrinsics[:, 3:]
    z = np.where(rays[2] > 0, rays[2], np.nan)
    return rays[:2] / z * np.diag(intrinsics)[:2, None] + intrinsics[:2, 2:], z


def scale_intrinsics(intrinsics: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """Intrinsics [3, 3] of an image resized by these factors about its top-left *edge*."""
    scaled = intrinsics.copy()
    scaled[0] *= scale_x
    scaled[1] *= scale_y
    scaled[0, 2] = (intrinsics[0, 2] + 0.5) * scale_x - 0.5
    scaled[1, 2] = (intrinsics[1, 2] + 0.5) * scale_y - 0.5
    return scaled


def rounded(coordinates: np.ndarray) -> np.ndarray:
    """The pixel nearest to each coordinate [n], without bias.

    Halfway between two pixels, the lower and the upper one alternate: always taking the same one would shift a
    half-size depth map by a quarter of a pixel.
    """
    tie = np.isclose(coordinates - np.floor(coordinates), 0.5, rtol=0, atol=1e-6)
    alternate = np.floor(coordinates).astype(np.intp) + np.arange(len(coordinates)) % 2
    return np.where(tie, alternate, np.rint(coordinates).astype(np.intp))


def nearest(coordinates: np.ndarray, size: int) -> np.ndarray:
    """The pixel of 0 .. size - 1 nearest to each coordinate [n], without bias."""
    return np.clip(rounded(coordinates), 0, size - 1)


def are_scattered(depth: np.ndarray) -> bool:
    """Whether most of the known pixels of a depth map [H, W] have no known neighbor to their right."""
    known = depth != 0 if depth.dtype != np.float16 else depth.view(np.uint16) != 0  # numpy is slow with half floats
    return bool(2 * np.count_nonzero(known[:, 1:] & known[:, :-1]) < np.count_nonzero(known))


def move_points(
    depth: np.ndarray, scale: tuple[float, float], offset: tuple[float, float], shape: tuple[int, int]
) -> np.ndarray:
    """A map of this shape: each known pixel of a depth map, moved to row * scale + offset, its column likewise.

    Resampling would lose most scattered pixels.
    """
    places = np.nonzero(depth)
    rows, columns = (p * s + o for p, s, o in zip(places, scale, offset, strict=True))
    return put_points(rows, columns, depth[places], shape)


def put_points(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map of this shape with values [n] in the pixels nearest to rows and columns [n], finite; 0 elsewhere.

    Where several meet, the one nearest to the pixel's center is kept, as resampling does: the nearest to the camera
    would be too near.
    """
    y, x = rounded(rows), rounded(columns)
    inside = (y >= 0) & (x >= 0) & (y < shape[0]) & (x < shape[1])
    off_center = (rows - y) ** 2 + (columns - x) ** 2
    nearest_last = np.flatnonzero(inside)[np.argsort(-off_center[inside], kind="stable")]
    put = np.zeros(shape, values.dtype)
    put[y[nearest_last], x[nearest_last]] = values[nearest_last]
    return put


AGREEMENT = 0.02  # of the depth: how far two views may differ on a point that both see


@dataclass(frozen=True)
class DepthView:
    """depth [H, W] along z, 0 where unknown; extrinsics [3, 4] camera-from-world; intrinsics [3, 3] in its pixels."""

    depth: np.ndarray
    extrinsics: np.ndarray
    intrinsics: np.ndarray

    def points(self) -> np.ndarray:
        """Points of the world [3, H * W], NaN where the depth is unknown."""
        return unproject(np.where(self.depth > 0, self.depth, np.nan), self.extrinsics, self.intrinsics)


def agreement(a: DepthView, b: DepthView) -> tuple[int, int]:
    """How many points of a fall where b knows a depth, and at how many of them the two depths agree."""
    pixels, z = project(a.points(), b.extrinsics, b.intrinsics)
    inside = (
        np.isfinite(z)
        & (pixels > -0.5).all(axis=0)
        & (pixels < np.array(b.depth.shape[::-1])[:, None] - 0.5).all(axis=0)
    )
    columns, rows = np.rint(pixels[:, inside]).astype(int)
    known = b.depth[rows, columns]
    ratio = known[known > 0] / z[inside][known > 0]
    return len(ratio), int((np.abs(ratio - 1) < AGREEMENT).sum())
