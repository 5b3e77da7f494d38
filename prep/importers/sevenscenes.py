"""7-Scenes: frame-NNNNNN.{color,depth,pose}, camera-to-world with OpenCV's axes, depth in millimeters.

12-Scenes, 3RScan and the exporter of ScanNet's .sens write the same, and the cameras into a file _info.txt or info.txt.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from prep.importers.cameras import OpenCVCamera, inverted, pinhole, read_matrix
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, by_stem, one_capture

T = TypeVar("T")
TITLE = "frame-NNNNNN.{color,depth,pose} (7-Scenes, 12-Scenes, 3RScan)"
INTRINSICS_FILE = "camera-intrinsics.txt"
INFO_FILES = ("_info.txt", "info.txt", "../_info.txt", "../info.txt")
COLOR_KEY, DEPTH_KEY = "m_calibrationColorIntrinsic", "m_calibrationDepthIntrinsic"
INFO_KEYS = (COLOR_KEY, DEPTH_KEY, "m_depthShift", "m_colorHeight", "m_colorWidth")
SEQUENCE = re.compile(r"seq-\d+")  # names of a room's sequences
DEFAULT, DEFAULT_SIZE = (585.0, 585.0, 320.0, 240.0), (480, 640)  # the dataset's


def is_there(folder: Path) -> bool:
    return any(folder.glob("frame-*.pose.txt"))


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError that names the file of the cameras, if it is not readable."""
    cameras, files = _cameras(folder, intrinsics)
    frames, unusable, images = [], [], by_stem(folder)
    poses = sorted(folder.glob("frame-*.pose.txt"))
    for pose in poses:
        stem = pose.name.removesuffix(".pose.txt")
        image = images.get(f"{stem}.color", folder / f"{stem}.color.png")
        depths = (folder / f"{stem}.depth{suffix}" for suffix in (".png", ".pgm"))
        depth = next((path for path in depths if path.exists()), None)
        try:
            extrinsics = inverted(read_matrix(pose.read_text(), 4, 4))
        except ValueError as error:
            unusable.append((pose.name, str(error)))
            continue
        frames.append(
            Frame(
                name=stem,
                path=image.name,
                image=image,
                size=cameras.size,
                depth=None if depth is None else DepthFile(path=depth, unit=cameras.unit, intrinsics=cameras.depth),
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=cameras.color),
            )
        )
    room = folder.resolve().parent if SEQUENCE.fullmatch(folder.resolve().name) else None
    return one_capture(folder, frames, unusable, [*poses, *files], True, site=room)


@dataclass(frozen=True, kw_only=True)
class _Cameras:
    """Intrinsics [3, 3] of the images, and of the depths if they differ; unit: of a step of depth, in meters. size:
    (height, width) of the only images that the intrinsics are known to be of."""

    color: np.ndarray
    depth: np.ndarray | None = None
    unit: float = 1e-3
    size: tuple[int, int] | None = None


def _cameras(folder: Path, intrinsics: Intrinsics | None) -> tuple[_Cameras, list[Path]]:
    """And the files that say them. Depths of an info file have a camera of their own, whatever that of the images."""
    said, files = _Cameras(color=pinhole(*DEFAULT), size=DEFAULT_SIZE), []
    info = next((path for name in INFO_FILES if _is_info(path := folder / name)), None)
    if info is not None:
        said, files = _parsed(info, _read_info), [info]
    if (file := folder / INTRINSICS_FILE).is_file():
        matrix = _parsed(file, lambda text: read_matrix(text, 3, 3))
        said, files = replace(said, color=matrix, size=None), [*files, file]
    if intrinsics is not None:
        said = replace(said, color=pinhole(*intrinsics), size=None)
    return said, files


def _parsed(path: Path, parse: Callable[[str], T]) -> T:
    """Raises ValueError that names the file."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as intrinsics ({error})") from error


def _is_info(path: Path) -> bool:
    return path.is_file() and COLOR_KEY in path.read_text(errors="replace")


def _read_info(text: str) -> _Cameras:
    """Of lines `key = numbers`. Raises ValueError."""
    values = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    missing = [key for key in INFO_KEYS if key not in values]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    color, depth = (read_matrix(values[key], 4, 4)[:3, :3] for key in (COLOR_KEY, DEPTH_KEY))
    shift, height, width = (float(values[key]) for key in INFO_KEYS[2:])
    if not 0 < shift < math.inf:
        raise ValueError(f"m_depthShift {shift:g}: expected more than 0")
    return _Cameras(color=color, depth=depth, unit=1 / shift, size=(int(height), int(width)))
