"""What each worker process loads, and in which order."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from shards.index import DamagedIndexError
from shards.reader import DamagedMemberError
from shards.storage import OUTAGE_PATIENCE, StorageError
from train.data.plan import DataState, Step, TrainingPlan
from train.data.scenes import load_step
from train.data.split import Split, read_step

SHARED_MEMORY = "/dev/shm"  # where worker processes leave batches for the trainer
SHARED_MEMORY_PATIENCE = OUTAGE_PATIENCE  # seconds: a validation or a save may take long, and no batch is taken then


class TrainingSteps(IterableDataset):
    """The batches of one rank from `state` up to `last_step`. Worker w of W loads every W-th of them."""

    def __init__(self, split: Split, plan: TrainingPlan, rank: int, state: DataState, last_step: int) -> None:
        self.split, self.plan, self.rank, self.state, self.last_step = split, plan, rank, state, last_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return load_ahead(self.split, self._mine(), spare=1)  # for a validation in between

    def _mine(self) -> Iterator[Step]:
        number, count = _worker()
        state = self.state
        while state.step < self.last_step:
            if (state.step - self.state.step) % count == number:
                yield self.plan.step(state, self.rank)
            state = self.plan.after(state)


class ValidationSteps(IterableDataset):
    """The batches of a validation plan. Worker w of W loads every W-th of them."""

    def __init__(self, split: Split, steps: list[Step]) -> None:
        self.split, self.steps = split, steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, count = _worker()
        return load_ahead(self.split, iter(self.steps[number::count]), spare=0)


def _worker() -> tuple[int, int]:
    """The number of this worker process, and how many there are."""
    worker = get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def load_ahead(split: Split, steps: Iterator[Step], spare: int) -> Iterator[dict[str, Any]]:
    """The batch of each step. A worker reads the next one while it decodes this one, which hides storage latency.

    (Without workers the trainer does not: a stop would have to wait for the reading thread.) An error that ends the
    data is the last item, {"error": message for the user}: exceptions of a worker process arrive with a traceback
    as their message.
    """
    try:
        if get_worker_info() is None:
            yield from (load_step(split, step) for step in steps)
        else:
            yield from _load_ahead(split, steps, spare)
    except (DamagedIndexError, DamagedMemberError, StorageError, FileNotFoundError) as error:
        yield {"error": str(error)}


def _load_ahead(split: Split, steps: Iterator[Step], spare: int) -> Iterator[dict[str, Any]]:
    with ThreadPoolExecutor(1) as reader:
        step = next(steps, None)
        members = step and reader.submit(read_step, split, step)
        while step is not None and members is not None:
            following = next(steps, None)
            ahead = following and reader.submit(read_step, split, following)
            batch = load_step(split, step, members.result())
            wait_for_shared_memory(sum(value.nbytes for value in batch.values() if isinstance(value, Tensor)), spare)
            yield batch
            step, members = following, ahead


def wait_for_shared_memory(size: int, spare: int) -> None:
    """Wait until a batch of `size` bytes, and `spare` more like it, fit into shared memory.

    Raises StorageError if they never do.

    Else torch loses the batch, and the trainer waits forever.
    """
    began = time.monotonic()
    while (free := _free_shared_memory()) <= (1 + spare) * size and time.monotonic() - began < SHARED_MEMORY_PATIENCE:
        time.sleep(0.5)  # the trainer frees that of a batch when it has used it
    if free > (1 + spare) * size:
        return
    raise StorageError(
        f"{SHARED_MEMORY}: {free / 1e6:.1f} MB are free, and a batch takes {size / 1e6:.1f} MB; make it larger (docker "
        "run --shm-size=8g), or lower data.workers (0 needs none of it) or max_img_per_gpu"
    )


def _free_shared_memory() -> int:
    usage = os.statvfs(SHARED_MEMORY)
    return usage.f_bavail * usage.f_frsize
