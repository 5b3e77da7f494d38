"""Writing files of a shard set: each under a temporary name until it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when whole and on disk; an exception leaves nothing behind."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """Samples {"__key__": ..., "jpg": bytes, "json": bytes, ...} -> a tar whose bytes depend on nothing else."""
    from webdataset.writer import TarWriter  # slow to import, and only needed here

    with atomic_file(path) as file, TarWriter(cast(Any, file), encoder=False, mtime=0, user="", group="") as tar:
        for sample in samples:
            tar.write(sample)
