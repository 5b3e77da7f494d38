"""Cameras and poses as layouts write them, and as we store them: OpenCV axes, camera-from-world, pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from prep.importers.source import Distortion
from shards.geometry import scale_intrinsics

SAME_TIME = 2e-3  # seconds: where times are rounded
FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL's y is up, and its z backward


@dataclass(frozen=True, kw_only=True)
class OpenCVCamera:
    """A camera as we store it: extrinsics [3, 4]; intrinsics [3, 3] in pixels, (0, 0) the center of the first.

    size: (height, width) of the image that the intrinsics are of, if the image was scaled since.
    """

    extrinsics: np.ndarray
    intrinsics: np.ndarray
    distortion: Distortion | None = None
    size: tuple[int, int] | None = None

    def opencv(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Extrinsics [3, 4] and intrinsics [3, 3] of an image of this size."""
        if self.size is None:
            return self.extrinsics, self.intrinsics
        return self.extrinsics, scale_intrinsics(self.intrinsics, width / self.size[1], height / self.size[0])


@dataclass(frozen=True, kw_only=True)
class FieldOfView:
    """A camera whose field of view alone is known; extrinsics [3, 4] as we store them.

    angle, angle_y: horizontal and vertical, in radians; None: pixels are square.
    """

    extrinsics: np.ndarray
    angle: float
    angle_y: float | None = None
    distortion: None = None

    def opencv(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Extrinsics [3, 4] and intrinsics [3, 3] of an image of this size, centered."""
        focal = focal_y = width / 2 / math.tan(self.angle / 2)
        if self.angle_y is not None:
            focal_y = height / 2 / math.tan(self.angle_y / 2)
        return self.extrinsics, pinhole(focal, focal_y, width / 2, height / 2, corner=True)


def pinhole(fx: float, fy: float, cx: float, cy: float, *, corner: bool = False) -> np.ndarray:
    """Intrinsics [3, 3]. corner: cx and cy are measured from the image's corner, not from the first pixel's center."""
    shift = 0.5 if corner else 0.0
    return np.array([[fx, 0, cx - shift], [0, fy, cy - shift], [0, 0, 1.0]])


def inverted(world_from_cam: np.ndarray) -> np.ndarray:
    """[3, 4] camera-from-world of a 4 x 4 camera-to-world. Raises ValueError if it cannot be inverted."""
    if not np.isfinite(world_from_cam).all():
        raise ValueError("pose is not finite")
    try:
        return np.linalg.inv(world_from_cam)[:3]
    except np.linalg.LinAlgError as error:
        raise ValueError("pose cannot be inverted") from error


def from_opengl(world_from_cam: np.ndarray) -> np.ndarray:
    """[3, 4] camera-from-world with OpenCV's axes of a 4 x 4 camera-to-world with OpenGL's."""
    return inverted(world_from_cam @ FLIP_YZ)


def rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """4 x 4 of a rotation [3, 3] and a translation [3]."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, translation
    return pose


def from_quaternion(xyzw: np.ndarray, position: np.ndarray) -> np.ndarray:
    """4 x 4 camera-to-world of a quaternion x y z w, of any length, and the camera's place [3]."""
    with np.errstate(invalid="ignore"):  # of length 0: no rotation, which is not finite
        x, y, z, w = np.asarray(xyzw, np.float64) / np.linalg.norm(xyzw)
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return rigid(np.array(rotation), position)


def interpolated(time: float, times: np.ndarray, poses: np.ndarray, most_apart: float) -> np.ndarray:
    """The 4 x 4 camera-to-world at a time, from poses [n, 4, 4] at sorted times [n] in seconds.

    Interpolates position linearly, and rotation about a fixed axis. Raises ValueError unless there is a pose at the
    time, or one before and one after it, both within most_apart.
    """
    i = int(np.clip(np.searchsorted(times, time), 1, max(1, len(times) - 1)))
    before, after = (time - times[i - 1], times[i] - time) if len(times) > 1 else (np.inf, np.inf)
    if min(abs(before), abs(after)) > SAME_TIME and not (0 <= before <= most_apart and 0 <= after <= most_apart):
        raise ValueError("no pose near the time of the image")
    a, b = poses[i - 1], poses[i]
    t = float(np.clip(before / max(before + after, 1e-12), 0, 1))
    if not np.isfinite([a, b]).all():
        return np.full((4, 4), np.nan)
    turn, _ = cv2.Rodrigues(a[:3, :3].T @ b[:3, :3])
    rotation = a[:3, :3] @ cv2.Rodrigues(t * turn)[0]
    return rigid(rotation, a[:3, 3] + t * (b[:3, 3] - a[:3, 3]))


def read_matrix(text: str, rows: int, columns: int) -> np.ndarray:
    """Numbers in a text file. Raises ValueError for another number of them."""
    values = np.array(text.split(), np.float64)
    if values.size != rows * columns:
        raise ValueError(f"expected {rows} x {columns} numbers, found {values.size}")
    return values.reshape(rows, columns)
