"""The folder of a run: who may work in it, what a run there resumes from, and whether it is the same run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shards import ShardSet
from shards.locks import locked
from train.engine.checkpoint import (
    BEST,
    CHECKPOINT_NAME,
    LATEST,
    best_saved,
    find_newest,
    keep,
    load,
    step_file,
    steps_saved,
)
from train.engine.settings import CONFIG_FILE, TrainConfig, read_config, to_dict
from train.engine.streams import saved_streams
from train.evaluation.history import ValidationHistory
from train.report.logger import METRICS_FILE
from train.runtime.jsonl import read_jsonl
from train.runtime.typed import flatten

log = logging.getLogger(__name__)

# May differ between a run and its resumption; anything else would make it another run.
MAY_CHANGE = {
    *("init", "out_dir", "epochs", "max_steps", "accum_steps", "strategy", "compile"),
    *("model.head_chunk", "model.recompute", "model.aggregator_dtype"),
    *(
        "val_every",
        "val_at",
        "guard",
        "log_every",
        "profile_steps",
        "max_skipped",
        "data.shards",
        "data.workers",
        "data.max_bad",
    ),
    *("data.allow_shared_frames", "data.val_split", "data.val_scenes", "data.val_views", "data.val_aspect"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.milestone", "checkpoint.best"),
}
REQUEUE_FILE = "requeue"
CHECKPOINTS = "checkpoints"


def check_place(out_dir: Path) -> None:
    """Raises ValueError if the folder of a run cannot be made or written to."""
    there = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{out_dir}: {there} is not a folder that you may write to; give another out_dir")


@contextmanager
def locked_folder(out_dir: Path) -> Iterator[None]:
    """Make the folder of a run, for this run alone. Raises ValueError if another trainer is at work there.

    Its checkpoints may be a link to another disk, and another run's, too: that folder is locked as well.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    folder = out_dir / CHECKPOINTS
    with ExitStack() as held:
        for place in (out_dir, folder) if folder.is_symlink() and folder.is_dir() else (out_dir,):
            held.enter_context(locked(place, f"{place}: another trainer is at work there; give another out_dir"))
        yield


def find_start(config: TrainConfig, out_dir: Path, *, repair: bool) -> Path | None:
    """The checkpoint to resume from; None: the run starts at step 0.

    Raises ValueError if there are traces of a run that had checkpoints and has none that is whole: nothing is erased
    before somebody has looked. A run that was killed before its first checkpoint just starts again.
    """
    _check_checkpoints(out_dir / CHECKPOINTS)
    newest = find_newest(out_dir / CHECKPOINTS, repair=repair)
    if newest is not None:
        return newest
    lines = read_jsonl(out_dir / METRICS_FILE) + ValidationHistory(out_dir).lines
    if not lines:
        return None
    before = read_config(out_dir)
    check_same_settings(before, config)
    reached = max(line["step"] for line in lines)
    if reached > flatten(before).get("checkpoint.every", 0):
        raise ValueError(
            f"{out_dir}: its {METRICS_FILE} goes up to step {reached}, but its checkpoints are gone; put them back "
            f"into {out_dir / CHECKPOINTS}, or {_elsewhere(config)}"
        )
    return None


def _check_checkpoints(folder: Path) -> None:
    """Raises ValueError if no checkpoint could be saved there: better now than after hours."""
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{folder}: a link to {folder.readlink()}, which is not there; mount it, or remove the link")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, where checkpoints go; move it elsewhere")
    for link in (folder / LATEST, folder / BEST):
        if link.is_dir() and not link.is_symlink():
            raise ValueError(f"{link}: a folder, where a link to a checkpoint goes; move it elsewhere")
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: you may not write there")


def load_run(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can resume from. Raises ValueError for any other, or one whose name is not its own."""
    saved = load(path)
    missing = {"model", "optimizer", "data", "config", "shards"} - set(saved)
    if missing:
        raise ValueError(
            f"{path}: not a checkpoint of the trainer, it has no {', '.join(sorted(missing))}; is it an exported one? "
            "Remove it, and the one before is taken"
        )
    if step_file(path.parent, saved["data"]["step"]).name != path.name:
        raise ValueError(f"{path}: holds step {saved['data']['step']}: remove it, or name it after that step")
    return saved


def check_resumable(saved: dict[str, Any], config: TrainConfig, shard_sets: Sequence[ShardSet]) -> None:
    """Raises ValueError if the run in out_dir was another one: other settings, or none of the data."""
    if not {shard_set.digest for shard_set in shard_sets} & saved_streams(saved).keys():
        again = {str(shard_set) for shard_set in shard_sets} & {*saved.get("places", {}).values()}
        if again:
            raise ValueError(
                f"{min(again)}: was packed again, and holds other frames than {config.out_dir} was trained on; "
                f"{_elsewhere(config)}"
            )
        raise ValueError(
            f"{config.out_dir}: was trained on other shards than {config.data.shards}; {_elsewhere(config)}"
        )
    check_same_settings(saved["config"], config)


def check_same_settings(settings: dict[str, Any], config: TrainConfig) -> None:
    """Raises ValueError if a setting of the run in out_dir is different now and makes it another run."""
    defaults = flatten(to_dict(TrainConfig(init=config.init or "none")))
    now, before = flatten(to_dict(config)), defaults | flatten(settings)  # they may be older than a key
    keys = [*now, *(key for key in before if key.rpartition(".")[0] in now)]  # of a section that is null now
    changed = [key for key in keys if key not in MAY_CHANGE and now.get(key) != before.get(key)]
    if changed:
        was, what = (", ".join(f"{key}={values.get(key)!r}" for key in changed) for values in (before, now))
        raise ValueError(f"{config.out_dir}: was trained with {was}, now it is {what}; {_elsewhere(config)}")


def real_name(init: str) -> str:
    """`init`, with a link resolved: checkpoints/latest will point at another checkpoint later."""
    path = Path(init).expanduser()
    return str(path.resolve()) if path.is_symlink() else init


def run_of(source: str) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does."""
    path = Path(source).expanduser().absolute()
    folder = path.parent
    is_run = path.is_file() and folder.name == CHECKPOINTS and (folder.parent / CONFIG_FILE).is_file()
    return folder.parent if is_run else None


def hold_init(init: str) -> str:
    """Keep an `init` that is a checkpoint of another run, which would drop it when it goes on; what to say of it.

    Adapters, and what is exported, need it as long as they are used.
    """
    path = Path(init).expanduser().absolute()
    step, of_trainer = CHECKPOINT_NAME.fullmatch(path.name), (path.parent / LATEST).is_symlink()
    if step is None or not of_trainer or not path.is_file() or (path.parent / f"keep-{step[1]}").is_symlink():
        return ""
    try:
        link = keep(path.parent, int(step[1]))
    except OSError as error:
        return f"{path} belongs to a run that may drop it, and cannot be kept there ({error}): copy it, or export it"
    return f"{path} is kept, by {link.name} beside it: this run begins from it"


def with_init_of(config: TrainConfig, before: str | None) -> TrainConfig:
    """The configuration with the `init` that the run began from, which export builds on.

    The path may have changed. Raises ValueError if the run began without one, and one is given now.
    """
    now = config.init and real_name(config.init)
    if now is not None and before is None:
        raise ValueError(f"{config.out_dir}: began without init, now it is {now}; {_elsewhere(config)}")
    if now is None or before is None or Path(before).expanduser().exists():
        if now not in (None, before):
            log.warning("init: %s is not read, as the run began from %s, which is there", now, before)
        return replace(config, init=before)
    if now != before:
        log.warning("init: was %s, and is now %s; it must be the same checkpoint, in another place", before, now)
    return replace(config, init=now)


def keep_former_choices(
    out_dir: Path, before: dict[str, Any], now: TrainConfig, plan: dict[str, Any], scenes: list[str]
) -> None:
    """Keep what the former settings kept: milestones, and the best checkpoint if it is now chosen differently.

    That is so if the metric, the plan or the scenes of validations have changed, or the file of them is gone.
    """
    folder = out_dir / CHECKPOINTS
    milestone = before["checkpoint"].get("milestone")
    if milestone not in (None, now.checkpoint.milestone):
        for step in steps_saved(folder):
            if step % milestone == 0:
                keep(folder, step)
    best = best_saved(folder)
    same_metric = before["checkpoint"].get("best") == to_dict(now)["checkpoint"]["best"]
    if best is None or (same_metric and ValidationHistory(out_dir).has(best, plan, scenes)):
        return
    log.warning(
        "%s: the former best, which stays; validations or the metric have changed, so there is no best yet",
        keep(folder, best),
    )
    (folder / BEST).unlink()


def _elsewhere(config: TrainConfig) -> str:
    return f"give another out_dir (RUN= of make), or remove {config.out_dir} to start from scratch"
