"""Train VGGT on a shard set.

    torchrun --nproc_per_node=2 train/main.py --config train/configs/default.yaml data.shards=S init=vggt.pt
    python train/main.py --config train/configs/demo.yaml data.shards=S --dry-run

One process a GPU (or a few on CPUs). The same command again goes on from the last checkpoint in out_dir.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml

import shards
from shards import ShardSet
from train.checkpoint import find_newest, load, mark_best, save, steps_saved
from train.config import TrainConfig, flatten, load_config, to_dict
from train.distributed import World, fail, start_world
from train.loader import STOP_SIGNALS, Split, TrainingSteps, stream, worker_count
from train.memory import peak_gb, rehearse, said_out_of_memory
from train.optim import freeze, make_optimizer, set_lr
from train.parallel import distribute, load_optimizer, whole
from train.pictures import contact_sheet, save_picture
from train.plan import DataState, TrainingPlan
from train.prepare import prepare
from train.report import SCENES_FILE, Reporter, read_lines
from train.step import train_step
from train.summary import describe_damage, describe_figures, describe_run, describe_start
from train.validate import Validation, best_step, comparable, compared_plan, validate
from vggt import VGGT, preset
from vggt.layers import compile_blocks
from vggt.memory import hold_in_bf16
from vggt.weights import load_weights

# May change between a run and its resumption; anything else would make it another run.
MAY_CHANGE = {
    *("init", "out_dir", "epochs", "max_steps", "accum_steps", "strategy", "compile"),
    *("model.head_chunk", "model.aggregator_dtype"),
    *("val_every", "log_every", "max_skipped", "data.shards", "data.workers", "data.max_bad"),
    *("data.val_split", "data.val_scenes", "data.val_views", "data.val_aspect"),
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
    try:
        config = load_config(arguments.config, arguments.overrides)
        with start_world(tf32=config.tf32) as world:
            run(config, world, dry_run=arguments.dry_run)
    except (ValueError, OSError) as error:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        fail(error)


def run(config: TrainConfig, world: World, *, dry_run: bool) -> None:
    stop_asked = catch_signals()

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
    newest = world.from_main(lambda: find_newest(out_dir / "checkpoints", mend=not dry_run))
    saved = None if newest is None else load(newest)
    if saved is not None:
        check_resumable(saved, config, shard_sets)
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
        del saved
    about = describe_start(config, model, train_split, val_split, world, workers)
    if dry_run:
        tried = rehearse(config, world, shared, optimizer, train_split, plan, state)
        if world.is_main:
            print(f"{about}\n{tried}")
        return
    out_dir.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(
        out_dir, is_main=world.is_main, first_step=state.step, total_steps=config.total_steps, resumed=resumed
    )
    if state.step:
        reporter.say(f"resuming {out_dir} at step {state.step} of {config.total_steps}, its last checkpoint")
    if state.step >= config.total_steps:
        reporter.say("it is finished: raise epochs or max_steps to go on, or give another out_dir")
    if world.is_main:
        (out_dir / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
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
        stop_asked=stop_asked,
    )
    with reporter:
        stopped = work.train(state)

    # Summary
    if not world.is_main:
        return
    if stopped:
        reporter.say(f"stopped, and saved in {out_dir}/checkpoints; the same command goes on from there")
    else:
        reporter.say(describe_run(config, out_dir))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run at work. model: bare; shared: the same as the ranks share it; stop_asked: gets the signals to stop."""

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
    stop_asked: list[int]

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    def train(self, state: DataState) -> bool:
        """From `state` to the last step; True if a signal stopped it. Raises ValueError if it must not go on."""
        config, world, reporter = self.config, self.world, self.reporter
        batches = stream(
            lambda last: TrainingSteps(self.train_split, self.plan, world.rank, last or state, config.total_steps),
            self.workers,
            pin_memory=world.device.type == "cuda",
        )
        if is_validation_step(config, state.step):
            self.evaluate(state.step)
            self.mark_best(state.step)
        window = Window()
        skipped = bad = tried = 0
        damaged: Counter[str] = Counter()  # frames of this rank, by file
        for _ in range(state.step, config.total_steps):
            began = time.perf_counter()
            raw = next(batches)
            waited = time.perf_counter() - began
            step = raw["after"].step  # counts the steps that are done
            lr = set_lr(self.optimizer, config.optim, step - 1, config.total_steps)
            damaged.update(raw["bad"])
            counts = {"bad": sum(raw["bad"].values()), "tried": raw["tried"]}
            with said_out_of_memory(raw["images"], config, world, step):
                batch = prepare(raw, world.device, with_points=config.loss.point > 0)
                outcome = train_step(
                    self.shared, self.optimizer, batch, config, world, stop=bool(self.stop_asked), **counts
                )
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
            due = step % config.checkpoint.every == 0 or step == config.total_steps or outcome.stop
            if due:
                self.save(raw["after"], stopped=outcome.stop and step < config.total_steps)
            if outcome.stop and step < config.total_steps:
                return True
            if is_validation_step(config, step):
                if self.evaluate(step) and not due:
                    self.save(raw["after"], stopped=False)
                self.mark_best(step)
        if bad:
            reporter.say(f"{bad} of {tried} frames were damaged and replaced: {describe_damage(world.gather(damaged))}")
        return False

    def evaluate(self, step: int) -> bool:
        """Validate, unless it has been done; whether no validation before was as good."""
        config, world, split, reporter = self.config, self.world, self.val_split, self.reporter
        # A run that was killed in between has validated before, or has still to do so.
        if split is None or world.from_main(lambda: reporter.has_validation(step, compared_plan(config))):
            return False
        result = validate(self.model, split, config, world, self.workers)
        reporter.scalars(step, config.data.val_split, result.means)
        reporter.scenes(step, compared_plan(config), result.names, result.by_scene)
        reporter.say(f"step {step}: {config.data.val_split} {describe_figures(result.means)}")
        publish_pictures(result, step, self.out_dir, reporter)
        return world.from_main(lambda: self._best_step(step) == step)

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

    def save(self, after: DataState, *, stopped: bool) -> None:
        """A checkpoint, from which the data goes on at `after`. Called by all ranks."""
        world = self.world
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
            save(self.out_dir / "checkpoints", after.step, content, self.config.checkpoint)
            if stopped:
                (self.out_dir / REQUEUE_FILE).touch()
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


def check_resumable(saved: dict[str, Any], config: TrainConfig, shard_sets: list[ShardSet]) -> None:
    """Raises ValueError if the run in out_dir was another one: other settings, or other data."""
    advice = f"give another out_dir, or remove {config.out_dir} to start anew"
    if saved["shards"] != [shard_set.digest for shard_set in shard_sets]:
        raise ValueError(f"{config.out_dir}: was trained on other shards than {config.data.shards}; {advice}")
    defaults = flatten(to_dict(TrainConfig(init=config.init or "none")))
    now, before = flatten(to_dict(config)), defaults | flatten(saved["config"])  # it may be older than a key
    changed = [key for key in now if key not in MAY_CHANGE and now[key] != before[key]]
    if changed:
        was, what = (", ".join(f"{key}={values[key]!r}" for key in changed) for values in (before, now))
        raise ValueError(f"{config.out_dir}: was trained with {was}, now it is {what}; {advice}")


def publish_pictures(result: Validation, step: int, out_dir: Path, reporter: Reporter) -> None:
    if result.pictured and reporter.is_main:
        sheet = contact_sheet(
            result.pictured, f"after {step} steps; depths in units of each scene's mean point distance"
        )
        save_picture(out_dir / SHEET_FILE, sheet)
        reporter.picture(step, "contact_sheet", sheet)


def catch_signals() -> list[int]:
    """A list that gets the number of the first signal that asks to stop; a second one kills as usual."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    return received


if __name__ == "__main__":
    main()
