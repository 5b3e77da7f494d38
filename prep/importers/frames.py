"""frames.csv, the layout for everything else. A line a frame, with a header:

    image,depth,r11,r12,r13,t1,r21,r22,r23,t2,r31,r32,r33,t3,fx,fy,cx,cy

image and depth are paths from the folder. depth may be empty; it is a 16-bit PNG in millimeters, or a float EXR, TIFF
or npy in the unit of t. [R|t] is camera-from-world, x right, y down, z forward; fx, fy, cx, cy are in pixels of the
image, and (0, 0) is the center of the first one.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from prep.importers.cameras import OpenCVCamera, pinhole
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, frame_name, one_capture

TITLE = "frames.csv (ours)"
FILE = "frames.csv"
POSE = [name for row in "123" for name in (f"r{row}1", f"r{row}2", f"r{row}3", f"t{row}")]
COLUMNS = ["image", "depth", *POSE, "fx", "fy", "cx", "cy"]


def is_there(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError that names the file for other columns."""
    path = folder / FILE
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # also as Excel writes it
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not readable as a table in UTF-8 ({error})") from error
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path}: expected a header {','.join(COLUMNS)} and lines; there is no {', '.join(missing)}")
    frames, unusable = [], []
    for row in rows:
        try:
            extrinsics = np.array([float(row[name]) for name in POSE]).reshape(3, 4)
            camera = pinhole(*(float(row[name]) for name in ("fx", "fy", "cx", "cy")))
            if not row["image"]:
                raise ValueError
        except (TypeError, ValueError):
            unusable.append((str(row["image"]), "a number or the image is missing"))
            continue
        image = Path(row["image"])
        frames.append(
            Frame(
                name=frame_name(image),
                path=row["image"],
                image=folder / image,
                size=None,
                depth=_depth(folder / row["depth"]) if row["depth"] else None,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=camera),
            )
        )
    return one_capture(folder, frames, unusable, [path], None)


def _depth(path: Path) -> DepthFile:
    is_png = path.suffix.lower() == ".png"
    return DepthFile(path=path, encoding="uint16" if is_png else "float", unit=1e-3 if is_png else 1.0)
