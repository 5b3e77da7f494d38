"""Writing files of a shard set: each under a temporary name until it is whole."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any, cast
from uuid import uuid4

TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")  # the names of files that atomic_file is writing
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when whole and on disk; an exception leaves nothing behind."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")  # another process may be making the same file
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):  # not of this file
            raise
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left of files that were being written, and nothing else."""
    for path in folder.glob("*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink()


def cannot_write(path: Path, error: OSError) -> OSError:
    """What went wrong, with the name that is missing in the system's own words."""
    full = ", is the disk full?" if error.errno in FULL else ""
    return OSError(f"{path}: cannot be written{full} ({error.strerror})")


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json_bytes(value))


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Samples {"__key__": ..., "jpg": bytes, "json": bytes, ...} -> a tar whose bytes depend on nothing else."""
    from webdataset.writer import TarWriter  # slow to import, and only needed here

    with atomic_file(path) as file, TarWriter(cast(Any, file), encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)


def set_aside(path: Path) -> bool:
    """Rename a file that is not empty to the first free name.1, name.2, ...; whether there was one."""
    if not path.is_file() or not path.stat().st_size:
        return False
    path.rename(next(free for i in count(1) if not (free := path.with_name(f"{path.name}.{i}")).exists()))
    return True
