"""Nerfstudio's transforms.json, also what ns-process-data writes of Polycam, Record3D and videos."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prep.importers.cameras import FieldOfView, OpenCVCamera, from_opengl, pinhole
from prep.importers.source import Capture, DepthFile, Distortion, Frame, Intrinsics, by_number, frame_name, one_capture

TITLE = "transforms.json (nerfstudio)"
FILE = "transforms.json"
DEPTH_UNIT = 1e-3  # of a step of a 16-bit depth map: the loader's default
PINHOLES = ("PINHOLE", "SIMPLE_PINHOLE")
RADIAL = ("RADIAL", "SIMPLE_RADIAL")  # OPENCV with fewer numbers
DOWNSCALED = (2, 4, 8)  # ns-process-data makes such copies of the images
SUFFIXES = (".png", ".jpg", ".jpeg")  # that NeRF's synthetic scenes leave out


def is_there(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError that names the file and the key."""
    path = folder / FILE
    content = read_json(path)
    # Of the poses, not of the depths.
    scale = float(content.get("applied_scale", 1.0))
    if not 0 < scale < math.inf:
        raise ValueError(f"{path}: applied_scale {scale:g}: expected more than 0")

    def depth_of(values: dict[str, Any]) -> DepthFile | None:
        if values.get("depth_file_path") is None:
            return _instant_ngp_depth(folder, values)
        place = folder / str(values["depth_file_path"])
        is_png = place.suffix.lower() == ".png"
        return DepthFile(
            path=place, encoding="uint16" if is_png else "float", unit=(DEPTH_UNIT if is_png else 1.0) * scale
        )

    frames, unusable = read_frames(path, content, from_opengl, depth_of)
    return one_capture(folder, frames, unusable, [path], None)


def _instant_ngp_depth(folder: Path, values: dict[str, Any]) -> DepthFile | None:
    """Its keys: a path, and the unit of a step, without which it reads no depth."""
    unit = float(values.get("integer_depth_scale", 0))
    if values.get("depth_path") is None or not 0 < unit < math.inf:
        return None
    return DepthFile(path=folder / str(values["depth_path"]), unit=unit)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError unless it is an object with a list `frames`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from error
    entries = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list `frames` that is not empty")
    return content


def read_frames(
    path: Path,
    content: dict[str, Any],
    to_extrinsics: Callable[[np.ndarray], np.ndarray],
    depth_of: Callable[[dict[str, Any]], DepthFile | None],
) -> tuple[list[Frame], list[tuple[str, str]]]:
    """The frames of a file, by path, and what is wrong with others.

    to_extrinsics: a 4 x 4 of the file -> camera-from-world; depth_of: a frame's values -> its depth.
    """
    frames, unusable = [], []
    for number, entry in enumerate(content["frames"]):
        try:
            values = content | entry
            extrinsics = to_extrinsics(_pose(values["transform_matrix"]))
            frames.append(_frame(path.parent, values, extrinsics, depth_of(values)))
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            name = entry.get("file_path", number) if isinstance(entry, dict) else number
            reason = f"no {error.args[0]} in {path.name}" if isinstance(error, KeyError) else str(error)
            unusable.append((str(name), reason))
    return sorted(frames, key=lambda frame: by_number(frame.path)), unusable


def _pose(numbers: Any) -> np.ndarray:
    pose = np.array(numbers, np.float64)
    if pose.shape not in ((4, 4), (3, 4)):
        raise ValueError("transform_matrix is not 4x4")
    return np.vstack([pose[:3], [0, 0, 0, 1]])


def _frame(folder: Path, values: dict[str, Any], extrinsics: np.ndarray, depth: DepthFile | None) -> Frame:
    image = _image(folder, str(values["file_path"] if "file_path" in values else values["image"]))
    size = (int(values["h"]), int(values["w"])) if "h" in values and "w" in values else None
    path = _in_folder(image, folder)
    name, camera = frame_name(path), _camera(values, extrinsics)
    smaller = _downscaled(folder, path) if size is not None and min(size) > 0 and not image.exists() else None
    if smaller is not None and isinstance(camera, OpenCVCamera):
        image, path, camera, size = smaller, smaller.relative_to(folder), replace(camera, size=size), None
    mask = folder / str(values["mask_path"]) if values.get("mask_path") is not None else None
    if mask is not None and not mask.exists():
        raise ValueError("mask_path: no such file")
    return Frame(
        name=name,
        path=str(path),
        image=image,
        size=size,
        depth=depth,
        mask=mask,
        mask_above=0,
        camera=camera,
    )


def _downscaled(folder: Path, path: Path) -> Path | None:
    """The image in the largest of the folders images_2, images_4 and images_8, where images/ is not there (DL3DV)."""
    first, *rest = path.parts
    places = (folder.joinpath(f"{first}_{factor}", *rest) for factor in DOWNSCALED)
    return next((place for place in places if place.exists()), None)


def _in_folder(image: Path, folder: Path) -> Path:
    """The path from the capture's folder, which an absolute one may call by another name. Raises ValueError."""
    if image.is_relative_to(folder):
        return image.relative_to(folder)
    for base in (folder.absolute(), folder.resolve()):
        if image.is_relative_to(base):
            return image.relative_to(base)
    raise ValueError(f"its path is absolute, and not in {folder.resolve()}")


def _image(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix or path.exists():
        return path
    return next((found for suffix in SUFFIXES if (found := path.with_name(path.name + suffix)).exists()), path)


def _camera(values: dict[str, Any], extrinsics: np.ndarray) -> OpenCVCamera | FieldOfView:
    distortion = _distortion(values)
    if "fl_x" not in values and "camera_angle_x" in values:
        angle = _angle(values, "camera_angle_x")
        angle_y = _angle(values, "camera_angle_y") if "camera_angle_y" in values else None
        centered = FieldOfView(extrinsics=extrinsics, angle=angle, angle_y=angle_y)
        if "w" not in values or "h" not in values:
            if distortion is not None or {"cx", "cy", "fl_y"} & values.keys():
                raise ValueError("camera_angle_x with cx, cy, fl_y or a distortion needs w and h, too")
            return centered
        _, k = centered.opencv(int(values["h"]), int(values["w"]))
        values = {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2] + 0.5, "cy": k[1, 2] + 0.5} | values
    focal = float(values["fl_x"])
    k = pinhole(focal, float(values.get("fl_y", focal)), float(values["cx"]), float(values["cy"]), corner=True)
    return OpenCVCamera(extrinsics=extrinsics, intrinsics=k, distortion=distortion)


def _angle(values: dict[str, Any], key: str) -> float:
    angle = float(values[key])
    if not 0 < angle < math.pi:
        raise ValueError(f"{key} {angle:g}: expected radians between 0 and pi")
    return angle


def _distortion(values: dict[str, Any]) -> Distortion | None:
    model = values.get("camera_model", "OPENCV")
    if model not in ("OPENCV", "OPENCV_FISHEYE", *RADIAL, *PINHOLES):
        raise ValueError(f"camera_model {model} cannot be undistorted")
    fisheye = model == "OPENCV_FISHEYE" or ("camera_model" not in values and bool(values.get("is_fisheye")))
    keys = ("k1", "k2", "k3", "k4") if fisheye else ("k1", "k2", "p1", "p2", "k3")
    numbers = tuple(float(values.get(key, 0.0)) for key in keys)
    if not fisheye and any(values.get(key) for key in ("k4", "k5", "k6")):
        raise ValueError("k4 to k6 of a lens that is no fisheye cannot be undistorted")
    if model in PINHOLES or not (fisheye or any(numbers)):
        return None
    return Distortion(coefficients=numbers, fisheye=fisheye)
