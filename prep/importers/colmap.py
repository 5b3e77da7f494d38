"""COLMAP projects: every model under sparse/, with its points as sparse depth, or the maps of a dense folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from prep.importers.cameras import OpenCVCamera, pinhole
from prep.importers.source import Capture, DepthFile, Distortion, Frame, Intrinsics, SparsePoints, by_number, frame_name

log = logging.getLogger(__name__)

TITLE = "sparse/ and images/ (COLMAP)"
MAX_ERROR, MIN_VIEWS = 2.0, 3  # pixels of reprojection, and images, of a point that is taken
# COLMAP's models that are OpenCV's.
PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE")
RADIAL = ("SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
FISHEYE = ("SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE", "OPENCV_FISHEYE")


def is_there(folder: Path) -> bool:
    return bool(_models(folder))


def _models(folder: Path) -> list[Path]:
    """The folders of the models of a project: sparse/ itself, or those in it."""
    sparse = folder / "sparse"
    places = [sparse, *sorted(path for path in sparse.glob("*") if path.is_dir())] if sparse.is_dir() else []
    return [place for place in places if any((place / f"cameras.{kind}").is_file() for kind in ("bin", "txt"))]


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """A capture for each model: their worlds have nothing in common. Raises ValueError without the extra `colmap`.

    A model most of whose images are in a larger one is left out: COLMAP leaves such where it began twice, and the
    smaller ones are often wrong.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise ValueError(
            f"{folder}: COLMAP's files need .venv/bin/pip install -c constraints.txt -e '.[colmap]'"
        ) from error
    models, captures = _models(folder), []
    for model in models:
        try:
            reconstruction = pycolmap.Reconstruction(str(model))
        except (ValueError, RuntimeError, OSError, LookupError) as error:
            raise ValueError(f"{model}: not readable as a model of COLMAP ({error})") from error
        suffix = f"-{model.name}" if len(models) > 1 else ""
        captures.append(_capture(folder, model, f"{folder.resolve().name}{suffix}", reconstruction))
    return _without_repeats(captures)


def _without_repeats(captures: list[Capture]) -> list[Capture]:
    kept: list[Capture] = []
    for capture in sorted(captures, key=lambda capture: -len(capture.frames)):
        paths = _paths(capture)
        larger = next((other for other in kept if 2 * len(paths & _paths(other)) > len(paths)), None)
        if larger is None:
            kept.append(capture)
        else:
            places = [one.files[0].parent for one in (capture, larger)]
            log.warning("%s: left out, as most of its %d images are in the larger %s", places[0], len(paths), places[1])
    return sorted(kept, key=lambda capture: capture.name)


def _paths(capture: Capture) -> set[str]:
    return {frame.path for frame in capture.frames}


def _capture(folder: Path, model: Path, name: str, reconstruction: Any) -> Capture:
    dense = folder / "stereo" / "depth_maps"
    has_dense = dense.is_dir() and any(dense.rglob("*.geometric.bin"))  # image_undistorter makes an empty folder
    points = {
        number: point.xyz
        for number, point in reconstruction.points3D.items()
        if point.error <= MAX_ERROR and point.track.length() >= MIN_VIEWS
    }
    frames, unusable = [], []
    for image in sorted(reconstruction.images.values(), key=lambda image: by_number(image.name)):
        if not image.has_pose:
            unusable.append((image.name, "image without a pose"))
            continue
        try:
            intrinsics, distortion = camera_of(reconstruction.cameras[image.camera_id])
        except ValueError as error:
            unusable.append((image.name, str(error)))
            continue
        pose: Any = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        seen = [points[p.point3D_id] for p in image.points2D if p.has_point3D() and p.point3D_id in points]
        depth = SparsePoints(points=np.array(seen).reshape(-1, 3))
        if has_dense and (file := dense / f"{image.name}.geometric.bin").exists():
            depth = DepthFile(path=file, encoding="colmap", kind="mvs")
        camera = reconstruction.cameras[image.camera_id]
        frames.append(
            Frame(
                name=frame_name(Path(image.name)),
                path=f"images/{image.name}",
                image=folder / "images" / image.name,
                size=(camera.height, camera.width),
                depth=depth,
                mask=None,
                camera=OpenCVCamera(extrinsics=np.array(pose.matrix()), intrinsics=intrinsics, distortion=distortion),
            )
        )
    without = sum(isinstance(frame.depth, SparsePoints) for frame in frames)
    if has_dense and without:  # patch_match_stereo leaves out what it finds no other images for
        log.warning("%s: has no map of %d of %d images: their depth is that of points", dense, without, len(frames))
    files = sorted(path for kind in ("bin", "txt") for path in model.glob(f"*.{kind}"))
    return Capture(name=name, place=folder, site=folder, frames=frames, unusable=unusable, files=files, metric=False)


def camera_of(camera: Any) -> tuple[np.ndarray, Distortion | None]:
    """Intrinsics [3, 3] and distortion of a camera of pycolmap. Raises ValueError for a model that OpenCV has not."""
    name = camera.model.name
    if name not in (*PINHOLES, *RADIAL, *FISHEYE):  # some have no focal length to ask for
        raise ValueError(
            f"camera model {name} cannot be undistorted: run colmap image_undistorter, and pack its output"
        )
    fx, fy = camera.focal_length_x, camera.focal_length_y
    intrinsics = pinhole(fx, fy, camera.principal_point_x, camera.principal_point_y, corner=True)
    extra = [float(camera.params[i]) for i in camera.extra_params_idxs()]
    if name in PINHOLES or (name in RADIAL and not any(extra)):
        return intrinsics, None
    coefficients = (*extra, *[0.0] * (4 - len(extra)))
    return intrinsics, Distortion(coefficients=coefficients, fisheye=name in FISHEYE)
