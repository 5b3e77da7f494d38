"""What the measurements on a GPU share: the device, models and batches of the recipes, clocks and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.noise import raw_noise
from train.config import load_config
from train.engine.adapters import attach
from train.engine.optim import freeze, make_optimizer
from train.engine.settings import TrainConfig
from train.engine.step import train_step
from train.objective.targets import prepare
from train.runtime.distributed import World
from vggt import VGGT, preset
from vggt.memory import hold_in_bf16

ROOT = Path(__file__).parents[2]
NO_MEMORY = ("out of memory", "unable to find an engine", "ALLOC_FAILED")  # of CUDA, cuDNN, cuBLAS
ROW = "ROW "  # begins a line of a stage that is one of its rows
Row = dict[str, Any]


@dataclass(frozen=True)
class Rig:
    """pretend: on the CPU, of the smallest model and images, to see that everything works."""

    pretend: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.pretend else torch.device("cuda", 0)

    @property
    def world(self) -> World:
        return World(0, 1, 1, self.device)

    @property
    def size(self) -> str:
        return "tiny" if self.pretend else "1b"

    @property
    def width(self) -> int:
        return 56 if self.pretend else 518

    @property
    def images(self) -> int:
        return 6 if self.pretend else 48

    @property
    def views(self) -> tuple[int, ...]:
        return (2, 3) if self.pretend else (2, 8, 24)

    @property
    def repeats(self) -> int:
        return 1 if self.pretend else 3

    def height(self, aspect: float) -> int:
        """Of an image, as the loader rounds it."""
        return max(14, round(self.width * aspect / 14) * 14)

    def recipe(self, name: str, *settings: str) -> TrainConfig:
        own = [f"model.preset={self.size}", f"data.width={self.width}", "init=unused", "data.shards=unused"]
        if self.pretend:
            own += [f"data.views=[2, {max(self.views)}]", f"max_img_per_gpu={self.images}"]
        return load_config(ROOT / "train" / "configs" / f"{name}.yaml", [*own, *settings])

    def model(self, config: TrainConfig) -> VGGT:
        """Of random weights on the device, as train/main.py makes it from a checkpoint."""
        chosen = config.model
        with torch.device("meta"):  # the published initialisation takes longer than the measurements
            sizes = preset(
                chosen.preset, heads=config.loss.heads, head_chunk=chosen.head_chunk, recompute=chosen.recompute
            )
            model = VGGT(sizes)
        model.to_empty(device=self.device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        freeze(model, chosen.freeze)
        if chosen.aggregator_dtype == "bf16":
            hold_in_bf16(model.aggregator)
        if chosen.lora is not None:
            attach(model, chosen.lora)
        return model.to(self.device).train()

    def step(
        self, config: TrainConfig, scenes: int, views: int, height: int, model: VGGT | None = None
    ) -> Callable[[], None]:
        """A step of the trainer, from a batch in the host's memory: a function of no arguments."""
        raw = raw_noise(scenes, views, height, self.width)
        if not self.pretend:
            raw = {name: value.pin_memory() for name, value in raw.items()}
        model = model or self.model(config)
        optimizer = make_optimizer(model, config.optim)

        def step() -> None:
            batch = prepare(raw, self.device, with_points=config.loss.point > 0)
            train_step(model, optimizer, batch, config, self.world)

        return step

    def seconds(self, work: Callable[[], object]) -> float:
        """The fastest of some, after one to warm up."""
        work()
        times = []
        for _ in range(self.repeats):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - began)
        return min(times)

    def wait(self) -> None:
        if not self.pretend:
            torch.cuda.synchronize()

    def forget(self, parameters: Iterable[nn.Parameter] = ()) -> None:
        """Give memory back, also what is left of a step that failed, and count its peak from here."""
        for parameter in parameters:
            parameter.grad = None
        gc.collect()
        if not self.pretend:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def check_memory(self, error: RuntimeError) -> None:
        """Raises what is none of a lack of memory, which libraries say in their own words."""
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise error

    def peaks(self) -> Row:
        """Since the last `forget`: of what tensors took, and of what was held for them."""
        if self.pretend:
            return {"allocated_gb": None, "reserved_gb": None}
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gb": allocated / 1e9, "reserved_gb": reserved / 1e9}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((found.cpu() - expected.cpu()).abs().max() / expected.abs().max()).item()
