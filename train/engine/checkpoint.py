"""Checkpoints: one file each, whole or absent, tensors and plain values only."""

from __future__ import annotations

import filecmp
import logging
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.runtime.typed import documented
from vggt.damage import damage

log = logging.getLogger(__name__)

LATEST, BEST = "latest", "best"
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})\.pt")
LEFTOVER = re.compile(r"(step-\d{8,}|keep-\d{8,}|latest|best)(\.\d+)?\.tmp")
DAMAGED = ".damaged"
DAMAGED_NAME = re.compile(CHECKPOINT_NAME.pattern + re.escape(DAMAGED))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = documented(400, "steps between checkpoints")
    keep: int = documented(2, "number of newest checkpoints to keep")
    milestone: int | None = documented(None, "steps whose multiples are kept for good; null: none")
    best: str | tuple[str, ...] = documented(
        "loss_objective",
        "validation metric that chooses checkpoints/best; or several, [auc_30, depth_abs_rel]: their mean relative "
        "change, with no headline metric worse than at first beyond the noise",
    )

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1 or (self.milestone is not None and self.milestone < 1):
            raise ValueError("every, keep and milestone: expected at least 1 (milestone: or null)")


def step_file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def save(folder: Path, step: int, content: dict[str, Any], config: CheckpointConfig) -> Path:
    """Write `content` as the checkpoint of `step`, point `latest` at it, and drop those no longer kept.

    Interrupted at any moment, `latest` and `best` still name whole files. Raises ValueError for weights that are not
    finite, which nothing could be resumed from; OSError if it cannot be written.
    """
    broken = [name for name, value in content["model"].items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"step {step}: {len(broken)} weights are not finite any more ({', '.join(broken[:3])}); the checkpoints "
            "before are kept: lower optim.lr"
        )
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
    for damaged in _steps(folder, DAMAGED_NAME):
        if damaged <= step:  # there is a whole one of as many steps
            step_file(folder, damaged).with_suffix(".pt" + DAMAGED).unlink()
    return path


def mark_best(folder: Path, step: int | None, config: CheckpointConfig) -> None:
    """Point `best` at the checkpoint of a step; None, or a step that has none: there is no `best`."""
    if step is not None and step_file(folder, step).exists():
        _link(folder, BEST, step_file(folder, step))
    else:
        (folder / BEST).unlink(missing_ok=True)
    _drop_old(folder, config)


def best_saved(folder: Path) -> int | None:
    """The step of the checkpoint that `best` points at."""
    match = (folder / BEST).is_symlink() and CHECKPOINT_NAME.fullmatch((folder / BEST).readlink().name)
    return int(match[1]) if match else None


def keep(folder: Path, step: int) -> Path:
    """Link to the checkpoint of a step, so that it stays under whatever settings; the link's name."""
    _link(folder, f"keep-{step:08d}", step_file(folder, step))
    return folder / f"keep-{step:08d}"


def _restore_links(folder: Path, *, repair: bool) -> None:
    """Restore links that copying a run has turned into files. Raises ValueError for one that equals no step's file.

    If copying has dropped the links, nobody knows which checkpoints they protected, so all that remain are kept.
    """
    steps = steps_saved(folder)
    if repair and len(steps) > 1 and not any(path.is_symlink() or path.name == LATEST for path in folder.glob("*")):
        log.warning("%s: its links are gone, as after a copy without them; all its checkpoints are kept", folder)
        for step in steps:
            keep(folder, step)
    for link in (folder / LATEST, folder / BEST):
        if link.is_file() and not link.is_symlink():
            files = [step_file(folder, step) for step in steps_saved(folder)]
            same = [file for file in files if filecmp.cmp(link, file, shallow=False)]
            if not same:
                raise ValueError(
                    f"{link}: a file, where the trainer keeps a link to one; name it step-<8 digits>.pt after its "
                    "step, or move it elsewhere"
                )
            if repair:
                _link(folder, link.name, same[0])


def _link(folder: Path, name: str, target: Path) -> None:
    link = folder / f"{name}.{os.getpid()}.tmp"  # several runs may begin from one checkpoint
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(folder / name)


def _drop_old(folder: Path, config: CheckpointConfig) -> None:
    """Remove the checkpoints that are not among the last and the milestones, nor what a link points at."""
    folder = folder.resolve()
    kept = {step_file(folder, step) for step in steps_saved(folder)[-config.keep :]}
    named = (folder / link.readlink() for link in folder.glob("*") if link.is_symlink())
    kept |= {path.parent.resolve() / path.name for path in named}  # a checkpoint may be a link to another disk itself
    for step in steps_saved(folder):
        is_milestone = config.milestone is not None and step % config.milestone == 0
        if step_file(folder, step) not in kept and not is_milestone:
            step_file(folder, step).unlink()


def steps_saved(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    return _steps(folder, CHECKPOINT_NAME)


def _steps(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    matches = (pattern.fullmatch(path.name) for path in folder.glob("step-*"))  # none of a copy that somebody made
    return sorted(int(match[1]) for match in matches if match)


def find_newest(folder: Path, *, repair: bool = True) -> Path | None:
    """The newest whole checkpoint, or None if there never was any; for one rank to call, as it repairs the folder.

    Every byte is checked against the CRCs that torch.save writes (torch.load does not: it takes flipped bits for
    weights). A damaged file is renamed, with a warning, and the one before is taken. Raises ValueError if there are
    traces of checkpoints and none is whole, OSError if the folder cannot be read just now. repair: whether damaged
    files are renamed, what a kill has left is removed, and `latest` points at the newest.
    """
    for leftover in folder.glob("*.tmp") if repair else ():
        if LEFTOVER.fullmatch(leftover.name):  # and not somebody's own
            leftover.unlink()
    _restore_links(folder, repair=repair)
    for step in reversed(steps_saved(folder)):
        path = step_file(folder, step)
        damaged = damage(path)
        if damaged is None:
            if repair and (folder / LATEST).resolve() != path.resolve():  # killed before it was linked
                _link(folder, LATEST, path)
            return path
        log.warning(
            "%s is damaged (%s)%s; looking for the one before", path, damaged, " and set aside" if repair else ""
        )
        if repair:
            path.rename(path.with_name(path.name + DAMAGED))
    traces = [path.name for path in folder.glob("step-*") if path.suffix != ".tmp"]
    traces += [name for name in (LATEST, BEST) if (folder / name).is_symlink()]
    if traces:
        raise ValueError(
            f"{folder}: none of the checkpoints is whole (there is {', '.join(sorted(traces)[:4])}); put a whole one "
            "back as step-<8 digits>.pt, give another out_dir, or remove the folder of the run to start from scratch"
        )
    return None


def load(path: Path) -> dict[str, Any]:
    """What `save` was given. Raises ValueError if the file holds more than tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, IndexError) as error:
        what = "truncated, or not a checkpoint of this trainer"
        raise ValueError(f"{path}: {what} ({type(error).__name__})") from error
