"""Polycam's raw export: keyframes/ with images, cameras (camera-to-world, OpenGL's axes) and depth in millimeters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prep.importers.cameras import OpenCVCamera, from_opengl, pinhole
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics, by_number, by_stem, one_capture

TITLE = "keyframes/{images,cameras,depth}/ (Polycam)"
# The corrected ones are Polycam's own after bundle adjustment, where it has made them.
FOLDERS = (("corrected_cameras", "corrected_images"), ("cameras", "images"))
CAMERA = "[!.]*.json"  # not what macOS leaves beside files
POSE = [f"t_{row}{column}" for row in range(3) for column in range(4)]


def is_there(folder: Path) -> bool:
    return any(any((folder / "keyframes" / cameras).glob(CAMERA)) for cameras, _ in FOLDERS)


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    keyframes = folder / "keyframes"
    cameras, images = next(pair for pair in FOLDERS if any((keyframes / pair[0]).glob(CAMERA)))
    frames, unusable, found = [], [], by_stem(keyframes / images)
    files = sorted((keyframes / cameras).glob(CAMERA), key=by_number)
    for file in files:
        try:
            frames.append(_frame(keyframes, found, file))
        except KeyError as error:
            unusable.append((str(file.relative_to(folder)), f"camera without {error.args[0]}"))
        except (OSError, OverflowError, TypeError, ValueError) as error:
            unusable.append((str(file.relative_to(folder)), f"camera is not readable ({error})"))
    return one_capture(folder, frames, unusable, files, True)


def _frame(keyframes: Path, images: dict[str, Path], file: Path) -> Frame:
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    pose = np.vstack([np.array([float(values[key]) for key in POSE]).reshape(3, 4), [0, 0, 0, 1]])
    camera = pinhole(*(float(values[key]) for key in ("fx", "fy", "cx", "cy")), corner=True)
    image = images.get(file.stem, file.with_suffix(".jpg"))
    depth = keyframes / "depth" / f"{file.stem}.png"
    return Frame(
        name=file.stem,
        path=str(image.relative_to(keyframes.parent)),
        image=image,
        size=(int(values["height"]), int(values["width"])),
        depth=DepthFile(path=depth, unit=1e-3) if depth.exists() else None,
        mask=None,
        camera=OpenCVCamera(extrinsics=from_opengl(pose), intrinsics=camera),
    )
