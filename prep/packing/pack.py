"""Packing: sequences -> shards in parallel -> index. Killed at any moment, it continues where it was."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import shards
from prep.importers.source import Source
from prep.packing.plan import PackError, PackOptions, ShardJob, make_plan, plan_digest
from prep.packing.shard import ShardDone, pack_shard
from prep.packing.work import (
    JOB_FILE,
    check_place,
    finish,
    is_done,
    is_whole,
    kept_shards,
    read_report,
    reopen,
    tell_changed,
)
from shards.index import sha256
from shards.locks import locked
from shards.schema import DATASET_FILE, WORK_FOLDER
from shards.writer import remove_leftovers, write_json

PATIENCE = 90  # seconds


@dataclass(frozen=True, kw_only=True)
class PackResult:
    """What a pack did. skipped: reason -> sequences the source omits; in_both: sequences in both splits.

    bad: (path, reason, detail); short: (place, usable frames); doubtful: (place, why); place: split/category/sequence.
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
    """Pack all of `source` into directory `out`, and return the result.

    parallel: how many shards the executor makes at once. on_plan receives the number of all frames, and of frames in
    shards that already exist; on_shard receives each new shard when it is finished. Raises PackError if `out` holds
    something else, nothing can be packed, more than the fraction max_bad of the frames is bad, or a frame is in both
    splits, unless that is allowed.
    """
    plan, in_both = make_plan(source, options, allow_shared_frames)
    total = sum(job.frames for job in plan)
    if not total:
        reasons = "".join(f"; {count} annotated sequences skipped: {why}" for why, count in source.skipped.items())
        raise PackError(f"no frame to pack{reasons}")
    described = source.describe() | {"plan": plan_digest(plan)}
    job = json.loads(json.dumps({"source": described, "options": asdict(options)}))  # as it will be read again
    check_place(out, job)
    work = out / WORK_FOLDER
    if (out / DATASET_FILE).exists():
        tell_changed(out, plan)
    if is_whole(out) and not (work / JOB_FILE).exists():  # where there is a job, another pack may be at work
        shutil.rmtree(work, ignore_errors=True)  # left by a kill at the very end
        on_plan(total, total)
        return _result(out, source, in_both)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, f"{out}: another pack is at work there"):
        has_job = (work / JOB_FILE).exists()  # if not, a kill during _clear left all files here
        remove_leftovers(out)
        for leftover in work.glob("*.tmp" if has_job else "*.*"):
            leftover.unlink()
        write_json(work / JOB_FILE, job)
        most_bad = max_bad * total
        reopen(out)
        kept = kept_shards(out, plan, most_bad)
        on_plan(total, sum(job.frames for job in plan if job.name in kept))
        missing = [job for job in plan if job.name not in kept]
        _run(missing, out, options, executor, parallel, on_shard, most_bad - sum(kept.values()))
        finish(out, job, [job.name for job in plan], most_bad)
    return _result(out, source, in_both)


def _run(
    jobs: list[ShardJob],
    out: Path,
    options: PackOptions,
    executor: Executor,
    parallel: int,
    on_shard: Callable[[ShardDone], None],
    most_bad: float,
) -> None:
    """Make these shards until more than `most_bad` frames are bad.

    Only a few jobs are queued at a time, so memory does not grow with the dataset.
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
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # on interrupt, the workers' owner ends them
            wait(pending)  # running jobs cannot be cancelled, and still write


def _collect(pending: dict[Future[ShardDone], str], out: Path) -> Iterator[ShardDone]:
    """Wait for some of the shards, and take them off."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        name, result = pending.pop(future), future.result()
        for _ in range(PATIENCE):
            if is_done(out, name):
                break
            os.listdir(out / WORK_FOLDER)  # a network file system may remember for a while that it was not there
            time.sleep(1)
        else:
            raise PackError(f"{out}: {name} was made, but is not here: all workers must see the same directory")
        yield result


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
