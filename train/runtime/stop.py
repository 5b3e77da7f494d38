"""Signals that ask a run to stop: the step at work is finished, the run saved, and only then it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
IMPATIENT = (signal.SIGTERM, signal.SIGINT)  # another one of these kills, if it comes later than
REPEATED = 3  # seconds: a scheduler signals all processes, torchrun passes its signal on, and each hears it twice


class Interrupted(BaseException):
    """A signal came while the run waited for data. No `except Exception` on the way may take it for an error."""


def _kill_if_asked_again(heard: int) -> None:
    """In a thread of its own, as the main one may hang where no handler of Python's runs."""
    first = None
    while number := os.read(heard, 1):
        if number[0] not in IMPATIENT:
            continue
        first = first or time.monotonic()
        if time.monotonic() - first > REPEATED:
            os.kill(os.getpid(), signal.SIGKILL)


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def listen(self) -> None:
        """Take note of signals from now on. Until then each kills as usual, as there is nothing to save.

        What is ignored stays so: under nohup a lost terminal must not stop a run.
        """
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._note)
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        Thread(target=_kill_if_asked_again, args=(heard,), daemon=True).start()

    def _note(self, *_: object) -> None:
        self.asked = True
        if self._waits:
            self._waits = False
            raise Interrupted

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once, and so does one that came before."""
        self._waits = True
        try:
            if self.asked:
                raise Interrupted
            yield
        finally:
            self._waits = False
