"""The stream of batches that a trainer or a validation takes, across the death of worker processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

from torch.utils.data import IterableDataset

from shards.storage import OUTAGE_PATIENCE
from train.data.plan import DataState
from train.data.workers import kill_workers, make_loader
from train.runtime.stop import Interrupted, StopRequest

log = logging.getLogger(__name__)

PATIENCE = 2 * OUTAGE_PATIENCE + 120  # seconds for a batch: longer than a worker waits for storage and for memory
TELL_EVERY = 60  # seconds of waiting
TIMED_OUT = "timed out"  # in torch's error
MAX_DEATHS = 3  # of workers, without a batch in between
LOST = "the batch of step {step} never came out of its worker process, which hangs or lost it: try data.workers=0"


class NoDataError(ValueError):
    """There are no more batches to be had; the message says why and what to do."""


def next_batch(batches: Iterator[dict[str, Any]], stop: StopRequest) -> dict[str, Any] | NoDataError | None:
    """The next batch, or the reason that there is none; None: a signal asked to stop during the wait."""
    try:
        with stop.interruptible():
            return next(batches)
    except Interrupted:
        return None
    except NoDataError as error:
        return error


def stream(
    make: Callable[[DataState | None], IterableDataset], steps: range, workers: int, pin_memory: bool
) -> Iterator[dict[str, Any]]:
    """The batches of make(None). If a worker process dies, make(state of the last batch) continues.

    steps: those of the batches. Raises NoDataError if a batch does not come, there is no data, or workers keep dying.
    """
    state: DataState | None = None
    expected, deaths = steps.start, 0
    while True:
        loader = None
        try:
            loader = iter(make_loader(make(state), workers, pin_memory))  # a worker may die already here
            while (batch := _next(loader, workers)) is not None:
                if "error" in batch:
                    raise NoDataError(batch["error"])
                state, deaths, expected = batch["after"], 0, expected + 1
                if batch["after"].step != expected:
                    raise NoDataError(LOST.format(step=expected))
                yield batch
            if expected < steps.stop:
                raise NoDataError(LOST.format(step=expected + 1))
            return
        except Interrupted:
            kill_workers()  # while the loader is held: when it goes, it waits 5 seconds for each
            raise
        except (RuntimeError, OSError, EOFError) as error:
            if TIMED_OUT in str(error):
                raise NoDataError(LOST.format(step=expected + 1)) from error
            if not workers or not _is_death(error):
                raise
            deaths += 1
            if deaths > MAX_DEATHS:
                raise NoDataError(
                    f"data.workers={workers}: they die again and again; is memory short? {error}"
                ) from error
            log.warning("%s; new workers continue from the last batch in %d s", error, 2**deaths)
        del loader
        time.sleep(2**deaths)


def _next(loader: Iterator[dict[str, Any]], workers: int) -> dict[str, Any] | None:
    """The next batch; None at the end. Raises RuntimeError if none comes for longer than a worker may wait."""
    began, came = time.monotonic(), Event()
    try:
        if workers:
            Thread(target=_watch, args=(began, came), daemon=True).start()
        while True:
            try:
                return next(loader, None)
            except (RuntimeError, OSError, EOFError) as error:
                if time.monotonic() - began > PATIENCE:
                    raise RuntimeError(TIMED_OUT) from error
                if TIMED_OUT not in str(error):  # LOOK_EVERY seconds have passed
                    raise
    finally:
        came.set()


def _watch(began: float, came: Event) -> None:
    """Say that no batch comes; and end the workers at last: torch waits for one that was about to hand it over."""
    while not came.wait(TELL_EVERY):
        waited = time.monotonic() - began
        giving_up = f"After {PATIENCE:.0f} s the run stops"
        log.warning("no data for %d s: is the storage slow, or shared memory full? %s", waited, giving_up)
        if waited > PATIENCE:
            kill_workers()


def _is_death(error: Exception) -> bool:
    """Whether a worker died: torch says so, or a batch was on its way out of it and the connection broke.

    What code in a worker raises comes as "Caught ... in DataLoader worker".
    """
    text = str(error)
    if isinstance(error, RuntimeError):
        return any(words in text for words in ("exited unexpectedly", "is killed by signal"))
    return not text.startswith("Caught ")
