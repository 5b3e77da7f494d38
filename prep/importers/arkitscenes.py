"""ARKitScenes: lowres_wide.traj, images, intrinsics and depths in millimeters by time, of a phone in any position."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from prep.importers.cameras import SAME_TIME, OpenCVCamera, interpolated, inverted, pinhole, rigid
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, one_capture

TITLE = "lowres_wide.traj, lowres_wide/ or vga_wide/ (ARKitScenes)"
TRAJECTORY = "lowres_wide.traj"
IMAGES = ("vga_wide", "lowres_wide")  # the larger ones first
MOST_APART = 0.2  # seconds from the nearest pose


def is_there(folder: Path) -> bool:
    return (folder / TRAJECTORY).is_file() and any((folder / name).is_dir() for name in IMAGES)


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError for a trajectory of other lines. Images are stored upright: gravity is along the world's z."""
    times, poses = _trajectory(folder / TRAJECTORY)
    kind = next((n for n in IMAGES if _by_time(folder / n) and _by_time(folder / f"{n}_intrinsics")), IMAGES[-1])
    images, cameras, depths = (_by_time(folder / name) for name in (kind, f"{kind}_intrinsics", "lowres_depth"))
    camera_times, depth_times = (np.fromiter(files, np.float64) for files in (cameras, depths))
    frames, unusable = [], []
    turns = _quarter_turns(poses)
    for time, image in images.items():
        name = str(image.relative_to(folder))
        camera = _nearest(cameras, camera_times, time)
        try:
            if camera is None:
                raise ValueError("image without a .pincam")
            width, height, *numbers = map(float, camera.read_text().split())
            size = int(height), int(width)
            extrinsics = inverted(interpolated(time, times, poses, MOST_APART))
            matrix = pinhole(*numbers, corner=True)
        except (OSError, OverflowError, TypeError, ValueError) as error:
            unusable.append((name, str(error)))
            continue
        depth = _nearest(depths, depth_times, time)
        frames.append(
            Frame(
                name=image.stem.replace(".", "_"),
                path=name,
                image=image,
                size=size,
                depth=DepthFile(path=depth, unit=1e-3) if depth is not None else None,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=matrix),
                quarter_turns=turns,
            )
        )
    files = [folder / TRAJECTORY, *cameras.values()]
    return one_capture(folder, frames, unusable, files, True)


def _trajectory(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Times [n] in order, and camera-to-world [n, 4, 4] of the file's camera-from-world. Raises ValueError."""
    try:
        rows = np.array([line.split() for line in path.read_text().splitlines() if line.strip()], np.float64)
        rows = rows.reshape(-1, 7)
    except ValueError as error:
        raise ValueError(f"{path}: expected lines of a time, a rotation and a place ({error})") from error
    rows = rows[np.isfinite(rows).all(axis=1)]
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    poses = [np.linalg.inv(rigid(cv2.Rodrigues(row[1:4])[0], row[4:])) for row in rows]
    return rows[:, 0], np.array(poses).reshape(-1, 4, 4)


def _by_time(folder: Path) -> dict[float, Path]:
    """The files <video>_<time>.<suffix> of a folder, in their order."""
    found = {}
    for path in folder.glob("[!.]*_*.*"):
        try:
            found[float(path.stem.rsplit("_", 1)[1])] = path
        except ValueError:
            continue
    return dict(sorted(found.items()))


def _nearest(files: dict[float, Path], times: np.ndarray, time: float) -> Path | None:
    """The file of a time that is the same but for rounding; times: all of theirs, in order."""
    i = int(np.searchsorted(times, time))
    near = min(times[max(0, i - 1) : i + 1], key=lambda other: abs(other - time), default=np.inf)
    return files[float(near)] if abs(near - time) <= SAME_TIME else None


def _quarter_turns(poses: np.ndarray) -> int:
    """By how many quarters, counterclockwise, most of the images must be turned to stand upright."""
    up = poses[:, 2, :2].sum(axis=0) if len(poses) else np.array([0, -1])  # in the images: x right, y down
    return int(np.argmax([-up[1], up[0], up[1], -up[0]]))
