"""Co3D with the annotations that come with it, also its single-sequence subset."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prep.importers.co3d import (
    FRAME_FILE,
    NO_FOLDER,
    SCALE_RANGE,
    SEQUENCE_FILE,
    SET_LISTS,
    check_categories,
    check_folder,
    counted_by_reason,
    make_sequence,
    path_inside,
    path_of,
    read_json,
    read_list,
    sequence_name,
    stereo_depth,
)
from prep.importers.co3d_cameras import read_camera
from prep.importers.layouts import layout_hint
from prep.importers.source import Frame, Sequence
from shards.index import sha256
from shards.schema import SPLITS

OFFICIAL_SPLITS = {"train": ("train",), "test": ("val", "test")}


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
        check_folder("--co3d-dir", co3d_dir)
        annotated = sorted(path.parent.name for path in co3d_dir.glob(f"*/{FRAME_FILE}"))
        if not annotated:
            raise ValueError(
                f"--co3d-dir {co3d_dir}: expected <category>/{FRAME_FILE} in it, found none; with VGGT's annotations, "
                "give their directory as --annotation-dir" + layout_hint(co3d_dir)
            )
        check_categories(categories, set(annotated), co3d_dir)
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
        return counted_by_reason(self._skipped, self.co3d_dir)

    def describe(self) -> dict[str, Any]:
        files = [self._set_list_file(category) for category in self.categories]
        files += [self.co3d_dir / c / name for c in self.categories for name in (FRAME_FILE, SEQUENCE_FILE)]
        digests = {path.relative_to(self.co3d_dir).as_posix(): sha256(path) for path in files if path.exists()}
        return {"kind": "co3d-official", "annotations": digests, "min_quality": self.min_quality}

    def identity(self, frame: Frame) -> str:
        return str(frame.image)

    def sequences(self) -> Iterator[Sequence]:
        for split in self.splits:
            for category in self.categories:
                yield from self._of_category(split, category)

    def _of_category(self, split: str, category: str) -> Iterator[Sequence]:
        chosen = self._chosen(split, category)
        good = self._good_sequences(category)
        by_sequence: dict[str, list[Any]] = {}
        unmatched = set(chosen)
        for entry in read_list(self.co3d_dir / category / FRAME_FILE):
            name = entry.get("sequence_name") if isinstance(entry, dict) else None
            if isinstance(name, str) and (name, path_of(entry)) in chosen:
                unmatched.discard((name, path_of(entry)))
                by_sequence.setdefault(name, []).append(entry)
        for name, path in sorted(unmatched):
            by_sequence.setdefault(name, []).append({"filepath": path})
        for name, entries in sorted(by_sequence.items()):
            if good is not None and name not in good:
                self._skipped[f"viewpoint quality below {self.min_quality:g}, or not known"].add((category, name))
            elif (self.co3d_dir / category / sequence_name(name, self._set_list_file(category))).is_dir():
                yield make_sequence(split, category, name, entries, partial(self._frame, category, name))
            else:
                self._skipped[NO_FOLDER].add((category, name))

    def _frame(self, category: str, sequence: str, entry: dict[str, Any]) -> Frame:
        if "sequence_name" not in entry:
            raise ValueError("in the set list, but not annotated")
        image, depth = entry.get("image"), entry.get("depth") or {}
        if not isinstance(image, dict) or not isinstance(depth, dict):
            raise ValueError("annotation whose image or depth is not an object")
        path = path_inside(category, sequence, "images", image.get("path"))
        size = image.get("size")
        if size is not None and (not isinstance(size, list) or len(size) != 2):
            raise ValueError("annotation whose image size is not [height, width]")
        places = {
            key: self.co3d_dir / path_inside(category, sequence, folder, depth[key]) if depth.get(key) else None
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
            depth=None
            if places["path"] is None
            else stereo_depth(places["path"], unit=1.0 if scale is None else float(scale)),
            mask=places["mask_path"],
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
        content = read_json(path)
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
        for entry in read_list(self.co3d_dir / category / SEQUENCE_FILE):
            score = entry.get("viewpoint_quality_score") if isinstance(entry, dict) else None
            if isinstance(score, int | float) and score >= self.min_quality:
                good.add(str(entry.get("sequence_name")))
        return good
