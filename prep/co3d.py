"""Co3D (arXiv:2109.00512) with VGGT's annotation files: where frames lie and which cameras they have.

CO3D_DIR/<category>/<sequence>/images/frame000001.jpg
                               depths/frame000001.jpg.geometric.png
                               depth_masks/frame000001.png
ANNOTATION_DIR/<category>_{train,test}.jgz    gzipped JSON: sequence -> [{filepath, extri, intri}, ...]
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from prep.source import Frame, Sequence
from shards.schema import SPLITS

ANNOTATION_NAME = re.compile(r"(?P<category>.+)_(?P<split>train|test)\.jgz")


class Co3D:
    """The frames of `co3d_dir` that the files in `annotation_dir` give cameras for.

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
        for path, option in ((co3d_dir, "--co3d-dir"), (annotation_dir, "--annotation-dir")):
            if not path.is_dir():
                raise ValueError(f"{option} {path}: no such directory")
        found: dict[tuple[str, str], Path] = {}
        for path in sorted(annotation_dir.iterdir()):
            match = ANNOTATION_NAME.fullmatch(path.name)
            if match:
                found[match["split"], match["category"]] = path
        if not found:
            raise ValueError(
                f"--annotation-dir {annotation_dir}: expected files like apple_train.jgz and apple_test.jgz, found none"
            )
        annotated = sorted({category for _, category in found})
        missing = sorted(set(categories or ()) - set(annotated))
        if missing:
            raise ValueError(
                f"--category {', '.join(missing)}: not annotated in {annotation_dir}, which has {', '.join(annotated)}"
            )
        self.co3d_dir = co3d_dir
        self.annotation_dir = annotation_dir
        self.files = {
            key: found[key]
            for key in sorted(found, key=lambda key: (SPLITS.index(key[0]), key[1]))
            if (splits is None or key[0] in splits) and (categories is None or key[1] in categories)
        }
        if not self.files:
            raise ValueError(f"{annotation_dir}: no annotation file is left for these --split and --category")
        self._skipped: set[tuple[str, str]] = set()

    @property
    def skipped(self) -> int:
        return len(self._skipped)

    def describe(self) -> dict[str, Any]:
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.files.values()}
        return {"kind": "co3d", "annotations": digests}

    def sequences(self) -> Iterator[Sequence]:
        for (split, category), path in self.files.items():
            for name, entries in sorted(read_annotations(path).items()):
                folder = self.co3d_dir / category / name
                if folder.is_dir():
                    yield self._sequence(split, category, name, entries)
                else:
                    self._skipped.add((category, name))

    def _sequence(self, split: str, category: str, name: str, entries: list[Any]) -> Sequence:
        has_depth = (self.co3d_dir / category / name / "depths").is_dir()
        frames: dict[str, Frame] = {}
        bad: list[tuple[str, str]] = []
        for i, entry in enumerate(entries):
            path = str(entry.get("filepath")) if isinstance(entry, dict) else f"{category}/{name}, entry {i}"
            try:
                frame = self._frame(category, name, entry, has_depth)
                if frame.name in frames:
                    raise ValueError("annotated twice")
                frames[frame.name] = frame
            except ValueError as error:
                bad.append((path, str(error)))
        ordered = [frames[key] for key in sorted(frames)]
        return Sequence(split=split, category=category, name=name, frames=ordered, bad=bad)

    def _frame(self, category: str, sequence: str, entry: Any, has_depth: bool) -> Frame:
        if not isinstance(entry, dict) or not isinstance(entry.get("filepath"), str):
            raise ValueError("annotation without a filepath")
        path = PurePosixPath(entry["filepath"])
        if path.parts[:-1] != (category, sequence, "images"):
            raise ValueError("filepath is not <category>/<sequence>/images/<file>")
        try:
            extrinsics = np.array(entry["extri"], dtype=np.float64).reshape(3, 4)
            intrinsics = np.array(entry["intri"], dtype=np.float64).reshape(3, 3)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("annotation without extri 3x4 and intri 3x3") from error
        folder = self.co3d_dir / category / sequence
        mask = folder / "depth_masks" / f"{path.stem}.png"
        return Frame(
            name=path.stem,
            path=str(path),
            image=self.co3d_dir / path,
            depth=folder / "depths" / f"{path.name}.geometric.png" if has_depth else None,
            mask=mask if mask.exists() else None,
            depth_scale=1.0,
            extrinsics=extrinsics,
            intrinsics=intrinsics,
        )


def read_annotations(path: Path) -> dict[str, list[Any]]:
    """Sequence -> entries of a gzipped JSON file. Raises ValueError naming the file if it is damaged or otherwise."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path}: not a readable gzipped JSON file ({error}); download it again") from error
    if not isinstance(content, dict) or not all(isinstance(entries, list) for entries in content.values()):
        raise ValueError(f"{path}: expected a JSON object of sequence -> list of frames")
    for name in content:
        if not name or "/" in name or name in (".", ".."):
            raise ValueError(f"{path}: {name!r} cannot be the name of a sequence")
    return content
