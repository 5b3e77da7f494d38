"""What a dataset must offer to be packed. Another dataset is one file with a class like prep.co3d.Co3D."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One image with its camera; files are read when the frame is packed, cameras are checked then."""

    name: str  # unique within its sequence
    path: str  # of the image within the dataset, for reports
    image: Path
    depth: Path | None  # 16-bit PNG of half floats; None: camera only
    mask: Path | None  # 8-bit PNG, depth counts where > 128; None: everywhere
    depth_scale: float
    extrinsics: np.ndarray  # [3, 4], camera-from-world, OpenCV axes
    intrinsics: np.ndarray  # [3, 3], pixels of the image, (0, 0) the centre of its top-left pixel


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
    def skipped(self) -> int:
        """Annotated sequences whose files are not here, counted by sequences()."""
        ...
