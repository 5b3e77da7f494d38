"""The folder of a pack at work: what is done, what a former pack left, how it ends."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import shards
from prep.packing.plan import PackError, ShardJob, missing_images
from shards.build_index import TarIndex, write_index
from shards.index import read_dataset
from shards.schema import DATASET_FILE, REPORT_FILE, WORK_FOLDER
from shards.writer import remove_leftovers, write_json

log = logging.getLogger(__name__)

SHOWN = 8  # names
ShardReport = dict[str, list[Any]]  # bad, short and doubtful, as in PackResult
NOTHING_TO_REPORT: ShardReport = {"bad": [], "short": [], "doubtful": []}
JOB_FILE = "job.json"
MADE_OF_FILE = "made_of.json"  # of a finished set: what tells the files of each shard from those that replace them


def kept_shards(out: Path, plan: list[ShardJob], most_bad: float) -> dict[str, int]:
    """The shards of an unfinished pack whose files are still as they were, and how many bad frames each has.

    If there are too many bad frames, shards with any are repacked: the dataset may have been repaired since. Of a
    finished set that lost files no tar that is there is made again: what replaces it may be worse.
    """
    done = [job for job in plan if is_done(out, job.name)]
    reports = {job.name: _report(out, job.name) for job in done}
    files = _read_record(out / DATASET_FILE)["files"] if (out / DATASET_FILE).exists() else {}
    of_set = {entry["sha256"] for entry in files.values()}
    final = {name for name, part in reports.items() if part["index"] and part["index"]["sha256"] in of_set}
    may_change = [job for job in done if job.name not in final]
    made_of = {name: part["made_of"] for name, part in reports.items() if "made_of" in part}
    found = changed_shards(may_change, made_of)
    changed = {name for name, now in found.items() if _may_be_better(now, made_of[name])}
    if found.keys() - changed:
        kept = shortened(sorted(found.keys() - changed))
        log.warning("kept as they are: some of their files have changed, and others are missing now: %s", kept)
    if changed:
        log.warning("made again, as files of theirs have other sizes or times now: %s", shortened(sorted(changed)))
    for name in changed:
        record_file(out, name).unlink()
    bad = {name: len(part["bad"]) for name, part in reports.items() if name not in changed}
    too_many = sum(bad.values()) > most_bad
    kept = {name: count for name, count in bad.items() if name in final or not (too_many and count)}
    for name in bad.keys() - kept.keys():
        record_file(out, name).unlink()  # now: a kill must not bring it back
    return kept


def changed_shards(jobs: list[ShardJob], made_of: dict[str, str | None]) -> dict[str, str]:
    """The shards whose files are not those they were made of, as far as that can be told, and what these are now.

    made_of: what they were, of those of which it is known.
    """
    known = [job for job in jobs if job.name in made_of]
    with ThreadPoolExecutor(32) as pool:  # a network file system answers slowly, but many at once
        digests = pool.map(ShardJob.file_digest, known)
    now = {job.name: digest for job, digest in zip(known, digests, strict=True) if digest is not None}
    return {name: digest for name, digest in now.items() if digest != made_of[name]}


def tell_changed(out: Path, plan: list[ShardJob]) -> None:
    """Warn of what a finished set was made of and has changed since. Runs on it end if it changes, so it stays."""
    with_tar = {job.name for job in plan if (out / f"{job.name}.tar").exists()}
    # Older versions wrote None where a single image was missing.
    made_of = {name: was for name, was in _read_made_of(out).items() if was is not None or name not in with_tar}
    found = changed_shards(plan, made_of)
    changed = found.keys() & with_tar
    if changed:
        log.warning(
            "%s: files of %s have other sizes or times than when it was packed; to pack them again, remove these tars, "
            "and give the same command",
            out,
            shortened(sorted(changed)),
        )
    better = [name for name in found.keys() - with_tar if _may_be_better(found[name], made_of[name])]
    if better:
        log.warning(
            "%s: nothing of %s could be used, but the files have changed since; to try again, pack into another --out, "
            "or remove any of the tars, and give the same command",
            out,
            shortened(sorted(better)),
        )


def _may_be_better(now: str, before: str | None) -> bool:
    """By digests of files. If more images are missing, a disk may not be mounted."""
    return missing_images(now) <= missing_images(before)


def shortened(names: list[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _read_made_of(out: Path) -> dict[str, str | None]:
    """Shard -> what its files were when it was made, None if there were none; empty if that is not known."""
    try:
        made_of = json.loads((out / MADE_OF_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return made_of if isinstance(made_of, dict) else {}


def reopen(out: Path) -> None:
    """Write shard records for a finished set that lost files, so that shards with unchanged tars are kept.

    Does nothing without such a set. If the set's report is lost, each record says that its shard may lack frames.
    """
    if not (out / DATASET_FILE).exists():
        return
    report = read_report(out)
    files = _read_record(out / DATASET_FILE)["files"]
    tars = {name.removesuffix(".tar"): entry for name, entry in files.items() if name.endswith(".tar")}
    names, made_of = {*tars} if report is None else {*tars, *report}, _read_made_of(out)
    for name in sorted(names):
        if not record_file(out, name).exists():  # else a pack that was stopped has left it
            part = NOTHING_TO_REPORT | {"doubtful": [(f"{name}.tar", "its report was lost: it may lack frames")]}
            if report is not None:
                part = report.get(name, NOTHING_TO_REPORT)
            known = {"made_of": made_of[name]} if name in made_of else {}
            write_json(record_file(out, name), {"index": tars.get(name)} | known | part)


def record_file(out: Path, name: str) -> Path:
    """The path of a shard's record: what the index says about its tar, and what there is to report."""
    return out / WORK_FOLDER / f"{name}.json"


def _report(out: Path, name: str) -> dict[str, Any]:
    return json.loads(record_file(out, name).read_bytes())


def finish(out: Path, job: dict[str, Any], names: list[str], most_bad: float) -> None:
    """Write the index, and the report of all shards.

    If too many frames are bad, write only a report, and do not replace a finished set's.
    """
    work = out / WORK_FOLDER
    reports = {name: _report(out, name) for name in names if is_done(out, name)}
    to_tell = {name: {key: part.get(key, []) for key in NOTHING_TO_REPORT} for name, part in reports.items()}
    to_tell = {name: part for name, part in to_tell.items() if part != NOTHING_TO_REPORT}
    bad = [entry for part in reports.values() for entry in part["bad"]]
    if len(bad) > most_bad:
        reasons = ", ".join(f"{n} x {reason}" for reason, n in Counter(e[1] for e in bad).most_common())
        so_far = "" if len(reports) == len(names) else f" in {len(reports)} of {len(names)} shards"
        write_json(work / REPORT_FILE, to_tell)
        are = "frame is" if len(bad) == 1 else "frames are"
        raise PackError(
            f"{len(bad)} {are} bad{so_far}, and --max-bad allows {int(most_bad)} in all: {reasons}; "
            f"each is listed in {work / REPORT_FILE}. Repair the dataset, or allow more, and run again: "
            "what is good is kept"
        )
    tars = [
        TarIndex(file=f"{name}.tar", rows=work / f"{name}.npy", **reports[name]["index"])
        for name in names
        if reports[name]["index"]
    ]
    write_json(out / REPORT_FILE, to_tell)
    for name in names:
        if not reports[name]["index"]:
            (out / f"{name}.tar").unlink(missing_ok=True)  # of a former pack, and nothing of it is good any more
    if not tars:
        _clear(work)  # so that other options may be tried
        least = job["options"]["min_frames"]
        raise PackError(f"no sequence has {least} usable frames in its split; see {out / REPORT_FILE} and --min-frames")
    made_of = {name: part["made_of"] for name, part in reports.items() if "made_of" in part}
    write_json(out / MADE_OF_FILE, made_of)
    write_index(out, tars, source=job["source"], options=job["options"])
    remove_leftovers(out)  # of a worker that was lost, and whose shard another one made
    _clear(work)


def _clear(work: Path) -> None:
    """Remove the folder of a pack that has ended; first what says that there is one."""
    (work / JOB_FILE).unlink()
    shutil.rmtree(work)


def check_place(out: Path, job: dict[str, Any]) -> None:
    """Raises PackError unless `out` is free, or holds what this job has made so far."""
    for path in (out / DATASET_FILE, out / WORK_FOLDER / JOB_FILE):
        if path.is_file():
            _check_same(out, _read_record(path), job)
            return
    if out.exists() and not out.is_dir():
        raise PackError(f"{out}: expected a directory")
    if out.is_dir() and any(out.glob("*.tar")) and not (out / WORK_FOLDER).exists():
        raise PackError(f"{out}: holds tars, but no {DATASET_FILE}: make one with vggt-prep index, or remove {out}")
    ours = (WORK_FOLDER, REPORT_FILE) if read_report(out) is not None else (WORK_FOLDER,)
    if out.is_dir() and any(path.name not in ours for path in out.iterdir()):
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
        raise PackError(
            f"{out}: holds shards of another dataset, of more or fewer of its sequences, or of other splits of them; "
            f"{advice}"
        )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        return read_dataset(path.read_bytes()) if path.name == DATASET_FILE else json.loads(path.read_bytes())
    except ValueError as error:
        raise PackError(f"{path}: damaged: {error}") from error


def is_whole(out: Path) -> bool:
    try:
        shards.open(out)
    except ValueError:
        return False
    return True


def is_done(out: Path, name: str) -> bool:
    """A shard is done when its record is there (it is written last), and its tar and rows as it says."""
    if not record_file(out, name).is_file():
        return False
    index, tar = json.loads(record_file(out, name).read_bytes())["index"], out / f"{name}.tar"
    if index is None:
        return True
    return tar.is_file() and tar.stat().st_size == index["size"] and (out / WORK_FOLDER / f"{name}.npy").is_file()


def read_report(out: Path) -> dict[str, ShardReport] | None:
    """Shard -> its report, for shards with something to report. None if the report file is missing or damaged."""
    try:
        report = json.loads((out / REPORT_FILE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    parts = report.values() if isinstance(report, dict) else [None]
    if not all(isinstance(part, dict) and {"bad", "short"} <= set(part) <= set(NOTHING_TO_REPORT) for part in parts):
        return None
    return {name: NOTHING_TO_REPORT | part for name, part in report.items()}  # older ones know nothing of doubts
