"""Train VGGT on a shard set.

    torchrun --nproc_per_node=2 train/main.py --config train/configs/default.yaml data.shards=S init=vggt.pt
    python train/main.py --config train/configs/demo.yaml data.shards=S --dry-run

One process a GPU (or a few on CPUs). The same command again resumes from the last checkpoint in out_dir.
"""

from __future__ import annotations

import argparse
import logging
import signal
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import shards
from train.config import list_keys, load_config
from train.data.plan import TrainingPlan
from train.data.split import Split, stored_neighbors
from train.data.workers import worker_count
from train.engine.adapters import attach, checked_fingerprint, load_weights, refuse_adapters
from train.engine.checkpoint import steps_saved
from train.engine.describe import describe_run, describe_start
from train.engine.folder import (
    CHECKPOINTS,
    REQUEUE_FILE,
    check_place,
    check_resumable,
    find_start,
    hold_init,
    keep_former_choices,
    load_run,
    locked_folder,
    real_name,
    with_init_of,
)
from train.engine.lineage import former_places, what_is_validated
from train.engine.memory import dry_run
from train.engine.optim import freeze, make_optimizer
from train.engine.parallel import distribute, load_optimizer
from train.engine.run import Run
from train.engine.settings import CONFIG_FILE, TrainConfig, write_config
from train.engine.streams import mixture_changes, new_streams, saved_streams, state_of
from train.evaluation.bootstrap import MIN_SCENES
from train.evaluation.guard import harmed
from train.evaluation.history import ValidationHistory, compared_plan
from train.evaluation.validation import Validator
from train.objective.matching import matching_block, start_matching
from train.report.logger import Reporter
from train.report.words import metric_of
from train.runtime.distributed import World, fail, start_world
from train.runtime.stop import STOP_SIGNALS, StopRequest
from vggt import VGGT, preset
from vggt.config import preset_of
from vggt.layers import compile_blocks
from vggt.memory import hold_in_bf16
from vggt.weights import NANO, fill, read_checkpoint

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=list_keys(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file; without it the defaults, which are train/configs/default.yaml")
    parser.add_argument("--dry-run", action="store_true", help="check everything and try one step; writes nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as seed=1 data.workers=4")
    arguments = parser.parse_intermixed_args()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the first step there is nothing to save, nor to explain
    try:
        config = load_config(arguments.config, arguments.overrides)
        with start_world(tf32=config.tf32) as world, ExitStack() as held:
            run(config, world, held, dry=arguments.dry_run)
    except (ValueError, OSError) as error:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        fail(error)


def run(config: TrainConfig, world: World, held: ExitStack, *, dry: bool) -> None:
    """A run, from its configuration to its summary. held: keeps the folder locked until the caller closes it."""
    # Data
    if not config.data.sources:
        raise ValueError("data.shards: not given; expected a directory made by vggt-prep pack, or its URL")
    shard_sets = [shards.open(source.path) for source in config.data.sources]
    train_split = Split(shard_sets, config.data.train_split)
    with_val = [i for i, s in enumerate(shard_sets) if config.data.val_split in s.dataset["splits"]]
    val_split = Split([shard_sets[i] for i in with_val], config.data.val_split) if with_val else None
    neighbors = stored_neighbors(train_split, config.data.samplings)
    workers = worker_count(config.data.workers, world.local_size)

    # Where to begin
    out_dir = Path(config.out_dir)
    world.from_main(lambda: check_place(out_dir) if dry else held.enter_context(locked_folder(out_dir)))
    if world.is_main and not dry:
        (out_dir / REQUEUE_FILE).unlink(missing_ok=True)  # before anything may fail, and ask for the same again
    newest = world.from_main(lambda: find_start(config, out_dir, repair=not dry))
    saved = None if newest is None else load_run(newest)
    changes: list[str] = []
    if saved is None:
        config = replace(config, init=config.init and real_name(config.init))
    else:
        check_resumable(saved, config, shard_sets)
        config = with_init_of(config, saved["config"].get("init"))
        changes = mixture_changes(shard_sets, config.data, saved)
    validated = world.from_main(partial(what_is_validated, config, train_split, val_split, saved))
    if config.guard == "stop" and (validated is None or validated.tested < MIN_SCENES):
        raise ValueError(
            f"guard: stop needs at least {MIN_SCENES} sequences to validate on, to tell harm from noise, and there are "
            f"{0 if validated is None else validated.tested}; set guard=warn, or test on more"
        )

    # Model, optimizer, plan
    model, init_fingerprint = make_model(config, saved, world)
    model.to(world.device).train()
    if config.compile:
        model.aggregator.keep_every_block()  # parts of one frame and of two would be compiled apart
        compile_blocks(model)
    shared = distribute(model, config.strategy, bf16=config.precision == "bf16", world=world)
    optimizer = make_optimizer(model, config.optim)
    if saved is not None:
        load_optimizer(optimizer, saved["optimizer"])
    before = {} if saved is None else saved_streams(saved)
    streams = new_streams(shard_sets, before)
    plan = TrainingPlan(
        config=config.data,
        lengths=train_split.lengths,
        streams=tuple(number for number, _ in streams.values()),
        neighbors=neighbors,
        seed=config.seed,
        max_img_per_gpu=config.max_img_per_gpu,
        world_size=world.size,
    )
    state = state_of(0 if saved is None else saved["data"]["step"], streams)
    resumed, former_config = saved is not None, saved and saved["config"]
    places = {**former_places(saved), **{s.digest: str(s) for s in shard_sets}}
    del saved
    about = describe_start(config, model, train_split, neighbors, val_split, validated, world, workers)
    if dry:
        result = dry_run(config, world, shared, optimizer, train_split, plan, state)
        if world.is_main:
            print(f"{about}\n{result}")
        return

    # What people see
    stop = StopRequest()
    validator = val_split and Validator(
        split=val_split,
        neighbors=stored_neighbors(val_split, [config.data.samplings[i] for i in with_val]),
        data=config.data,
        loss=config.loss,
        precision=config.precision,
        world=world,
        workers=workers,
        stop=stop,
    )
    if former_config is not None and world.is_main:
        validation = validator.compared if validator else compared_plan(config.data, [])
        keep_former_choices(out_dir, former_config, config, validation, validator.names if validator else [])
    total = config.total_steps
    reporter = Reporter(out_dir, is_main=world.is_main, first_step=state.step, total_steps=total, resumed=resumed)
    if state.step:
        reporter.say(f"resuming {out_dir} at step {state.step} of {total}, its last checkpoint")
    if config.init is not None and (held_init := world.from_main(partial(hold_init, config.init))):
        changes.append(held_init)
    for change in changes:
        reporter.say(change)
    if state.step >= total:
        reporter.say("it is finished: raise epochs or max_steps to continue, or give another out_dir")
    stop.listen()
    if world.is_main and write_config(out_dir, config, keep_other=not resumed):
        reporter.say(f"{out_dir / CONFIG_FILE}: what was there is kept beside it, under a number")
    reporter.say(about)

    # Loop
    work = Run(
        config=config,
        world=world,
        model=model,
        shared=shared,
        optimizer=optimizer,
        plan=plan,
        streams=before | streams,
        places=places,
        init_fingerprint=init_fingerprint,
        train_split=train_split,
        validator=validator,
        workers=workers,
        reporter=reporter,
        stop=stop,
    )
    with reporter:
        ending = work.train(state)

    # Summary
    if not world.is_main:
        return
    if ending == "stopped" and steps_saved(out_dir / CHECKPOINTS):
        reporter.say(f"stopped, and saved in {out_dir}/checkpoints; the same command resumes from there")
    elif ending == "stopped":
        reporter.say("stopped before the first step; the same command starts it again")
    else:
        if ending == "harmful":
            harm = ", ".join(metric_of(name).label for name in harmed(ValidationHistory(out_dir).comparable))
            reporter.say(
                f"ended by guard=stop: {harm}: worse than at first in two validations in a row; guard=warn goes on"
            )
        reporter.say(describe_run(config, out_dir, validated, whole=ending == "finished"))


def make_model(config: TrainConfig, saved: dict[str, Any] | None, world: World) -> tuple[VGGT, str | None]:
    """The run's model, with the weights of its checkpoint, of `init`, or random; and the fingerprint of `init`.

    A checkpoint of adapters holds just what was trained: the rest comes from `init` again. Raises ValueError for an
    `init` that is in another place than before, and is another one.
    """
    chosen, state = config.model, None
    known = None if saved is None else saved.get("init_fingerprint")
    needs_init = saved is None or chosen.lora is not None
    if config.init is not None and needs_init:
        state = read_init(config.init, chosen.preset)  # first: a large model takes long to make
    elif saved is not None and known is not None and saved["config"].get("init") != config.init:
        init = str(config.init)
        world.from_main(lambda: checked_fingerprint(read_init(init, chosen.preset), init, known))
    torch.manual_seed(config.seed)
    model = VGGT(
        preset(chosen.preset, heads=config.loss.heads, head_chunk=chosen.head_chunk, recompute=chosen.recompute)
    )
    if state is not None:
        init = str(config.init)
        fill(model, state, init)
        known = world.from_main(partial(checked_fingerprint, state, init, known))
        del state
    elif saved is None and config.loss.match > 0:
        start_matching(model)
    freeze(model, chosen.freeze)
    if config.loss.match > 0 and not any(p.requires_grad for p in matching_block(model).parameters()):
        raise ValueError("loss.match: teaches attention, but model.freeze keeps it as it is; set loss.match=0")
    if chosen.aggregator_dtype == "bf16":
        hold_in_bf16(model.aggregator)
    if chosen.lora is not None:
        attach(model, chosen.lora)
    if saved is not None:
        load_weights(model, chosen, saved["model"])
    return model, known


def read_init(init: str, name: str) -> dict[str, Tensor]:
    """The weights of `init`. Raises ValueError if it holds none for a model of the preset of that name."""
    refuse_adapters(init)
    state, found = read_checkpoint(init)
    sizes = preset_of(found) if found else None
    if sizes not in (None, name):
        recipe = " (RECIPE=nano of make has the settings for it)" if sizes == NANO.name else ""
        raise ValueError(f"model.preset: {name}, but {init} has the sizes of {sizes}; set model.preset={sizes}{recipe}")
    return state


if __name__ == "__main__":
    main()
