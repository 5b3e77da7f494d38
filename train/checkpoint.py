"""Checkpoints: one file each, whole or absent, tensors and plain values only."""

from __future__ import annotations

import logging
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

LATEST, BEST = "latest", "best"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 400
    keep: int = 2
    milestone: int | None = None
    best: str = "loss_objective"  # a figure of validation

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1 or (self.milestone is not None and self.milestone < 1):
            raise ValueError("every, keep and milestone: expected at least 1 (milestone: or null)")


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save(folder: Path, step: int, content: dict[str, Any], config: CheckpointConfig) -> Path:
    """Write `content` as the checkpoint of `step`, point `latest` at it, and drop those no longer kept.

    Interrupted at any moment, `latest` and `best` still name whole files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = step_file(folder, step)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):  # torch reports a full disk as a RuntimeError
            reason = str(error).partition("\n")[0]
            raise OSError(
                f"{path}: cannot be written, is the disk full? The ones before are kept ({reason})"
            ) from error
        raise
    _link(folder, LATEST, path)
    _drop_old(folder, config)
    return path


def mark_best(folder: Path, step: int | None, config: CheckpointConfig) -> None:
    """Point `best` at the checkpoint of a step; None, or a step that has none: there is no `best`."""
    if step is not None and step_file(folder, step).exists():
        _link(folder, BEST, step_file(folder, step))
    else:
        (folder / BEST).unlink(missing_ok=True)
    _drop_old(folder, config)


def _link(folder: Path, name: str, target: Path) -> None:
    link = folder / (name + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / name)


def _drop_old(folder: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints that are not among the last, the milestones and the best."""
    kept = {step_file(folder, step) for step in steps_saved(folder)[-config.keep :]}
    if (folder / BEST).is_symlink():
        kept.add(folder / (folder / BEST).readlink())
    for step in steps_saved(folder):
        is_milestone = config.milestone is not None and step % config.milestone == 0
        if step_file(folder, step) not in kept and not is_milestone:
            step_file(folder, step).unlink()


def steps_saved(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def find_newest(folder: Path, *, mend: bool = True) -> Path | None:
    """The newest whole checkpoint, or None if there is none at all; for one rank to call, as it mends the folder.

    Every byte is checked against the CRCs that torch.save writes (torch.load does not: it takes flipped bits for
    weights). A damaged file is renamed, with a warning, and the one before is taken. Raises ValueError if all are
    damaged, OSError if the folder cannot be read just now. mend: whether damaged files are renamed, and what a kill has
    left is removed.
    """
    for leftover in folder.glob("*.tmp") if mend else ():
        leftover.unlink()
    steps = steps_saved(folder)
    for step in reversed(steps):
        path = step_file(folder, step)
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
            damaged = str(error)
        if damaged is None:
            return path
        log.warning("%s is damaged (%s)%s; taking the one before", path, damaged, " and set aside" if mend else "")
        if mend:
            path.rename(path.with_name(path.name + ".damaged"))
    if steps:
        raise ValueError(f"{folder}: none of the {len(steps)} checkpoints is whole; remove the folder to start anew")
    return None


def load(path: Path) -> dict[str, Any]:
    """What `save` was given. Raises ValueError if the file holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, IndexError) as error:
        what = "truncated, or not a checkpoint of this trainer"
        raise ValueError(f"{path}: {what} ({type(error).__name__})") from error
