"""ScanNet, exported: color/N.jpg, depth/N.png in millimeters, pose/N.txt camera-to-world, intrinsic/."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from prep.importers.cameras import OpenCVCamera, inverted, read_matrix
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, by_stem, one_capture

TITLE = "color/, depth/, pose/, intrinsic/ (ScanNet)"
SCAN = re.compile(r"(scene\d{4})_\d\d")  # names of a room's scans
# Color and depth; the second pair in scannet_frames_25k.
CAMERAS = (
    ("intrinsic/intrinsic_color.txt", "intrinsic/intrinsic_depth.txt"),
    ("intrinsics_color.txt", "intrinsics_depth.txt"),
)


def is_there(folder: Path) -> bool:
    return any((folder / color).is_file() for color, _ in CAMERAS) and (folder / "pose").is_dir()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError for intrinsics that are not a matrix. Both cameras are taken to be in one place."""
    names = next(pair for pair in CAMERAS if (folder / pair[0]).is_file())
    files = [path for name in names if (path := folder / name).is_file()]
    matrices = {}
    for path in files:
        try:
            matrices[path] = read_matrix(path.read_text(), 4, 4)[:3, :3]
            if not np.isfinite(matrices[path]).all() or matrices[path][0, 0] <= 0 or matrices[path][1, 1] <= 0:
                raise ValueError("its focal lengths are not positive numbers")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    matrix, of_depth = (matrices.get(folder / name) for name in names)
    assert matrix is not None
    frames, unusable, images = [], [], by_stem(folder / "color")
    for pose in sorted((folder / "pose").glob("[!.]*.txt"), key=lambda path: (len(path.stem), path.stem)):
        image = images.get(pose.stem, folder / "color" / f"{pose.stem}.jpg")
        files.append(pose)
        try:
            extrinsics = inverted(read_matrix(pose.read_text(), 4, 4))
        except ValueError as error:  # also those that were lost: -inf
            unusable.append((f"color/{image.name}", str(error)))
            continue
        depth = folder / "depth" / f"{pose.stem}.png"
        frames.append(
            Frame(
                name=pose.stem,
                path=f"color/{image.name}",
                image=image,
                size=None,
                depth=DepthFile(path=depth, unit=1e-3, intrinsics=of_depth) if depth.exists() else None,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=matrix),
            )
        )
    room = folder.resolve().with_name(SCAN.sub(r"\1", folder.resolve().name))
    return one_capture(folder, frames, unusable, files, True, site=room)
