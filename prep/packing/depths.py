"""Depth as layouts have it, and as it is stored: half floats of the image's size, picked, never averaged."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from prep.importers.source import DepthFile, Frame
from prep.packing.depth_files import read_depth
from prep.packing.lens import Lens
from prep.packing.reading import BadFrameError, read_file, read_image, read_png
from shards.geometry import are_scattered, nearest, project, put_points, rounded

FAR_PERCENTILE = 98.0  # of valid stereo depths: what lies farther is mostly noise
Mask = tuple[Path, int]  # a file, and the number above which depth counts
HALF_RANGE = (2.0**-14, 65504.0)  # of half floats with full precision
MAX_ASPECT = 1.02  # of a depth map over its image
NEAR_CENTER = 0.1  # of a side: where principal points are
COARSE = 2 / 3  # of the image's rows: above that, training's crops would take a scattered map for a full one
KEPT_SCALES = (1e-2, 1e3)  # of median depths that are stored as they are
MAX_SCALE = 2.0**30
SATURATED = 65535  # of 16-bit depths: unknown, or beyond what can be counted
ROW_STEP = 8  # of the rows that tell whether depths are scattered: picked, most of them would be lost
BACKGROUND = 65504.0  # the largest half float, and other numbers so far: what renderers write where there is nothing
GAP = 16  # times as far as all else: where a smaller number is background
MIN_SCENE = 0.005  # of the known pixels: fewer may be strays in front of a wall


Affine = list[tuple[float, float]]  # factor and offset of rows, and of columns


def _pixels(
    places: Iterable[np.ndarray], to_map: Affine, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The rows and columns of a map of this shape nearest to places in the source, and whether they lie in it."""
    moved = [scale * place + offset for place, (scale, offset) in zip(places, to_map, strict=True)]
    rows, columns = (nearest(place, n) for place, n in zip(moved, shape, strict=True))
    return rows, columns, [(place >= -0.5) & (place <= n - 0.5) for place, n in zip(moved, shape, strict=True)]


class Target:
    """The stored image of a frame, and where its pixels lie in the source image, before any quarter turn.

    source, size: (height, width) of the source and the stored image; factor: (y, x) scale of edges from source to
    stored; lens, intrinsics [3, 3]: of the source; quarter_turns: counterclockwise, applied last.
    """

    def __init__(
        self,
        source: tuple[int, int],
        size: tuple[int, ...],
        factor: tuple[float, ...],
        lens: Lens | None,
        intrinsics: np.ndarray,
        quarter_turns: int = 0,
    ) -> None:
        self.source, self.size, self.factor, self.lens = source, size, factor, lens
        self.intrinsics, self.quarter_turns = intrinsics, quarter_turns

    def pick(self, values: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
        """For each stored pixel, the nearest of `values` [h, w], a map of the source's view at any size.

        own: intrinsics [3, 3] of the map's camera, if they differ; pixels that it does not see become 0.
        """
        shape = values.shape[0], values.shape[1]
        if self.lens is None:
            if shape == self.size and own is None:
                return values
            places = [(np.arange(n) + 0.5) / f - 0.5 for n, f in zip(self.size, self.factor, strict=True)]
            rows, columns, inside = _pixels(places, self._to_map(shape, own), shape)
            rows, inside = rows[:, None], inside[0][:, None] & inside[1]
        else:
            rows, columns, inside = self.lens.once(
                (self.size, self.factor, shape, None if own is None else own.tobytes()),
                lambda: self._through_lens(self._to_map(shape, own), shape),
            )
        picked = values[rows, columns]
        if own is not None:
            picked = np.where(inside, picked, values.dtype.type(0))
        return picked.reshape(self.size)

    def _through_lens(self, to_map: Affine, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As _pixels, for each pixel of the stored image."""
        assert self.lens is not None
        y, x = np.mgrid[: self.size[0], : self.size[1]].reshape(2, -1)
        full = np.column_stack([(x + 0.5) / self.factor[1] - 0.5, (y + 0.5) / self.factor[0] - 0.5])
        rows, columns, inside = _pixels(self.lens.to_source(full).T[::-1], to_map, shape)
        return rows, columns, inside[0] & inside[1]

    def scatter(self, depth: np.ndarray, own: np.ndarray | None) -> np.ndarray:
        """Put each known depth of a map [h, w], coarse or scattered, in one pixel; gaps stay empty."""
        rows, columns = np.nonzero(depth > 0)
        (row_scale, row_offset), (column_scale, column_offset) = self._to_map(depth.shape, own)
        pixels = np.column_stack([(columns - column_offset) / column_scale, (rows - row_offset) / row_scale])
        if self.lens is not None:
            pixels = self.lens.from_source(pixels)
        x, y = ((pixels + 0.5) * self.factor[::-1] - 0.5).T
        seen = np.isfinite(x) & np.isfinite(y)
        return put_points(y[seen], x[seen], depth[rows, columns][seen], self.size)

    def _to_map(self, shape: tuple[int, ...], own: np.ndarray | None) -> Affine:
        """Factor and offset of the rows, and of the columns, of source pixels in a map of this shape."""
        if own is None:
            return [(n / m, (n / m - 1) / 2) for n, m in zip(shape, self.source, strict=True)]
        scales = [own[axis, axis] / self.intrinsics[axis, axis] for axis in (1, 0)]
        return [
            (scale, own[axis, 2] - scale * self.intrinsics[axis, 2]) for axis, scale in zip((1, 0), scales, strict=True)
        ]

    def place(self, pixels: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """A depth map of the stored size with depths [n] at pixels [n, 2], the nearest where several meet."""
        seen = np.isfinite(pixels).all(axis=1)
        (x, y), depths = (rounded(place) for place in pixels[seen].T), depths[seen]
        inside = (x >= 0) & (y >= 0) & (x < self.size[1]) & (y < self.size[0])
        found = np.full(self.size, np.inf, np.float32)
        np.minimum.at(found, (y[inside], x[inside]), depths[inside].astype(np.float32))
        return np.where(np.isfinite(found), found, np.float32(0))


def stored_depth(
    frame: Frame, target: Target, extrinsics: np.ndarray, intrinsics: np.ndarray
) -> tuple[np.ndarray, float, float | None]:
    """Half floats to store, 0 where unknown, their scale factor, and the median known depth (None: none).

    extrinsics [3, 4], intrinsics [3, 3]: the stored image's camera, before it is turned. The median is in the units of
    the translations. Raises BadFrameError.
    """
    depth, mask = frame.depth, None if frame.mask is None else (frame.mask, frame.mask_above)
    if isinstance(depth, DepthFile) and depth.encoding == "half":
        halves, scale, median = _stored_halves(depth, mask, target)
    else:
        if isinstance(depth, DepthFile):
            values = _placed(depth, target)
        else:
            points = depth.points if depth is not None else np.empty((0, 3))
            pixels, z = project(points.T, extrinsics, intrinsics)
            values = target.place(pixels.T[z > 0], z[z > 0])
        if frame.depth_range is not None:
            near, far = frame.depth_range
            values = np.where((values >= near) & (values <= far), values, np.float32(0))
        halves, scale, median = _as_halves(_masked(values, mask, target))
    return np.rot90(halves, target.quarter_turns), scale, median


def _stored_halves(depth: DepthFile, mask: Mask | None, target: Target) -> tuple[np.ndarray, float, float | None]:
    """As stored_depth, for a file of half floats: unchanged, but without the farthest stereo depths."""
    halves = target.pick(_checked(read_png(depth.path, "depth", np.uint16), target)).view(np.float16)
    valid = np.isfinite(halves) & (halves > 0)
    halves = _masked(np.where(valid, halves, np.float16(0)), mask, target)
    known = halves[halves > 0].astype(np.float32)
    if not len(known):
        return halves, depth.unit, None
    median, far = np.percentile(known, (50, FAR_PERCENTILE))
    if depth.kind == "stereo":
        halves = np.where(halves <= far, halves, np.float16(0))
    return halves, depth.unit, float(median) * depth.unit


def _placed(depth: DepthFile, target: Target) -> np.ndarray:
    """The depths of a file, in the units of the translations, where they belong: float32 of the stored size."""
    values = read_depth(depth, target.source)
    aspects = [shape[1] / shape[0] for shape in (values.shape, target.source)]
    if depth.intrinsics is None and not 1 / MAX_ASPECT < aspects[0] / aspects[1] < MAX_ASPECT:
        raise BadFrameError("depth is not of the image's shape", f"{values.shape} against {target.source}")
    if depth.intrinsics is not None and not _fits(depth.intrinsics, values.shape):
        raise BadFrameError("depth is not of the size that its intrinsics are of", f"{values.shape}")
    if values.shape[0] < COARSE * target.size[0] or are_scattered(_known(values[::ROW_STEP])):
        values = target.scatter(_known(values), depth.intrinsics)
    else:
        values = _known(target.pick(values, depth.intrinsics))
    return values * np.float32(depth.unit)


def _fits(own: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a map's own principal point is near its center, as it is unless the map was scaled."""
    return all(abs((own[axis, 2] + 0.5) / n - 0.5) < NEAR_CENTER for axis, n in ((0, shape[1]), (1, shape[0])))


def _known(values: np.ndarray) -> np.ndarray:
    """float32 [h, w], 0 where unknown."""
    if values.dtype == np.uint16:
        return np.where(values != SATURATED, values, 0).astype(np.float32)
    known = np.where(np.isfinite(values) & (values > 0), values, 0).astype(np.float32)
    return np.where((known < _background(known)) & (known != BACKGROUND), known, 0)


def _background(depths: np.ndarray) -> float:
    """Where the depths begin that stand for nothing, as 1000 or 1e10 behind a scene of meters; inf if there are none.

    Most of them are one number, far behind all others, of which some may be blends with it. A pixel of such sky would
    outweigh a scene.
    """
    known = depths[depths > 0]
    there = np.flatnonzero(np.bincount(known.view(np.int32) >> 21))  # quarters of octaves of float32
    gaps = np.flatnonzero(np.diff(there) > 4 * np.log2(GAP))
    begin = float(np.int32(there[gaps[-1] + 1] << 21).view(np.float32)) if len(gaps) else 0.0
    beyond = known[known >= begin]
    farthest = float(beyond.max(initial=0))
    is_scene = len(known) - len(beyond) < MIN_SCENE * len(known) and farthest < BACKGROUND
    if is_scene or 2 * np.count_nonzero(beyond == farthest) <= len(beyond):
        return np.inf
    return begin or farthest


def _checked(values: np.ndarray, target: Target) -> np.ndarray:
    if values.shape != target.source:
        raise BadFrameError("depth is not of the image's size", f"{values.shape} against {target.source}")
    return values


def _masked(values: np.ndarray, mask: Mask | None, target: Target) -> np.ndarray:
    """The depths, 0 where a mask says to ignore them."""
    if mask is None:
        return values
    array = read_image(read_file(mask[0], "depth mask"), "depth mask")
    array = array[..., :3].max(axis=2) if array.ndim == 3 else array  # without what is opaque
    if array.shape != target.source:
        raise BadFrameError("depth mask is not of the image's size", f"{array.shape} against {target.source}")
    return np.where(target.pick(array) > mask[1], values, values.dtype.type(0))


def _as_halves(values: np.ndarray) -> tuple[np.ndarray, float, float | None]:
    """Depths [H, W] in float32 as half floats and their factor: 1, unless that would lose precision."""
    known = values[values > 0]
    if not len(known):
        return np.zeros(values.shape, np.float16), 1.0, None
    median = float(np.median(known))
    if median > MAX_SCALE:
        raise BadFrameError("depths are too large", f"their median is {median:.3g}")
    scale = 1.0 if KEPT_SCALES[0] < median < KEPT_SCALES[1] else 2.0 ** round(np.log2(median))
    scaled = values / np.float32(scale)
    fits = (scaled >= HALF_RANGE[0]) & (scaled <= HALF_RANGE[1])
    return np.where(fits, scaled, 0).astype(np.float16), scale, median
