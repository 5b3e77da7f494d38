"""Depth as layouts have it, and as it is stored: half floats of the image's size, picked, never averaged."""

from __future__ import annotations

import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from prep.importers.source import DepthFile, SparsePoints
from prep.packing.lens import Lens
from prep.packing.reading import BadFrameError, read_file, read_image, read_png
from shards.geometry import nearest, project

FAR_PERCENTILE = 98.0  # of valid stereo depths: what lies farther is mostly noise
Mask = tuple[Path, int]  # a file, and the number above which depth counts
HALF_RANGE = (2.0**-14, 65504.0)  # of half floats with full precision
MAX_ASPECT = 1.02  # of a depth map over its image
KEPT_SCALES = (1e-2, 1e3)  # of median depths that are stored as they are


class Target:
    """The stored image of a frame, and where its pixels lie in the source image.

    source, size: height and width of both; factor: of an edge's place in the stored image, (y, x); lens: between them.
    """

    def __init__(
        self, source: tuple[int, int], size: tuple[int, ...], factor: tuple[float, ...], lens: Lens | None
    ) -> None:
        self.source, self.size, self.factor, self.lens = source, size, factor, lens

    def pick(self, values: np.ndarray) -> np.ndarray:
        """The nearest of values [h, w], of the source's view in any size, for each pixel of the stored image."""
        shape = values.shape[0], values.shape[1]
        if self.lens is None:
            if shape == self.size:
                return values
            scale = [n / m for n, m in zip(shape, self.source, strict=True)]
            rows, columns = (
                nearest((np.arange(n) + 0.5) / f * s - 0.5, m)
                for n, f, s, m in zip(self.size, self.factor, scale, shape, strict=True)
            )
            return values[rows[:, None], columns]
        y, x = np.mgrid[: self.size[0], : self.size[1]].reshape(2, -1)
        full = np.column_stack([(x + 0.5) / self.factor[1] - 0.5, (y + 0.5) / self.factor[0] - 0.5])
        places = self.lens.to_source(full)
        columns, rows = (
            nearest((place + 0.5) * n / m - 0.5, n)
            for place, n, m in zip(places.T, shape[::-1], self.source[::-1], strict=True)
        )
        return values[rows, columns].reshape(self.size)

    def scatter(self, depth: np.ndarray) -> np.ndarray:
        """Each sample of a depth map [h, w] that is coarser than the stored image in one pixel: none is spread."""
        rows, columns = np.nonzero(depth > 0)
        shape = depth.shape
        pixels = np.column_stack(
            [(columns + 0.5) * self.source[1] / shape[1] - 0.5, (rows + 0.5) * self.source[0] / shape[0] - 0.5]
        )
        if self.lens is not None:
            pixels = self.lens.from_source(pixels)
        return self.place((pixels + 0.5) * self.factor[::-1] - 0.5, depth[rows, columns])

    def place(self, pixels: np.ndarray, depths: np.ndarray) -> np.ndarray:
        """A depth map of the stored size with depths [n] at pixels [n, 2], the nearest where several meet."""
        x, y = np.rint(pixels).astype(np.int64).T
        inside = (x >= 0) & (y >= 0) & (x < self.size[1]) & (y < self.size[0]) & np.isfinite(pixels).all(axis=1)
        found = np.full(self.size, np.inf, np.float32)
        np.minimum.at(found, (y[inside], x[inside]), depths[inside].astype(np.float32))
        return np.where(np.isfinite(found), found, np.float32(0))


def stored_depth(
    depth: DepthFile | SparsePoints,
    mask: Mask | None,
    target: Target,
    extrinsics: np.ndarray,
    intrinsics: np.ndarray,
) -> tuple[np.ndarray, float, float | None]:
    """Half floats of the stored size, 0 where unknown, their factor, and the median of what is known (None: nothing).

    extrinsics [3, 4], intrinsics [3, 3]: the stored image's camera. The median is in the units of the translations.
    """
    if isinstance(depth, SparsePoints):
        pixels, z = project(depth.points.T, extrinsics, intrinsics)
        values = target.place(pixels.T[z > 0], z[z > 0])
        return _as_halves(_masked(values, mask, target), 1.0)
    if depth.encoding == "half":
        halves = target.pick(_checked(read_png(depth.path, "depth", np.uint16), target)).view(np.float16)
        valid = np.isfinite(halves) & (halves > 0)
        return _cut(np.where(valid, halves, np.float16(0)), depth, mask, target)
    values = read_depth(depth)
    aspects = [shape[1] / shape[0] for shape in (values.shape, target.source)]
    if not 1 / MAX_ASPECT < aspects[0] / aspects[1] < MAX_ASPECT:
        raise BadFrameError("depth is not of the image's shape", f"{values.shape} against {target.source}")
    is_fine = values.shape[0] >= target.size[0]
    values = target.pick(values) if is_fine else target.scatter(values)
    return _as_halves(_masked(values.astype(np.float32), mask, target), depth.unit)


def read_depth(depth: DepthFile) -> np.ndarray:
    """The numbers of a depth file as float32 [h, w], 0 where unknown. Raises BadFrameError."""
    if depth.encoding == "uint16":
        values = read_png(depth.path, "depth", np.uint16).astype(np.float32)
    elif depth.encoding == "colmap":
        values = _read_colmap(depth.path)
    else:
        values = _read_float(depth.path)
    valid = np.isfinite(values) & (values > 0)
    if depth.nothing is not None:
        valid &= values != depth.nothing
    return np.where(valid, values, np.float32(0))


def _read_float(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    try:
        if suffix == ".exr":
            values = _read_exr(path)
        elif suffix in (".npy", ".npz"):
            loaded = np.load(BytesIO(read_file(path, "depth")), allow_pickle=False)
            values = loaded[loaded.files[0]] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
        else:
            values = read_image(read_file(path, "depth"), "depth")
        values = np.squeeze(np.asarray(values, np.float32))
    except (ValueError, EOFError, OSError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise error if isinstance(error, BadFrameError) else BadFrameError("depth is damaged", str(error)) from error
    values = values[..., 0] if values.ndim == 3 else values
    if values.ndim != 2:
        raise BadFrameError("depth is not a map of numbers", f"{values.shape}")
    return values


def _read_exr(path: Path) -> np.ndarray:
    """The channel of a depth, or the first: OpenCV's wheels cannot read it."""
    try:
        import OpenEXR
    except ImportError as error:
        raise BadFrameError("EXR needs .venv/bin/pip install -c constraints.txt -e '.[exr]'") from error
    if not path.is_file():
        raise BadFrameError("depth is missing")
    try:
        with OpenEXR.File(str(path)) as file:
            channels = file.channels()
            name = next((name for name in ("Z", "depth", "Y", "R") if name in channels), next(iter(channels)))
            return channels[name].pixels
    except RuntimeError as error:
        raise BadFrameError("depth is damaged", str(error)) from error


def _read_colmap(path: Path) -> np.ndarray:
    """COLMAP's dense maps: width&height&channels& in ASCII, then float32, columns first."""
    data = read_file(path, "depth")
    try:
        *sizes, numbers = data.split(b"&", 3)
        width, height, channels = map(int, sizes)
        values = np.frombuffer(numbers, "<f4").reshape((width, height, channels), order="F")
    except ValueError as error:
        raise BadFrameError("depth is not a depth map of COLMAP", str(error)) from error
    return np.ascontiguousarray(values[..., 0].T)


def _checked(values: np.ndarray, target: Target) -> np.ndarray:
    if values.shape != target.source:
        raise BadFrameError("depth is not of the image's size", f"{values.shape} against {target.source}")
    return values


def _masked(values: np.ndarray, mask: Mask | None, target: Target) -> np.ndarray:
    """The depths, 0 where a mask says to ignore them."""
    if mask is None or not mask[0].exists():
        return values
    array = read_image(read_file(mask[0], "depth mask"), "depth mask")
    array = array.max(axis=2) if array.ndim == 3 else array
    if array.shape != target.source:
        raise BadFrameError("depth mask is not of the image's size", f"{array.shape} against {target.source}")
    return np.where(target.pick(array) > mask[1], values, values.dtype.type(0))


def _cut(
    halves: np.ndarray, depth: DepthFile, mask: Mask | None, target: Target
) -> tuple[np.ndarray, float, float | None]:
    """Without what lies farthest, if it is of stereo."""
    halves = _masked(halves, mask, target)
    known = halves[halves > 0].astype(np.float32)
    if not len(known):
        return halves, depth.unit, None
    median, far = np.percentile(known, (50, FAR_PERCENTILE))
    if depth.kind == "stereo":
        halves = np.where(halves <= far, halves, np.float16(0))
    return halves, depth.unit, float(median) * depth.unit


def _as_halves(values: np.ndarray, unit: float) -> tuple[np.ndarray, float, float | None]:
    """Depths [H, W] in float32, times unit, as half floats and their factor: 1, unless that would lose precision."""
    values = values * np.float32(unit)
    known = values[values > 0]
    if not len(known):
        return np.zeros(values.shape, np.float16), 1.0, None
    median = float(np.median(known))
    scale = 1.0 if KEPT_SCALES[0] < median < KEPT_SCALES[1] else 2.0 ** round(np.log2(median))
    scaled = values / np.float32(scale)
    fits = (scaled >= HALF_RANGE[0]) & (scaled <= HALF_RANGE[1])
    return np.where(fits, scaled, 0).astype(np.float16), scale, median
