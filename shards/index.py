"""The index of a shard set: what the tars hold, as rows that are mapped from disk."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shards.schema import (
    FORMAT,
    FRAMES_FILE,
    PAIRS_FILE,
    SELF_CRC,
    SEQUENCES_FILE,
    VERSION,
    self_crc,
)

REPAIR = "copy it again, or rebuild it with: vggt-prep index"
TAR_NAME = re.compile(r"(train|test)-\d{6,}\.tar")


def read_dataset(data: bytes) -> dict[str, Any]:
    """The content of dataset.json. Raises ValueError if it is damaged, or of another version."""
    try:
        dataset = json.loads(data)
        if (dataset["format"], dataset["version"]) != (FORMAT, VERSION):
            found = f"{dataset['format']} {dataset['version']}"
            raise ValueError(f"expected {FORMAT} version {VERSION}, found {found}; pack again")
        whole = self_crc(data, dataset[SELF_CRC]) == dataset[SELF_CRC]
        _check_names(dataset)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not the description of a shard set ({type(error).__name__}); {REPAIR}") from error
    if not whole:
        raise ValueError(f"does not match its own CRC; {REPAIR}")
    return dataset


def _check_names(dataset: dict[str, Any]) -> None:
    """Raises ValueError or KeyError for files of other names than a set has: they become paths on this machine."""
    for name in dataset["tars"]:
        if not TAR_NAME.fullmatch(name):
            raise ValueError(f"lists a tar {name!r}, which is none of a shard set; {REPAIR}")
    optional = [PAIRS_FILE] if PAIRS_FILE in dataset["files"] else []
    for name in (FRAMES_FILE, SEQUENCES_FILE, *optional, *dataset["tars"]):
        entry = dataset["files"][name]
        if not isinstance(entry["size"], int) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError(f"size or sha256 of {name} is no such thing; {REPAIR}")


class DamagedIndexError(ValueError):
    """An index that is not the one that was packed; says the file and what to do."""


def how_to_make_pairs(place: str) -> str:
    """For a message: what to do where a set has no pairs.npy, or another one."""
    if "://" in place:
        return "make it where the set lies as a directory, with vggt-prep pairs, and copy it and dataset.json there"
    return f"make it with: vggt-prep pairs {shlex.quote(place)}"


def map_rows(path: Path, dtype: Callable[..., np.dtype], *names: str, repair: str = REPAIR) -> np.ndarray:
    """The rows of an index file, mapped from disk. `names`: fields on whose lengths its dtype depends.

    Raises DamagedIndexError for anything else.
    """
    try:
        rows = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        good = rows.ndim == 1 and rows.dtype == dtype(*(rows.dtype[name].itemsize for name in names))
    except Exception as error:  # a damaged header may raise whatever Python's tokenizer does
        raise DamagedIndexError(f"{path}: not readable as an index ({type(error).__name__}); {repair}") from error
    if not good:
        raise DamagedIndexError(f"{path}: not an index of version {VERSION}; {repair}")
    return rows


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
