"""Poses as layouts write them -> camera-from-world [3, 4] with OpenCV's axes."""

from __future__ import annotations

import numpy as np

FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL's y is up, and its z backward


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


def from_quaternion(xyzw: np.ndarray, position: np.ndarray) -> np.ndarray:
    """4 x 4 camera-to-world of a quaternion x y z w, of any length, and the camera's place [3]."""
    x, y, z, w = np.asarray(xyzw, np.float64) / np.linalg.norm(xyzw)
    pose = np.eye(4)
    pose[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    pose[:3, 3] = position
    return pose


def interpolated(time: float, times: np.ndarray, quaternions: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """4 x 4 camera-to-world at a time within the (sorted) times: linear in place, spherical in rotation."""
    i = int(np.clip(np.searchsorted(times, time), 1, len(times) - 1))
    a, b = quaternions[i - 1] / np.linalg.norm(quaternions[i - 1]), quaternions[i] / np.linalg.norm(quaternions[i])
    t = float(np.clip((time - times[i - 1]) / max(times[i] - times[i - 1], 1e-12), 0, 1))
    b = b if a @ b >= 0 else -b
    angle = np.arccos(min(1.0, float(a @ b)))
    if angle < 1e-9:
        quaternion = a + t * (b - a)
    else:
        quaternion = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return from_quaternion(quaternion, positions[i - 1] + t * (positions[i] - positions[i - 1]))


def pinhole(fx: float, fy: float, cx: float, cy: float, *, corner: bool = False) -> np.ndarray:
    """Intrinsics [3, 3]. corner: cx and cy are measured from the image's corner, not from the first pixel's center."""
    shift = 0.5 if corner else 0.0
    return np.array([[fx, 0, cx - shift], [0, fy, cy - shift], [0, 0, 1.0]])


def read_matrix(text: str, rows: int, columns: int) -> np.ndarray:
    """Numbers in a text file. Raises ValueError for another number of them."""
    values = np.array(text.split(), np.float64)
    if values.size != rows * columns:
        raise ValueError(f"expected {rows} x {columns} numbers, found {values.size}")
    return values.reshape(rows, columns)
