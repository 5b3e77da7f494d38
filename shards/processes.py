"""Worker processes that start clean and do not outlive whoever started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Collection
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext


def fork_server(preload: list[str], deaf_to: Collection[signal.Signals]) -> ForkServerContext:
    """A context whose workers are forked from a server that has imported these modules and runs no threads.

    Workers forked from a process that has already computed something would wait forever on the locks of thread pools,
    whose threads a fork does not copy. deaf_to: signals that the server and its workers block. They reach the whole
    process group, but only the parent should handle them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    resource_tracker.ensure_running()  # it unblocks signals, so not in between
    before = signal.pthread_sigmask(signal.SIG_BLOCK, deaf_to)
    try:
        forkserver.ensure_running()  # what is blocked now stays blocked there
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def end_with_parent() -> None:
    """Have this worker end when its parent does, however that ends: an orphan would wait for work forever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
