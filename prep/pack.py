"""Packing: sequences -> shards in parallel -> index. Killed at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import shards
from prep.frames import BadFrameError, FrameOptions, pack_frame
from prep.source import Sequence, Source
from shards.index import TarIndex, index_tar, write_index
from shards.schema import DATASET_FILE, DEPTH, JPEG, META, REPORT_FILE, member_key
from shards.writer import atomic_file, write_json, write_tar

WORK_FOLDER = ".pack"  # in the output, until it is complete
JOB_FILE = "job.json"


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


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What a pack did. bad: (path, reason, detail); short: (split/category/sequence, usable frames)."""

    splits: dict[str, dict[str, int]]
    bytes: int
    skipped: int
    bad: list[tuple[str, str, str]]
    short: list[tuple[str, int]]

    @property
    def reasons(self) -> Counter[str]:
        return Counter(reason for _, reason, _ in self.bad)


class PackError(ValueError):
    """A pack that must not go on; the message says why and what to do."""


def pack(
    source: Source,
    out: Path,
    options: PackOptions,
    executor: Executor,
    *,
    max_bad: float,
    workers: int,
    on_plan: Callable[[int], None] = lambda frames: None,
    on_shard: Callable[[int], None] = lambda frames: None,
) -> PackResult:
    """Pack all of `source` into directory `out` and return what came of it.

    on_plan is told the number of frames in all, on_shard those of each shard as it is finished. Raises PackError
    if `out` holds something else, nothing can be packed, or more than the share max_bad of the frames is bad.
    """
    jobs = _jobs(source, options)
    plan = [(job.split, job.name, [(s.category, s.name, s.annotated) for s in job.sequences]) for job in jobs]
    total = sum(count for _, _, sequences in plan for _, _, count in sequences)
    on_plan(total)
    if not total:
        raise PackError(
            f"no frame to pack: {source.skipped} annotated sequences, but no folder of any; is --co3d-dir right?"
        )
    description, stored = source.describe(), asdict(options)
    work = out / WORK_FOLDER
    if _already_packed(out, description, stored, plan):
        shutil.rmtree(work, ignore_errors=True)  # left by a kill at the very end
        on_shard(total)
        return _result(out, source.skipped)
    work.mkdir(parents=True, exist_ok=True)
    for leftover in [*out.glob("*.tmp"), *work.glob("*.tmp")]:
        leftover.unlink()
    write_json(work / JOB_FILE, _job_record(description, stored, plan))

    _run(_jobs(source, options), out, options, executor, workers, on_shard)
    reports = {name: json.loads((work / f"{name}.json").read_bytes()) for _, name, _ in plan}
    report = {
        "bad": [entry for part in reports.values() for entry in part["bad"]],
        "short": [entry for part in reports.values() for entry in part["short"]],
    }
    write_json(out / REPORT_FILE, report)
    if len(report["bad"]) > max_bad * total:
        for name, part in reports.items():
            if part["bad"]:  # to be made again from a mended dataset
                (work / f"{name}.json").unlink()
        reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(e[1] for e in report["bad"]).most_common())
        raise PackError(
            f"{len(report['bad'])} of {total} frames are bad, more than --max-bad {max_bad:g} allows: {reasons}; "
            f"each is listed in {out / REPORT_FILE}. Mend the dataset, or allow more, and run again: "
            "shards without bad frames are kept"
        )
    tars = [
        TarIndex(f"{name}.tar", split, [tuple(s) for s in reports[name]["sequences"]], np.load(work / f"{name}.npy"))
        for split, name, _ in plan
        if reports[name]["sequences"]
    ]
    if not tars:
        raise PackError(f"no sequence has {options.min_frames} usable frames; see {out / REPORT_FILE} and --min-frames")
    write_index(out, tars, source=description | {"plan": _digest(plan)}, options=stored)
    shutil.rmtree(work)
    return _result(out, source.skipped)


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


def _job_record(description: dict[str, Any], options: dict[str, Any], plan: list[Any]) -> dict[str, Any]:
    return {"source": description | {"plan": _digest(plan)}, "options": options}


def _already_packed(out: Path, description: dict[str, Any], options: dict[str, Any], plan: list[Any]) -> bool:
    """Whether `out` is complete. Raises PackError if it holds a pack of something else, or other files."""
    wanted = _job_record(description, options, plan)
    for path in (out / DATASET_FILE, out / WORK_FOLDER / JOB_FILE):
        if path.is_file():
            found = _read_record(path)
            for key, what in (("options", "other options"), ("source", "another dataset")):
                if found.get(key) != wanted[key]:
                    raise PackError(f"{out}: holds shards of {what}; give another --out, or remove it first")
            if path.name == DATASET_FILE and not _is_whole(out):
                path.unlink()  # a file is missing or cut off: make the set again
                return False
            return path.name == DATASET_FILE
    if out.exists() and not out.is_dir():
        raise PackError(f"{out}: expected a directory")
    if out.is_dir() and any(path.name != WORK_FOLDER for path in out.iterdir()):
        raise PackError(f"{out}: not empty, and holds no shards; give another --out")
    return False


def _read_record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise PackError(f"{path}: damaged ({error}); remove {path.parent} and pack again") from error
    if not isinstance(found, dict):
        raise PackError(f"{path}: expected a JSON object; is this a shard set?")
    return found


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
    workers: int,
    on_shard: Callable[[int], None],
) -> None:
    """Make all shards that are not there yet, with a few more jobs submitted than there are workers."""
    pending: dict[Future[None], int] = {}
    try:
        for job in jobs:
            frames = sum(s.annotated for s in job.sequences)
            if _is_done(out, job.name):
                on_shard(frames)
                continue
            pending[executor.submit(pack_shard, job, out, options)] = frames
            while len(pending) > 2 * workers:
                _collect(pending, on_shard)
        while pending:
            _collect(pending, on_shard)
    finally:
        for future in pending:
            future.cancel()


def _collect(pending: dict[Future[None], int], on_shard: Callable[[int], None]) -> None:
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        frames = pending.pop(future)
        future.result()
        on_shard(frames)


def _is_done(out: Path, name: str) -> bool:
    """A shard is done when its report is there (it is written last) and its tar has the size it says."""
    report = out / WORK_FOLDER / f"{name}.json"
    if not report.is_file():
        return False
    size = json.loads(report.read_bytes())["tar_size"]
    tar = out / f"{name}.tar"
    return size is None or (tar.is_file() and tar.stat().st_size == size)


def pack_shard(job: ShardJob, out: Path, options: PackOptions) -> None:
    """Make one shard: its tar in `out`, then its rows of the index, then its report. Runs in a worker."""
    cv2.setNumThreads(1)  # there is a worker a core
    samples: list[dict[str, Any]] = []
    bad: list[tuple[str, str, str]] = []
    short: list[tuple[str, int]] = []
    for sequence in job.sequences:
        usable = []
        bad += [(path, reason, "") for path, reason in sequence.bad]
        for frame in sequence.frames:
            try:
                packed = pack_frame(frame, options)
            except BadFrameError as error:
                bad.append((frame.path, error.reason, error.detail))
                continue
            sample = {"__key__": member_key(sequence.category, sequence.name, frame.name), JPEG: packed.jpeg}
            sample |= {META: packed.meta.to_json()} | ({} if packed.depth is None else {DEPTH: packed.depth})
            usable.append(sample)
        if len(usable) >= options.min_frames:
            samples += usable
        else:
            short.append((f"{sequence.split}/{sequence.category}/{sequence.name}", len(usable)))

    work, tar = out / WORK_FOLDER, out / f"{job.name}.tar"
    sequences, rows = [], None
    if samples:
        write_tar(tar, samples)
        sequences, rows = index_tar(tar)
        with atomic_file(work / f"{job.name}.npy") as file:
            np.save(file, rows, allow_pickle=False)
    report = {"tar_size": tar.stat().st_size if samples else None, "sequences": sequences, "bad": bad, "short": short}
    write_json(work / f"{job.name}.json", report)


def _result(out: Path, skipped: int) -> PackResult:
    dataset = json.loads((out / DATASET_FILE).read_bytes())
    report = json.loads((out / REPORT_FILE).read_bytes())
    return PackResult(
        splits=dataset["splits"],
        bytes=sum(entry["size"] for entry in dataset["files"].values()),
        skipped=skipped,
        bad=[tuple(entry) for entry in report["bad"]],
        short=[tuple(entry) for entry in report["short"]],
    )
