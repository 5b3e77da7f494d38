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
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from prep.importers.cameras import read_camera
from prep.importers.layouts import recognized
from prep.importers.source import Frame, Sequence
from shards.index import sha256
from shards.schema import SPLITS

ANNOTATION_NAME = re.compile(r"(?P<category>.+)_(?P<split>train|test)\.jgz")
MAX_NAME = 255  # bytes, as file systems have it
FRAME_FILE, SEQUENCE_FILE, SET_LISTS = "frame_annotations.jgz", "sequence_annotations.jgz", "set_lists"
SCALE_RANGE = (1e-10, 1e10)  # of scale_adjustment
NO_FOLDER = "no such folder"
OFFICIAL_SPLITS = {"train": ("train",), "test": ("val", "test")}


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
        _check_folder("--co3d-dir", co3d_dir)
        _check_folder("--annotation-dir", annotation_dir)
        found: dict[tuple[str, str], Path] = {}
        for path in sorted(annotation_dir.iterdir()):
            match = ANNOTATION_NAME.fullmatch(path.name)
            if match:
                found[match["split"], match["category"]] = path
        if not found:
            raise ValueError(
                f"--annotation-dir {annotation_dir}: expected files like apple_train.jgz and apple_test.jgz, found none"
                + _other_layout(annotation_dir)
            )
        _check_categories(categories, {category for _, category in found}, annotation_dir)
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
        return _counted(self._skipped, self.co3d_dir)

    def describe(self) -> dict[str, Any]:
        return {"kind": "co3d", "annotations": {path.name: sha256(path) for path in self.files.values()}}

    def sequences(self) -> Iterator[Sequence]:
        for (split, category), path in self.files.items():
            for name, entries in sorted(read_annotations(path).items()):
                folder = self.co3d_dir / category / name
                if not folder.is_dir():
                    self._skipped[NO_FOLDER].add((category, name))
                    continue
                has_depth = (folder / "depths").is_dir()
                make = partial(self._frame, category, name, has_depth)
                yield _sequence(split, category, name, entries, make)

    def _frame(self, category: str, sequence: str, has_depth: bool, entry: Any) -> Frame:
        path = _inside(category, sequence, "images", entry.get("filepath") if isinstance(entry, dict) else None)
        folder = self.co3d_dir / category / sequence
        return Frame(
            name=path.stem,
            path=str(path),
            image=self.co3d_dir / path,
            size=None,
            depth=folder / "depths" / f"{path.name}.geometric.png" if has_depth else None,
            mask=folder / "depth_masks" / f"{path.stem}.png",
            depth_scale=1.0,
            camera=read_camera(entry),
        )


class OfficialCo3D:
    """The frames of `co3d_dir` with the annotations that come with the dataset, also its single-sequence subset.

    set_list: which of set_lists/ says what is for training and what for testing (its val and test), such as
    fewview_dev or manyview_dev_0. min_quality: sequences with a lower viewpoint_quality_score, or none, are not part
    of it; None takes all. splits and categories as for Co3D. Raises ValueError like Co3D.
    """

    def __init__(
        self,
        co3d_dir: Path,
        set_list: str,
        min_quality: float | None = None,
        splits: tuple[str, ...] | None = None,
        categories: tuple[str, ...] | None = None,
    ) -> None:
        _check_folder("--co3d-dir", co3d_dir)
        annotated = sorted(path.parent.name for path in co3d_dir.glob(f"*/{FRAME_FILE}"))
        if not annotated:
            raise ValueError(
                f"--co3d-dir {co3d_dir}: expected <category>/{FRAME_FILE} in it, found none; with VGGT's annotations, "
                "give their directory as --annotation-dir" + _other_layout(co3d_dir)
            )
        _check_categories(categories, set(annotated), co3d_dir)
        if min_quality is not None and not math.isfinite(min_quality):
            raise ValueError(f"--min-quality {min_quality}: expected a number")
        self.co3d_dir, self.set_list, self.min_quality = co3d_dir, set_list, min_quality
        self.splits = tuple(split for split in SPLITS if splits is None or split in splits)
        self.categories = [category for category in annotated if categories is None or category in categories]
        for category in self.categories:
            self._set_list_file(category)
        self._skipped = defaultdict[str, set[tuple[str, str]]](set)

    @property
    def skipped(self) -> dict[str, int]:
        return _counted(self._skipped, self.co3d_dir)

    def describe(self) -> dict[str, Any]:
        files = [self._set_list_file(category) for category in self.categories]
        files += [self.co3d_dir / c / name for c in self.categories for name in (FRAME_FILE, SEQUENCE_FILE)]
        digests = {path.relative_to(self.co3d_dir).as_posix(): sha256(path) for path in files if path.exists()}
        return {"kind": "co3d-official", "annotations": digests, "min_quality": self.min_quality}

    def sequences(self) -> Iterator[Sequence]:
        for split in self.splits:
            for category in self.categories:
                yield from self._of_category(split, category)

    def _of_category(self, split: str, category: str) -> Iterator[Sequence]:
        chosen = self._chosen(split, category)
        good = self._good_sequences(category)
        by_sequence: dict[str, list[Any]] = {}
        unmatched = set(chosen)
        for entry in _read_list(self.co3d_dir / category / FRAME_FILE):
            name = entry.get("sequence_name") if isinstance(entry, dict) else None
            if isinstance(name, str) and (name, _path_of(entry)) in chosen:
                unmatched.discard((name, _path_of(entry)))
                by_sequence.setdefault(name, []).append(entry)
        for name, path in sorted(unmatched):
            by_sequence.setdefault(name, []).append({"filepath": path})
        for name, entries in sorted(by_sequence.items()):
            if good is not None and name not in good:
                self._skipped[f"viewpoint quality below {self.min_quality:g}, or not known"].add((category, name))
            elif (self.co3d_dir / category / _sequence_name(name, self._set_list_file(category))).is_dir():
                yield _sequence(split, category, name, entries, partial(self._frame, category, name))
            else:
                self._skipped[NO_FOLDER].add((category, name))

    def _frame(self, category: str, sequence: str, entry: dict[str, Any]) -> Frame:
        if "sequence_name" not in entry:
            raise ValueError("in the set list, but not annotated")
        image, depth = entry.get("image"), entry.get("depth") or {}
        if not isinstance(image, dict) or not isinstance(depth, dict):
            raise ValueError("annotation whose image or depth is not an object")
        path = _inside(category, sequence, "images", image.get("path"))
        size = image.get("size")
        if size is not None and (not isinstance(size, list) or len(size) != 2):
            raise ValueError("annotation whose image size is not [height, width]")
        places = {
            key: self.co3d_dir / _inside(category, sequence, folder, depth[key]) if depth.get(key) else None
            for key, folder in (("path", "depths"), ("mask_path", "depth_masks"))
        }
        scale = depth.get("scale_adjustment")
        if scale is not None and (not isinstance(scale, int | float) or not SCALE_RANGE[0] < scale < SCALE_RANGE[1]):
            raise ValueError("annotation whose scale_adjustment is not a positive number of a usual size")
        return Frame(
            name=path.stem,
            path=str(path),
            image=self.co3d_dir / path,
            size=None if size is None else (size[0], size[1]),
            depth=places["path"],
            mask=places["mask_path"],
            depth_scale=1.0 if scale is None else float(scale),
            camera=read_camera(entry.get("viewpoint")),
        )

    def _set_list_file(self, category: str) -> Path:
        folder = self.co3d_dir / category / SET_LISTS
        path = folder / f"set_lists_{self.set_list}.json"
        if not path.is_file():
            names = sorted(p.stem.removeprefix("set_lists_") for p in folder.glob("set_lists_*.json"))
            there = f"there are {', '.join(names)}" if names else "there are none"
            raise ValueError(f"--set-list {self.set_list}: no {path}; {there}")
        return path

    def _chosen(self, split: str, category: str) -> set[tuple[str, str]]:
        """The (sequence, image path) pairs that the set list has for our split."""
        path = self._set_list_file(category)
        content = _read_json(path)
        try:
            lists = [content.get(name) or [] for name in OFFICIAL_SPLITS[split]]
            return {(str(sequence), str(image)) for part in lists for sequence, _, image in part}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f'{path}: expected {{"train": [[sequence, number, path], ...], ...}}') from error

    def _good_sequences(self, category: str) -> set[str] | None:
        """The sequences of at least min_quality; None: all."""
        if self.min_quality is None:
            return None
        good = set()
        for entry in _read_list(self.co3d_dir / category / SEQUENCE_FILE):
            score = entry.get("viewpoint_quality_score") if isinstance(entry, dict) else None
            if isinstance(score, int | float) and score >= self.min_quality:
                good.add(str(entry.get("sequence_name")))
        return good


def _sequence(split: str, category: str, name: str, entries: list[Any], make: Callable[[Any], Frame]) -> Sequence:
    """From annotations in any order, and what makes a frame of one or raises ValueError."""
    made: dict[str, Frame] = {}
    bad: list[tuple[str, str]] = []
    for i, entry in enumerate(entries):
        try:
            frame = make(entry)
            if frame.name in made:
                raise ValueError("annotated twice")
            made[frame.name] = frame
        except ValueError as error:
            bad.append((_path_of(entry) or f"{category}/{name}, entry {i}", str(error)))
    return Sequence(split=split, category=category, name=name, frames=[made[k] for k in sorted(made)], bad=bad)


def _counted(skipped: dict[str, set[tuple[str, str]]], co3d_dir: Path) -> dict[str, int]:
    """How many sequences were skipped for each reason, which names one of them."""
    return {f"{why} ({co3d_dir.joinpath(*min(names))})": len(names) for why, names in skipped.items()}


def _path_of(entry: Any) -> str:
    """The image's path in an annotation of either kind; empty if there is none."""
    if not isinstance(entry, dict):
        return ""
    image = entry.get("image")
    return str(entry.get("filepath") or (image.get("path") if isinstance(image, dict) else None) or "")


def _inside(category: str, sequence: str, folder: str, path: Any) -> PurePosixPath:
    """An annotated path, if it is <category>/<sequence>/<folder>/<file>: nothing else is opened."""
    if not isinstance(path, str) or not path:
        raise ValueError("annotation without a path of its image")
    parsed = PurePosixPath(path)
    if parsed.parts[:-1] != (category, sequence, folder) or parsed.name == ".." or not parsed.name.isprintable():
        raise ValueError(f"annotated path is not <category>/<sequence>/{folder}/<file>")
    return parsed


def _check_folder(option: str, path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{option} {path}: no such directory")


def _other_layout(path: Path) -> str:
    """For the end of an error: what a folder without what was expected looks like."""
    what = recognized(path)
    if what is None:
        return ""
    return (
        f". It looks like {what}; so far vggt-prep packs Co3D's layout only, in which captures of your own can be "
        "written: see README, Expected on disk"
    )


def _check_categories(wanted: tuple[str, ...] | None, annotated: set[str], where: Path) -> None:
    missing = sorted(set(wanted or ()) - annotated)
    if missing:
        raise ValueError(
            f"--category {', '.join(missing)}: not annotated in {where}, which has {', '.join(sorted(annotated))}"
        )


def _sequence_name(name: Any, path: Path) -> str:
    text = name if isinstance(name, str) else ""
    if not text.isprintable() or "/" in text or text in ("", ".", "..") or len(text.encode()) > MAX_NAME:
        raise ValueError(f"{path}: {str(name)[:MAX_NAME]!r} cannot be the name of a sequence")
    return name


def _read_json(path: Path) -> Any:
    """A JSON file, gzipped if it is named so. Raises ValueError naming a file that is damaged."""
    kind = "gzipped JSON" if path.suffix == ".jgz" else "JSON"
    try:
        data = path.read_bytes()
        return json.loads(gzip.decompress(data) if path.suffix == ".jgz" else data)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable {kind} file ({error}); download it again") from error


def _read_list(path: Path) -> list[Any]:
    content = _read_json(path)
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a JSON list, found {type(content).__name__}")
    return content


def read_annotations(path: Path) -> dict[str, list[Any]]:
    """Sequence -> entries of VGGT's annotation file. Raises ValueError naming a file that is damaged or otherwise."""
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise ValueError(f"{path}: expected a JSON object of sequence -> list of frames")
    for name in content:
        _sequence_name(name, path)
    return content
