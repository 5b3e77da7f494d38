"""A plane of stripes: a shift or a wrong depth shows."""

from __future__ import annotations

import numpy as np

NORMAL, DISTANCE = np.array([0.6, -0.25, 0.76]) / np.linalg.norm([0.6, -0.25, 0.76]), 1.0


def plane_depth(k, height, width):
    """Depth along z of the plane NORMAL . X = DISTANCE, seen by a camera with intrinsics k: [H, W]."""
    y, x = np.mgrid[:height, :width]
    rays = np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones_like(x, dtype=float)], axis=-1)
    return DISTANCE / (rays @ NORMAL)


def stripes(u, v):
    """A smooth pattern over the image plane in units of pixels of the source: its phase shows a shift."""
    return 127 + 60 * np.sin(2 * np.pi * u / 40) + 60 * np.sin(2 * np.pi * v / 40)
