"""pairs.npy: for each frame of a shard set, those that overlap with it. Killed at any moment, it continues."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Executor, as_completed, wait
from pathlib import Path

import numpy as np

import shards
from shards.build_index import write_dataset
from shards.index import read_dataset, sha256
from shards.locks import locked
from shards.overlap import View, Views, stored_view, views_of
from shards.schema import DATASET_FILE, PAIRS_FILE, pair_dtype, row_crc
from shards.schema import WORK_FOLDER as PACK_FOLDER
from shards.storage import LocalStorage
from shards.writer import atomic_file, remove_leftovers

log = logging.getLogger(__name__)

NEIGHBORS = 64  # of a frame
WORK_FOLDER = ".pairs"
ANCHORS = 1024  # frames of a sequence that all others are tried with
TRIED_POINTS = 16  # of a view, in a trial
MEASURED = 1.25  # candidates that are measured, in multiples of the neighbors that are kept


def add_pairs(
    out: Path,
    executor: Executor,
    neighbors: int = NEIGHBORS,
    *,
    on_plan: Callable[[int], None] = lambda frames: None,
    on_tar: Callable[[int], None] = lambda frames: None,
) -> int:
    """Write pairs.npy of a set on this machine, and list it in dataset.json; the tars stay as they are.

    Returns how many frames have no neighbor. on_plan receives the number of frames; on_tar the number in a tar that is
    done. Raises ValueError for a damaged set.
    """
    if (out / PACK_FOLDER).exists():
        raise ValueError(f"{out}: its pack is not finished; the same pack command continues it")
    shard_set = shards.open(out)
    most = max(1, min(neighbors, int(shard_set.sequences["count"].max()) - 1))
    bounds = np.searchsorted(shard_set.frames["tar"], np.arange(len(shard_set.tars) + 1))
    on_plan(len(shard_set.frames))
    work = out / WORK_FOLDER / f"{shard_set.digest[:16]}-{most}"  # of another set or number: begun again
    work.mkdir(parents=True, exist_ok=True)
    with locked(out / WORK_FOLDER, f"{out}: another process is making its pairs"):
        remove_leftovers(work)
        for leftover in out.glob(f"{PAIRS_FILE}.*.tmp"):
            leftover.unlink()
        parts = [work / f"{i}.npy" for i in range(len(shard_set.tars))]
        jobs = {
            executor.submit(pairs_of_tar, out, shard_set.digest, int(a), int(b), most, part): int(b - a)
            for a, b, part in zip(bounds[:-1], bounds[1:], parts, strict=True)
        }
        try:
            for job in as_completed(jobs):
                job.result()
                on_tar(jobs[job])
        finally:
            for job in jobs:
                job.cancel()
            if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # on interrupt, the workers' owner ends them
                wait(jobs)  # running ones still write
        _opened(out, shard_set.digest)
        alone = _join(out, parts, most)
        _list_pairs(out, shard_set.digest)
        shutil.rmtree(out / WORK_FOLDER)
    return alone


def _opened(out: Path, digest: str) -> shards.ShardSet:
    """The set, whose size others have looked at. Raises ValueError if it is not the one of this digest any more."""
    shard_set = shards.ShardSet(LocalStorage(out), read_dataset((out / DATASET_FILE).read_bytes()))
    if shard_set.digest != digest:
        raise ValueError(f"{out}: was replaced while its pairs were made; make them again")
    return shard_set


def pairs_of_tar(out: Path, digest: str, first: int, end: int, neighbors: int, part: Path) -> None:
    """Write the rows of a tar's frames, those from `first` to before `end`. Runs in a worker."""
    if _is_whole(part, end - first, neighbors):
        return
    shard_set = _opened(out, digest)
    rows = np.zeros(end - first, pair_dtype(neighbors))
    frame = first
    while frame < end:
        count = int(shard_set.sequences[shard_set.row(frame)["sequence"]]["count"])
        views = views_of(_view(shard_set, i) for i in range(frame, frame + count))
        fill_rows(rows[frame - first : frame - first + count], views)
        frame += count
    with atomic_file(part) as file:
        np.save(file, rows, allow_pickle=False)


def _view(shard_set: shards.ShardSet, frame: int) -> View:
    """A frame, and one that is damaged as one without depth: training replaces it by others, too."""
    try:
        return stored_view(shard_set, frame)
    except shards.DamagedMemberError as error:
        log.warning("taken as without depth: %s", error)
        row = shard_set.row(frame)
        return View(None, (int(row["height"]), int(row["width"])), row["extrinsics"], row["intrinsics"])


def _is_whole(part: Path, frames: int, neighbors: int) -> bool:
    try:
        rows = np.load(part, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing, or half of a copied folder
        return False
    return rows.shape == (frames,) and rows.dtype == pair_dtype(neighbors)


def fill_rows(rows: np.ndarray, views: Views) -> None:
    """The rows of a sequence: of each view the best neighbors, and some of the others that it overlaps with.

    Half of them are the best. In a video these show all but the same: the other half are taken evenly from the rest.
    """
    most = rows["neighbors"].shape[1]
    pairs = candidates(views, int(most * MEASURED))
    levels = np.rint(views.overlaps(pairs) * 255).astype(np.uint8)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    levels = np.concatenate([levels, levels])
    both, levels = both[levels > 0], levels[levels > 0]
    distance = np.abs(both[:, 0] - both[:, 1])  # of equal ones first what is nearest in time
    order = np.lexsort((both[:, 1], distance, -levels.astype(int), both[:, 0]))
    both, levels = both[order], levels[order]
    starts = np.searchsorted(both[:, 0], np.arange(len(views) + 1))
    for row, start, end, has_depth in zip(rows, starts[:-1], starts[1:], views.has_depth, strict=True):
        chosen = start + spread_ranks(int(end - start), most)
        row["neighbors"][: len(chosen)] = both[chosen, 1]
        row["overlap"][: len(chosen)] = levels[chosen]
        row["guessed"] = not has_depth
        row["row_crc"] = row_crc(row)


def spread_ranks(count: int, most: int) -> np.ndarray:
    """At most so many of the ranks 0 .. count - 1: the first ones, and as many evenly over the rest."""
    if count <= most:
        return np.arange(count)
    best = -(-most // 2)
    return np.concatenate([np.arange(best), np.linspace(best, count - 1, most - best).round().astype(int)])


def candidates(views: Views, most: int) -> np.ndarray:
    """Pairs of views [n, 2], each once, the lower number first: all of few, of many those that may overlap.

    Each view is tried with at most ANCHORS others by a few points, and each is taken to overlap as the anchor does that
    it overlaps with best. So the cost grows with the number of views, not with its square.
    """
    count = len(views)
    if count <= most + 1:
        return np.stack(np.triu_indices(count, 1), axis=1)
    anchors = np.unique(np.linspace(0, count - 1, min(ANCHORS, count)).round().astype(int))
    scores = _tried(views, anchors)
    if len(anchors) == count:
        np.fill_diagonal(scores, -1)
        group = np.arange(count)
    else:
        group = scores.argmax(axis=1)
    chosen = []
    for i in range(count):
        score = scores[i, group]
        score[i] = -1
        order = np.argsort(-score, kind="stable")[: np.count_nonzero(score > 0)]
        others = order[spread_ranks(len(order), most)]
        chosen.append(np.minimum(others, i) * count + np.maximum(others, i))
    return np.stack(np.divmod(np.unique(np.concatenate(chosen)), count), axis=1)


def _tried(views: Views, anchors: np.ndarray) -> np.ndarray:
    """How much each view may have in common with each anchor: float32 [views, anchors].

    Among many that overlap as well, those that look the same way are first.
    """
    everyone = np.arange(len(views))
    there = np.stack([views.seen(everyone, int(anchor), TRIED_POINTS) for anchor in anchors], axis=1)
    back = np.stack([views.seen(anchors, int(view), TRIED_POINTS) for view in everyone])
    axes = views.rotations[:, 2]
    # Few points may miss a small overlap in one of the directions.
    return (np.minimum(there, back) + 0.05 * np.maximum(there, back)) * (2 + axes @ axes[anchors].T)


def _join(out: Path, parts: list[Path], neighbors: int) -> int:
    """Write pairs.npy, a tar at a time; how many frames have no neighbor."""
    rows = [np.load(part, mmap_mode="r", allow_pickle=False) for part in parts]
    alone = 0
    with atomic_file(out / PAIRS_FILE) as file:
        header = {"descr": pair_dtype(neighbors).descr, "fortran_order": False, "shape": (sum(map(len, rows)),)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in rows:
            file.write(part.tobytes())
            alone += int((part["overlap"][:, 0] == 0).sum())
    return alone


def _list_pairs(out: Path, digest: str) -> None:
    path, dataset = out / PAIRS_FILE, _opened(out, digest).dataset
    dataset["files"][PAIRS_FILE] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_dataset(out, dataset)
