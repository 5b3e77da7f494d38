"""Captures that people have, in one of the known layouts: which folders they are, and who is trained and tested on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prep.importers.layouts import FORMATS, capture_folders
from prep.importers.source import Capture, Frame, Intrinsics, Sequence
from shards.index import sha256
from shards.schema import SPLITS

CATEGORY = "captures"
FEW = 4  # with fewer captures none can be spared for testing
TEST_FRACTION, TEST_TAIL = 0.1, 0.2
MAX_NAME = 200  # bytes


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is tested on: a fraction of the captures, those named, or the last fraction of each; None: see _assign."""

    fraction: float | None = None
    names: tuple[str, ...] = ()
    tail: float | None = None


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """format: of all captures; None: as recognized. every: of so many frames one is taken. metric: whether lengths are
    meters, where the layout does not say. intrinsics: fx, fy, cx, cy, where it says none."""

    format: str | None = None
    every: int = 1
    metric: bool | None = None
    intrinsics: Intrinsics | None = None
    split: Split = field(default_factory=Split)


class Captures:
    """A source of prep.packing: captures in folders, each of which is one or holds some. Raises ValueError."""

    def __init__(self, folders: list[Path], options: CaptureOptions) -> None:
        self.options = options
        self.found: list[Capture] = []
        self.formats: list[str] = []  # of each capture
        for folder in folders:
            for name, place in capture_folders(folder, options.format):
                for capture in FORMATS[name].read(place, options.intrinsics):
                    self.found.append(_reduced(capture, options))
                    self.formats.append(name)
        for name, count in Counter(capture.name for capture in self.found).items():
            if count > 1:
                raise ValueError(f"two captures are called {name}: rename one of their folders, or pack them apart")
        for capture in self.found:
            _check_frames(capture)
        self.split, self.tail = _assign(self.found, options.split)

    @property
    def titles(self) -> list[str]:
        """What was found, a line a capture."""
        return [
            f"{capture.name}: {FORMATS[name].TITLE}, {len(capture.frames)} frames"
            for name, capture in zip(self.formats, self.found, strict=True)
        ]

    @property
    def same_places(self) -> bool:
        """Whether the captures that are tested on are also trained on, by other frames."""
        return self.tail is not None

    @property
    def skipped(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict[str, Any]:
        files = {f"{capture.name}/{file.name}": sha256(file) for capture in self.found for file in capture.files}
        kinds = {capture.name: {"depth": capture.depth_kind, "metric": capture.metric} for capture in self.found}
        told = {"every": self.options.every, "intrinsics": self.options.intrinsics}
        return {"kind": "captures", "formats": sorted({*self.formats}), "annotations": files, "captures": kinds} | told

    def sequences(self) -> Iterator[Sequence]:
        for split in SPLITS:
            for capture in sorted(self.found, key=lambda capture: capture.name):
                whole = (capture.name in self.split) == (split == "test")
                frames = self._frames(capture, split, whole)
                bad = capture.bad if whole else []
                if frames or bad:
                    yield Sequence(split=split, category=CATEGORY, name=capture.name, frames=frames, bad=bad)

    def _frames(self, capture: Capture, split: str, whole: bool) -> list[Frame]:
        if self.tail is None:
            return capture.frames if whole else []
        first = len(capture.frames) - round(self.tail * len(capture.frames))
        return capture.frames[first:] if split == "test" else capture.frames[:first]


def _reduced(capture: Capture, options: CaptureOptions) -> Capture:
    name = re.sub(r"[^\w.-]+", "_", capture.name).encode()[:MAX_NAME].decode(errors="ignore")
    metric = capture.metric if options.metric is None else options.metric
    frames, bad = capture.frames[:: options.every], capture.bad[:: options.every]
    return replace(capture, name=name, metric=metric, frames=frames, bad=bad)


def _check_frames(capture: Capture) -> None:
    """Raises ValueError if there is no frame, two would have one name, or a name is none."""
    if not capture.frames:
        reasons = Counter(reason for _, reason in capture.bad).most_common(3)
        said = ", ".join(f"{count} x {reason}" for reason, count in reasons)
        raise ValueError(f"{capture.name}: has no usable frame ({said or 'it is empty'})")
    first: dict[str, str] = {}
    for frame in capture.frames:
        if not frame.name or "/" in frame.name:
            raise ValueError(f"{capture.name}: {frame.path!r} is no path from the capture's folder")
        if first.setdefault(frame.name, frame.path) != frame.path:
            raise ValueError(f"{capture.name}: {first[frame.name]} and {frame.path} have the same name; rename one")
    if len(first) < len(capture.frames):
        raise ValueError(f"{capture.name}: a frame is listed twice")


def _assign(captures: list[Capture], split: Split) -> tuple[set[str], float | None]:
    """The captures to test on, or the last fraction of each. Raises ValueError for a name that is none.

    Those of one place, as the models of a COLMAP project, go to one split.
    """
    names = [capture.name for capture in captures]
    unknown = [name for name in split.names if name not in names]
    if unknown:
        raise ValueError(f"--test {', '.join(unknown)}: no such capture; there are {', '.join(names)}")
    if split.names:
        return set(split.names), None
    if split.tail is not None:
        return set(), split.tail
    places = sorted({capture.place for capture in captures})
    if split.fraction is None and len(places) < FEW:
        return set(), TEST_TAIL
    count = max(1, round((split.fraction or TEST_FRACTION) * len(places)))
    chosen = {places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)}
    return {capture.name for capture in captures if capture.place in chosen}, None
