"""Real shards on the host of a GPU: whether they come as fast as it takes them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.gpu.rig import Rig, Row
from bench.step import NEVER, Sink, packed, plan_of, run_loop
from train.data.batches import TrainingSteps
from train.data.loader import stream
from train.data.split import Split
from train.data.workers import worker_count
from train.engine.optim import make_optimizer
from train.engine.settings import TrainConfig
from train.runtime.profiler import FOLDER, TABLE_FILE, WARM_UP

PROFILED = 4  # steps


def loading(rig: Rig) -> Iterator[Row]:
    """The loader alone, then the trainer's loop with it: how long it waits, and where the time of a step goes."""
    cores = len(os.sched_getaffinity(0))
    with packed(60 if rig.pretend else 518, cores) as split, TemporaryDirectory() as folder:
        steps = WARM_UP + PROFILED + 1
        settings = (f"max_steps={steps}", f"out_dir={folder}", "log_every=1", f"profile_steps={PROFILED}")
        config = rig.recipe(
            "default", *settings, f"val_every={NEVER}", "data.views=[2, 3]" if rig.pretend else "seed=0"
        )
        workers = worker_count(None, 1)
        loader = alone(rig, config, split, workers)
        yield loader
        for row in in_the_loop(rig, config, split, workers, Path(folder)):
            yield row
            if "images_per_s" in row:  # its steps are too few to wait for what was made ahead: the rates tell
                faster = loader["images_per_s"] / row["images_per_s"]
                yield {"what": "the loader over the step", "ratio": faster} | (
                    {} if rig.pretend else {"good": faster > 1}
                )


def alone(rig: Rig, config: TrainConfig, split: Split, workers: int) -> Row:
    plan = plan_of(config, split)
    batches = stream(
        lambda last: TrainingSteps(split, plan, 0, last or plan.start(), NEVER),
        range(NEVER),
        workers,
        pin_memory=not rig.pretend,
    )
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter() - began
    for _ in islice(batches, workers):  # what was made ahead
        pass
    count, began = 0, time.perf_counter()
    for batch in islice(batches, 2 if rig.pretend else 3 * workers):
        count += batch["images"].shape[:2].numel()
    rate = count / (time.perf_counter() - began)
    return {
        "what": f"the loader alone, worker processes: {workers}",
        "images_per_s": rate,
        "seconds_to_first_batch": first,
    }


def in_the_loop(rig: Rig, config: TrainConfig, split: Split, workers: int, folder: Path) -> Iterator[Row]:
    model, plan = rig.model(config), plan_of(config, split)
    batches = stream(
        lambda last: TrainingSteps(split, plan, 0, last or plan.start(), config.total_steps),
        range(config.total_steps),
        workers,
        pin_memory=not rig.pretend,
    )
    reporter = Sink(folder, config.total_steps)
    with reporter:
        run_loop(config, model, make_optimizer(model, config.optim), split, batches, reporter, rig.world)
    lines = [line for line in reporter.kept if "images_per_s" in line][WARM_UP : WARM_UP + PROFILED]
    means = {key: sum(line[key] for line in lines) / len(lines) for key in ("images_per_s", "data_wait")}
    yield {"what": "the trainer's loop on shards", **means}
    table = (folder / FOLDER / TABLE_FILE).read_text()
    for part, seconds, share in re.findall(r"^  (.+?) +([0-9.]+) s +([0-9]+)%$", table, re.MULTILINE):
        yield {"what": f"of a step: {part}", "seconds": float(seconds), "share": int(share) / 100}
