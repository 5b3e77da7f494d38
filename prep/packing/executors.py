"""Where work runs: processes of this machine, or the workers of an existing Dask cluster."""

from __future__ import annotations

import logging
import multiprocessing
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from tempfile import TemporaryDirectory
from typing import Any, cast
from urllib.parse import urlsplit

from shards.processes import end_with_parent, fork_server

log = logging.getLogger(__name__)

IDLE_CHECK = 10  # seconds
STOP_PATIENCE = 5  # seconds


@contextmanager
def process_pool(workers: int, preload: list[str]) -> Iterator[ProcessPoolExecutor]:
    """Worker processes forked from a server that has imported these modules and has no threads running.

    An interrupt ends them at once, which is safe: files get their names only when whole.
    """
    context = fork_server(preload, {signal.SIGINT})  # which the parent handles
    _wait_for_server(context)
    with TemporaryDirectory() as scratch:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(scratch,))
        try:
            yield pool
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            children = multiprocessing.active_children()
            for child in children:
                child.terminate()
            end = time.monotonic() + STOP_PATIENCE
            for child in children:
                child.join(max(0.0, end - time.monotonic()))
                if child.is_alive():  # it is stopped, or waits for a disk
                    child.kill()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _wait_for_server(context: ForkServerContext) -> None:
    """Block stop signals until the server has imported: they would make a worker that is starting end noisily."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        first = context.Process(target=int)
        first.start()
        first.join()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(scratch: str) -> None:
    """End with the parent, which also removes the temporary files: they lie in `scratch`."""
    tempfile.tempdir = scratch
    end_with_parent()


@contextmanager
def dask_cluster(address: str) -> Iterator[tuple[Executor, int]]:
    """The workers of the Dask scheduler at `address`, and how many tasks they run at once.

    Raises ValueError if Dask is not installed, the scheduler cannot be reached, or it has no workers.
    """
    try:
        from distributed import Client
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise ValueError(f"--scheduler needs the extra `cluster`: pip install -e '.[cluster]' ({error})") from error
    parts = urlsplit(address)
    if not parts.hostname or not parts.port:
        raise ValueError(f"--scheduler {address}: expected an address like tcp://host:8786")
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=10).close()  # Dask's own attempt is noisy
        client = Client(address, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--scheduler {address}: cannot be reached ({error})") from error
    with client:
        threads = sum(cast(dict[str, int], client.nthreads()).values())
        if not threads:
            raise ValueError(f"--scheduler {address}: has no workers")
        ended = threading.Event()
        threading.Thread(target=_say_when_idle, args=(client, address, ended), daemon=True).start()
        try:
            yield client.get_executor(pure=False), threads
        except (KilledWorker, FutureCancelledError, CancelledError) as error:
            raise ValueError(f"--scheduler {address}: workers or the scheduler were lost ({error})") from error
        finally:
            ended.set()


def _say_when_idle(client: Any, address: str, ended: threading.Event) -> None:
    """Warn when no workers are left: Dask then waits forever, in case they come back."""
    while not ended.wait(IDLE_CHECK):
        with suppress(OSError):  # the scheduler is gone: its tasks fail, too
            if not client.nthreads():
                log.warning("--scheduler %s: has no workers left; waiting for some to come", address)
