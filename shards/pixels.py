"""Arithmetic of pixel grids. (0, 0) is the centre of the top-left pixel; its edges are at -0.5 and 0.5."""

from __future__ import annotations

import numpy as np


def scale_intrinsics(intrinsics: np.ndarray, scale_x: float, scale_y: float) -> np.ndarray:
    """Intrinsics [3, 3] of an image resized by these factors about its top-left *edge*."""
    scaled = intrinsics.copy()
    scaled[0] *= scale_x
    scaled[1] *= scale_y
    scaled[0, 2] = (intrinsics[0, 2] + 0.5) * scale_x - 0.5
    scaled[1, 2] = (intrinsics[1, 2] + 0.5) * scale_y - 0.5
    return scaled


def nearest(coordinates: np.ndarray, size: int) -> np.ndarray:
    """The pixel of 0 .. size - 1 nearest to each coordinate [n], without bias.

    Halfway between two pixels the lower and the upper one are taken in turn: always taking one of them would shift
    a depth map that is halved by a quarter of a pixel.
    """
    tie = np.isclose(coordinates - np.floor(coordinates), 0.5, rtol=0, atol=1e-6)
    alternate = np.floor(coordinates).astype(np.intp) + np.arange(len(coordinates)) % 2
    picked = np.where(tie, alternate, np.rint(coordinates).astype(np.intp))
    return np.clip(picked, 0, size - 1)
