"""What the commands of vggt-prep share: errors in one line, paths, progress bars, sizes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

TELL_EVERY = 60  # seconds, in a log file
console = Console(highlight=False, markup=False, emoji=False)  # names are printed as they are


class Stopped(click.ClickException):
    exit_code = 130  # as shells expect it of a Ctrl-C

    def show(self, file: Any = None) -> None:
        click.echo(self.message, err=True)


@contextmanager
def plain_errors(stopped: str = "stopped") -> Iterator[None]:
    """For what a user can fix, print one line without a traceback; on a stop signal, the line `stopped`."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(stopped) from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    except BrokenProcessPool as error:
        raise click.ClickException("a worker process died, perhaps for lack of memory: try fewer --workers") from error


class LocalPath(click.Path):
    """A path on this machine; a URL, which it would take for a folder called `s3:`, is an error."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"{value}: expected a place on this machine; sets can be copied elsewhere and read there")
        return super().convert(os.path.expanduser(value), param, ctx)


class Fraction(click.FloatRange):
    """A number from 0 to 1. Click lets NaN pass, which is neither below nor above a limit."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(0, 1, **limits)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        fraction = super().convert(value, param, ctx)
        return fraction if fraction == fraction else self.fail(f"{value} is not a number", param, ctx)


@contextmanager
def progress_bar(unit: str, *columns: str) -> Iterator[Progress]:
    """A progress bar that appears when it is started, and stops at the end, even after an error.

    Where there is no terminal, it is a line now and then.
    """
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600,  # a shard may take a minute
    )
    ended = Event()
    teller = Thread(target=_tell, args=(bar, unit, ended), daemon=True)
    if not console.is_terminal:
        teller.start()
    try:
        yield bar
    finally:
        ended.set()
        bar.stop()


def _tell(bar: Progress, unit: str, ended: Event) -> None:
    while not ended.wait(TELL_EVERY):
        for task in bar.tasks:
            console.print(f"{task.description}: {task.completed:,.0f} of {task.total or 0:,.0f} {unit}")


def start(bar: Progress, description: str, total: int, **fields: Any) -> TaskID:
    bar.start()
    return bar.add_task(description, total=total, **fields)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def size_text(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


class PinholeNumbers(click.ParamType):
    """fx,fy,cx,cy."""

    name = "fx,fy,cx,cy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            fx, fy, cx, cy = map(float, value.split(","))
        except ValueError:
            self.fail(f"expected four numbers such as 585,585,320,240, found {value}", param, ctx)
        return fx, fy, cx, cy


workers_option = click.option(
    "--workers",
    type=click.IntRange(1),
    default=len(os.sched_getaffinity(0)),
    show_default="all cores",
    help="Processes.",
)
