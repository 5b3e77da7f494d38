"""Co3D (arXiv:2109.00512): where frames lie, and which cameras its two kinds of annotations give them.

CO3D_DIR/<category>/<sequence>/images/frame000001.jpg
                               depths/frame000001.jpg.geometric.png
                               depth_masks/frame000001.png
with VGGT's annotations:
ANNOTATION_DIR/<category>_{train,test}.jgz    sequence -> [{filepath, camera}, ...]
or with the official ones:
CO3D_DIR/<category>/frame_annotations.jgz     [{sequence_name, image, depth, viewpoint, ...}, ...]
                    sequence_annotations.jgz  [{sequence_name, viewpoint_quality_score, ...}, ...]
                    set_lists/set_lists_<name>.json  {"train": [[sequence, number, path], ...], "val", "test"}
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from prep.importers.co3d_cameras import read_camera
from prep.importers.layouts import layout_hint
from prep.importers.source import DepthFile, Frame, Sequence
from shards.index import sha256
from shards.schema import SPLITS

log = logging.getLogger(__name__)

ANNOTATION_NAME = re.compile(r"(?P<category>.+)_(?P<split>train|test)\.jgz")
MAX_NAME = 255  # bytes, as file systems have it
FRAME_FILE, SEQUENCE_FILE, SET_LISTS = "frame_annotations.jgz", "sequence_annotations.jgz", "set_lists"
SCALE_RANGE = (1e-10, 1e10)  # of scale_adjustment
NO_FOLDER = "no such folder"


class Co3D:
    """The frames of `co3d_dir` that VGGT's annotation files in `annotation_dir` give cameras for.

    splits and categories: which to take; None takes all there are. Raises ValueError if a directory is missing, or
    nothing is annotated, or a category asked for is not.
    """

    def __init__(
        self,
        co3d_dir: Path,
        annotation_dir: Path,
        splits: tuple[str, ...] | None = None,
        categories: tuple[str, ...] | None = None,
    ) -> None:
        check_folder("--co3d-dir", co3d_dir)
        check_folder("--annotation-dir", annotation_dir)
        found: dict[tuple[str, str], Path] = {}
        for path in sorted(annotation_dir.iterdir()):
            match = ANNOTATION_NAME.fullmatch(path.name)
            if match:
                found[match["split"], match["category"]] = path
        if not found:
            raise ValueError(
                f"--annotation-dir {annotation_dir}: expected files like apple_train.jgz and apple_test.jgz, found none"
                + layout_hint(annotation_dir)
            )
        check_categories(categories, {category for _, category in found}, annotation_dir)
        self.co3d_dir = co3d_dir
        self.files = {
            key: found[key]
            for key in sorted(found, key=lambda key: (SPLITS.index(key[0]), key[1]))
            if (splits is None or key[0] in splits) and (categories is None or key[1] in categories)
        }
        if not self.files:
            raise ValueError(f"{annotation_dir}: no annotation file is left for these --split and --category")
        self._skipped = defaultdict[str, set[tuple[str, str]]](set)

    @property
    def skipped(self) -> dict[str, int]:
        return counted_by_reason(self._skipped, self.co3d_dir)

    def describe(self) -> dict[str, Any]:
        return {"kind": "co3d", "annotations": {path.name: sha256(path) for path in self.files.values()}}

    def identity(self, frame: Frame) -> str:
        return str(frame.image)

    def sequences(self) -> Iterator[Sequence]:
        without_masks: list[str] = []
        for (split, category), path in self.files.items():
            for name, entries in sorted(read_annotations(path).items()):
                folder = self.co3d_dir / category / name
                if not folder.is_dir():
                    self._skipped[NO_FOLDER].add((category, name))
                    continue
                has_depth, has_masks = ((folder / part).is_dir() for part in ("depths", "depth_masks"))
                if has_depth and not has_masks:
                    without_masks.append(str(folder))
                make = partial(self._frame, category, name, has_depth, has_masks)
                yield make_sequence(split, category, name, entries, make)
        if without_masks:
            log.warning(
                "%d sequences without depth_masks/, all of whose depth counts (%s)",
                len(without_masks),
                without_masks[0],
            )

    def _frame(self, category: str, sequence: str, has_depth: bool, has_masks: bool, entry: Any) -> Frame:
        path = path_inside(category, sequence, "images", entry.get("filepath") if isinstance(entry, dict) else None)
        folder = self.co3d_dir / category / sequence
        return Frame(
            name=path.stem,
            path=str(path),
            image=self.co3d_dir / path,
            size=None,
            depth=stereo_depth(folder / "depths" / f"{path.name}.geometric.png") if has_depth else None,
            mask=folder / "depth_masks" / f"{path.stem}.png" if has_masks else None,
            camera=read_camera(entry),
        )


def make_sequence(split: str, category: str, name: str, entries: list[Any], make: Callable[[Any], Frame]) -> Sequence:
    """Annotations in any order -> a sequence. make: gives a frame or raises ValueError."""
    made: dict[str, Frame] = {}
    bad: list[tuple[str, str]] = []
    for i, entry in enumerate(entries):
        try:
            frame = make(entry)
            if frame.name in made:
                raise ValueError("annotated twice")
            made[frame.name] = frame
        except ValueError as error:
            bad.append((path_of(entry) or f"{category}/{name}, entry {i}", str(error)))
    return Sequence(split=split, category=category, name=name, frames=[made[k] for k in sorted(made)], bad=bad)


def counted_by_reason(skipped: dict[str, set[tuple[str, str]]], co3d_dir: Path) -> dict[str, int]:
    """How many sequences were skipped for each reason, which names one of them."""
    return {f"{why} ({co3d_dir.joinpath(*min(names))})": len(names) for why, names in skipped.items()}


def path_of(entry: Any) -> str:
    """The image's path in an annotation of either kind; empty if there is none."""
    if not isinstance(entry, dict):
        return ""
    image = entry.get("image")
    return str(entry.get("filepath") or (image.get("path") if isinstance(image, dict) else None) or "")


def path_inside(category: str, sequence: str, folder: str, path: Any) -> PurePosixPath:
    """An annotated path, if it is <category>/<sequence>/<folder>/<file>: nothing else is opened."""
    if not isinstance(path, str) or not path:
        raise ValueError("annotation without a path of its image")
    parsed = PurePosixPath(path)
    if parsed.parts[:-1] != (category, sequence, folder) or parsed.name == ".." or not parsed.name.isprintable():
        raise ValueError(f"annotated path is not <category>/<sequence>/{folder}/<file>")
    return parsed


def check_folder(option: str, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{option} {path}: no such directory")


def check_categories(wanted: tuple[str, ...] | None, annotated: set[str], where: Path) -> None:
    missing = sorted(set(wanted or ()) - annotated)
    if missing:
        raise ValueError(
            f"--category {', '.join(missing)}: not annotated in {where}, which has {', '.join(sorted(annotated))}"
        )


def sequence_name(name: Any, path: Path) -> str:
    text = name if isinstance(name, str) else ""
    if not text.isprintable() or "/" in text or text in ("", ".", "..") or len(text.encode()) > MAX_NAME:
        raise ValueError(f"{path}: {str(name)[:MAX_NAME]!r} cannot be the name of a sequence")
    return name


def read_json(path: Path) -> Any:
    """A JSON file, gzipped if it is named so. Raises ValueError naming a file that is damaged."""
    kind = "gzipped JSON" if path.suffix == ".jgz" else "JSON"
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".jgz" else data)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable {kind} file ({error}); download it again") from error


def read_list(path: Path) -> list[Any]:
    content = read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a JSON list, found {type(content).__name__}")
    return content


def read_annotations(path: Path) -> dict[str, list[Any]]:
    """Sequence -> entries of VGGT's annotation file. Raises ValueError naming a file that is damaged or otherwise."""
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise ValueError(f"{path}: expected a JSON object of sequence -> list of frames")
    for name in content:
        sequence_name(name, path)
    return content


def stereo_depth(path: Path, unit: float = 1.0) -> DepthFile:
    """A depth map of Co3D: a 16-bit PNG whose bits are half floats."""
    return DepthFile(path=path, encoding="half", unit=unit, kind="stereo")
