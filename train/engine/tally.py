"""What a run counts while it trains: what the next log line averages over, damaged frames, skipped steps."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch

from train.engine.settings import TrainConfig
from train.engine.step import StepOutcome
from train.objective.losses import needs_scale
from train.report.words import describe_damage
from train.runtime.distributed import World

MIN_TRIED = 200  # frames, before a fraction of bad ones means anything


class Window:
    """Sums of what a log line averages over."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.scaled = torch.zeros(())  # steps whose terms of lengths count
        self.steps, self.images, self.waited, self.seconds = 0, 0, 0.0, 0.0

    def add(self, outcome: StepOutcome, images: int, began: float, waited: float) -> None:
        for name, value in (outcome.terms | {f"grad_norm_{k}": v for k, v in outcome.norms.items()}).items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.scaled = outcome.has_scale + self.scaled
        self.steps, self.images = self.steps + 1, self.images + images
        self.waited, self.seconds = self.waited + waited, self.seconds + time.perf_counter() - began

    def take_means(self, world: World) -> dict[str, float]:
        """The means over the steps and over the ranks; the next ones are of what comes after.

        Terms of lengths are means where a scene had a defined scale, and left out where none had; in the objective and
        other sums of terms they are 0 there.
        """
        values = torch.stack(list(self.sums.values())).double()
        steps = torch.full_like(self.scaled, self.steps)
        counts = torch.stack([self.scaled if needs_scale(name) else steps for name in self.sums])
        sums, counts = world.sum(torch.stack([values, counts])).tolist()
        rates = {"images_per_s": self.images * world.size / self.seconds, "data_wait": self.waited / self.seconds}
        means = zip(self.sums, sums, counts, strict=True)
        found = {name: value / count for name, value, count in means if count} | rates
        self._clear()
        return found


class Tally:
    """Damaged frames and skipped steps since a process began; each raises ValueError when it is too much."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.bad = self.tried = self.skipped = 0
        self.damaged: Counter[str] = Counter()  # frames of this rank, by file

    def count_damage(self, raw: dict[str, Any], outcome: StepOutcome) -> None:
        """raw: the batch of this rank; the outcome counts those of all."""
        self.damaged.update(raw["bad"])
        self.bad, self.tried = self.bad + outcome.bad, self.tried + outcome.tried
        if self.tried >= MIN_TRIED and self.bad > self.config.data.max_bad * self.tried:
            raise ValueError(
                f"{self.bad} of {self.tried} frames read are damaged, more than data.max_bad="
                f"{self.config.data.max_bad:g}: {self.files}; copy these again, or pack again"
            )

    @property
    def files(self) -> str:
        """Those that hold damaged frames, on any rank; all ranks must ask."""
        return describe_damage(self.world.gather(self.damaged))

    def count_skipped(self, finite: bool) -> None:
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped > self.config.max_skipped:
            raise ValueError(
                f"{self.skipped} steps in a row were not finite (max_skipped={self.config.max_skipped}): lower "
                "optim.lr, or look at the scenes listed above"
            )
