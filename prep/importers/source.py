"""What a dataset must offer to be packed. Another dataset is one class like prep.importers.co3d.Co3D, packed by

with process_pool(8, ["prep.packing.pack"]) as pool:  # prep.packing.executors
    pack(MyDataset("/data/mine"), Path("shards"), PackOptions(), pool, max_bad=0.02, parallel=8)  # prep.packing.pack
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """How a lens bends rays before they meet the image, in OpenCV's models.

    coefficients: k1, k2, p1, p2[, k3[, k4, k5, k6]] (radial and tangential) or, of a fisheye, k1, k2, k3, k4.
    """

    coefficients: tuple[float, ...]
    fisheye: bool = False


class Camera(Protocol):
    """A camera as the dataset writes it, such as those of prep.importers.cameras."""

    @property
    def distortion(self) -> Distortion | None:
        """None: the image is that of a pinhole camera."""
        ...

    def opencv(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Extrinsics [3, 4], camera-from-world with OpenCV's axes, and intrinsics [3, 3] of an image of this size.

        In pixels; (0, 0) is the center of the top-left one.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class DepthFile:
    """A depth map of its image's view, at any size.

    encoding: half (16-bit PNG whose bits are half floats), uint16 (16-bit PNG or PGM), float (EXR, TIFF, npy or npz),
    colmap (COLMAP's .bin), record3d (LZFSE of float32). unit: of a stored number, in the units of the translations.
    kind: stereo, sensor, mvs or rendered; the farthest stereo depths are noise, and are dropped. intrinsics [3, 3]: of
    the depth map, in its own pixels, if its camera has the image's pose but other intrinsics; None: it covers exactly
    the image.
    """

    path: Path
    encoding: str = "uint16"
    unit: float = 1.0
    kind: str = "sensor"
    intrinsics: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class SparsePoints:
    """Points of the world [n, 3] that were seen in an image: each gives the depth of one pixel."""

    points: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image with its camera; files are read when the frame is packed, cameras are checked then.

    depth_range: depths outside of it are unknown, in the units of the translations. quarter_turns: the image is stored
    turned counterclockwise by so many, and depth and camera with it.
    """

    name: str  # unique within its sequence
    path: str  # of the image within the dataset, for reports
    image: Path
    size: tuple[int, int] | None  # height and width that the dataset says the image has
    depth: DepthFile | SparsePoints | None  # None: camera only
    mask: Path | None  # 8-bit, depth counts where > mask_above; None: everywhere
    camera: Camera
    mask_above: int = 128
    depth_range: tuple[float, float] | None = None
    quarter_turns: int = 0


Intrinsics = tuple[float, float, float, float]  # fx, fy, cx, cy in pixels, (0, 0) the center of the first


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What an importer reads from one capture: frames in order, not yet assigned to a split.

    place: the folder. site: captures of one, as sequences of a room, go to one split. unusable: (path, reason) of
    images without a pose and of invalid entries. files: those that define the capture. metric: whether lengths are
    meters; None: not known.
    """

    name: str
    place: Path
    site: Path
    frames: list[Frame]
    unusable: list[tuple[str, str]]
    files: list[Path]
    metric: bool | None

    @property
    def depth_kind(self) -> str:
        """sensor, mvs, rendered, sparse or none: that of its first depth."""
        depth = next((frame.depth for frame in self.frames if frame.depth is not None), None)
        return "none" if depth is None else "sparse" if isinstance(depth, SparsePoints) else depth.kind


def one_capture(
    folder: Path,
    frames: list[Frame],
    unusable: list[tuple[str, str]],
    files: list[Path],
    metric: bool | None,
    site: Path | None = None,
) -> list[Capture]:
    """The capture that a folder is, called after it. site: if it is not the folder."""
    return [
        Capture(
            name=folder.resolve().name,
            place=folder,
            site=site or folder,
            frames=frames,
            unusable=unusable,
            files=files,
            metric=metric,
        )
    ]


def by_stem(folder: Path) -> dict[str, Path]:
    """The files of a folder, without hidden ones, by their names without the last suffix; of several the first."""
    paths = sorted(folder.glob("[!.]*"), reverse=True)
    return {path.stem: path for path in paths}


def by_number(path: Path | str) -> list[tuple[int, str]]:
    """A key to sort paths by that puts 10.jpg behind 9.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def frame_name(path: Path) -> str:
    """The frame name for an image's path in its capture: folders (without images/) and stem, joined by hyphens."""
    parts = path.with_suffix("").parts
    return "-".join(parts[1:] if parts[:1] == ("images",) and len(parts) > 1 else parts)


@dataclass(frozen=True, kw_only=True)
class Sequence:
    split: str  # "train" or "test"
    category: str
    name: str
    frames: list[Frame]
    bad: list[tuple[str, str]]  # annotations that give no frame: path, reason

    @property
    def annotated(self) -> int:
        return len(self.frames) + len(self.bad)


class Source(Protocol):
    def describe(self) -> dict[str, Any]:
        """What tells this dataset from another, as JSON, without the place where it lies."""
        ...

    def identity(self, frame: Frame) -> str:
        """What is the same for frames that have the same image: none may be trained on and tested on."""
        ...

    def sequences(self) -> Iterator[Sequence]:
        """All sequences whose files are here, train before test, by category and name: always in the same order."""
        ...

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many annotated sequences sequences() did not give, such as those whose files are not here."""
        ...
