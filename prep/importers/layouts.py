"""Which layout a capture is in, by the files that only that layout has."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from prep.importers import colmap, frames, nerfstudio, scannet, sevenscenes, tum, unified
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
    "tum": tum,
    "sevenscenes": sevenscenes,
    "scannet": scannet,
    "unified": unified,
    "frames": frames,
}
# Those that cannot be read yet: what each is called, and patterns of files of which one must be there.
UNREAD = {
    "a NeRF scene": ("transforms_train.json",),
    "a Polycam export": ("keyframes/cameras/*.json", "keyframes/corrected_cameras/*.json"),
    "a Record3D capture": ("rgbd/*.depth",),
    "an ARKitScenes capture": ("lowres_wide.traj", "*/lowres_wide.traj"),
    "a WAI scene": ("scene_meta.json",),
}


def capture_folders(folder: Path, wanted: str | None) -> list[tuple[str, Path]]:
    """Format and place of the captures in a folder: itself, or those among its sub-folders.

    wanted: the format of all; None: as recognized. Raises ValueError if there is none, or if several formats fit one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    for places in ([folder], sorted(path for path in folder.iterdir() if path.is_dir())):
        found = [(name, place) for place in places if (name := _format(place, wanted)) is not None]
        if found:
            return found
    known = "; ".join(f"{name}: {layout.TITLE}" for name, layout in FORMATS.items())
    raise ValueError(f"{folder}: holds no capture of a known layout{_unread(folder)}. Looked for {known}")


def layout_hint(folder: Path) -> str:
    """For the end of an error: what a folder without what was expected looks like."""
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
        for name, patterns in UNREAD.items():
            if any(any(folder.glob(prefix + pattern)) for pattern in patterns):
                return f". It looks like {name}, which cannot be read yet (see docs/CAPTURES.md)"
    return ""
