"""Does a split to test on hold places, or even pictures, of what is trained on?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.reader import ShardSet

Part = tuple[ShardSet, str]  # a split of a set


@dataclass(frozen=True)
class SharedPlaces:
    """Of the `tested` sequences: how many are trained on, and how many only share a name with a trained one.

    frames: how many of their images are trained on, under any name; unknown: why these counts may be too low.
    """

    tested: int
    sequences: int
    namesakes: int
    frames: int
    unknown: tuple[str, ...] = ()

    def check(self, how_to_allow: str) -> None:
        """Raises ValueError if pictures are shared: a test on them says nothing."""
        if self.frames:
            raise ValueError(
                f"{self.frames} frames to test on are the same as frames to train on, so that a test says nothing; "
                f"pack other splits, or give {how_to_allow}"
            )

    @property
    def any(self) -> bool:
        return self.sequences + self.namesakes + self.frames > 0

    @property
    def words(self) -> str:
        """What the tested sequences are, to be put behind their number."""
        return "; ".join((self._known, *self.unknown))

    @property
    def _known(self) -> str:
        if self.frames:
            return f"{self.frames} of whose frames are trained on"
        kinds = (
            (self.sequences, "other frames of places that are trained on"),
            (self.namesakes, "named like sequences that are trained on, which may be the same places"),
        )
        found = [(number, kind) for number, kind in kinds if number]
        if [number for number, _ in found] == [self.tested]:
            return found[0][1]
        return " and ".join(f"{number} of which are {kind}" for number, kind in found) or (
            "not trained on by this run" if self.unknown else "never trained on"
        )


def shared_places(
    trained: Sequence[Part], tested: Sequence[Part], only: set[tuple[int, int]] | None = None
) -> SharedPlaces:
    """Compare test data with all training data: images by file size and CRC, sequences by category and name.

    Within a set, and between sets packed from the same annotations, equal sequence names mean the same place, and equal
    frame names in it the same image, at any resolution. only: the tested sequences, each as the index of its part in
    `tested` and its number in that split; None: all.
    """
    namesakes: defaultdict[tuple[bytes, bytes], list[tuple[ShardSet, np.void]]] = defaultdict(list)
    of_capture: defaultdict[str | None, list[tuple[ShardSet, np.void]]] = defaultdict(list)
    sites = set[tuple[str, str]]()
    pictures = [np.empty(0, np.uint64)]
    for shard_set, split in trained:
        if split in shard_set.dataset["splits"]:
            pictures.append(_pictures(shard_set)[np.repeat(_in_split(shard_set, split), shard_set.sequences["count"])])
            for row in shard_set.sequences[_in_split(shard_set, split)]:
                namesakes[_key(row)].append((shard_set, row))
                if capture := _said(shard_set, row).get("digest"):
                    of_capture[capture].append((shard_set, row))
                if site := _said(shard_set, row).get("site"):
                    sites.add((shard_set.digest, site))
    all_trained = np.unique(np.concatenate(pictures))
    counts = np.zeros(4, int)
    for place, (shard_set, split) in enumerate(tested):
        known = np.isin(_pictures(shard_set), all_trained)
        for number, row in enumerate(shard_set.sequences[_in_split(shard_set, split)]):
            if only is None or (place, number) in only:
                others = namesakes.get(_key(row), [])
                same = [(other, match) for other, match in others if _same_source(other, shard_set, row)]
                said = _said(shard_set, row)
                same += of_capture.get(said.get("digest"), [])
                place_is_seen = bool(same) or (shard_set.digest, said.get("site")) in sites
                seen = known[_frames(row)]
                for other, match in same:
                    seen |= np.isin(_names(shard_set, row), _names(other, match))
                counts += (1, place_is_seen, bool(others) and not place_is_seen, seen.sum())
    tested_sequences, sequences, namesakes_only, frames = map(int, counts)
    return SharedPlaces(tested_sequences, sequences, namesakes_only, frames)


def _in_split(shard_set: ShardSet, split: str) -> np.ndarray:
    return shard_set.sequences["split"] == split.encode()


def _key(sequence: np.void) -> tuple[bytes, bytes]:
    return bytes(sequence["category"]), bytes(sequence["name"])


def _same_source(a: ShardSet, b: ShardSet, sequence: np.void) -> bool:
    return a.digest == b.digest or bool(_annotations(a, sequence) & _annotations(b, sequence))


def _annotations(shard_set: ShardSet, sequence: np.void) -> set[str]:
    """The digests of the annotation files behind a sequence's category; a file whose split is empty is left out."""
    of_category = shard_set.sequences[shard_set.sequences["category"] == sequence["category"]]
    category, splits = sequence["category"].decode(), {split.decode() for split in of_category["split"]}
    files = shard_set.dataset["source"].get("annotations", {})
    names = (f"{category}/frame_annotations.jgz", *(f"{category}_{split}.jgz" for split in splits))
    return {files[name] for name in names if name in files}


def _said(shard_set: ShardSet, sequence: np.void) -> dict[str, Any]:
    """What a set says of a capture: a digest that tells it from others, and its site if it shares one; empty if not."""
    return shard_set.dataset["source"].get("captures", {}).get(sequence["name"].decode(), {})


def _frames(sequence: np.void) -> slice:
    return slice(int(sequence["first"]), int(sequence["first"]) + int(sequence["count"]))


def _names(shard_set: ShardSet, sequence: np.void) -> np.ndarray:
    return shard_set.frames["name"][_frames(sequence)]


def _pictures(shard_set: ShardSet) -> np.ndarray:
    """What tells the pictures of a set's frames apart [n]."""
    return (shard_set.frames["jpg_size"].astype(np.uint64) << np.uint64(32)) | shard_set.frames["jpg_crc"]
