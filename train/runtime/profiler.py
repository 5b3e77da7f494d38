"""Where the time of a step goes: its parts by name, and a trace of everything that it launches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

WARM_UP = 3  # steps that are not like the others: memory is taken, kernels are chosen
FOLDER, TRACE_FILE, TABLE_FILE = "profile", "trace.json.gz", "table.txt"
STEP, OTHER = "the whole step", "everything else"
VIEWER = "https://ui.perfetto.dev"

Moment = Any  # seconds or, on a GPU, an event

_active: StepProfiler | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of a step, which a profiler at work shows under this name. Parts do not overlap."""
    if _active is None:
        yield
        return
    with record_function(name):
        began = _active.now()
        yield
        _active.add(name, began)


class StepProfiler:
    """Times the parts of `steps` steps, and traces one more after them. For one process, and its device.

    model: whose modules make the parts of its forward pass.
    """

    def __init__(self, steps: int, model: nn.Module, device: torch.device, out_dir: Path) -> None:
        self.model, self.device, self.folder = model, device, out_dir / FOLDER
        self.timed = range(WARM_UP, WARM_UP + steps)
        self.traced = self.timed.stop if steps else None  # this one
        self.began = 0  # steps
        self.moments: list[tuple[str, Moment, Moment]] = []
        self.hooks: list[RemovableHandle] = []
        self.trace: profile | None = None
        self.reported = steps == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Surrounds each step."""
        global _active
        number, self.began = self.began, self.began + 1
        if number not in self.timed and number != self.traced:
            yield
            return
        if not self.hooks:
            self.hooks = [hook for name, module in self.model.named_children() for hook in _hooks(name, module)]
        if number == self.traced:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # what it logs is for those who work on it
            on_gpu = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self.trace = profile(activities=[ProfilerActivity.CPU, *on_gpu])
        _active = self
        try:
            with self.trace or nullcontext(), part(STEP):
                yield
        finally:
            _active = None

    def now(self) -> Moment:
        """On a GPU when it gets there, as it works behind the process that tells it what to do."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, name: str, began: Moment) -> None:
        if self.trace is None:  # which makes everything slower
            self.moments.append((name, began, self.now()))

    @property
    def needs(self) -> int:
        """Steps, from its first to its last."""
        return 0 if self.traced is None else self.traced + 1

    def report(self, *, ended: bool = False) -> str | None:
        """Write what there is, once it is complete or the run has ended, and say what it is; None: nothing to say."""
        complete, timed = self.began >= self.needs, self.began >= self.timed.stop
        if self.reported or not timed or not (complete or ended):
            return None
        self.reported = True
        for hook in self.hooks:
            hook.remove()
        table, words = self._table(), f"the table is in {self.folder / TABLE_FILE}"
        try:
            self.folder.mkdir(exist_ok=True)
            (self.folder / TABLE_FILE).write_text(f"{table}\n")
            if complete and self.trace is not None:
                self.trace.export_chrome_trace(str(self.folder / TRACE_FILE))
                words += f", and a trace of one more step in {TRACE_FILE} beside it: open that at {VIEWER}"
        except OSError as error:  # nothing to lose a run for
            words = f"{self.folder}: cannot be written ({error.strerror})"
        return f"{table}\n{words}"

    def _table(self) -> str:
        """Seconds of each part of a step, on average, and its share."""
        seconds: dict[str, float] = {}
        for name, began, ended in self.moments:
            seconds[name] = seconds.get(name, 0) + _between(began, ended) / len(self.timed)
        whole = seconds.pop(STEP)
        seconds[OTHER] = whole - sum(seconds.values())
        clock = " by the clock of the GPU" if self.device.type == "cuda" else ""
        lines = [f"profile: a step takes {whole:.3f} s{clock}, on average over {len(self.timed)}; of these"]
        return "\n".join(lines + [f"  {name:28} {took:8.4f} s {took / whole:5.0%}" for name, took in seconds.items()])


def _hooks(name: str, module: nn.Module) -> list[RemovableHandle]:
    """Make a part of each pass through a module."""
    entered = ExitStack()
    title = f"{name.replace('_', ' ')}, forward"
    return [
        module.register_forward_pre_hook(lambda *_: entered.enter_context(part(title))),
        module.register_forward_hook(lambda *_: entered.close()),
    ]


def _between(began: Moment, ended: Moment) -> float:
    """Seconds."""
    if isinstance(began, torch.cuda.Event):
        ended.synchronize()
        return began.elapsed_time(ended) / 1000
    return ended - began
