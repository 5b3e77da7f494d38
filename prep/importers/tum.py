"""TUM RGB-D: lists of images, depths and poses by time, which are not synchronous."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from prep.importers.cameras import OpenCVCamera, from_quaternion, interpolated, inverted, pinhole
from prep.importers.source import Capture, DepthFile, Distortion, Frame, Intrinsics, one_capture

TITLE = "rgb.txt, depth.txt, groundtruth.txt (TUM RGB-D)"
MOST_APART = 0.02  # seconds between an image and its depth, or the nearest pose
DEPTH_UNIT = 1 / 5000  # meters a step
# The dataset's own cameras, by the number in the names of its folders, as freiburg1.
KNOWN = {
    "1": (517.3, 516.5, 318.6, 255.3),
    "2": (520.9, 521.0, 325.1, 249.7),
    "3": (535.4, 539.2, 320.1, 247.6),
}
# Images of the third are rectified; those of the others are not (vision.in.tum.de, "Intrinsic Camera Calibration").
LENSES = {
    "1": Distortion(coefficients=(0.2624, -0.9531, -0.0054, 0.0026, 1.1633)),
    "2": Distortion(coefficients=(0.2312, -0.7849, -0.0033, -0.0001, 0.9172)),
}


def is_there(folder: Path) -> bool:
    return (folder / "groundtruth.txt").is_file() and (folder / "rgb.txt").is_file()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError if the camera is not known."""
    number = _number(folder)
    lens = LENSES.get(number) if intrinsics is None else None
    intrinsics = intrinsics or KNOWN.get(number)
    if intrinsics is None:
        raise ValueError(f"{folder}: TUM's layout does not say the camera: give --intrinsics fx,fy,cx,cy")
    images, depths = _listed(folder / "rgb.txt"), _listed(folder / "depth.txt")
    times, poses = _poses(folder / "groundtruth.txt")
    depth_times = np.array([time for time, _ in depths])
    frames, unusable = [], []
    for time, name in images:
        near = int(np.abs(depth_times - time).argmin()) if depths else None
        depth = None
        if near is not None and abs(depth_times[near] - time) <= MOST_APART:
            depth = DepthFile(path=folder / depths[near][1], unit=DEPTH_UNIT)
        try:
            extrinsics = inverted(interpolated(time, times, poses, MOST_APART))
        except ValueError as error:
            unusable.append((name, str(error)))
            continue
        frames.append(
            Frame(
                name=re.sub(r"\W", "_", Path(name).stem),
                path=name,
                image=folder / name,
                size=None,
                depth=depth,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=pinhole(*intrinsics), distortion=lens),
            )
        )
    files = [path for name in ("rgb", "depth", "groundtruth") if (path := folder / f"{name}.txt").is_file()]
    return one_capture(folder, frames, unusable, files, True)


def _number(folder: Path) -> str:
    """Of the dataset's camera; empty for other folders."""
    found = re.search(r"freiburg([123])", folder.resolve().name)
    return found[1] if found else ""


def _rows(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return [line for line in lines if line]


def _listed(path: Path) -> list[tuple[float, str]]:
    """Times and files, by time; several may be of one, where times are rounded. Raises ValueError for other lines."""
    try:
        return sorted((float(time), name) for time, name, *_ in _rows(path))
    except ValueError as error:
        raise ValueError(f"{path}: expected lines of a time and a file ({error})") from error


def _poses(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] in order, and camera-to-world [n, 4, 4], of those that are finite. Raises ValueError."""
    try:
        rows = np.array(_rows(path), np.float64).reshape(-1, 8)
    except ValueError as error:
        raise ValueError(f"{path}: expected lines of t tx ty tz qx qy qz qw ({error})") from error
    rows = rows[np.isfinite(rows).all(axis=1)]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return rows[:, 0], np.array([from_quaternion(row[4:], row[1:4]) for row in rows])
