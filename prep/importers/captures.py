"""Captures that people have, in one of the known layouts: which folders they are, and who is trained and tested on."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prep.importers.layouts import DEEPEST, FORMATS, MAY_LACK_INTRINSICS, capture_folders, passed_over
from prep.importers.source import Capture, Frame, Intrinsics, Sequence, by_number
from shards.index import sha256
from shards.schema import SPLITS

CATEGORY = "captures"
FEW = 4  # with fewer captures none can be spared for testing
TEST_FRACTION, TEST_TAIL = 0.1, 0.2
IDENTIFYING = 1 << 15  # bytes at either end of a compressed image's file that tell it from others of its size
COMPRESSED = (".jpg", ".jpeg", ".png", ".webp", ".heic", ".heif")  # of others the ends can be borders of one color
MAX_NAME = 200  # bytes


@dataclass(frozen=True, kw_only=True)
class Split:
    """What is tested on: a fraction of the captures, those named, or the last fraction of each; None: see _assign."""

    fraction: float | None = None
    names: tuple[str, ...] = ()
    tail: float | None = None


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """format: of all captures; None: as recognized. every: keep one frame in so many. min_motion: drop a frame if
    its camera turned by fewer degrees, and moved by a smaller fraction of the capture's extent, since the last kept
    frame. depth_range: other depths are unknown. metric: whether lengths are meters; None: as the layout says.
    intrinsics: fx, fy, cx, cy for layouts without any. min_frames: fewest frames to test on at the end of a capture."""

    format: str | None = None
    every: int = 1
    min_motion: tuple[float, float] | None = None
    depth_range: tuple[float, float] | None = None
    metric: bool | None = None
    intrinsics: Intrinsics | None = None
    min_frames: int = 1
    split: Split = field(default_factory=Split)


class Captures:
    """A source of prep.packing: captures in folders, each of which is one or holds some. Raises ValueError."""

    def __init__(self, folders: list[Path], options: CaptureOptions) -> None:
        self.options = options
        found: list[tuple[str, Capture]] = []
        self.passed_over: list[str] = []  # folders beside captures that are none
        for folder in folders:
            places = capture_folders(folder, options.format)
            self.passed_over += passed_over(folder, [place for _, place in places])
            found += [(name, capture) for name, place in places for capture in read_captures(name, place, options)]
        self.formats = [name for name, _ in found]  # of each capture
        self.found = _told_apart([capture for _, capture in found])
        self.split, self.tail = _assign(self.found, options.split)
        self.last = set[Path]() if self.tail is None else _last_images(self.found, self.tail, options.min_frames)

    @property
    def titles(self) -> list[str]:
        """What was found, a line a capture."""
        return [
            f"{capture.name}: {FORMATS[name].TITLE}, {len(capture.frames)} frames{_said_unusable(capture)}"
            for name, capture in zip(self.formats, self.found, strict=True)
        ]

    @property
    def same_places(self) -> bool:
        """Whether the captures that are tested on are also trained on, by other frames."""
        return self.tail is not None

    @property
    def torn(self) -> list[str]:
        """Captures to test on whose site is also trained on: others of one room."""
        trained = {capture.site for capture in self.found if capture.name not in self.split}
        return [capture.name for capture in self.found if capture.name in self.split and capture.site in trained]

    @property
    def skipped(self) -> dict[str, int]:
        return {}

    def describe(self) -> dict[str, Any]:
        kinds = {
            capture.name: {"depth": capture.depth_kind, "metric": capture.metric, "digest": _digest(capture)}
            | ({} if capture.site == capture.place else {"site": capture.site.name})
            for capture in self.found
        }
        told = {"every": self.options.every, "intrinsics": self.options.intrinsics}
        told |= {key: value for key in ("min_motion", "depth_range") if (value := getattr(self.options, key))}
        return {"kind": "captures", "formats": sorted({*self.formats}), "captures": kinds} | told

    def identity(self, frame: Frame) -> str:
        """By the file's size and bytes, or those at both its ends: a photograph may lie in two captures."""
        path = str(frame.image)
        if (self.tail is None and not self.split) or not frame.image.is_file():  # nothing is tested on; a pipe
            return path
        try:
            with frame.image.open("rb") as file:
                begin = file.read(IDENTIFYING if frame.image.suffix.lower() in COMPRESSED else -1)
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - IDENTIFYING))
                return f"{size} {hashlib.sha256(begin + file.read()).hexdigest()}" if size else path
        except OSError:  # it will be reported when it is packed
            return path

    def sequences(self) -> Iterator[Sequence]:
        for split in SPLITS:
            for capture in sorted(self.found, key=lambda capture: capture.name):
                if frames := self._frames(capture, split):
                    yield Sequence(split=split, category=CATEGORY, name=capture.name, frames=frames, bad=[])

    def _frames(self, capture: Capture, split: str) -> list[Frame]:
        if self.tail is None:
            return capture.frames if (capture.name in self.split) == (split == "test") else []
        return [frame for frame in capture.frames if (frame.image in self.last) == (split == "test")]


def read_captures(layout: str, folder: Path, options: CaptureOptions) -> list[Capture]:
    """The captures in a folder of this layout, as the options say. Raises ValueError for one that cannot be used."""
    if options.intrinsics is not None and layout not in MAY_LACK_INTRINSICS:
        raise ValueError(f"{folder}: --intrinsics is for {' and '.join(MAY_LACK_INTRINSICS)}; {layout} says its own")
    captures = [_reduced(capture, options) for capture in FORMATS[layout].read(folder, options.intrinsics)]
    for capture in captures:
        _check_frames(capture)
    return captures


def _digest(capture: Capture) -> str:
    """A digest of a capture's files and first image, whatever its name; cameras of a rig can have equal files."""
    digest = hashlib.sha256()
    for path in [*capture.files, capture.frames[0].image]:
        digest.update((sha256(path) if path.is_file() else "").encode())
    return digest.hexdigest()


def _reduced(capture: Capture, options: CaptureOptions) -> Capture:
    metric = capture.metric if options.metric is None else options.metric
    frames = capture.frames[:: options.every]
    if options.min_motion is not None:
        frames = _moving(frames, *options.min_motion)
    if options.depth_range is not None:
        frames = [replace(frame, depth_range=options.depth_range) for frame in frames]
    return replace(capture, name=_file_name(capture.name), metric=metric, frames=frames)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name).encode()[:MAX_NAME].decode(errors="ignore")


def _moving(frames: list[Frame], degrees: float, fraction: float) -> list[Frame]:
    """The first frame, and each whose camera turned or moved enough since the one that was taken before."""
    poses = [frame.camera.opencv(*(frame.size or (1, 1)))[0] for frame in frames]
    centers = np.array([-pose[:, :3].T @ pose[:, 3] for pose in poses]).reshape(-1, 3)
    finite = [bool(np.isfinite(center).all()) for center in centers]
    extent = np.linalg.norm(np.ptp(centers[finite], axis=0)) if any(finite) else 0.0
    taken: list[Frame] = []
    last = None
    for i, pose in enumerate(poses):
        if finite[i] and last is not None:
            turn = np.trace(pose[:, :3] @ poses[last][:, :3].T)
            turned = np.degrees(np.arccos(np.clip((turn - 1) / 2, -1, 1)))
            if turned < degrees and np.linalg.norm(centers[i] - centers[last]) < fraction * extent:
                continue
        last = i if finite[i] else last
        taken.append(frames[i])
    return taken


def _told_apart(captures: list[Capture]) -> list[Capture]:
    """Prefix captures that share a name, such as 7-Scenes' seq-01, with the names of the folders they are in.

    As few as tell them apart. Raises ValueError if names still clash.
    """
    names = [capture.name for capture in captures]
    for level in range(1, DEEPEST + 1):
        shared = {name for name, times in Counter(names).items() if times > 1}
        for i, capture in enumerate(captures):
            if names[i] in shared:
                above = capture.place.resolve().parent.parts[1:][-level:]
                names[i] = _file_name("-".join([*above, capture.name]))
    named = [replace(capture, name=name) for capture, name in zip(captures, names, strict=True)]
    places = defaultdict[str, list[str]](list)
    for capture in named:
        places[capture.name].append(str(capture.place))
    for name, same in places.items():
        if len(same) > 1:
            raise ValueError(f"{same[0]} and {same[1]} would both be called {name}: rename one, or pack them apart")
    return named


def _said_unusable(capture: Capture) -> str:
    return f"; {len(capture.unusable)} left out: {_reasons(capture)}" if capture.unusable else ""


def _reasons(capture: Capture) -> str:
    """Why frames cannot be used, and the first of each."""
    first = {reason: path for path, reason in reversed(capture.unusable)}
    reasons = Counter(reason for _, reason in capture.unusable).most_common(3)
    return ", ".join(f"{count} x {reason} ({first[reason]})" for reason, count in reasons)


def _check_frames(capture: Capture) -> None:
    """Raises ValueError if there is no frame, two would have one name, or a name is none."""
    if not capture.frames:
        raise ValueError(f"{capture.name}: has no usable frame: {_reasons(capture) or 'it is empty'}")
    first: dict[str, str] = {}
    for frame in capture.frames:
        if not frame.name or "/" in frame.name:
            raise ValueError(f"{capture.name}: {frame.path!r} is no path from the capture's folder")
        try:
            frame.path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{capture.name}: {frame.path!r} is no UTF-8; rename it") from error
        if first.setdefault(frame.name, frame.path) != frame.path:
            raise ValueError(f"{capture.name}: {first[frame.name]} and {frame.path} have the same name; rename one")
    if len(first) < len(capture.frames):
        raise ValueError(f"{capture.name}: a frame is listed twice")


def _last_images(captures: list[Capture], fraction: float, min_frames: int) -> set[Path]:
    """The last images of each place, which models of one COLMAP project share; at least min_frames or half of them."""
    places = defaultdict[Path, dict[Path, None]](dict)
    for capture in captures:
        places[capture.place] |= dict.fromkeys(frame.image for frame in capture.frames)
    last, models = set[Path](), Counter(capture.place for capture in captures)
    for place, images in places.items():
        ordered = sorted(images, key=by_number) if models[place] > 1 else list(images)
        tail = max(round(fraction * len(ordered)), min(min_frames, len(ordered) // 2))
        last |= {*ordered[len(ordered) - tail :]}
    return last


def _assign(captures: list[Capture], split: Split) -> tuple[set[str], float | None]:
    """The captures to test on, or the last fraction of each. Raises ValueError for a name that is none.

    Those of one site, as the models of a COLMAP project and the sequences of a room, go to one split.
    """
    names = [capture.name for capture in captures]
    unknown = [name for name in split.names if name not in names]
    if unknown:
        raise ValueError(f"--test {', '.join(unknown)}: no such capture; there are {', '.join(names)}")
    if split.names:
        return set(split.names), None
    if split.tail is not None:
        return set(), split.tail
    sites, fraction = sorted({capture.site for capture in captures}), split.fraction or TEST_FRACTION
    if split.fraction is None and len(sites) < FEW:
        return set(), TEST_TAIL
    count = max(1, round(fraction * len(sites)))
    if count == len(sites) and fraction < 1:
        if count == 1:
            raise ValueError("--test-fraction: all captures are of one place: give --test-tail, or --test and a name")
        count -= 1
    chosen = {sites[(2 * i + 1) * len(sites) // (2 * count)] for i in range(count)}
    return {capture.name for capture in captures if capture.site in chosen}, None
