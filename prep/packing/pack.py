"""Packing: sequences -> shards in parallel -> index. Killed at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import shards
from prep.importers.source import Sequence, Source
from prep.packing.frames import BadFrameError, FrameOptions, PackedFrame, pack_frame
from prep.packing.sequences import doubtful_lengths, recentered
from shards.index import TarIndex, index_file, read_dataset, sha256, write_index
from shards.locks import locked
from shards.schema import DATASET_FILE, DEPTH, JPEG, META, REPORT_FILE, SPLITS, WORK_FOLDER, member_key
from shards.writer import write_json, write_tar

JOB_FILE = "job.json"
PATIENCE = 90  # seconds
ShardReport = dict[str, list[Any]]  # bad, short and doubtful, as in PackResult
NOTHING_TO_REPORT: ShardReport = {"bad": [], "short": [], "doubtful": []}


@dataclass(frozen=True, kw_only=True)
class PackOptions(FrameOptions):
    """min_frames: sequences with fewer usable frames are left out; shard_frames: a shard is full at that many."""

    min_frames: int = 24
    shard_frames: int = 500


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """A shard to be made: the unit of work, self-contained."""

    split: str
    name: str
    sequences: list[Sequence]
    former: Former | None = None


@dataclass(frozen=True)
class Former:
    """What a finished set says of a shard: its tar, and what its report says."""

    sha256: str | None  # None: nothing was left to be packed
    report: ShardReport


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What a pack did. skipped: reason -> sequences that the source did not give; in_both: sequences of both splits.

    bad: (path, reason, detail); short: (split/category/sequence, usable frames); doubtful: (the same, why).
    """

    splits: dict[str, dict[str, int]]
    bytes: int
    without_depth: int
    skipped: dict[str, int]
    in_both: int
    bad: list[tuple[str, str, str]]
    short: list[tuple[str, int]]
    doubtful: list[tuple[str, str]]

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for _, reason, _ in self.bad)


@dataclass(frozen=True, kw_only=True)
class ShardDone:
    """What came of a shard: annotated frames, bytes of its tar, and frames of it that are bad."""

    frames: int
    bytes: int
    bad: int

    def __add__(self, other: ShardDone) -> ShardDone:
        return ShardDone(frames=self.frames + other.frames, bytes=self.bytes + other.bytes, bad=self.bad + other.bad)


class PackError(ValueError):
    """A pack that must not go on; the message says why and what to do."""


def pack(
    source: Source,
    out: Path,
    options: PackOptions,
    executor: Executor,
    *,
    max_bad: float,
    parallel: int,
    allow_shared_frames: bool = False,
    on_plan: Callable[[int, int], None] = lambda frames, kept: None,
    on_shard: Callable[[ShardDone], None] = lambda done: None,
) -> PackResult:
    """Pack all of `source` into directory `out` and return what came of it.

    parallel: shards that the executor makes at once. on_plan is told the number of frames in all and of those in
    shards that are there already, on_shard each further shard as it is finished. Raises PackError if `out` holds
    something else, nothing can be packed, more than the share max_bad of the frames is bad, or, unless that is allowed,
    a frame is to train and to test on.
    """
    plan, in_both = _plan(source, options, allow_shared_frames)
    total = sum(entry.frames for entry in plan)
    if not total:
        reasons = "".join(f"; {count} annotated sequences skipped: {why}" for why, count in source.skipped.items())
        raise PackError(f"no frame to pack{reasons}")
    job = {
        "source": source.describe() | {"plan": _digest([asdict(entry) for entry in plan])},
        "options": asdict(options),
    }
    _check_place(out, job)
    work = out / WORK_FOLDER
    if _is_whole(out) and not (work / JOB_FILE).exists():  # where there is a job, another pack may be at work
        shutil.rmtree(work, ignore_errors=True)  # left by a kill at the very end
        on_plan(total, total)
        return _result(out, source, in_both)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, f"{out}: another pack is at work there"):
        has_job = (work / JOB_FILE).exists()  # without, all that is there was left by a kill in _clear
        for leftover in [*out.glob("*.tmp"), *work.glob("*.tmp" if has_job else "*.*")]:
            leftover.unlink()
        write_json(work / JOB_FILE, job)
        most_bad = max_bad * total
        kept = _kept(out, plan, most_bad)
        on_plan(total, sum(entry.frames for entry in plan if entry.name in kept))
        missing = _missing_jobs(source, out, options, plan, kept, _formers(out))
        _run(missing, out, options, executor, parallel, on_shard, most_bad - sum(kept.values()))
        _finish(out, job, [entry.name for entry in plan], most_bad)
    return _result(out, source, in_both)


@dataclass(frozen=True)
class Planned:
    """A shard of the plan. sequences: category, name, annotated frames, and how many have depth."""

    split: str
    name: str
    sequences: list[tuple[str, str, int, int]]

    @property
    def frames(self) -> int:
        return sum(count for _, _, count, _ in self.sequences)


def _plan(source: Source, options: PackOptions, allow_shared_frames: bool) -> tuple[list[Planned], int]:
    """The shards to make, and how many sequences are both to train and to test on (source: train comes first).

    Raises PackError if that is true of frames, unless it is allowed.
    """
    plan, in_both = [], 0
    trained: dict[tuple[str, str], np.ndarray] = {}  # hashes of their frames' paths: a large dataset has millions
    for job in _jobs(source, options):
        plan.append(_planned(job))
        for sequence in job.sequences:
            key, paths = (sequence.category, sequence.name), [frame.path for frame in sequence.frames]
            hashes = np.array([hash(path) for path in paths], np.int64)
            if sequence.split == SPLITS[0]:
                trained[key] = hashes
            elif key in trained:
                in_both += 1
                same = np.flatnonzero(np.isin(hashes, trained[key]))
                if len(same) and not allow_shared_frames:
                    raise PackError(
                        f"{paths[same[0]]} is in the train and in the test split, with {len(same) - 1} more frames of "
                        "its sequence: a test on them says nothing. Give another --set-list or other annotations, only "
                        "one --split, or --allow-shared-frames"
                    )
    return plan, in_both


def _planned(job: ShardJob) -> Planned:
    rows = []
    for sequence in job.sequences:
        depths = sum(frame.depth is not None for frame in sequence.frames)
        rows.append((sequence.category, sequence.name, sequence.annotated, depths))
    return Planned(job.split, job.name, rows)


def _kept(out: Path, plan: list[Planned], most_bad: float) -> dict[str, int]:
    """The shards that are done, and how many bad frames each has; without those that have some if these are too many.

    Then the dataset may have been mended since, and they are made again.
    """
    kept = {entry.name: len(_report(out, entry.name)["bad"]) for entry in plan if _is_done(out, entry.name)}
    if sum(kept.values()) <= most_bad:
        return kept
    for name in [name for name, bad in kept.items() if bad]:
        del kept[name]
        (out / WORK_FOLDER / f"{name}.json").unlink()  # now: a kill must not bring it back
    return kept


def _formers(out: Path) -> dict[str, Former]:
    """The shards of a finished set that lost some file: those of its tars that are as they were stay.

    Empty if there was no such set, or its report is gone: then nobody knows what was left out.
    """
    report = read_report(out)
    if not (out / DATASET_FILE).exists() or report is None:
        return {}
    files = _read_record(out / DATASET_FILE)["files"]
    digests = {name.removesuffix(".tar"): entry["sha256"] for name, entry in files.items() if name.endswith(".tar")}
    return {
        name: Former(digests.get(name), report.get(name, NOTHING_TO_REPORT)) for name in sorted({*digests, *report})
    }


def _missing_jobs(
    source: Source,
    out: Path,
    options: PackOptions,
    plan: list[Planned],
    kept: dict[str, int],
    formers: dict[str, Former],
) -> Iterator[ShardJob]:
    """The jobs of the shards that are not kept. Raises PackError if the dataset is no longer what was planned."""
    for planned, job in zip_longest(plan, _jobs(source, options)):
        if planned is None or job is None or _planned(job) != planned:
            raise PackError(f"the dataset changed while it was packed: remove {out}, and run again when it is complete")
        if job.name not in kept:
            yield replace(job, former=formers.get(job.name))


def _report(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / WORK_FOLDER / f"{name}.json").read_bytes())


def _finish(out: Path, job: dict[str, Any], names: list[str], most_bad: float) -> None:
    """Write the report of all shards that were made and the index.

    If too much is bad, only a report, where it replaces none of a finished set.
    """
    work = out / WORK_FOLDER
    reports = {name: _report(out, name) for name in names if _is_done(out, name)}
    to_tell = {name: {key: part.get(key, []) for key in NOTHING_TO_REPORT} for name, part in reports.items()}
    to_tell = {name: part for name, part in to_tell.items() if part != NOTHING_TO_REPORT}
    bad = [entry for part in reports.values() for entry in part["bad"]]
    if len(bad) > most_bad:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(e[1] for e in bad).most_common())
        so_far = "" if len(reports) == len(names) else f" in {len(reports)} of {len(names)} shards"
        write_json(work / REPORT_FILE, to_tell)
        raise PackError(
            f"{len(bad)} frames are bad{so_far}, and --max-bad allows {int(most_bad)} in all: {reasons}; "
            f"each is listed in {work / REPORT_FILE}. Mend the dataset, or allow more, and run again: "
            "what is good is kept"
        )
    tars = [
        TarIndex(file=f"{name}.tar", rows=work / f"{name}.npy", **reports[name]["index"])
        for name in names
        if reports[name]["index"]
    ]
    write_json(out / REPORT_FILE, to_tell)
    if not tars:
        _clear(work)  # so that other options may be tried
        raise PackError(
            f"no sequence has {job['options']['min_frames']} usable frames; see {out / REPORT_FILE} and --min-frames"
        )
    write_index(out, tars, source=job["source"], options=job["options"])
    for leftover in out.glob("*.tmp"):  # of a worker that was lost, and whose shard another one made
        leftover.unlink()
    _clear(work)


def _clear(work: Path) -> None:
    """Remove the folder of a pack that has ended; first what says that there is one."""
    (work / JOB_FILE).unlink()
    shutil.rmtree(work)


def _jobs(source: Source, options: PackOptions) -> Iterator[ShardJob]:
    """The shards, by filling each with whole sequences: their boundaries follow from the annotations alone."""
    split, number, held = "", 0, list[Sequence]()
    for sequence in source.sequences():
        full = sum(s.annotated for s in held) >= options.shard_frames
        if held and (full or sequence.split != split):
            yield ShardJob(split=split, name=f"{split}-{number:06d}", sequences=held)
            number, held = number + 1, []
        if sequence.split != split:
            split, number = sequence.split, 0
        held.append(sequence)
    if held:
        yield ShardJob(split=split, name=f"{split}-{number:06d}", sequences=held)


def _digest(plan: list[Any]) -> str:
    return hashlib.sha256(json.dumps(plan).encode()).hexdigest()


def _check_place(out: Path, job: dict[str, Any]) -> None:
    """Raises PackError unless `out` is free, or holds what this job has made so far."""
    for path in (out / DATASET_FILE, out / WORK_FOLDER / JOB_FILE):
        if path.is_file():
            _check_same(out, _read_record(path), job)
            return
    if out.exists() and not out.is_dir():
        raise PackError(f"{out}: expected a directory")
    if out.is_dir() and any(out.glob("*.tar")) and not (out / WORK_FOLDER).exists():
        raise PackError(f"{out}: holds tars, but no {DATASET_FILE}: make one with vggt-prep index, or remove {out}")
    if out.is_dir() and any(path.name not in (WORK_FOLDER, REPORT_FILE) for path in out.iterdir()):
        raise PackError(f"{out}: not empty, and holds no shards; give another --out")


def _check_same(out: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises PackError, saying what differs, unless `out` holds, or will hold, what is wanted."""
    advice = "give another --out, or remove it first"
    if not found["options"]:
        raise PackError(f"{out}: its index was rebuilt, and with what options it was packed is not known; {advice}")
    other = [
        f"{key} is {found['options'].get(key)} there and {value} here"
        for key, value in wanted["options"].items()
        if found["options"].get(key) != value
    ]
    if other:
        raise PackError(f"{out}: holds shards of other options ({', '.join(other)}); {advice}")
    if found["source"] != wanted["source"]:
        raise PackError(f"{out}: holds shards of another dataset, or of more or fewer of its sequences; {advice}")


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_dataset(path.read_bytes()) if path.name == DATASET_FILE else json.loads(path.read_bytes())
    except ValueError as error:
        raise PackError(f"{path}: damaged: {error}") from error


def _is_whole(out: Path) -> bool:
    try:
        shards.open(out)
    except ValueError:
        return False
    return True


def _run(
    jobs: Iterator[ShardJob],
    out: Path,
    options: PackOptions,
    executor: Executor,
    parallel: int,
    on_shard: Callable[[ShardDone], None],
    most_bad: float,
) -> None:
    """Make these shards until more than `most_bad` frames are bad.

    A few more jobs are submitted than run at once: memory does not grow with the dataset.
    """
    pending: dict[Future[ShardDone], str] = {}
    stamp = sha256(out / WORK_FOLDER / JOB_FILE)
    bad = 0

    def take(all_but: int) -> None:
        nonlocal bad
        while len(pending) > all_but and bad <= most_bad:
            for done in _collect(pending, out):
                on_shard(done)
                bad += done.bad

    try:
        for job in jobs:
            pending[executor.submit(pack_shard, job, out, options, stamp)] = job.name
            take(all_but=2 * parallel)
            if bad > most_bad:
                break
        take(all_but=0)
    finally:
        for future in pending:
            future.cancel()
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # then whoever started the workers ends them
            wait(pending)  # those that run cannot be cancelled, and still write


def _collect(pending: dict[Future[ShardDone], str], out: Path) -> Iterator[ShardDone]:
    """Wait for some of the shards, and take them off."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        name, result = pending.pop(future), future.result()
        for _ in range(PATIENCE):
            if _is_done(out, name):
                break
            os.listdir(out / WORK_FOLDER)  # a network file system may remember for a while that it was not there
            time.sleep(1)
        else:
            raise PackError(f"{out}: {name} was made, but is not here: all workers must see the same directory")
        yield result


def _is_done(out: Path, name: str) -> bool:
    """A shard is done when its report is there (it is written last) and its tar has the size it says."""
    report = out / WORK_FOLDER / f"{name}.json"
    if not report.is_file():
        return False
    index = json.loads(report.read_bytes())["index"]
    tar = out / f"{name}.tar"
    return index is None or (tar.is_file() and tar.stat().st_size == index["size"])


def pack_shard(job: ShardJob, out: Path, options: PackOptions, stamp: str) -> ShardDone:
    """Make one shard: its tar in `out`, then its rows of the index, then its report. Runs in a worker.

    stamp: SHA-256 of the record of the pack this is for. Raises PackError if `out` now holds another one: a worker of
    a cluster may come to this long after who asked for it is gone.
    """
    _check_stamp(out, stamp)
    cv2.setNumThreads(1)  # there is a worker a core
    tar, former, index = out / f"{job.name}.tar", job.former, None
    if former is not None and former.sha256 == (sha256(tar) if tar.is_file() else None):
        report = former.report
    else:
        report = _write_shard(tar, job.sequences, options, lambda: _check_stamp(out, stamp))
    if tar.is_file():
        made = index_file(tar, out / WORK_FOLDER)
        index = {"size": made.size, "sha256": made.sha256, "sequences": made.sequences}
    write_json(out / WORK_FOLDER / f"{job.name}.json", {"index": index} | report)
    annotated = sum(sequence.annotated for sequence in job.sequences)
    return ShardDone(frames=annotated, bytes=index["size"] if index else 0, bad=len(report["bad"]))


def _check_stamp(out: Path, stamp: str) -> None:
    record = out / WORK_FOLDER / JOB_FILE
    if not record.is_file() or sha256(record) != stamp:
        raise PackError(f"{out}: the pack that this shard was for is over")


def _write_shard(tar: Path, sequences: list[Sequence], options: PackOptions, check: Callable[[], None]) -> ShardReport:
    """Make a tar, unless all of it is left out; returns what there is to report. check comes last, and may raise."""
    report: ShardReport = {"bad": [], "short": [], "doubtful": []}

    def samples() -> Iterator[dict[str, Any]]:
        for sequence in sequences:
            yield from _samples(sequence, options, report)
        check()

    made = samples()
    first = next(made, None)
    if first is None:
        tar.unlink(missing_ok=True)  # of a former pack
    else:
        write_tar(tar, chain([first], made))
    return report


def _samples(sequence: Sequence, options: PackOptions, report: ShardReport) -> Iterator[dict[str, Any]]:
    """The WebDataset samples of a sequence, none if it is too short; what is to be said of it goes to `report`."""
    names, frames = [], list[PackedFrame]()
    report["bad"] += [(path, reason, "") for path, reason in sequence.bad]
    for frame in sequence.frames:
        try:
            frames.append(pack_frame(frame, options))
            names.append(frame.name)
        except BadFrameError as error:
            report["bad"].append((frame.path, error.reason, error.detail))
    place = f"{sequence.split}/{sequence.category}/{sequence.name}"
    if len(frames) < options.min_frames:
        report["short"].append((place, len(frames)))
        return
    doubt = doubtful_lengths(frames)
    if doubt is not None:
        report["doubtful"].append((place, doubt))
    for name, packed in zip(names, recentered(frames), strict=True):
        sample = {"__key__": member_key(sequence.category, sequence.name, name), JPEG: packed.jpeg}
        yield sample | {META: packed.meta.to_json()} | ({} if packed.depth is None else {DEPTH: packed.depth})


def read_report(out: Path) -> dict[str, ShardReport] | None:
    """Shard -> what there is to report of it, for shards of which there is. None if the report is gone or damaged."""
    try:
        report = json.loads((out / REPORT_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    parts = report.values() if isinstance(report, dict) else [None]
    if not all(isinstance(part, dict) and {"bad", "short"} <= set(part) <= set(NOTHING_TO_REPORT) for part in parts):
        return None
    return {name: NOTHING_TO_REPORT | part for name, part in report.items()}  # older ones know nothing of doubts


def _result(out: Path, source: Source, in_both: int) -> PackResult:
    opened = shards.open(out)
    parts = (read_report(out) or {}).values()
    return PackResult(
        splits=opened.dataset["splits"],
        bytes=sum(entry["size"] for entry in opened.dataset["files"].values()),
        without_depth=int((opened.frames["depth_size"] == 0).sum()),
        skipped=source.skipped,
        in_both=in_both,
        bad=[tuple(entry) for part in parts for entry in part["bad"]],
        short=[tuple(entry) for part in parts for entry in part["short"]],
        doubtful=[tuple(entry) for part in parts for entry in part["doubtful"]],
    )
