"""A frame cut to the shape of a step, about its principal point."""

from __future__ import annotations

import cv2
import numpy as np

from shards.geometry import nearest
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
    """The same crop of a depth map, each pixel taken from its nearest one: depths are never averaged. [H, W].

    Of sparse points, or of depth coarser than the image, each has its one pixel: picking would lose most of them.
    """
    if are_scattered(depth):
        return crop_points(depth, center, scale, shape)
    columns = nearest((np.arange(shape.width) - (shape.width - 1) / 2) / scale + center[0], depth.shape[1])
    rows = nearest((np.arange(shape.height) - (shape.height - 1) / 2) / scale + center[1], depth.shape[0])
    return depth[rows][:, columns]


def are_scattered(depth: np.ndarray) -> bool:
    """Whether most of the known pixels of a depth map [H, W] have no known neighbor to their right."""
    known = depth != 0 if depth.dtype != np.float16 else depth.view(np.uint16) != 0  # numpy is slow with half floats
    return bool(2 * np.count_nonzero(known[:, 1:] & known[:, :-1]) < np.count_nonzero(known))


def crop_points(depth: np.ndarray, center: tuple[float, float], scale: float, shape: StepShape) -> np.ndarray:
    """As crop_depth, of scattered points. Where several meet, the nearest is kept: it may hide the others."""
    rows, columns = np.nonzero(depth)
    values = depth[rows, columns]
    y, x = (
        np.rint((places - c) * scale + (n - 1) / 2).astype(np.intp)
        for places, c, n in ((rows, center[1], shape.height), (columns, center[0], shape.width))
    )
    inside = (y >= 0) & (x >= 0) & (y < shape.height) & (x < shape.width)
    found = np.zeros((shape.height, shape.width), depth.dtype)
    farthest_first = np.argsort(values[inside])[::-1]
    found[y[inside][farthest_first], x[inside][farthest_first]] = values[inside][farthest_first]
    return found
