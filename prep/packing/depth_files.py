"""The numbers of a depth file, in every format that layouts have."""

from __future__ import annotations

import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np

from prep.importers.source import DepthFile
from prep.packing.reading import BadFrameError, read_file, read_image, read_png


def read_depth(depth: DepthFile, image_size: tuple[int, int]) -> np.ndarray:
    """The numbers of a depth file [h, w]. Raises BadFrameError."""
    if depth.encoding == "uint16":
        return read_png(depth.path, "depth", np.uint16)
    if depth.encoding == "colmap":
        return _read_colmap(depth.path)
    if depth.encoding == "record3d":
        return _read_record3d(depth.path, image_size)
    return read_float(depth.path)


def read_float(path: Path) -> np.ndarray:
    suffix = path.suffix.lower()
    try:
        if suffix == ".exr":
            values = _read_exr(path)
        elif suffix in (".npy", ".npz"):
            loaded = np.load(BytesIO(read_file(path, "depth")), allow_pickle=False)
            values = _only_array(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
        else:
            values = read_image(read_file(path, "depth"), "depth")
        if values.dtype.kind != "f":
            raise BadFrameError("depth is of integers, whose unit is not known")
        values = np.squeeze(np.asarray(values, np.float32))
    except (ValueError, EOFError, OSError, IndexError, zipfile.BadZipFile, zlib.error) as error:
        raise error if isinstance(error, BadFrameError) else BadFrameError("depth is damaged", str(error)) from error
    values = values[..., 0] if values.ndim == 3 else values
    if values.ndim != 2:
        raise BadFrameError("depth is not a map of numbers", f"{values.shape}")
    return values


def _only_array(arrays: np.lib.npyio.NpzFile) -> np.ndarray:
    """That called depth, or the only one."""
    if "depth" not in arrays.files and len(arrays.files) != 1:
        raise BadFrameError("depth is one of several arrays, and none is called depth", ", ".join(arrays.files))
    return arrays["depth" if "depth" in arrays.files else arrays.files[0]]


def _read_exr(path: Path) -> np.ndarray:
    """The channel of a depth, or the only one: OpenCV's wheels cannot read it."""
    try:
        import OpenEXR
    except ImportError as error:
        raise BadFrameError("EXR needs .venv/bin/pip install -c constraints.txt -e '.[exr]'") from error
    if not path.is_file():
        raise BadFrameError("depth is missing")
    try:
        with OpenEXR.File(str(path)) as file:
            channels = file.channels()
            return channels[_depth_channel([*channels])].pixels
    except RuntimeError as error:
        raise BadFrameError("depth is damaged", str(error)) from error


def _depth_channel(names: list[str]) -> str:
    """Which of these channels holds depths: ViewLayer.Depth.Z, of several. Raises BadFrameError."""
    if len(names) == 1:
        return names[0]
    parts = [name.lower().split(".") for name in names]
    for fits in (
        lambda part: part in (["z"], ["depth"]),
        lambda part: "depth" in part,
        lambda part: part[-1] == "z" and [*part[:-1], "x"] not in parts,  # else it is of a vector
        lambda part: part in (["y"], ["r"]),
    ):
        found = [name for name, part in zip(names, parts, strict=True) if fits(part)]
        if len(found) == 1:
            return found[0]
    raise BadFrameError("depth is one of several channels, and not just one is called Z or depth", ", ".join(names))


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


def _read_record3d(path: Path, image_size: tuple[int, int]) -> np.ndarray:
    """LZFSE of float32; the map's size follows from their count and the image's aspect ratio."""
    try:
        import liblzfse
    except ImportError as error:
        raise BadFrameError("Record3D needs .venv/bin/pip install -c constraints.txt -e '.[record3d]'") from error
    try:
        values = np.frombuffer(liblzfse.decompress(read_file(path, "depth")), "<f4")
    except (ValueError, liblzfse.error) as error:
        raise error if isinstance(error, BadFrameError) else BadFrameError("depth is damaged", str(error)) from error
    scale = (len(values) / (image_size[0] * image_size[1])) ** 0.5
    height, width = (round(n * scale) for n in image_size)
    if not len(values) or height * width != len(values):
        raise BadFrameError("depth is not of the image's shape", f"{len(values)} numbers against {image_size}")
    return values.reshape(height, width)
