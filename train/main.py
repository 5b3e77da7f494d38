"""Train VGGT on a shard set.

    torchrun --nproc_per_node=2 train/main.py --config train/configs/default.yaml data.shards=S init=vggt.pt
    python train/main.py --config train/configs/demo.yaml data.shards=S --dry-run

One process a GPU (or a few on CPUs). The same command again goes on from the last checkpoint in out_dir.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import shards
from shards import ShardSet
from shards.locks import locked
from shards.splits import SharedPlaces, shared_places
from train.checkpoint import (
    best_saved,
    find_newest,
    keep_milestones,
    load,
    mark_best,
    save,
    set_best_aside,
    step_file,
    steps_saved,
)
from train.config import CONFIG_FILE, TrainConfig, flatten, load_config, read_config, to_dict, write_config
from train.distributed import World, fail, start_world
from train.lineage import trained_before
from train.loader import NoDataError, Split, TrainingSteps, blank_batch, next_batch, stream, worker_count
from train.memory import peak_gb, rehearse, said_out_of_memory
from train.optim import freeze, make_optimizer, set_lr
from train.parallel import distribute, load_optimizer, whole
from train.pictures import contact_sheet, save_picture
from train.plan import DataState, TrainingPlan, validation_plan
from train.prepare import prepare
from train.report import METRICS_FILE, SCENES_FILE, Reporter, read_lines
from train.step import train_step
from train.stop import STOP_SIGNALS, StopRequest
from train.summary import describe_damage, describe_figures, describe_run, describe_start
from train.validate import Validation, best_step, comparable, compared_plan, validate
from vggt import VGGT, preset
from vggt.layers import compile_blocks
from vggt.memory import hold_in_bf16
from vggt.weights import load_weights

log = logging.getLogger(__name__)

# May change between a run and its resumption; anything else would make it another run.
MAY_CHANGE = {
    *("init", "out_dir", "epochs", "max_steps", "accum_steps", "strategy", "compile"),
    *("model.head_chunk", "model.aggregator_dtype"),
    *("val_every", "log_every", "max_skipped", "data.shards", "data.workers", "data.max_bad"),
    *("data.allow_shared_frames", "data.val_split", "data.val_scenes", "data.val_views", "data.val_aspect"),
    *("checkpoint.every", "checkpoint.keep", "checkpoint.milestone", "checkpoint.best"),
}
REQUEUE_FILE = "requeue"
SHEET_FILE = "contact_sheet.png"
MIN_TRIED = 200  # frames, before a share of bad ones means anything


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file; without it the defaults, which are train/configs/default.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check everything and try one step; writes nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1 data.workers=4")
    arguments = parser.parse_intermixed_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the first step there is nothing to save, nor to explain
    try:
        config = load_config(arguments.config, arguments.overrides)
        with start_world(tf32=config.tf32) as world, ExitStack() as held:
            run(config, world, held, dry_run=arguments.dry_run)
    except (ValueError, OSError) as error:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        fail(error)


def run(config: TrainConfig, world: World, held: ExitStack, *, dry_run: bool) -> None:
    """A run, from its configuration to its summary. held: closed at its end, keeps the folder for this run alone."""
    # Data
    if not config.data.sources:
        raise ValueError("data.shards: not given; expected a directory made by vggt-prep pack, or its URL")
    shard_sets = [shards.open(source.path) for source in config.data.sources]
    train_split = Split(shard_sets, config.data.train_split)
    with_val = [shard_set for shard_set in shard_sets if config.data.val_split in shard_set.dataset["splits"]]
    val_split = Split(with_val, config.data.val_split) if with_val else None
    workers = worker_count(config.data.workers, world.local_size)

    # Model
    out_dir = Path(config.out_dir)
    world.from_main(lambda: check_place(out_dir) if dry_run else held.enter_context(locked_folder(out_dir)))
    newest = world.from_main(lambda: find_start(config, out_dir, repair=not dry_run))
    saved = None if newest is None else load_run(newest)
    if saved is not None:
        check_resumable(saved, config, shard_sets)
        config = with_init_of(config, saved["config"].get("init"))
    validated = world.from_main(lambda: what_is_validated(config, train_split, val_split))
    torch.manual_seed(config.seed)
    model = VGGT(preset(config.model.preset, heads=config.loss.heads, head_chunk=config.model.head_chunk))
    if config.init is not None and saved is None:
        load_weights(model, config.init)
    freeze(model, config.model.freeze)
    if config.model.aggregator_dtype == "bf16":
        hold_in_bf16(model.aggregator)
    if saved is not None:
        model.load_state_dict(saved["model"])
    model.to(world.device).train()
    if config.compile:
        compile_blocks(model)
    shared = distribute(model, config.strategy, bf16=config.precision == "bf16", world=world)

    # Optimizer and resume
    optimizer = make_optimizer(model, config.optim)
    plan = TrainingPlan(
        config=config.data,
        lengths=train_split.lengths,
        seed=config.seed,
        max_img_per_gpu=config.max_img_per_gpu,
        world_size=world.size,
    )
    state, resumed = plan.start(), saved is not None
    if saved is not None:
        load_optimizer(optimizer, saved["optimizer"])
        state = DataState(saved["data"]["step"], tuple(saved["data"]["positions"]))
        if world.is_main and not dry_run:
            keep_former_best(out_dir, saved["config"], config)
            milestone = saved["config"]["checkpoint"].get("milestone")
            if milestone not in (None, config.checkpoint.milestone):
                keep_milestones(out_dir / "checkpoints", milestone)
        del saved
    about = describe_start(config, model, train_split, val_split, validated, world, workers)
    if dry_run:
        tried = rehearse(config, world, shared, optimizer, train_split, plan, state)
        if world.is_main:
            print(f"{about}\n{tried}")
        return
    reporter = Reporter(
        out_dir, is_main=world.is_main, first_step=state.step, total_steps=config.total_steps, resumed=resumed
    )
    if state.step:
        reporter.say(f"resuming {out_dir} at step {state.step} of {config.total_steps}, its last checkpoint")
    if state.step >= config.total_steps:
        reporter.say("it is finished: raise epochs or max_steps to go on, or give another out_dir")
    stop = StopRequest()
    stop.listen()
    if world.is_main:
        if write_config(out_dir, config, keep_other=not resumed):
            reporter.say(f"{out_dir / CONFIG_FILE}: what was there is kept beside it, under a number")
        (out_dir / REQUEUE_FILE).unlink(missing_ok=True)
    reporter.say(about)

    # Loop
    work = Run(
        config=config,
        world=world,
        model=model,
        shared=shared,
        optimizer=optimizer,
        plan=plan,
        train_split=train_split,
        val_split=val_split,
        workers=workers,
        reporter=reporter,
        stop=stop,
    )
    with reporter:
        stopped = work.train(state)

    # Summary
    if not world.is_main:
        return
    if stopped and steps_saved(out_dir / "checkpoints"):
        reporter.say(f"stopped, and saved in {out_dir}/checkpoints; the same command resumes from there")
    elif stopped:
        reporter.say("stopped before the first step; the same command starts it again")
    else:
        reporter.say(describe_run(config, out_dir, validated))


def what_is_validated(config: TrainConfig, train: Split, val: Split | None) -> SharedPlaces | None:
    """How the sequences that are validated on relate to what is trained on; None: there are none.

    Raises ValueError if they have frames in common, unless that is allowed.
    """
    if val is None:
        return None
    steps, _ = validation_plan(config.data, val.lengths, rank=0, world_size=1)
    trained = [(shard_set, config.data.train_split) for shard_set in train.shard_sets]
    before, unknown = trained_before(config.init)
    for problem in unknown:
        log.warning("%s", problem)
    tested = [(shard_set, config.data.val_split) for shard_set in val.shard_sets]
    only = {(scene.source, scene.sequence) for step in steps for scene in step.scenes}
    found = shared_places(trained + before, tested, only)
    if not config.data.allow_shared_frames:
        found.check("data.allow_shared_frames=true")
    return found


def with_init_of(config: TrainConfig, before: str | None) -> TrainConfig:
    """A run's configuration with the `init` that it began from, over which export lays its weights.

    Its place may have changed. Raises ValueError if it began from nothing, and is now given one.
    """
    if config.init is not None and before is None:
        raise ValueError(f"{config.out_dir}: began without init, now it is {config.init}; {elsewhere(config)}")
    if config.init not in (None, before):
        log.warning(
            "init: was %s, and is now %s; it must be the same checkpoint, in another place", before, config.init
        )
    return replace(config, init=config.init or before)


def check_place(out_dir: Path) -> None:
    """Raises ValueError if the folder of a run cannot be made or written to."""
    there = next(path for path in (out_dir, *out_dir.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{out_dir}: {there} is no folder in which you may write; give another out_dir")


@contextmanager
def locked_folder(out_dir: Path) -> Iterator[None]:
    """Make the folder of a run, for this run alone. Raises ValueError if another trainer is at work there."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(out_dir, f"{out_dir}: another trainer is at work there; give another out_dir"):
        yield


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run at work. model: bare; shared: the same as the ranks share it."""

    config: TrainConfig
    world: World
    model: VGGT
    shared: torch.nn.Module
    optimizer: torch.optim.Optimizer
    plan: TrainingPlan
    train_split: Split
    val_split: Split | None
    workers: int
    reporter: Reporter
    stop: StopRequest

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    def train(self, state: DataState) -> bool:
        """From `state` to the last step; True if a signal stopped it. Raises ValueError if it must not continue."""
        config, world, reporter = self.config, self.world, self.reporter
        batches = stream(
            lambda last: TrainingSteps(self.train_split, self.plan, world.rank, last or state, config.total_steps),
            self.workers,
            pin_memory=world.device.type == "cuda",
        )
        if is_validation_step(config, state.step) and self.evaluate(state):
            return True
        window = Window()
        skipped = bad = tried = 0
        damaged: Counter[str] = Counter()  # frames of this rank, by file
        while state.step < config.total_steps:
            began = time.perf_counter()
            raw = next_batch(batches, self.stop)
            waited = time.perf_counter() - began
            if not isinstance(raw, dict):
                self.abandon_step(state)
                self.give_up(state, raw)
                return True
            step = raw["after"].step  # counts the steps that are done
            lr = set_lr(self.optimizer, config.optim, step - 1, config.total_steps)
            damaged.update(raw["bad"])
            counts = {"bad": sum(raw["bad"].values()), "tried": raw["tried"]}
            with said_out_of_memory(raw["images"], config, world, step):
                batch = prepare(raw, world.device, with_points=config.loss.point > 0)
                outcome = train_step(self.shared, self.optimizer, batch, config, world, stop=self.stop.asked, **counts)
            if outcome.abandoned:
                self.give_up(state, None)
                return True
            state = raw["after"]
            bad, tried = bad + outcome.bad, tried + outcome.tried
            if tried >= MIN_TRIED and bad > config.data.max_bad * tried:
                raise ValueError(
                    f"{bad} of {tried} frames read are damaged, more than data.max_bad={config.data.max_bad:g}: "
                    f"{describe_damage(world.gather(damaged))}; copy these again, or pack again"
                )
            skipped = 0 if outcome.finite else skipped + 1
            if not outcome.finite:
                keys = [key for rank_keys in world.gather(raw["keys"]) for key in rank_keys]
                reporter.scalars(step, "skipped", {"skipped": skipped})
                reporter.say(f"step {step}: skipped on all ranks, as a loss or gradient is not finite; scenes: {keys}")
                if skipped > config.max_skipped:
                    raise ValueError(
                        f"{skipped} steps in a row were not finite (max_skipped={config.max_skipped}): lower optim.lr, "
                        "or look at the scenes listed above"
                    )
            else:
                window.add(outcome.terms, outcome.norms, batch["images"].shape[:2].numel(), began, waited)
            if window.steps and (step % config.log_every == 0 or step == config.total_steps):
                values = window.means(world) | {"lr": lr, "memory_gb": peak_gb(world.device)}
                window = Window()
                reporter.scalars(step, config.data.train_split, values)
                reporter.progress(step, values)
            if outcome.stop and step < config.total_steps:
                self.save(state, stopped=True)
                return True
            if step % config.checkpoint.every == 0 or step == config.total_steps:
                self.save(state)
            if is_validation_step(config, step) and self.evaluate(state):
                return True
        if bad:
            reporter.say(f"{bad} of {tried} frames were damaged and replaced: {describe_damage(world.gather(damaged))}")
        return False

    def abandon_step(self, state: DataState) -> None:
        """Take part in the step at `state`, for which this rank has no data, so that the others do not wait for it."""
        if self.world.size > 1:
            raw = blank_batch(self.plan.step(state, self.world.rank))
            batch = prepare(raw, self.world.device, with_points=self.config.loss.point > 0)
            train_step(self.shared, self.optimizer, batch, self.config, self.world, abandon=True)

    def give_up(self, state: DataState, problem: NoDataError | None) -> None:
        """Save what was reached, for a signal asked to stop or, on some rank, there is a problem with the data.

        Raises NoDataError with the latter on every rank.
        """
        problems = [found for found in self.world.gather(problem) if found is not None]
        self.save(state, stopped=not problems)
        if problems:
            saved = f"; what was trained is saved at step {state.step}" if state.step else ""
            raise NoDataError(f"{problems[0]}{saved}")

    def evaluate(self, state: DataState) -> bool:
        """Validate at `state`, unless that is done, and mark the best checkpoint; True if a signal stopped it."""
        config, world, split, reporter, step = self.config, self.world, self.val_split, self.reporter, state.step
        # A run that was killed in between has validated before, or has still to do so.
        if split is not None and not world.from_main(lambda: reporter.has_validation(step, compared_plan(config))):
            problem = result = None
            try:
                result = validate(self.model, split, config, world, self.workers, self.stop)
            except NoDataError as error:  # on every rank
                problem = error
            if result is None:
                self.give_up(state, problem)
                return True
            reporter.scalars(step, config.data.val_split, result.means)
            reporter.scenes(step, compared_plan(config), result.names, result.by_scene)
            reporter.say(f"step {step}: {config.data.val_split} {describe_figures(result.means)}")
            missing = [name for name, figures in zip(result.names, result.by_scene, strict=True) if not figures]
            if missing:
                reporter.say(f"{len(missing)} of {len(result.names)} scenes cannot be read: {', '.join(missing[:3])}")
            publish_pictures(result, step, self.out_dir, reporter)
            if world.from_main(lambda: self._best_step(step) == step):
                self.save(state)
        self.mark_best(step)
        return False

    def _best_step(self, step: int) -> int | None:
        """The best validation so far: of those with a checkpoint, the first and this one."""
        lines = comparable(read_lines(self.out_dir / SCENES_FILE))
        saved = {*steps_saved(self.out_dir / "checkpoints"), step}
        return best_step(
            [line for line in lines if line is lines[0] or line["step"] in saved], self.config.checkpoint.best
        )

    def mark_best(self, step: int) -> None:
        """Point checkpoints/best at the checkpoint of the best validation so far."""
        if self.world.is_main:
            mark_best(self.out_dir / "checkpoints", self._best_step(step), self.config.checkpoint)

    def save(self, after: DataState, *, stopped: bool = False) -> None:
        """A checkpoint from which the data resumes at `after`, unless there is one or nothing to save. All ranks call.

        stopped: leave word that the run wants to be started again.
        """
        world, folder = self.world, self.out_dir / "checkpoints"
        if after.step and not world.from_main(lambda: after.step in steps_saved(folder)):
            self._write(after)
        if stopped and world.is_main:
            (self.out_dir / REQUEUE_FILE).touch()

    def _write(self, after: DataState) -> None:
        world, folder = self.world, self.out_dir / "checkpoints"
        weights, moments = (whole(part.state_dict(), world) for part in (self.model, self.optimizer))
        if world.is_main:
            content = {
                "model": weights,
                "model_config": asdict(self.model.config),
                "optimizer": moments,
                "data": {"step": after.step, "positions": list(after.positions)},
                "config": to_dict(self.config),
                "shards": [shard_set.digest for shard_set in self.train_split.shard_sets],
            }
            save(folder, after.step, content, self.config.checkpoint)
        world.barrier()


def is_validation_step(config: TrainConfig, step: int) -> bool:
    return step % config.val_every == 0 or step >= config.total_steps


class Window:
    """Sums of what a log line averages over."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps, self.images, self.waited, self.seconds = 0, 0, 0.0, 0.0

    def add(
        self, terms: dict[str, torch.Tensor], norms: dict[str, torch.Tensor], images: int, began: float, waited: float
    ) -> None:
        for name, value in (terms | {f"grad_norm_{k}": v for k, v in norms.items()}).items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps, self.images = self.steps + 1, self.images + images
        self.waited, self.seconds = self.waited + waited, self.seconds + time.perf_counter() - began

    def means(self, world: World) -> dict[str, float]:
        """The means over the steps and over the ranks."""
        values = torch.stack(list(self.sums.values())).double() / self.steps
        means = (world.sum(values) / world.size).tolist()
        rates = {"images_per_s": self.images * world.size / self.seconds, "data_wait": self.waited / self.seconds}
        return dict(zip(self.sums, means, strict=True)) | rates


def find_start(config: TrainConfig, out_dir: Path, *, repair: bool) -> Path | None:
    """The checkpoint to resume from; None: the run starts at step 0.

    Raises ValueError if there are traces of a run that had checkpoints and has none that is whole: nothing is erased
    before somebody has looked. A run that was killed before its first checkpoint just starts again.
    """
    newest = find_newest(out_dir / "checkpoints", repair=repair)
    if newest is not None:
        return newest
    lines = [line for name in (METRICS_FILE, SCENES_FILE) for line in read_lines(out_dir / name)]
    if not lines:
        return None
    before = read_config(out_dir)
    check_same_settings(before, config)
    reached = max(line["step"] for line in lines)
    if reached > flatten(before).get("checkpoint.every", 0):
        raise ValueError(
            f"{out_dir}: its {METRICS_FILE} goes up to step {reached}, but its checkpoints are gone; put them back "
            f"into {out_dir / 'checkpoints'}, or {elsewhere(config)}"
        )
    return None


def load_run(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can resume from. Raises ValueError for any other, or one whose name is not its own."""
    saved = load(path)
    missing = {"model", "optimizer", "data", "config", "shards"} - set(saved)
    if missing:
        raise ValueError(
            f"{path}: no checkpoint of the trainer, it has no {', '.join(sorted(missing))}: an exported one? Remove "
            "it, and the one before is taken"
        )
    if step_file(path.parent, saved["data"]["step"]).name != path.name:
        raise ValueError(f"{path}: holds step {saved['data']['step']}: remove it, or name it after that step")
    return saved


def keep_former_best(out_dir: Path, before: dict[str, Any], now: TrainConfig) -> None:
    """Give checkpoints/best of a resumed run another name if it was found in another way than will be from now on.

    That is by another figure or on other scenes, or in validations whose file is gone.
    """
    folder = out_dir / "checkpoints"
    steps = [line["step"] for line in read_lines(out_dir / SCENES_FILE) if line["plan"] == compared_plan(now)]
    if before["checkpoint"].get("best") == now.checkpoint.best and best_saved(folder) in steps:
        return
    former = set_best_aside(folder)
    if former is not None:
        log.warning(
            "%s: what was the best stays; by other validations or another figure, so `best` begins anew", former
        )


def elsewhere(config: TrainConfig) -> str:
    return f"give another out_dir, or remove {config.out_dir} to start from scratch"


def check_resumable(saved: dict[str, Any], config: TrainConfig, shard_sets: list[ShardSet]) -> None:
    """Raises ValueError if the run in out_dir was another one: other settings, or other data."""
    if saved["shards"] != [shard_set.digest for shard_set in shard_sets]:
        raise ValueError(
            f"{config.out_dir}: was trained on other shards than {config.data.shards}; {elsewhere(config)}"
        )
    check_same_settings(saved["config"], config)


def check_same_settings(settings: dict[str, Any], config: TrainConfig) -> None:
    """Raises ValueError if the settings of the run in out_dir are others than now, where that makes another run."""
    defaults = flatten(to_dict(TrainConfig(init=config.init or "none")))
    now, before = flatten(to_dict(config)), defaults | flatten(settings)  # they may be older than a key
    changed = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
    if changed:
        was, what = (", ".join(f"{key}={values[key]!r}" for key in changed) for values in (before, now))
        raise ValueError(f"{config.out_dir}: was trained with {was}, now it is {what}; {elsewhere(config)}")


def publish_pictures(result: Validation, step: int, out_dir: Path, reporter: Reporter) -> None:
    if result.pictured and reporter.is_main:
        sheet = contact_sheet(
            result.pictured, f"after {step} steps; depths in units of each scene's mean point distance"
        )
        save_picture(out_dir / SHEET_FILE, sheet)
        reporter.picture(step, "contact_sheet", sheet)


if __name__ == "__main__":
    main()
