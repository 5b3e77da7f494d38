"""Checkpoints: one file each, whole or absent, tensors and plain values only."""

from __future__ import annotations

import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 400
    keep: int = 2
    milestone: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1 or (self.milestone is not None and self.milestone < 1):
            raise ValueError("every, keep and milestone: expected at least 1 (milestone: or null)")


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save(folder: Path, step: int, content: dict[str, Any], config: CheckpointConfig) -> Path:
    """Write `content` as the checkpoint of `step`, point `latest` at it, and drop those no longer kept.

    Interrupted at any moment, `latest` still names a whole file.
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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    link = folder / (LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(folder / LATEST)
    kept = steps_saved(folder)[-config.keep :]
    for old in steps_saved(folder):
        is_milestone = config.milestone is not None and old % config.milestone == 0
        if old not in kept and not is_milestone:
            step_file(folder, old).unlink()
    return path


def steps_saved(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt"))


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None if there is none at all.

    A damaged one is passed over with a warning. Raises ValueError if all of them are damaged.
    """
    for leftover in folder.glob("*.tmp"):
        leftover.unlink(missing_ok=True)  # every rank does
    steps = steps_saved(folder)
    for step in reversed(steps):
        path = step_file(folder, step)
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
            log.warning("%s is damaged (%s); trying the one before", path, type(error).__name__)
    if steps:
        raise ValueError(
            f"{folder}: none of the {len(steps)} checkpoints can be read; move the folder away to start anew"
        )
    return None
