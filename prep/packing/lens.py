"""Distorted images as a pinhole camera would have taken them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import cv2
import numpy as np

from prep.importers.source import Distortion
from prep.packing.reading import BadFrameError

T = TypeVar("T")
WIDEST = 60.0  # degrees from the axis: beyond that a pinhole image of a fisheye would be mostly margin
BORDER_STEPS = 50
CLOSER, CLOSEST = 1.05, 4.0  # steps, and the most, by which the focal length grows until nothing is seen mirrored
PRECISE = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 100, 1e-10)


class Lens:
    """The lens of a camera with intrinsics [3, 3] whose images are height x width pixels.

    intrinsics [3, 3]: of the pinhole camera that replaces it: the same size, centered, with square pixels, and the
    smallest focal length at which every pixel shows something that the lens saw, and nothing mirrored: polynomials bend
    back beyond what they were fitted to. Raises BadFrameError if that is nearly everywhere.
    """

    def __init__(self, intrinsics: np.ndarray, distortion: Distortion, height: int, width: int) -> None:
        self.source, self.distortion, self.size = intrinsics, distortion, (height, width)
        self._coefficients = np.array(distortion.coefficients, np.float64)
        self._kept: dict[Hashable, Any] = {}
        center = np.array([(width - 1) / 2, (height - 1) / 2])
        sides = np.linspace(-0.5, 0.5, BORDER_STEPS)
        half = np.array([width, height]) / 2
        focal = max(half) / np.tan(np.radians(WIDEST))
        for axis, sign in ((0, -1), (0, 1), (1, -1), (1, 1)):
            border = np.empty((BORDER_STEPS, 2))
            border[:, axis] = center[axis] + sign * (half[axis] - 0.5)
            border[:, 1 - axis] = center[1 - axis] + sides * 2 * (half[1 - axis] - 0.5)
            reach = sign * self._rays(border)[:, axis]
            if (reach > 0).all():
                focal = max(focal, float((half[axis] / reach).max()))
        self.intrinsics = np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1]])
        while self._bends_back():
            self.intrinsics[[0, 1], [0, 1]] *= CLOSER
            if self.intrinsics[0, 0] > CLOSEST * focal:
                raise BadFrameError("lens model bends back", f"coefficients {distortion.coefficients}")

    def _bends_back(self) -> bool:
        """Whether some part of the pinhole image shows the distorted one mirrored."""
        height, width = self.size
        x, y = np.meshgrid(np.linspace(0, width - 1, BORDER_STEPS), np.linspace(0, height - 1, BORDER_STEPS))
        seen = self.to_source(np.column_stack([x.ravel(), y.ravel()])).reshape(*x.shape, 2)
        across, down = seen[:-1, 1:] - seen[:-1, :-1], seen[1:, :-1] - seen[:-1, :-1]
        return bool((across[..., 0] * down[..., 1] <= across[..., 1] * down[..., 0]).any())

    def _rays(self, pixels: np.ndarray) -> np.ndarray:
        """Directions x / z, y / z [n, 2] of pixels [n, 2] of the distorted image."""
        points = np.ascontiguousarray(pixels, np.float64)[:, None]
        if self.distortion.fisheye:
            return cv2.fisheye.undistortPoints(points, self.source, self._coefficients)[:, 0]
        # OpenCV's default stops after five rounds, at a hundredth of a pixel.
        return cv2.undistortPoints(points, self.source, self._coefficients, criteria=PRECISE)[:, 0]

    def from_source(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of the pinhole image for those of the distorted one."""
        return self._rays(pixels) * np.diag(self.intrinsics)[:2] + self.intrinsics[:2, 2]

    def to_source(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels [n, 2] of the distorted image for those of the pinhole one."""
        rays = (np.asarray(pixels, np.float64) - self.intrinsics[:2, 2]) / np.diag(self.intrinsics)[:2]
        if self.distortion.fisheye:
            return cv2.fisheye.distortPoints(rays[:, None], self.source, self._coefficients)[:, 0]
        # Written out: cv2.projectPoints takes its derivatives, too, and GB of memory for them.
        k1, k2, p1, p2, k3, k4, k5, k6 = np.pad(self._coefficients, (0, 8 - len(self._coefficients)))
        x, y = rays.T
        r2 = x * x + y * y
        radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
        bent_x = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)
        bent_y = y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y
        return np.column_stack([bent_x, bent_y]) * np.diag(self.source)[:2] + self.source[:2, 2]

    def image(self, image: np.ndarray) -> np.ndarray:
        """The pinhole image [H, W, 3] of a distorted one."""
        return cv2.remap(image, *self._maps, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        """For each pixel of the pinhole image x and y in the distorted one, float32."""
        make = cv2.fisheye.initUndistortRectifyMap if self.distortion.fisheye else cv2.initUndistortRectifyMap
        x, y = make(self.source, self._coefficients, np.eye(3), self.intrinsics, self.size[::-1], cv2.CV_32FC1)
        return x, y

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, cached by key: most frames of a capture need the same result."""
        kept = self._kept.get(key)
        if kept is None:
            kept = make()
            self._kept = dict([*self._kept.items()][-1:]) | {key: kept}  # of the depth and of its mask
        return kept


@lru_cache(maxsize=1)  # frames of a capture mostly have one camera; maps are as large as images
def _lens(intrinsics: bytes, distortion: Distortion, height: int, width: int) -> Lens:
    return Lens(np.frombuffer(intrinsics).reshape(3, 3), distortion, height, width)


def lens_of(intrinsics: np.ndarray, distortion: Distortion, height: int, width: int) -> Lens:
    """The lens of a camera, made once for frames that share it."""
    return _lens(intrinsics.astype(np.float64).tobytes(), distortion, height, width)
