"""Validation: the same scenes in the same crops every time, so that two runs of it can be compared scene by scene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from train.config import Precision, TrainConfig
from train.distributed import World
from train.loader import NoDataError, Split, ValidationSteps, next_batch, sequence_name, stream
from train.losses import denominators, losses
from train.metrics import FIGURES, scene_figures
from train.pictures import SceneResult, scene_result
from train.plan import DataState, Step, validation_plan
from train.prepare import Batch, prepare
from train.step import autocast
from train.stop import StopRequest

PICTURED = 3  # scenes on the contact sheet

Figures = dict[str, float]  # by name; NaN where a prediction or a loss is not finite


@dataclass(frozen=True)
class Validation:
    """by_scene: the figures of each scene of all ranks, in the order of the plan; pictured: some of the main rank's."""

    names: list[str]
    by_scene: list[Figures]
    pictured: list[SceneResult]

    @property
    def means(self) -> Figures:
        """The mean of each figure over the scenes that have it."""
        found: dict[str, list[float]] = {}
        for figures in self.by_scene:
            for name, value in figures.items():
                found.setdefault(name, []).append(value)
        return {name: float(np.mean(values)) for name, values in found.items()}


def validate(
    model: nn.Module, split: Split, config: TrainConfig, world: World, workers: int, stop: StopRequest
) -> Validation | None:
    """The losses of training and all figures of train.metrics on the validation plan; None if it was asked to stop.

    Raises NoDataError on every rank if one has no data.
    """
    model.eval()
    steps, counted = validation_plan(config.data, split.lengths, world.rank, world.size)
    mine: list[tuple[str, Figures]] = []
    pictured: list[SceneResult] = []
    with_points = config.loss.point > 0
    done = 0
    for raw, batch, predictions in predict(model, split, steps, config.precision, world, workers, with_points, stop):
        done += 1
        if len(mine) >= counted:  # a repeated scene, for ranks that share a model take as many steps each
            continue
        name = sequence_name(split, steps[done - 1].scenes[0])
        usable = scene_name(raw) == name  # else the loader took another sequence, which may be validated on as well
        figures = scene_losses(predictions, batch, config) | scene_figures(predictions, batch) if usable else {}
        mine.append((name, figures))
        if usable and world.is_main and len(pictured) < PICTURED:
            pictured.append(scene_result(name, predictions, batch))
    model.train()
    if done < len(steps):  # the same on every rank
        return None
    by_rank = world.gather(mine)
    ordered = [by_rank[i % world.size][i // world.size] for i in range(sum(map(len, by_rank)))]
    return Validation([name for name, _ in ordered], [figures for _, figures in ordered], pictured)


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
    """Each step's batch as it was loaded and as it was prepared, and what the model makes of it.

    With `stop` every rank must have equally many steps: all end early together once a signal asks one of them to.
    Raises NoDataError, with `stop` on every rank.
    """
    steps = [replace(step, after=DataState(number + 1, ())) for number, step in enumerate(steps)]
    batches = stream(
        lambda last: ValidationSteps(split, steps[last.step if last else 0 :]),
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


def scene_losses(predictions: dict[str, Any], batch: Batch, config: TrainConfig) -> Figures:
    """The loss terms of one scene (a batch of one), without those of lengths if nothing is known of these."""
    terms = losses(predictions, batch, denominators(batch, config.loss), config.loss)
    found = {name: float(value) for name, value in terms.items()}
    if not batch["has_scale"][0]:  # a zero would pass for perfect
        found = {n: v for n, v in found.items() if n != "loss_T" and not n.endswith(("_depth", "_point"))}
    return found


def best_step(lines: list[dict[str, Any]], name: str) -> int | None:
    """The step of the best mean of a figure, the first of equals, among lines of validation.jsonl; None without any.

    Over the scenes that have it in all of them: one that cannot be read any more would change the mean.
    """
    sign = -1 if name in FIGURES and FIGURES[name].higher_is_better else 1
    found = []
    lines = [line for line in comparable(lines) if any(name in scene for scene in line["scenes"])]
    by_scene = zip(*(line["scenes"] for line in lines), strict=False)
    common = [all(name in scene for scene in same) for same in by_scene]
    for line in lines:
        values = [scene[name] for scene, in_all in zip(line["scenes"], common, strict=False) if in_all]
        if values and None not in values:  # None: not finite
            found.append((sign * float(np.mean(values)), line["step"]))
    return min(found)[1] if found else None


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those lines of validation.jsonl that are of the same scenes as the last: a resumed run may validate on others."""
    return [line for line in lines if line["plan"] == lines[-1]["plan"]]


def compared_plan(config: TrainConfig) -> dict[str, Any]:
    """What must be the same for two validations of a run to be of the same scenes."""
    data = asdict(config.data)
    return {key: data[key] for key in ("val_split", "val_scenes", "val_views", "val_aspect", "width")}
