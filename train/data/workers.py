"""The processes that load batches."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import warnings

import cv2
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from shards.processes import end_with_parent, fork_server
from train.runtime.stop import STOP_SIGNALS

NEVER = 10**9  # batches: what StatefulDataLoader would remember of its workers is not needed
MAX_WORKERS = 8
LOOK_EVERY = 5  # seconds: whether workers still live


def make_loader(dataset: IterableDataset, workers: int, pin_memory: bool) -> StatefulDataLoader:
    """Runs the dataset in worker processes, whole batches in order. The batches, not the loader, hold the state."""
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's own
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: they wait for storage
    # A signal to the whole process group must not take the next batch away from a trainer that finishes its step.
    context = fork_server(["train.data.batches"], STOP_SIGNALS) if workers else None
    return StatefulDataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=context,
        worker_init_fn=start_worker,
        snapshot_every_n_steps=NEVER,
        timeout=LOOK_EVERY if workers else 0,
    )


def start_worker(_: int) -> None:
    """End with the trainer: torch looks for the parent, which is the server that forked the worker."""
    end_with_parent()
    cv2.setNumThreads(1)  # there is a worker a core


@atexit.register
def kill_workers() -> None:
    """Kill the workers at exit: they block the SIGTERM that Python sends, and the trainer would wait for them.

    It runs before multiprocessing's exit handler, as it is registered later.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def worker_count(configured: int | None, ranks_here: int) -> int:
    """Worker processes a rank: as configured, else one for each core that is left beside the ranks, 1 to 8."""
    if configured is not None:
        return configured
    cores = len(os.sched_getaffinity(0))
    return max(1, min(MAX_WORKERS, cores // ranks_here - 1))
