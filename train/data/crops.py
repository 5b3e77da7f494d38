"""A frame cut to the shape of a step, about its principal point."""

from __future__ import annotations

import cv2
import numpy as np

from shards.geometry import are_scattered, move_points, nearest
from train.data.plan import StepShape

CROP_RANGE = (0.8, 1.2)  # of each side, at most 1
MARGIN_PIXELS = 4
MARGIN_FRACTION = 0.3  # of the longer target side, the most of a triangular distribution


def crop_scale(
    size: tuple[int, int], center: tuple[float, float], shape: StepShape, rng: np.random.Generator | None
) -> float:
    """Target pixels a source pixel, so that `shape`, centered on the principal point, lies within the image.

    size: height and width of the image; center: principal point x, y. With an rng each side is first cut to a random
    fraction of itself about the principal point, and a random margin is left around the target.
    """
    sides = [2 * min(c + 0.5, n - 0.5 - c) for c, n in zip(center, size[::-1], strict=True)]  # width, height
    margin = 0.0
    if rng is not None:
        sides = [side * min(1.0, rng.uniform(*CROP_RANGE)) for side in sides]
        margin = MARGIN_PIXELS + rng.triangular(0, 0, MARGIN_FRACTION) * max(shape.height, shape.width)
    return max((shape.width + margin) / sides[0], (shape.height + margin) / sides[1])


def crop_image(
    image: np.ndarray, decoded: float, center: tuple[float, float], scale: float, shape: StepShape
) -> np.ndarray:
    """Resample an image that was decoded at a fraction of its size, with the principal point in the target's center.

    `center` and `scale` are those of the undecoded image. Returns [H, W, 3].
    """
    step = decoded / scale
    x, y = (
        (c + 0.5) * decoded - 0.5 - (n - 1) / 2 * step for c, n in zip(center, (shape.width, shape.height), strict=True)
    )
    return cv2.warpAffine(
        image,
        np.array([[step, 0, x], [0, step, y]]),
        (shape.width, shape.height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def crop_depth(depth: np.ndarray, center: tuple[float, float], scale: float, shape: StepShape) -> np.ndarray:
    """The same crop of a depth map, by nearest neighbor: depths are never averaged. [H, W].

    Points of sparse depth, or of depth coarser than the image, are moved one by one: sampling would lose most.
    """
    if are_scattered(depth):
        offset = (shape.height - 1) / 2 - center[1] * scale, (shape.width - 1) / 2 - center[0] * scale
        return move_points(depth, (scale, scale), offset, (shape.height, shape.width))
    columns = nearest((np.arange(shape.width) - (shape.width - 1) / 2) / scale + center[0], depth.shape[1])
    rows = nearest((np.arange(shape.height) - (shape.height - 1) / 2) / scale + center[1], depth.shape[0])
    return depth[rows][:, columns]
