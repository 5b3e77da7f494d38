"""A run at work: the loop over its steps, with validations and checkpoints."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from train.data.batches import TrainingSteps
from train.data.loader import NoDataError, next_batch, stream
from train.data.plan import DataState, TrainingPlan, scenes_per_rank
from train.data.scenes import blank_batch
from train.data.split import Split
from train.engine.adapters import adapters_content, saved_weights
from train.engine.checkpoint import mark_best, save, steps_saved
from train.engine.folder import CHECKPOINTS, REQUEUE_FILE
from train.engine.memory import explain_oom, peak_gb
from train.engine.optim import Optimizers, set_lr
from train.engine.parallel import full_state_dict
from train.engine.settings import TrainConfig, to_dict
from train.engine.step import StepOutcome, train_step
from train.engine.streams import Streams, streams_at
from train.engine.tally import Tally, Window
from train.evaluation.guard import broken, changes, harmed, worse
from train.evaluation.history import ValidationHistory, compared_plan
from train.evaluation.validation import Validation, Validator
from train.objective.targets import prepare
from train.report.logger import Reporter
from train.report.pictures import SHEET_FILE, contact_sheet, save_picture
from train.report.words import describe_harm, describe_metrics
from train.runtime.distributed import World
from train.runtime.profiler import StepProfiler, part
from train.runtime.stop import StopRequest
from vggt.model import VGGT

# stopped: by a signal; harmful: by the guard.
Ending = Literal["finished", "stopped", "harmful"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run at work. model: the model itself; shared: as the ranks share it; streams: see engine/streams.py."""

    config: TrainConfig
    world: World
    model: VGGT
    shared: torch.nn.Module
    optimizer: torch.optim.Optimizer | Optimizers
    plan: TrainingPlan
    streams: Streams
    places: dict[str, str]  # of all shard sets that were ever trained on, by digest
    init_fingerprint: str | None
    train_split: Split
    validator: Validator | None
    workers: int
    reporter: Reporter
    stop: StopRequest

    @property
    def out_dir(self) -> Path:
        return Path(self.config.out_dir)

    @property
    def _compared_plan(self) -> dict[str, Any]:
        return self.validator.compared if self.validator else compared_plan(self.config.data, [])

    def train(self, state: DataState) -> Ending:
        """From `state` to the last step, or why not. Raises ValueError if it must not continue."""
        steps = self.config.profile_steps if self.world.is_main else 0
        profiler = StepProfiler(steps, self.model, self.world.device, self.out_dir)
        left = self.config.total_steps - state.step
        if 0 < left < profiler.needs:
            self.reporter.say(f"profile_steps={steps} needs {profiler.needs} steps, and there are {left}")
        try:
            return self._train(state, profiler)
        finally:
            if words := profiler.report(ended=True):
                self.reporter.say(words)

    def _train(self, state: DataState, profiler: StepProfiler) -> Ending:
        config, world, reporter, total = self.config, self.world, self.reporter, self.config.total_steps
        batches = stream(
            lambda last: TrainingSteps(self.train_split, self.plan, world.rank, last or state, total),
            range(state.step, total),
            self.workers,
            pin_memory=world.device.type == "cuda",
        )
        if is_validation_step(config, state.step) and (ending := self._validate(state)):
            return ending
        window, tally = Window(), Tally(config, world)
        while state.step < total:
            with profiler.step():
                began = time.perf_counter()
                with part("waiting for data"):
                    raw = next_batch(batches, self.stop)
                waited = time.perf_counter() - began
                if not isinstance(raw, dict):
                    self._abandon_step(state)
                    return self._end_early(state, self._problem_of_any(raw))
                outcome, lr = self._take_step(raw)
            if outcome.abandoned:
                return self._end_early(state, self._problem_of_any(None))
            state, step = raw["after"], raw["after"].step
            if outcome.finite:
                window.add(outcome, raw["images"].shape[:2].numel(), began, waited)
            try:
                self._account(raw, outcome, lr, window, tally)
            except ValueError as error:  # on every rank
                return self._end_early(state, error)
            if words := profiler.report():
                reporter.say(words)
            if outcome.stop and step < total:
                return self._end_early(state, None)
            if step % config.checkpoint.every == 0 or step == total:
                self._save(state)
            if is_validation_step(config, step) and (ending := self._validate(state)):
                return ending
        if tally.bad:
            reporter.say(f"{tally.bad} of {tally.tried} frames were damaged and replaced: {tally.files}")
        return "finished"

    def _take_step(self, raw: dict[str, Any]) -> tuple[StepOutcome, float]:
        """The outcome, and the learning rate."""
        config, step = self.config, raw["after"].step  # counts the steps that are done
        lr = set_lr(self.optimizer, config.optim, step - 1, config.total_steps)
        counts = {"bad": sum(raw["bad"].values()), "tried": raw["tried"]}
        with explain_oom(raw["images"], config, self.world, step):
            with part("data, on the device"):
                batch = prepare(raw, self.world.device, with_points=config.loss.point > 0)
            stop = self.stop.asked
            return train_step(self.shared, self.optimizer, batch, config, self.world, stop=stop, **counts), lr

    def _account(self, raw: dict[str, Any], outcome: StepOutcome, lr: float, window: Window, tally: Tally) -> None:
        """Count and report a step. Raises ValueError, on every rank, if too much is wrong or it cannot be written."""
        config, world, step = self.config, self.world, raw["after"].step
        tally.count_damage(raw, outcome)
        if not outcome.finite:
            keys = [key for rank_keys in world.gather(raw["keys"]) for key in rank_keys]
            world.from_main(partial(self.reporter.skipped, step, tally.skipped + 1, keys))
        tally.count_skipped(outcome.finite)
        if window.steps and (step % config.log_every == 0 or step == config.total_steps):
            values = window.take_means(world) | {"lr": lr, "memory_gb": peak_gb(world.device)}
            world.from_main(partial(self.reporter.trained, step, config.data.train_split, values))

    def _abandon_step(self, state: DataState) -> None:
        """Take part in the step at `state`, for which this rank has no data, so that the others do not wait for it."""
        if self.world.size > 1:
            shape = self.plan.shape(state.step)  # not the scenes: to draw them may be what failed
            raw = blank_batch(shape, scenes_per_rank(self.config.max_img_per_gpu, shape.views))
            batch = prepare(raw, self.world.device, with_points=self.config.loss.point > 0)
            train_step(self.shared, self.optimizer, batch, self.config, self.world, abandon=True)

    def _problem_of_any(self, mine: NoDataError | None) -> NoDataError | None:
        """The first problem with the data of all ranks, on every rank."""
        return next((problem for problem in self.world.gather(mine) if problem is not None), None)

    def _end_early(self, state: DataState, problem: ValueError | None) -> Ending:
        """Save the state reached, as a signal asked to stop. Raises ValueError for `problem`.

        `problem` must be the same on every rank.
        """
        self._save(state, stopped=problem is None)
        if problem is not None:
            saved = f"; what was trained is saved at step {state.step}" if state.step else ""
            raise ValueError(f"{problem}{saved}") from problem
        return "stopped"

    def _validate(self, state: DataState) -> Ending | None:
        """Validate at `state`, unless that is done, and mark the best checkpoint; returns why the run ends, if so."""
        step, history, plan = state.step, ValidationHistory(self.out_dir), self._compared_plan
        # A run that was killed in between has validated before, or has still to do so.
        validator = self.validator
        if validator and not self.world.from_main(lambda: history.has(step, plan, validator.names)):
            try:
                result = validator.validate(self.model)
            except NoDataError as error:  # on every rank
                return self._end_early(state, error)
            if result is None:
                return self._end_early(state, None)
            try:
                self.world.from_main(partial(self._publish, result, step))
            except ValueError as error:
                return self._end_early(state, error)
        best = self.world.from_main(lambda: self._best_step(step))
        if best == step:
            self._save(state)
        if self.world.is_main:
            mark_best(self.out_dir / CHECKPOINTS, best, self.config.checkpoint)
        if self.config.guard == "stop" and self.world.from_main(lambda: harmed(history.comparable)):
            self._save(state)
            return "harmful"
        return None

    def _publish(self, result: Validation, step: int) -> None:
        """Report a validation, on the main rank. Of the files that a resumed run reads, the history is written last."""
        assert self.validator is not None
        reporter, name = self.reporter, self.config.data.val_split
        reporter.scalars(step, name, result.means())
        shard_sets = self.validator.split.shard_sets
        for source, shard_set in enumerate(shard_sets if len(shard_sets) > 1 else ()):
            if source in result.sources:
                reporter.scalars(step, f"{name}:{shard_set}", result.means(source))
        ValidationHistory(self.out_dir).add(step, self._compared_plan, result.names, result.by_scene)
        reporter.say(f"step {step}: {name} {describe_metrics(result.means())}")
        if self.config.guard != "off":
            self._compare_with_start(step)
        if result.unreadable:
            few = ", ".join(result.unreadable[:3])
            reporter.say(f"{len(result.unreadable)} of {len(result.names)} scenes cannot be read: {few}")
        if result.pictured:
            title = f"after {step} steps; depths in units of each scene's mean point distance"
            sheet = contact_sheet(result.pictured, title)
            save_picture(self.out_dir / SHEET_FILE, sheet)
            reporter.picture(step, "contact_sheet", sheet)

    def _compare_with_start(self, step: int) -> None:
        """Say at once if something is worse than it was at first."""
        validations = ValidationHistory(self.out_dir).comparable
        if len(validations) < 2:
            return
        found, harm = changes(validations), worse(validations)
        gains = {name: change.gain for name, change in found.items()} | dict.fromkeys(harm, -1)
        self.reporter.scalars(step, "guard", {f"gain_{name}": float(gain) for name, gain in gains.items()})
        if harm:
            words = describe_harm(harm, found, broken(validations))
            start = f"step {validations[0]['step']}"
            self.reporter.say(f"WARNING: step {step}: worse than at {start} beyond the noise: {words}")

    def _best_step(self, step: int) -> int | None:
        """The step of the best validation among the first, `step`, and those that have a checkpoint."""
        saved = {*steps_saved(self.out_dir / CHECKPOINTS), step}
        return ValidationHistory(self.out_dir).best_step(self.config.checkpoint.best, saved)

    def _save(self, state: DataState, *, stopped: bool = False) -> None:
        """Save a checkpoint at `state`, unless there is one or nothing to save. All ranks must call it.

        stopped: leave a file that asks for the run to be started again.
        """
        world, folder = self.world, self.out_dir / CHECKPOINTS
        if state.step and not world.from_main(lambda: state.step in steps_saved(folder)):
            parts = saved_weights(self.model, self.config.model), self.optimizer.state_dict()
            weights, moments = (full_state_dict(part, world) for part in parts)
            if world.is_main:
                shard_sets = self.train_split.shard_sets
                content = {
                    "model": weights,
                    "model_config": asdict(self.model.config),
                    "optimizer": moments,
                    "data": {"step": state.step, "streams": streams_at(state, shard_sets, self.streams)},
                    "places": self.places,
                    "config": to_dict(self.config),
                    "init_fingerprint": self.init_fingerprint,
                    "shards": [shard_set.digest for shard_set in shard_sets],
                    "pairs": {
                        shard_set.digest: shard_set.pairs_digest
                        for shard_set, sampling in zip(shard_sets, self.config.data.samplings, strict=True)
                        if sampling == "overlap"
                    },
                } | adapters_content(self.config.model, self.config.init, self.init_fingerprint)
                save(folder, state.step, content, self.config.checkpoint)
            world.barrier()
        if stopped and world.is_main:
            (self.out_dir / REQUEUE_FILE).touch()


def is_validation_step(config: TrainConfig, step: int) -> bool:
    return step % config.val_every == 0 or step in config.val_at or step >= config.total_steps
