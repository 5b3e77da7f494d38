"""Which layout a capture is in, by the files that only that layout has."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prep.importers import (
    arkitscenes,
    colmap,
    frames,
    nerfstudio,
    polycam,
    record3d,
    scannet,
    sevenscenes,
    tum,
    unified,
    wai,
)
from prep.importers.source import Capture, Intrinsics


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
    "polycam": polycam,
    "record3d": record3d,
    "tum": tum,
    "sevenscenes": sevenscenes,
    "scannet": scannet,
    "arkitscenes": arkitscenes,
    "unified": unified,
    "wai": wai,
    "frames": frames,
}
MAY_LACK_INTRINSICS = ("tum", "sevenscenes")
# What cannot be read, by patterns of its files, and what to do.
UNREAD = {
    ("transforms_train.json",): "It looks like a NeRF scene in splits: rename the file of one to transforms.json",
    ("*.mp4", "*.mov", "*.MP4", "*.MOV"): "It holds a video: extract frames first, as with "
    "ffmpeg -i VIDEO -vf fps=2 images/%05d.jpg, and find their cameras, as with COLMAP",
    ("*.r3d",): "It holds an archive of Record3D: unpack it, it is a zip file",
}
DEEPEST = 3  # levels of folders in which captures are looked for


def capture_folders(folder: Path, wanted: str | None) -> list[tuple[str, Path]]:
    """Format and place of the captures in a folder: itself, or those in its folders, and in theirs.

    wanted: the format of all; None: as recognized. Raises ValueError if there is none, or if several formats fit one.
    """
    if folder.is_file():
        raise ValueError(f"{folder}: is a file{_unread(folder.parent)}. Give the folder of a capture")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = _search(folder, wanted, DEEPEST)
    if found:
        return found
    known = "; ".join(f"{name}: {layout.TITLE}" for name, layout in FORMATS.items())
    raise ValueError(f"{folder}: holds no capture of a known layout{_unread(folder)}. Looked for {known}")


def passed_over(folder: Path, captures: list[Path]) -> list[str]:
    """The names of a folder's direct subfolders that contain none of the captures found in it."""
    if folder in captures:
        return []
    above = {path for place in captures for path in (place, *place.parents)}
    return [path.name for path in _inner(folder) if path not in above]


def _inner(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX")))


def _search(folder: Path, wanted: str | None, depth: int) -> list[tuple[str, Path]]:
    name = _format(folder, wanted)
    if name is not None or not depth:
        return [(name, folder)] if name is not None else []
    return [found for path in _inner(folder) for found in _search(path, wanted, depth - 1)]


def layout_hint(folder: Path) -> str:
    """The end of an error message: which layout an unexpected folder looks like."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        for layout in FORMATS.values():
            if layout.is_there(place):
                return f". It looks like {layout.TITLE}: pack it with vggt-prep pack {folder}"
    return _unread(folder)


def _format(folder: Path, wanted: str | None) -> str | None:
    fitting = [name for name, layout in FORMATS.items() if wanted in (None, name) and layout.is_there(folder)]
    if len(fitting) > 1:
        raise ValueError(f"{folder}: may be {' or '.join(fitting)}: say which with --format")
    return fitting[0] if fitting else None


def _unread(folder: Path) -> str:
    for prefix in ("", "*/"):
        for patterns, advice in UNREAD.items():
            if any(any(folder.glob(prefix + pattern)) for pattern in patterns):
                return f". {advice}"
    return ""
