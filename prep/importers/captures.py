"""Captures that people have, in one of the known layouts: which folders they are, and who is trained and tested on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from prep.importers import colmap, frames, nerfstudio, scannet, sevenscenes, tum, unified
from prep.importers.layouts import recognized
from prep.importers.source import Capture, Frame, Intrinsics, Sequence
from shards.index import sha256
from shards.schema import SPLITS

CATEGORY = "captures"
FEW = 4  # with fewer captures none can be spared for testing
TEST_FRACTION, TEST_TAIL = 0.1, 0.2
MAX_NAME = 200  # bytes


class Layout(Protocol):
    """A module of prep.importers that reads one layout."""

    @property
    def TITLE(self) -> str:  # noqa: N802
        """The files that tell it, and what people call it."""
        ...

    def is_there(self, folder: Path) -> bool:
        """Whether a folder is a capture of this layout."""
        ...

    def read(self, folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
        """The captures in the folder: one, or one for each model of a COLMAP project. Raises ValueError."""
        ...


FORMATS: dict[str, Layout] = {
    "colmap": colmap,
    "nerfstudio": nerfstudio,
    "tum": tum,
    "sevenscenes": sevenscenes,
    "scannet": scannet,
    "unified": unified,
    "frames": frames,
}


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
        self.found: list[tuple[str, Capture]] = []
        for folder in folders:
            for name, place in _capture_folders(folder, options.format):
                for capture in FORMATS[name].read(place, options.intrinsics):
                    self.found.append((name, _reduced(capture, options)))
        names = [capture.name for _, capture in self.found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two captures are called {name}: rename one of their folders, or pack them apart")
            if not any(c.frames for _, c in self.found if c.name == name):
                reasons = Counter(reason for _, c in self.found if c.name == name for _, reason in c.bad)
                said = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
                raise ValueError(f"{name}: has no usable frame ({said or 'it is empty'})")
        for _, capture in self.found:
            _check_names(capture)
        self.split, self.tail = _assign([capture for _, capture in self.found], options.split)

    @property
    def titles(self) -> list[str]:
        """What was found, a line a capture."""
        return [f"{capture.name}: {FORMATS[name].TITLE}, {len(capture.frames)} frames" for name, capture in self.found]

    @property
    def same_places(self) -> bool:
        """Whether the captures that are tested on are also trained on, by other frames."""
        return self.tail is not None

    @property
    def skipped(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict[str, Any]:
        files = {f"{capture.name}/{file.name}": sha256(file) for _, capture in self.found for file in capture.files}
        kinds = {capture.name: {"depth": capture.depth_kind, "metric": capture.metric} for _, capture in self.found}
        formats = sorted({name for name, _ in self.found})
        told = {"every": self.options.every, "intrinsics": self.options.intrinsics}
        return {"kind": "captures", "formats": formats, "annotations": files, "captures": kinds} | told

    def sequences(self) -> Iterator[Sequence]:
        for split in SPLITS:
            for _, capture in sorted(self.found, key=lambda item: item[1].name):
                frames = self._frames(capture, split)
                bad = capture.bad if (capture.name in self.split) == (split == "test") else []
                if frames or bad:
                    yield Sequence(split=split, category=CATEGORY, name=capture.name, frames=frames, bad=bad)

    def _frames(self, capture: Capture, split: str) -> list[Frame]:
        if self.tail is None:
            return capture.frames if (capture.name in self.split) == (split == "test") else []
        first = len(capture.frames) - round(self.tail * len(capture.frames))
        return capture.frames[first:] if split == "test" else capture.frames[:first]


def _capture_folders(folder: Path, wanted: str | None) -> list[tuple[str, Path]]:
    """The captures in a folder: itself, or those among its sub-folders. Raises ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for places in ([folder], sorted(path for path in folder.iterdir() if path.is_dir())):
        found = [(name, place) for place in places if (name := _layout(place, wanted)) is not None]
        if found:
            return found
    known = "; ".join(f"{name}: {layout.TITLE}" for name, layout in FORMATS.items())
    other = recognized(folder)
    hint = f"this looks like {other}, which cannot be read yet. " if other and wanted is None else ""
    raise ValueError(f"{folder}: holds no capture of a known layout. {hint}Looked for {known}")


def _layout(folder: Path, wanted: str | None) -> str | None:
    """The layout of a folder; raises ValueError if several fit."""
    fitting = [name for name, layout in FORMATS.items() if wanted in (None, name) and layout.is_there(folder)]
    if len(fitting) > 1:
        raise ValueError(f"{folder}: may be {' or '.join(fitting)}: say which with --format")
    return fitting[0] if fitting else None


def _reduced(capture: Capture, options: CaptureOptions) -> Capture:
    name = re.sub(r"[^\w.-]+", "_", capture.name).encode()[:MAX_NAME].decode(errors="ignore")
    metric = capture.metric if options.metric is None else options.metric
    every = options.every
    return replace(capture, name=name, metric=metric, frames=capture.frames[::every], bad=capture.bad[::every])


def _check_names(capture: Capture) -> None:
    """Raises ValueError if two frames would have one name, or a name is none."""
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
