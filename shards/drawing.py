"""Pictures of frames, depths and cameras, for people to look at. Images are RGB uint8 [H, W, 3]."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

GAP, TEXT_HEIGHT, BAR_WIDTH = 6, 22, 90
BACKGROUND, UNKNOWN, INK = 255, 128, (40, 40, 40)
NEAR_FAR_PERCENTILES = (1, 99)
FRUSTUM = 0.12  # length of a drawn camera, of the picture's side


def jpeg(image: np.ndarray, quality: int = 88) -> bytes:
    return cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def text(line: str, width: int) -> np.ndarray:
    """One line of text, at least `width` wide: [TEXT_HEIGHT, width or more, 3]."""
    (needed, _), _ = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)
    picture = np.full((TEXT_HEIGHT, max(width, needed + 8), 3), BACKGROUND, np.uint8)
    cv2.putText(picture, line, (4, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    return picture


def row(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Images side by side; lower ones are filled up with background."""
    height = max(len(cell) for cell in cells)
    padded = [
        np.pad(cell, ((0, height - len(cell) + GAP), (0, GAP), (0, 0)), constant_values=BACKGROUND) for cell in cells
    ]
    return np.concatenate(padded, axis=1)


def stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Images one below the other; narrower ones are filled up with background."""
    width = max(picture.shape[1] for picture in rows)
    return np.concatenate(
        [np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=BACKGROUND) for p in rows]
    )


def near_and_far(depth: np.ndarray) -> tuple[float, float]:
    """The range of known depths to color; 0 and 1 without any."""
    known = depth[np.isfinite(depth) & (depth > 0)]
    if not known.size:
        return 0.0, 1.0
    near, far = np.percentile(known, NEAR_FAR_PERCENTILES)
    return float(near), float(far)


def color_depth(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Depth [..., H, W] -> RGB [..., H, W, 3]; near is red, far is blue, gray is unknown."""
    fraction = 1 - np.clip((depth - near) / max(far - near, 1e-9), 0, 1)
    flat = (np.nan_to_num(fraction) * 255).astype(np.uint8).reshape(-1, 1)
    colored = cv2.applyColorMap(flat, cv2.COLORMAP_TURBO)[..., ::-1].reshape(*depth.shape, 3)
    return np.where((np.isfinite(depth) & (depth > 0))[..., None], colored, np.uint8(UNKNOWN))


def as_dots(depth: np.ndarray) -> np.ndarray:
    """Scattered depths [H, W] as dots that can be seen, the nearest where they meet."""
    known = np.where(depth > 0, depth, np.inf).astype(np.float32)
    dots = cv2.erode(known, np.ones((3, 3), np.uint8))
    return np.where(np.isfinite(dots), dots, 0)


def color_amount(fraction: np.ndarray) -> np.ndarray:
    """Numbers [..., H, W] from 0, black, to 1, white -> RGB [..., H, W, 3]; NaN is gray."""
    flat = (np.nan_to_num(np.clip(fraction, 0, 1)) * 255).astype(np.uint8).reshape(-1, 1)
    colored = cv2.applyColorMap(flat, cv2.COLORMAP_HOT)[..., ::-1].reshape(*fraction.shape, 3)
    return np.where(np.isfinite(fraction)[..., None], colored, np.uint8(UNKNOWN))


def scale_bar(height: int, near: float, far: float) -> np.ndarray:
    """What the colors of color_depth mean: [height, BAR_WIDTH, 3]."""
    bar = np.full((height, BAR_WIDTH, 3), BACKGROUND, np.uint8)
    top, bottom = TEXT_HEIGHT, height - GAP
    ramp = np.linspace(near, far, bottom - top, dtype=np.float32)[:, None].repeat(14, axis=1)
    bar[top:bottom, 4:18] = color_depth(np.maximum(ramp, 1e-12), near, far)
    for fraction in (0, 0.5, 1):
        y = int(top + 10 + fraction * (bottom - top - 14))
        label = f"{near + fraction * (far - near):.3g}"
        cv2.putText(bar, label, (24, y), cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)
    return bar


def top_down(extrinsics: np.ndarray, intrinsics: np.ndarray, points: np.ndarray, side: int) -> np.ndarray:
    """Cameras [S, 3, 4], [S, 3, 3] and points [N, 3] of the world, seen against the cameras' mean "down".

    The first camera is red, the last blue; points are gray. Returns [side, side, 3].
    """
    rotations = extrinsics[:, :, :3]
    centers = -np.einsum("sji,sj->si", rotations, extrinsics[:, :, 3])
    down = rotations[:, 1].mean(axis=0)
    down /= max(np.linalg.norm(down), 1e-9)
    right = rotations[0, 0] - rotations[0, 0] @ down * down
    right /= max(np.linalg.norm(right), 1e-9)
    plane = np.stack([right, -np.cross(right, down)])  # what the first camera looks at lies above it
    cameras, ground = centers @ plane.T, points @ plane.T
    low, high = np.percentile(np.concatenate([cameras, ground]), [1, 99], axis=0)
    low, high = np.minimum(low, cameras.min(0)), np.maximum(high, cameras.max(0))
    scale = side * (1 - 2 * FRUSTUM) / max((high - low).max(), 1e-9)

    def place(xy: np.ndarray) -> np.ndarray:
        return (xy - (low + high) / 2) * scale + side / 2

    picture = np.full((side, side, 3), BACKGROUND, np.uint8)
    x, y = np.round(place(ground)).astype(int).T
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    picture[y[inside], x[inside]] = 185
    colors = color_depth(np.linspace(1, 2, len(cameras))[None], 1, 2)[0]
    for center, rotation, k, color in zip(place(cameras), rotations, intrinsics, colors, strict=True):
        half = k[0, 2] / k[0, 0]  # tangent of half the horizontal field of view
        corners = [plane @ (rotation[2] + sign * half * rotation[0]) * FRUSTUM / 2 * side for sign in (-1, 1)]
        outline = np.round([center, center + corners[0], center + corners[1]]).astype(np.int32)
        cv2.polylines(picture, [outline], True, tuple(map(int, color)), 1, cv2.LINE_AA)
    return picture


def sample(image: np.ndarray, pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The interpolated values [h, w, 3] of an image at pixels [2, h * w], gray where these are outside or NaN."""
    x, y = np.where(np.isfinite(pixels), pixels, -9).astype(np.float32).reshape(2, *shape)
    outside = (x < 0) | (x > image.shape[1] - 1) | (y < 0) | (y > image.shape[0] - 1)
    values = cv2.remap(image, x, y, cv2.INTER_LINEAR)
    values[outside] = UNKNOWN
    return values
