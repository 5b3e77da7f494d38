"""Is a shard set what was packed? Every byte, every member, every camera."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

import shards
from prep.packing.frames import check_camera
from shards.build_index import complete_rows, index_tar
from shards.codecs import decode_depth, jpeg_size
from shards.index import REPAIR, how_to_make_pairs, sha256
from shards.pairs import Pairs
from shards.schema import DATASET_FILE, FRAMES_FILE, PAIRS_FILE, SEQUENCES_FILE, row_crc
from shards.storage import LocalStorage

SAMPLE_SEED = 0


@dataclass(frozen=True, kw_only=True)
class TarCheck:
    """A tar to check: its frames are the rows from `first` on, its sequences those from `sequence` on."""

    number: int
    first: int
    count: int
    sequence: int


@dataclass(frozen=True, kw_only=True)
class VerifyResult:
    """What was checked, of how many tars, and each problem found as a line that names the file."""

    tars: int
    all_tars: int
    frames: int
    problems: list[str]


def verify(
    location: str,
    executor: Executor,
    *,
    sample: float = 1.0,
    on_plan: Callable[[int], None] = lambda tars: None,
    on_tar: Callable[[], None] = lambda: None,
) -> VerifyResult:
    """Check a shard set: the whole index, and the fraction `sample` of its tars, always the same ones.

    Whatever is wrong is in the result; nothing is raised for a damaged set.
    """
    try:
        shard_set = shards.open(location, check_sizes=False)
        wrong = shard_set.size_problems()
        if {FRAMES_FILE, SEQUENCES_FILE} & set(wrong):
            return VerifyResult(tars=0, all_tars=0, frames=0, problems=[*wrong.values()])
        checks = _check_index(shard_set)
        pairs_problems = _pairs_problems(shard_set, location)
    except (ValueError, OSError) as error:  # without an index there is no telling what the tars should hold
        return VerifyResult(tars=0, all_tars=0, frames=0, problems=[str(error)])
    count = max(1, round(sample * len(checks)))
    chosen = [checks[i] for i in sorted(np.random.default_rng(SAMPLE_SEED).choice(len(checks), count, replace=False))]
    on_plan(count)
    problems = [*wrong.values(), *pairs_problems]
    chosen_whole = [check for check in chosen if shard_set.tars[check.number] not in wrong]
    for found in executor.map(verify_tar, [shard_set] * count, chosen_whole):
        problems += found
        on_tar()
    return VerifyResult(
        tars=count, all_tars=len(checks), frames=sum(check.count for check in chosen), problems=problems
    )


def _check_index(shard_set: shards.ShardSet) -> list[TarCheck]:
    """Which rows belong to which tar. Raises ValueError for an index that is not as packed."""
    path = shard_set.index_path(FRAMES_FILE)
    frames, sequences = shard_set.frames, shard_set.sequences
    if sha256(path) != shard_set.dataset["files"][FRAMES_FILE]["sha256"]:
        damaged = [str(i) for i, row in enumerate(frames) if row_crc(row) != row["row_crc"]]
        what = f"row {', '.join(damaged[:10])}" if damaged else "its header"
        raise ValueError(f"{path}: {what} is damaged; copy it again, or rebuild it with: vggt-prep index")
    ends = np.cumsum(sequences["count"], dtype=np.int64)
    _check_description(shard_set, ends)
    bounds = np.searchsorted(frames["tar"], np.arange(len(shard_set.tars) + 1))
    return [
        TarCheck(number=i, first=int(a), count=int(b - a), sequence=int(np.searchsorted(ends, a, side="right")))
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def _pairs_problems(shard_set: shards.ShardSet, location: str) -> list[str]:
    """What is wrong with pairs.npy, if the set has one."""
    if not shard_set.has_pairs or PAIRS_FILE in shard_set.size_problems():
        return []
    try:
        if sha256(shard_set.index_path(PAIRS_FILE)) == shard_set.dataset["files"][PAIRS_FILE]["sha256"]:
            return []
        pairs = Pairs(shard_set, whole=False)
        for frame in range(len(pairs.rows)):
            pairs.neighbors(frame)
    except (ValueError, OSError) as error:
        return [str(error)]
    return [f"{shard_set}/{PAIRS_FILE}: not the one that {DATASET_FILE} describes; {how_to_make_pairs(location)}"]


def _check_description(shard_set: shards.ShardSet, ends: np.ndarray) -> None:
    """Raises ValueError unless sequences lie end to end and dataset.json counts what is there, each tar once."""
    sequences, dataset = shard_set.sequences, shard_set.dataset
    if not np.array_equal(sequences["first"], ends - sequences["count"]):
        raise ValueError(f"{shard_set.index_path(SEQUENCES_FILE)}: sequences do not lie end to end; {REPAIR}")
    splits = {}
    for split in sorted(set(sequences["split"].tolist())):
        part = sequences["count"][sequences["split"] == split]
        splits[split.decode()] = {"sequences": len(part), "frames": int(part.sum())}
    categories = sorted(name.decode() for name in set(sequences["category"].tolist()))
    if (splits, categories) != (dataset["splits"], dataset["categories"]):
        raise ValueError(f"{shard_set}/{DATASET_FILE}: its splits or categories are not those of the index; {REPAIR}")
    digests = Counter(dataset["files"][tar]["sha256"] for tar in dataset["tars"])
    same = [tar for tar in dataset["tars"] if digests[dataset["files"][tar]["sha256"]] > 1]
    if same:
        raise ValueError(f"{shard_set}: {', '.join(same[:4])} hold the same frames; remove all but one, and {REPAIR}")


def verify_tar(shard_set: shards.ShardSet, check: TarCheck) -> list[str]:
    """What is wrong with one tar and its frames. Runs in a worker."""
    name = shard_set.tars[check.number]
    try:
        with shard_set.storage.local_copy(name) as path:
            found = (
                [] if sha256(path) == shard_set.dataset["files"][name]["sha256"] else ["not the bytes that were packed"]
            )
            copied = shard_set.with_tars_at(LocalStorage(path.parent))
            found += [*_frame_problems(copied, check), *_index_problems(shard_set, check, path)]
    except OSError as error:
        found = [str(error)]
    return [f"{shard_set}/{name}: {problem}" for problem in found]


def _frame_problems(shard_set: shards.ShardSet, check: TarCheck) -> Iterator[str]:
    """Each frame as our own reader sees it: its CRCs, its sizes, its camera."""
    for frame in range(check.first, check.first + check.count):
        row = shard_set.frames[frame]
        height, width = int(row["height"]), int(row["width"])
        try:
            jpeg, depth = shard_set.read(frame)
            if jpeg_size(jpeg) != (height, width):
                raise ValueError(f"image is {jpeg_size(jpeg)}, in the index {(height, width)}")
            if depth is not None and not (decode_depth(depth, height, width) >= 0).all():
                raise ValueError("some of its depth is negative or NaN")
            if (
                bytes(shard_set.sequences["split"][row["sequence"]]).decode()
                != shard_set.tars[check.number].split("-")[0]
            ):
                raise ValueError("its sequence is of another split than its tar")
            check_camera(row["extrinsics"], row["intrinsics"], height, width)
        except shards.DamagedMemberError as error:
            yield error.problem
        except ValueError as error:
            yield f"frame {shard_set.key(frame)}: {error}"


def _index_problems(shard_set: shards.ShardSet, check: TarCheck, path: Path) -> Iterator[str]:
    """The index against one made again from the tar."""
    try:
        sequences, rows = index_tar(path)
    except ValueError as error:
        yield str(error).removeprefix(f"{path}: ")
        return
    held = shard_set.frames[check.first : check.first + check.count]
    rows = complete_rows(rows, held.dtype, check.number, check.sequence)
    named = shard_set.sequences[check.sequence : check.sequence + len(sequences)]
    stated = [(row["category"].decode(), row["name"].decode(), int(row["count"])) for row in named]
    if rows.tobytes() != held.tobytes() or stated != sequences:
        yield "the index says something else of it; rebuild that with: vggt-prep index"
