"""VGGT-Omega's scenes: images/, depths/, masks/, cam_from_worlds.npy and intrinsics.npy, OpenCV's axes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from prep.importers.cameras import OpenCVCamera
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, frame_name, one_capture

TITLE = "cam_from_worlds.npy, intrinsics.npy, images/ (VGGT-Omega)"
POSES, CAMERAS, NAMES = "cam_from_worlds.npy", "intrinsics.npy", "image_names.json"
DEPTH_SUFFIXES = (".exr", ".npy", ".npz")


def is_there(folder: Path) -> bool:
    return (folder / POSES).is_file()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError for files that do not belong together.

    Pixels are measured from corners there, as its own evaluation does: the principal point is moved by half a pixel.
    """
    try:
        names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
        poses, cameras = (np.load(folder / name, allow_pickle=False) for name in (POSES, CAMERAS))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("names that are no list of text")
        if not all(isinstance(array, np.ndarray) and array.ndim == 3 for array in (poses, cameras)):
            raise ValueError("poses or intrinsics that are no arrays of matrices")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{folder}: expected {NAMES}, {POSES} and {CAMERAS} ({error})") from error
    if poses.shape[1:] != (3, 4) or cameras.shape != (len(poses), 3, 3) or len(names) != len(poses):
        raise ValueError(
            f"{folder}: expected as many names as poses [N, 3, 4] and intrinsics [N, 3, 3], found {len(names)}, "
            f"{poses.shape} and {cameras.shape}"
        )
    frames = []
    for name, pose, camera in zip(names, poses.astype(np.float64), cameras.astype(np.float64), strict=True):
        depths = [(folder / "depths" / name).with_suffix(suffix) for suffix in DEPTH_SUFFIXES]
        depth = next((path for path in depths if path.exists()), None)
        mask = (folder / "masks" / name).with_suffix(".png")
        shifted = camera - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        frames.append(
            Frame(
                name=frame_name(Path(name)),
                path=f"images/{name}",
                image=folder / "images" / name,
                size=None,
                depth=None if depth is None else DepthFile(path=depth, encoding="float", kind="rendered"),
                mask=mask if mask.exists() else None,
                mask_above=0,
                camera=OpenCVCamera(extrinsics=pose, intrinsics=shifted),
            )
        )
    files = [folder / name for name in (NAMES, POSES, CAMERAS)]
    return one_capture(folder, frames, [], files, None)
