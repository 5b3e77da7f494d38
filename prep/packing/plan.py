"""Which shards a pack makes: a pure function of the annotations."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prep.importers.source import DepthFile, Sequence, Source
from prep.packing.frames import FrameOptions
from shards.schema import SPLITS

MISSING = " without "  # in a digest of files, before a number of images


@dataclass(frozen=True, kw_only=True)
class PackOptions(FrameOptions):
    """min_frames: sequences with fewer usable frames are left out; shard_frames: a shard is full at that many."""

    min_frames: int = 24
    shard_frames: int = 500


@dataclass(frozen=True)
class ShardJob:
    """A shard to be made: the unit of work, self-contained.

    summary: (category, name, annotated frames, frames with depth) of each sequence; content: the sequences, compressed
    to save memory with large datasets.
    """

    split: str
    name: str
    summary: list[tuple[str, str, int, int]]
    content: bytes

    @property
    def frames(self) -> int:
        return sum(count for _, _, count, _ in self.summary)

    @property
    def sequences(self) -> list[Sequence]:
        return pickle.loads(zlib.decompress(self.content))  # of this process, or of the one that made it for a worker

    def file_digest(self) -> str | None:
        """What tells the files of its frames from those that replace them later: sizes and times, not contents.

        With how many images are missing, if some are; None if all are: their disk may just not be mounted.
        """
        digest, missing = hashlib.sha256(), 0
        frames = [frame for sequence in self.sequences for frame in sequence.frames]
        for frame in frames:
            depth = frame.depth.path if isinstance(frame.depth, DepthFile) else None
            for path in (frame.image, depth, frame.mask):
                try:
                    found = None if path is None else path.stat()
                except (OSError, ValueError):  # a name that can be of no file
                    found = None
                    missing += path is frame.image
                digest.update(b"-" if found is None else f"{found.st_size} {found.st_mtime_ns},".encode())
        if missing == len(frames):
            return None
        return f"{digest.hexdigest()}{MISSING}{missing}" if missing else digest.hexdigest()


def missing_images(file_digest: str | None) -> float:
    """How many images were missing when a shard's file_digest was made; infinitely many if it is None."""
    return math.inf if file_digest is None else int(file_digest.partition(MISSING)[2] or 0)


def make_plan(source: Source, options: PackOptions, allow_shared_frames: bool) -> tuple[list[ShardJob], int]:
    """The shards to make, and how many sequences are in both splits (the source gives train first).

    Raises PackError if a frame is in both splits, unless that is allowed.
    """
    plan, in_both = [], 0
    trained, images = set[tuple[str, str]](), [np.empty(0, np.int64)]  # hashes of files: a large dataset has millions
    for split, name, sequences in _filled(source, options):
        summary = [(s.category, s.name, s.annotated, sum(f.depth is not None for f in s.frames)) for s in sequences]
        plan.append(ShardJob(split, name, summary, zlib.compress(pickle.dumps(sequences), 1)))
        for sequence in sequences:
            key = sequence.category, sequence.name
            hashes = np.array([hash(source.identity(frame)) for frame in sequence.frames], np.int64)
            if sequence.split == SPLITS[0]:
                trained.add(key)
                images.append(hashes)
                continue
            in_both += key in trained
            if len(images) > 1:
                images = [np.unique(np.concatenate(images))]
            same = np.flatnonzero(_are_in(hashes, images[0]))
            if len(same) and not allow_shared_frames:
                raise PackError(
                    f"{sequence.frames[same[0]].path} is in the train and in the test split, with {len(same) - 1} more "
                    "frames of its sequence: a test on them says nothing. Give another --set-list or other "
                    "annotations, only one --split, of captures another --test or --test-tail 0.2, or "
                    "--allow-shared-frames"
                )
    return plan, in_both


def _are_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Which values are in a long sorted array, which np.isin would scan in full on each call."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def _filled(source: Source, options: PackOptions) -> Iterator[tuple[str, str, list[Sequence]]]:
    """Split, name and sequences (always whole) of each shard; this depends on the annotations only."""
    split, number, held = "", 0, list[Sequence]()
    for sequence in source.sequences():
        full = sum(s.annotated for s in held) >= options.shard_frames
        if held and (full or sequence.split != split):
            yield split, f"{split}-{number:06d}", held
            number, held = number + 1, []
        if sequence.split != split:
            split, number = sequence.split, 0
        held.append(sequence)
    if held:
        yield split, f"{split}-{number:06d}", held


def plan_digest(plan: list[ShardJob]) -> str:
    """What tells a plan from others."""
    rows = [{"split": job.split, "name": job.name, "sequences": job.summary} for job in plan]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


class PackError(ValueError):
    """A pack that must not continue; the message says why and what to do."""
