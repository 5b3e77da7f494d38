"""One process at a time in a folder that a command writes to."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

LOCK_FILE = "lock"


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of an existing folder. The system releases it when this process ends, however it ends.

    Raises ValueError with the message `busy` if another process holds it. On a network file system, a lock may hold
    only within one machine. On a file system without locks, this only warns, and does not protect.
    """
    try:
        opened = (folder / LOCK_FILE).open("a")
    except FileNotFoundError as error:  # the folder went while its other user ended
        raise ValueError(busy) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(busy) from error
        except OSError as error:
            log.warning("%s: this file system has no locks (%s): see that no other process writes there", folder, error)
        yield
