"""A model at work on scenes of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from train.data.batches import ValidationSteps
from train.data.loader import NoDataError, next_batch, stream
from train.data.plan import DataState, Step
from train.data.split import Split
from train.objective.targets import Batch, prepare
from train.runtime.distributed import World
from train.runtime.precision import Precision, autocast
from train.runtime.stop import StopRequest

Metrics = dict[str, float]  # by name; NaN where a prediction or a loss is not finite


@torch.no_grad()
def predict(
    model: nn.Module,
    split: Split,
    steps: list[Step],
    precision: Precision,
    world: World,
    workers: int,
    with_points: bool = False,
    stop: StopRequest | None = None,
) -> Iterator[tuple[dict[str, Any], Batch, dict[str, Any]]]:
    """Each step's batch as loaded and as prepared, and the model's predictions for it.

    With `stop`, every rank must have equally many steps; once a signal asks one rank to stop, all end together.
    Raises NoDataError; with `stop`, on every rank.
    """
    steps = [replace(step, after=DataState(number + 1, ())) for number, step in enumerate(steps)]
    batches = stream(
        lambda last: ValidationSteps(split, steps[last.step if last else 0 :]),
        range(len(steps)),
        workers,
        pin_memory=world.device.type == "cuda",
    )
    for raw in batches if stop is None else _until_stopped(batches, len(steps), world, stop):
        batch = prepare(raw, world.device, with_points=with_points)
        with autocast(precision, world.device):
            predictions = model(batch["images"])
        yield raw, batch, predictions


def _until_stopped(
    batches: Iterator[dict[str, Any]], count: int, world: World, stop: StopRequest
) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        raw = next_batch(batches, stop)
        if world.any(not isinstance(raw, dict)):
            for problem in world.gather(raw if isinstance(raw, NoDataError) else None):
                if problem is not None:
                    raise problem
            return
        assert isinstance(raw, dict)
        yield raw


def scene_name(raw: dict[str, Any]) -> str:
    """category/sequence of the first scene of a loaded batch."""
    return raw["keys"][0][0].rpartition("/")[0]
