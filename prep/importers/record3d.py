"""Record3D: an unpacked .r3d, or EXR and JPG: poses camera-to-world with OpenGL's axes, depth in meters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prep.importers.cameras import OpenCVCamera, from_opengl, from_quaternion, pinhole
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, one_capture

TITLE = "metadata or metadata.json, rgbd/ or rgb/ and depth/ (Record3D)"
FILES = ("metadata.json", "metadata")  # the second one in an .r3d
# Folders of images and of depths, and the suffix and encoding of these.
FOLDERS = (("rgbd", "rgbd", ".depth", "record3d"), ("rgb", "depth", ".exr", "float"))


def is_there(folder: Path) -> bool:
    file = _metadata(folder)
    there = file.is_file() and any((folder / images).is_dir() for images, *_ in FOLDERS)
    return there and '"poses"' in file.read_text(encoding="utf-8", errors="replace")  # others have such names, too


def _metadata(folder: Path) -> Path:
    return next((path for name in FILES if (path := folder / name).is_file()), folder / FILES[0])


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError that names the file, and what is wrong with it."""
    path = _metadata(folder)
    images, depths, suffix, encoding = next(place for place in FOLDERS if (folder / place[0]).is_dir())
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        poses = np.array(content["poses"], np.float64)
        size = int(content["h"]), int(content["w"])
        cameras = _cameras(content, len(poses))
    except KeyError as error:
        raise ValueError(f"{path}: has no key {error.args[0]}") from error
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not readable as Record3D's metadata ({error})") from error
    if poses.ndim != 2 or poses.shape[1] != 7:
        raise ValueError(f"{path}: expected poses of 7 numbers (x y z w of a quaternion, a place), found {poses.shape}")
    frames, unusable = [], []
    for number, (pose, camera) in enumerate(zip(poses, cameras, strict=True)):
        image, depth = folder / images / f"{number}.jpg", folder / depths / f"{number}{suffix}"
        name = f"{images}/{image.name}"
        try:
            extrinsics = from_opengl(from_quaternion(pose[:4], pose[4:]))
        except ValueError as error:
            unusable.append((name, str(error)))
            continue
        frames.append(
            Frame(
                name=f"{number:06d}",
                path=name,
                image=image,
                size=size,
                depth=DepthFile(path=depth, encoding=encoding) if depth.exists() else None,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=camera),
            )
        )
    return one_capture(folder, frames, unusable, [path], True)


def _cameras(content: dict[str, Any], count: int) -> list[np.ndarray]:
    """Intrinsics [3, 3] of each frame: its own, where the focus moved, or those of all (columns first)."""
    own = content.get("perFrameIntrinsicCoeffs")
    if own:
        if len(own) != count:
            raise ValueError(f"{len(own)} perFrameIntrinsicCoeffs for {count} poses")
        return [pinhole(*map(float, numbers[:4]), corner=True) for numbers in own]
    k = np.array(content["K"], np.float64).reshape(3, 3).T
    return [pinhole(k[0, 0], k[1, 1], k[0, 2], k[1, 2], corner=True)] * count
