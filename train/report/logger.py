"""What people see of a run: one progress line (plain lines without a terminal), metrics.jsonl, TensorBoard."""

from __future__ import annotations

import errno
import logging
import math
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards.writer import cannot_write, set_aside
from train.evaluation.history import VALIDATION_FILE
from train.report.pictures import SHEET_FILE
from train.runtime.jsonl import append_line, drop_after, finite_or_none

METRICS_FILE = "metrics.jsonl"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would end the process, and what was trained would not be saved."""
        raise BrokenPipeError(errno.EPIPE, "nobody reads what is printed")


class Reporter:
    """Writes on the main rank, and does nothing on the others. A context manager."""

    def __init__(self, out_dir: Path, *, is_main: bool, first_step: int, total_steps: int, resumed: bool) -> None:
        self.is_main, self.out_dir = is_main, out_dir
        self.console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=not is_main)
        self.live = is_main and sys.stdout.isatty()
        handler = RichHandler(console=Console(stderr=True), show_path=False) if self.live else logging.StreamHandler()
        logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
        if not is_main:
            return
        for name in (METRICS_FILE, VALIDATION_FILE) if resumed else ():
            drop_after(out_dir / name, first_step)
        for name in (METRICS_FILE, VALIDATION_FILE, SHEET_FILE) if not resumed else ():
            if set_aside(out_dir / name):
                self.say(f"{out_dir / name}: what was there is kept beside it, under a number")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # protobuf's, on import
            from torch.utils.tensorboard import SummaryWriter
        threading.excepthook = _tell_of_thread
        # The step that a run resumes at is done; what comes after it is logged again.
        self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=first_step + resumed)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, text="")
        self._total = total_steps

    def __enter__(self) -> Reporter:
        if self.is_main:
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_main:
            with self._terminal():
                self._progress.stop()
            with self._board_errors():
                self._board.close()

    def say(self, text: str) -> None:
        """A line for people."""
        with self._terminal():
            self.console.print(text)

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """A run outlives the terminal, or the pipe, that it prints to: then it prints nowhere."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                return  # such as a full disk, which may have room for the next line
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)

    def scalars(self, step: int, split: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, and a TensorBoard point for each value."""
        if not self.is_main:
            return
        append_line(self.out_dir / METRICS_FILE, {"step": step, "split": split} | finite_or_none(values))
        with self._board_errors():
            for name, value in values.items():
                if math.isfinite(value):
                    self._board.add_scalar(f"{split}/{name}", value, step)

    def trained(self, step: int, split: str, values: dict[str, float]) -> None:
        """The means of some steps, up to `step`."""
        self.scalars(step, split, values)
        self.progress(step, values)

    def skipped(self, step: int, in_a_row: int, keys: list[str]) -> None:
        """A step that did not count; keys: of its scenes."""
        self.scalars(step, "skipped", {"skipped": in_a_row})
        self.say(f"step {step}: skipped on all ranks, as a loss or gradient is not finite; scenes: {keys}")

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        if self.is_main:
            with self._board_errors():
                self._board.add_image(name, image, step, dataformats="HWC")

    @contextmanager
    def _board_errors(self) -> Iterator[None]:
        """TensorBoard writes in a thread: what goes wrong there is raised by the next call, without a name."""
        try:
            yield
        except OSError as error:
            raise cannot_write(self.out_dir / "tensorboard", error) from error

    def progress(self, step: int, values: dict[str, float]) -> None:
        """The training line after `step` steps."""
        if not self.is_main:
            return
        terms = " ".join(f"{k.removeprefix('loss_')} {v:.3f}" for k, v in values.items() if k.startswith("loss_"))
        text = f"{terms} | {values['images_per_s']:.1f} images/s, waiting for data {values['data_wait']:.0%}"
        text += f", {values['memory_gb']:.1f} GB"
        self._progress.update(self._task, completed=step, text=text)
        if not self.live:
            self.say(f"step {step}/{self._total} {text}")


def _tell_of_thread(error: threading.ExceptHookArgs) -> None:
    """Python's own traceback, but not of TensorBoard's thread, whose error comes back from its next call."""
    if not type(error.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(error)
