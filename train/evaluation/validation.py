"""Validation: the same scenes in the same crops every time, so that two of them can be compared scene by scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from train.data.plan import DataConfig, validation_plan
from train.data.split import Split, StoredNeighbors, sequence_name
from train.evaluation.history import compared_plan
from train.evaluation.metrics import scene_metrics
from train.evaluation.predict import Metrics, predict, scene_name
from train.evaluation.scene_result import SceneResult, scene_result
from train.objective.losses import LossConfig, losses, needs_scale, normalizer_of
from train.objective.targets import Batch
from train.runtime.distributed import World
from train.runtime.precision import Precision
from train.runtime.stop import StopRequest

PICTURED = 3  # scenes on the contact sheet


@dataclass(frozen=True)
class Validation:
    """The metrics of each scene of all ranks, in the order of the plan; pictured: some scenes of the main rank.

    sources: the shard set of each scene, by its place in the split.
    """

    names: list[str]
    sources: list[int]
    by_scene: list[Metrics]
    pictured: list[SceneResult]

    @property
    def unreadable(self) -> list[str]:
        """The scenes that have no metrics: other views than at other times would be compared."""
        return [name for name, metrics in zip(self.names, self.by_scene, strict=True) if not metrics]

    def means(self, source: int | None = None) -> Metrics:
        """The mean of each metric over the scenes that have it, all or those of one shard set."""
        values: dict[str, list[float]] = {}
        for number, metrics in zip(self.sources, self.by_scene, strict=True):
            for name, value in metrics.items() if source in (None, number) else ():
                values.setdefault(name, []).append(value)
        return {name: float(np.mean(of_scenes)) for name, of_scenes in values.items()}


@dataclass(frozen=True, kw_only=True)
class Validator:
    """What a run validates on, and how."""

    split: Split
    neighbors: tuple[StoredNeighbors | None, ...]
    data: DataConfig
    loss: LossConfig
    precision: Precision
    world: World
    workers: int
    stop: StopRequest

    @property
    def names(self) -> list[str]:
        """The scenes of a validation, of all ranks."""
        return scene_names(self.split, self.data)

    @property
    def compared(self) -> dict[str, Any]:
        """What another validation must have in common with this one's to be of the same scenes."""
        pairs = [stored and stored.shard_set.pairs_digest for stored in self.neighbors]
        return compared_plan(self.data, [shard_set.digest for shard_set in self.split.shard_sets], pairs)

    def validate(self, model: nn.Module) -> Validation | None:
        """The losses of training and all metrics on the validation plan; None if a signal asked to stop.

        Raises NoDataError on every rank if one has no data.
        """
        model.eval()
        world = self.world
        steps, counted = validation_plan(self.data, self.split.lengths, world.rank, world.size, self.neighbors)
        mine: list[tuple[str, int, Metrics]] = []
        pictured: list[SceneResult] = []
        done = 0
        with_points = self.loss.point > 0
        for raw, batch, predictions in predict(
            model, self.split, steps, self.precision, world, self.workers, with_points, self.stop
        ):
            scene = steps[done].scenes[0]
            done += 1
            if len(mine) >= counted:  # a repeated scene, for ranks that share a model take equally many steps
                continue
            name = sequence_name(self.split, scene)
            usable = scene_name(raw) == name and not any(raw["bad"].values())  # else other views took their place
            metrics = scene_losses(predictions, batch, self.loss) | scene_metrics(predictions, batch) if usable else {}
            mine.append((name, scene.source, metrics))
            if usable and world.is_main and len(pictured) < PICTURED:
                pictured.append(scene_result(name, predictions, batch))
        model.train()
        if done < len(steps):  # the same on every rank
            return None
        by_rank = world.gather(mine)
        ordered = [by_rank[i % world.size][i // world.size] for i in range(sum(map(len, by_rank)))]
        names, sources, by_scene = map(list, zip(*ordered, strict=True))
        return Validation(names, sources, by_scene, pictured)


def scene_names(split: Split, data: DataConfig) -> list[str]:
    """The scenes that the validation plan is of, in its order."""
    steps, _ = validation_plan(data, split.lengths, rank=0, world_size=1)
    return [sequence_name(split, step.scenes[0]) for step in steps]


def scene_losses(predictions: dict[str, Any], batch: Batch, config: LossConfig) -> Metrics:
    """The loss terms of one scene (a batch of one), without those of lengths if its scale is not known."""
    terms = losses(predictions, batch, normalizer_of(batch, config), config)
    values = {name: float(value) for name, value in terms.items()}
    if not batch["has_scale"][0]:
        values = {name: value for name, value in values.items() if not needs_scale(name)}
    return values
