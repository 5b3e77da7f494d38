"""7-Scenes: frame-NNNNNN.{color,depth,pose}, camera-to-world with OpenCV's axes, depth in millimeters."""

from __future__ import annotations

import re
from pathlib import Path

from prep.importers.cameras import OpenCVCamera, inverted, pinhole, read_matrix
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, by_stem, one_capture

TITLE = "frame-NNNNNN.{color,depth,pose} (7-Scenes)"
INTRINSICS_FILE = "camera-intrinsics.txt"
SEQUENCE = re.compile(r"seq-\d+")  # names of a room's sequences
DEFAULT = (585.0, 585.0, 320.0, 240.0)  # the dataset's, of 640 x 480


def is_there(folder: Path) -> bool:
    return any(folder.glob("frame-*.pose.txt"))


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    file = folder / INTRINSICS_FILE
    if intrinsics is None and file.is_file():
        matrix = read_matrix(file.read_text(), 3, 3)
    else:
        matrix = pinhole(*(intrinsics or DEFAULT))
    frames, unusable, images = [], [], by_stem(folder)
    poses = sorted(folder.glob("frame-*.pose.txt"))
    for pose in poses:
        stem = pose.name.removesuffix(".pose.txt")
        image = images.get(f"{stem}.color", folder / f"{stem}.color.png")
        depth = folder / f"{stem}.depth.png"
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
                size=None,
                depth=DepthFile(path=depth, unit=1e-3) if depth.exists() else None,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=matrix),
            )
        )
    files = [*poses, file] if file.is_file() else poses
    room = folder.resolve().parent if SEQUENCE.fullmatch(folder.resolve().name) else None
    return one_capture(folder, frames, unusable, files, True, site=room)
