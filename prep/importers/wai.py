"""MapAnything's WAI scenes: scene_meta.json, like nerfstudio's file, but camera-to-world with OpenCV's axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prep.importers import nerfstudio
from prep.importers.cameras import inverted
from prep.importers.source import Capture, DepthFile, Intrinsics, one_capture

TITLE = "scene_meta.json (WAI)"
FILE = "scene_meta.json"
BEST = ("depth", "gt_depth", "rendered_depth")  # modalities, before others of that format


def is_there(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read(folder: Path, intrinsics: Intrinsics | None) -> list[Capture]:
    """Raises ValueError that names the file and the key."""
    path = folder / FILE
    content = nerfstudio.read_json(path)
    convention = content.get("camera_convention", "opencv")
    if convention != "opencv":
        raise ValueError(f"{path}: camera_convention: expected opencv, found {convention!r}")
    key = _depth_key(content)

    def depth_of(values: dict[str, Any]) -> DepthFile | None:
        place = values.get(key) if key else None
        return DepthFile(path=folder / place, encoding="float") if isinstance(place, str) else None

    frames, unusable = nerfstudio.read_frames(path, content, inverted, depth_of)
    return one_capture(folder, frames, unusable, [path], None)


def _depth_key(content: dict[str, Any]) -> str | None:
    """The key of a frame's depth; predicted depths are no truth."""
    modalities = content.get("frame_modalities")
    depths = {
        name: str(said["frame_key"])
        for name, said in (modalities.items() if isinstance(modalities, dict) else ())
        if isinstance(said, dict) and said.get("format") == "depth" and "frame_key" in said
    }
    names = [*BEST, *(name for name in depths if not name.startswith("pred"))]
    return next((depths[name] for name in names if name in depths), None)
