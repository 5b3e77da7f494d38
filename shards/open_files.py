"""Local files that stay open in a process, of a limited number of them."""

from __future__ import annotations

import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

MOST = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # a process
_descriptors: OrderedDict[Path, int] = OrderedDict()
_lock = threading.Lock()  # a thread that reads ahead and one that replaces a frame share descriptors


def read(path: Path, start: int, end: int) -> bytes:
    """Bytes start .. end - 1 of a file, fewer if it ends before. Raises OSError."""
    with _lock:
        if path not in _descriptors:
            _descriptors[path] = os.open(path, os.O_RDONLY)
            if len(_descriptors) > MOST:
                os.close(_descriptors.popitem(last=False)[1])
        _descriptors.move_to_end(path)
        return os.pread(_descriptors[path], end - start, start)


def forget(root: Path) -> None:
    """Close the files of a folder: a set that is opened may have taken the place of another."""
    with _lock:
        for path in [path for path in _descriptors if path.parent == root]:
            os.close(_descriptors.pop(path))


def _start_clean() -> None:
    """After a fork: another thread may have held the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_start_clean)
