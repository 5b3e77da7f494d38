"""One shard: its tar, its rows of the index, its report. Runs in a worker."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import cv2

from prep.importers.source import Sequence
from prep.packing.frames import PackedFrame, pack_frame
from prep.packing.plan import PackError, PackOptions, ShardJob
from prep.packing.reading import BadFrameError
from prep.packing.sequences import doubtful_lengths, recentered
from prep.packing.work import JOB_FILE, NOTHING_TO_REPORT, ShardReport, record_file
from shards.build_index import index_file
from shards.index import sha256
from shards.schema import DEPTH, JPEG, META, WORK_FOLDER, member_key
from shards.writer import write_json, write_tar


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """What came of a shard: annotated frames, bytes of its tar, and frames of it that are bad."""

    frames: int
    bytes: int
    bad: int

    def __add__(self, other: ShardDone) -> ShardDone:
        return ShardDone(frames=self.frames + other.frames, bytes=self.bytes + other.bytes, bad=self.bad + other.bad)


def pack_shard(job: ShardJob, out: Path, options: PackOptions, stamp: str) -> ShardDone:
    """Make one shard: its tar in `out`, then its rows of the index, then its report. Runs in a worker.

    stamp: SHA-256 of the job file of the pack this is for. Raises PackError if `out` now holds another one: a cluster
    worker may start this long after that pack has ended.
    """
    _check_stamp(out, stamp)
    cv2.setNumThreads(1)  # there is a worker a core
    tar, record, index = out / f"{job.name}.tar", record_file(out, job.name), None
    made_of = {"made_of": job.file_digest()}  # before they are read: they may be replaced meanwhile
    known = json.loads(record.read_bytes()) if record.is_file() else None
    if known is not None and known["index"] and tar.is_file() and known["index"]["sha256"] == sha256(tar):
        report, made = {key: known[key] for key in NOTHING_TO_REPORT}, True
        made_of = {key: known[key] for key in made_of if key in known}
    else:
        report, made = _write_shard(tar, job.sequences, options, lambda: _check_stamp(out, stamp))
    if made:
        indexed = index_file(tar, out / WORK_FOLDER)
        index = {"size": indexed.size, "sha256": indexed.sha256, "sequences": indexed.sequences}
    write_json(record, {"index": index} | made_of | report)
    return ShardDone(frames=job.frames, bytes=index["size"] if index else 0, bad=len(report["bad"]))


def _check_stamp(out: Path, stamp: str) -> None:
    record = out / WORK_FOLDER / JOB_FILE
    if not record.is_file() or sha256(record) != stamp:
        raise PackError(f"{out}: the pack that this shard was for is over")


def _write_shard(
    tar: Path, sequences: list[Sequence], options: PackOptions, check: Callable[[], None]
) -> tuple[ShardReport, bool]:
    """Make a tar, unless all its sequences are left out; return the report and whether it was made.

    check runs last, and may raise. An old tar is kept: if too much is bad, it may be all there is.
    """
    report: ShardReport = {"bad": [], "short": [], "doubtful": []}

    def samples() -> Iterator[dict[str, Any]]:
        for sequence in sequences:
            yield from _samples(sequence, options, report)
        check()

    made = samples()
    first = next(made, None)
    if first is not None:
        write_tar(tar, chain([first], made))
    return report, first is not None


def _samples(sequence: Sequence, options: PackOptions, report: ShardReport) -> Iterator[dict[str, Any]]:
    """The WebDataset samples of a sequence, none if it is too short; what is to be said of it goes to `report`."""
    names, frames, maps = [], list[PackedFrame](), 0
    report["bad"] += [(path, reason, "") for path, reason in sequence.bad]
    for frame in sequence.frames:
        try:
            frames.append(pack_frame(frame, options))
            names.append(frame.name)
            maps += frame.depth is not None
        except BadFrameError as error:
            report["bad"].append((frame.path, error.reason, error.detail))
    place = f"{sequence.split}/{sequence.category}/{sequence.name}"
    if len(frames) < options.min_frames:
        report["short"].append((place, len(frames)))
        return
    empty = maps - sum(packed.depth is not None for packed in frames)
    if 2 * empty > maps:
        causes = "a mask, --depth-range, or points of few views?"
        report["doubtful"].append((place, f"{empty} of {maps} depth maps hold no known depth: {causes}"))
    doubt = doubtful_lengths(frames)
    if doubt is not None:
        report["doubtful"].append((place, doubt))
    for name, packed in zip(names, recentered(frames), strict=True):
        sample = {"__key__": member_key(sequence.category, sequence.name, name), JPEG: packed.jpeg}
        yield sample | {META: packed.meta.to_json()} | ({} if packed.depth is None else {DEPTH: packed.depth})
