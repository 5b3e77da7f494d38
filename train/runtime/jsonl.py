"""Files of one JSON object a line, each of which has the step it belongs to."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from shards.writer import atomic_file, cannot_write

log = logging.getLogger(__name__)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add an object to a file. Raises OSError that names it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def read_jsonl(path: Path, *keys: str) -> list[dict[str, Any]]:
    """The objects of a file that have a step and these keys; skips cut-off lines; none if there is no file."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:  # also for bytes that are no text
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int) and set(keys) <= set(value):
            found.append(value)
    return found


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps that a resumed run takes again, and those that cannot be read."""
    if path.exists():
        found, written = read_jsonl(path), len(path.read_bytes().splitlines())
        if written > len(found) + 1:  # one may have been cut off by a kill
            log.warning("%s: %d of its %d lines are damaged, and are left out", path, written - len(found), written)
        lines = [line for line in found if line["step"] <= step]
        with atomic_file(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def finite_or_none(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
