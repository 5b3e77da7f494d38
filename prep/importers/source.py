"""What a dataset must offer to be packed. Another dataset is one class like prep.importers.co3d.Co3D, packed by

with process_pool(8, ["prep.packing.pack"]) as pool:  # prep.packing.executors
    pack(MyDataset("/data/mine"), Path("shards"), PackOptions(), pool, max_bad=0.02, parallel=8)  # prep.packing.pack
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Camera(Protocol):
    """A camera as the dataset writes it, such as those of prep.importers.co3d_cameras."""

    def opencv(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Extrinsics [3, 4], camera-from-world with OpenCV's axes, and intrinsics [3, 3] of an image of this size.

        In pixels; (0, 0) is the center of the top-left one.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image with its camera; files are read when the frame is packed, cameras are checked then."""

    name: str  # unique within its sequence
    path: str  # of the image within the dataset, for reports
    image: Path
    size: tuple[int, int] | None  # height and width that the dataset says the image has
    depth: Path | None  # 16-bit PNG of half floats; None: camera only
    mask: Path | None  # 8-bit PNG, depth counts where > 128; None, or no such file: everywhere
    depth_scale: float
    camera: Camera


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

    def sequences(self) -> Iterator[Sequence]:
        """All sequences whose files are here, train before test, by category and name: always in the same order."""
        ...

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many annotated sequences sequences() did not give, such as those whose files are not here."""
        ...
