"""ScanNet, exported: color/N.jpg, depth/N.png in millimeters, pose/N.txt camera-to-world, intrinsic/."""

from __future__ import annotations

from pathlib import Path

from prep.importers.co3d_cameras import OpenCVCamera
from prep.importers.poses import inverted, read_matrix
from prep.importers.source import Capture, DepthFile, Frame, Intrinsics

TITLE = "color/, depth/, pose/, intrinsic/ (ScanNet)"
CAMERA = "intrinsic/intrinsic_color.txt"


def is_there(folder: Path) -> bool:
    return (folder / CAMERA).is_file() and (folder / "pose").is_dir()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError for intrinsics that are not a matrix.

    The depth camera's view is taken for that of the color camera: their intrinsics differ a little, which is up to two
    pixels of the color image at its edges.
    """
    try:
        matrix = read_matrix((folder / CAMERA).read_text(), 4, 4)[:3, :3]
    except ValueError as error:
        raise ValueError(f"{folder / CAMERA}: {error}") from error
    frames, bad, files = [], [], [folder / CAMERA]
    for pose in sorted((folder / "pose").glob("*.txt"), key=lambda path: (len(path.stem), path.stem)):
        image = next(iter(sorted((folder / "color").glob(f"{pose.stem}.*"))), folder / "color" / f"{pose.stem}.jpg")
        files.append(pose)
        try:
            extrinsics = inverted(read_matrix(pose.read_text(), 4, 4))
        except ValueError as error:  # also those that were lost: -inf
            bad.append((f"color/{image.name}", str(error)))
            continue
        depth = folder / "depth" / f"{pose.stem}.png"
        frames.append(
            Frame(
                name=pose.stem,
                path=f"color/{image.name}",
                image=image,
                size=None,
                depth=DepthFile(path=depth, unit=1e-3) if depth.exists() else None,
                mask=None,
                camera=OpenCVCamera(extrinsics=extrinsics, intrinsics=matrix),
            )
        )
    return [Capture(name=folder.resolve().name, place=folder, frames=frames, bad=bad, files=files, metric=True)]
