"""What the trainer adds to the work of a step, as ratios.

    python bench/step.py loop          the loop's step over its bare forward, losses, backward and optimizer
    python bench/step.py wait          the fraction of time spent waiting for data, trainer and worker on a core each
    python bench/step.py ranks         two processes against one, and what sharing gradients costs
    python bench/step.py checkpoint    a checkpoint of the recipe's size, against writing as many bytes
    python bench/step.py memory        full size: peak memory of two chunks against one (needs 16 GB, some minutes)

The first three train the small model of demo.yaml, on rendered scenes in their shards or, for `ranks`, on noise.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from noise import noise
from pairs import ratio, seconds
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import shards
import train.engine.run
from prep.packing.executors import process_pool
from prep.packing.pack import pack
from prep.packing.plan import PackOptions
from train.config import load_config
from train.data.batches import TrainingSteps
from train.data.loader import stream
from train.data.plan import DataState, TrainingPlan
from train.data.scenes import load_step
from train.data.split import Split
from train.engine.checkpoint import CheckpointConfig, save
from train.engine.optim import clip_gradients, make_optimizer
from train.engine.parallel import distribute, gradient_sync
from train.engine.run import Run
from train.engine.settings import TrainConfig
from train.engine.step import forward_backward
from train.objective.losses import losses, normalizer_of
from train.objective.targets import Batch, prepare
from train.report.logger import Reporter
from train.runtime.distributed import World, start_world
from train.runtime.stop import StopRequest
from vggt import VGGT, preset

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, 1, torch.device("cpu"))
STEPS = 6
NEVER = 10**9


@contextmanager
def packed(short_side: int = 240, processes: int = 2) -> Iterator[Split]:
    """Rendered scenes, of the size that the demo's are or another, packed as they are."""
    from prep.importers.co3d import Co3D
    from prep.synth.synth import SynthOptions, synth

    with TemporaryDirectory() as name, process_pool(processes, ["prep.packing.pack", "prep.synth.synth"]) as pool:
        folder = Path(name)
        synth(folder, SynthOptions(scenes=16, frames=30, seed=0, short_side=short_side), pool, on_scene=lambda: None)
        source = Co3D(folder / "co3d", folder / "annotations", ("train",))
        pack(source, folder / "set", PackOptions(), pool, max_bad=0, parallel=processes)
        yield Split([shards.open(folder / "set")], "train")


def demo(*overrides: str) -> TrainConfig:
    options = [f"val_every={NEVER}", f"checkpoint.every={NEVER}", f"log_every={STEPS}", "data.shards=unused"]
    return load_config(ROOT / "train" / "configs" / "demo.yaml", [*options, *overrides])


def small_model(config: TrainConfig) -> VGGT:
    torch.manual_seed(0)
    return VGGT(preset("demo", heads=config.loss.heads, head_chunk=config.model.head_chunk)).train()


def plan_of(config: TrainConfig, split: Split) -> TrainingPlan:
    return TrainingPlan(
        config=config.data, lengths=split.lengths, seed=0, max_img_per_gpu=config.max_img_per_gpu, world_size=1
    )


class Sink(Reporter):
    """Reports as a run does, and keeps the scalars."""

    def __init__(self, out_dir: Path, total_steps: int) -> None:
        super().__init__(out_dir, is_main=True, first_step=0, total_steps=total_steps, resumed=False)
        self.console.quiet = True
        self.kept: list[dict[str, float]] = []

    def scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        super().scalars(step, split, values)
        self.kept.append(values)


class LoopOnly(Run):
    """A run without validations and checkpoints."""

    def _validate(self, state: DataState) -> None:
        pass

    def _save(self, state: DataState, *, stopped: bool = False) -> None:
        pass


def run_loop(
    config: TrainConfig,
    model: VGGT,
    optimizer: Any,
    split: Split,
    batches: Any,
    reporter: Reporter,
    world: World = ALONE,
) -> None:
    """The trainer's loop on these batches."""
    plan = plan_of(config, split)
    train.engine.run.stream = lambda *_, **__: batches
    work = LoopOnly(
        config=config,
        world=world,
        model=model,
        shared=model,
        optimizer=optimizer,
        plan=plan,
        streams={},
        places={},
        init_fingerprint=None,
        train_split=split,
        validator=None,
        workers=0,
        reporter=reporter,
        stop=StopRequest(),
    )
    work.train(plan.start())


def loop() -> None:
    torch.set_num_threads(1)
    with packed() as split, TemporaryDirectory() as folder:
        config = demo(f"max_steps={STEPS}")
        plan, state, raws = plan_of(config, split), DataState(0, (0,)), []
        for _ in range(STEPS):
            raws.append(load_step(split, plan.step(state, 0)))
            state = plan.after(state)
        model = small_model(config)
        optimizer = make_optimizer(model, config.optim)
        reporter = Sink(Path(folder), STEPS)
        prepared = [prepare(raw, ALONE.device, with_points=False) for raw in raws]

        def plain(batches: list[Batch]) -> None:
            for batch in batches:
                terms = losses(model(batch["images"]), batch, normalizer_of(batch, config.loss), config.loss)
                terms["loss_objective"].backward()
                clip_gradients(model, config.optim.clip)
                optimizer.step()
                optimizer.zero_grad()

        def ours() -> None:
            run_loop(config, model, optimizer, split, iter(raws), reporter)

        with reporter:
            print("the loop's step over a plain one (at most 1.03):", ratio(ours, lambda: plain(prepared)))
            print(
                "the same, preparing the batch (floats, jitter, scale) in both:",
                ratio(ours, lambda: plain([prepare(raw, ALONE.device, with_points=False) for raw in raws])),
            )


def pin(core: int) -> None:
    """All threads of this process to one core; what it starts from now on, too."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def wait() -> None:
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    with packed() as split, TemporaryDirectory() as folder:
        steps = 40
        config = demo(f"max_steps={steps}")
        plan = plan_of(config, split)
        pin(cores[1])  # the loader's worker is started from here
        batches = stream(
            lambda last: TrainingSteps(split, plan, 0, last or plan.start(), NEVER), range(NEVER), 1, False
        )
        for _ in range(3):
            next(batches)
        alone = statistics.median(seconds(lambda: next(batches)) for _ in range(60))
        pin(cores[0])
        model = small_model(config)
        reporter = Sink(Path(folder), steps)
        numbered = ({**batch, "after": DataState(i + 1, (0,))} for i, batch in enumerate(batches))
        began = time.perf_counter()
        with reporter:
            run_loop(config, model, make_optimizer(model, config.optim), split, numbered, reporter)
        step = (time.perf_counter() - began) / steps
        waits = [values["data_wait"] for values in reporter.kept if "data_wait" in values]
        print(
            f"loader alone {step / alone:.1f} times as fast as the step (at least 1.5); waiting for data "
            f"{statistics.mean(waits):.2%} of the time (at most 2%), of log lines at most {max(waits):.2%}"
        )


def rank() -> None:
    """What each process of `ranks` does: prints seconds a step, and what sharing gradients costs."""
    with start_world(tf32=False) as world:
        torch.set_num_threads(1)
        config = demo()
        model = distribute(small_model(config), config.strategy, bf16=False, world=world)
        batch = noise(4, 3, 84, 112)

        def step(shared: bool) -> None:
            with gradient_sync(model, shared):
                predictions = model(batch["images"])
                losses(predictions, batch, normalizer_of(batch, config.loss), config.loss)["loss_objective"].backward()
            world.barrier()

        cost = ratio(lambda: step(True), lambda: step(False), pairs=25) if world.size > 1 else ""
        took = statistics.median(seconds(lambda: step(True)) for _ in range(25))
        if world.is_main:
            print(took, cost, sep="|")


def ranks() -> None:
    launcher = str(Path(sys.executable).parent / "torchrun")
    found = {1: [], 2: []}
    for _ in range(5):
        for count, rows in found.items():
            command = [launcher, "--standalone", f"--nproc_per_node={count}", __file__, "rank"]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append(output.strip().splitlines()[-1].split("|"))
    speedups = sorted(2 * float(one[0]) / float(two[0]) for one, two in zip(found[1], found[2], strict=True))
    print(
        f"throughput of two processes over one: {statistics.median(speedups):.2f} ({speedups[0]:.2f} to "
        f"{speedups[-1]:.2f}, 5 pairs); a step that shares gradients over one that does not: {found[2][-1][1]}"
    )


def checkpoint() -> None:
    """Weights of the recipe's model, and two moments of what it trains: 6.6 GB."""
    with torch.device("meta"):
        model = VGGT(preset("1b", heads=("camera", "depth")))
    state = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    trained = [name for name in state if not name.startswith("aggregator")]
    moments = {i: {key: torch.zeros_like(state[n]) for key in ("exp_avg", "exp_avg_sq")} for i, n in enumerate(trained)}
    content = {"model": state, "optimizer": {"state": moments}}
    size = sum(t.nbytes for t in (*state.values(), *(m for part in moments.values() for m in part.values())))
    block = torch.empty(2**26, dtype=torch.uint8).numpy()

    with TemporaryDirectory(dir=".") as name:

        def plain() -> None:
            with (Path(name) / "plain").open("wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        def ours() -> None:
            shutil.rmtree(Path(name) / "checkpoints", ignore_errors=True)
            save(Path(name) / "checkpoints", 1, content, CheckpointConfig())

        took = seconds(ours)
        print(
            f"{size / 1e9:.1f} GB in {took:.0f} s; over writing as many bytes: {ratio(ours, plain, pairs=5)}; at one "
            f"every 400 steps that is {took / 400:.2f} s a step"
        )


def peak(chunks: int) -> None:
    """Prints the peak memory of forward and backward, at full size, of two scenes of two views."""
    options = ["init=unused", "precision=fp32", f"accum_steps={chunks}"]
    config = load_config(ROOT / "train" / "configs" / "default.yaml", options)
    with torch.device("meta"):
        model = VGGT(preset("1b", heads=("camera", "depth"), head_chunk=1))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.aggregator.requires_grad_(False)
    terms: dict[str, Tensor] = forward_backward(model.train(), noise(2, 4, 266, 518), config)
    assert terms
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)


def memory() -> None:
    found = []
    for chunks in (1, 2):
        command = [sys.executable, __file__, f"peak-{chunks}"]
        found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"two scenes of four views of 266x518: {found[0]:.2f} GB in one chunk, {found[1]:.2f} GB in two")


PARTS = {"loop": loop, "wait": wait, "ranks": ranks, "rank": rank, "checkpoint": checkpoint, "memory": memory}
PARTS |= {"peak-1": lambda: peak(1), "peak-2": lambda: peak(2)}

if __name__ == "__main__":
    PARTS[sys.argv[1]]()
