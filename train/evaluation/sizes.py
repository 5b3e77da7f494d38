"""How large a model takes a scene for: the ratio of predicted to true lengths, before any alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shards import ShardSet
from train.evaluation.bootstrap import MIN_SCENES, is_finite
from train.evaluation.depths import depth_scale
from train.objective.targets import Batch

SIZE = "size_ratio"  # beside the metrics of a scene


def size_ratio(predictions: Mapping[str, Any], batch: Batch) -> dict[str, float]:
    """Of a batch of one: median of predicted over median of true depths, the true ones in the units of the shard set.

    Empty without a depth head or true depth.
    """
    if "depth" not in predictions or not bool(batch["has_scale"][0]):
        return {}
    aligns = depth_scale(predictions["depth"][..., 0].float(), batch["depth"], batch["mask"], "scene").flatten()[0]
    return {SIZE: float(1 / (aligns * batch["scale"][0]))}


def is_metric(shard_set: ShardSet, sequence: str) -> bool:
    """Whether the lengths of a sequence are known to be meters."""
    captures = (shard_set.dataset.get("source") or {}).get("captures") or {}
    return captures.get(sequence, {}).get("metric") is True


def summarize_sizes(by_scene: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """How many scenes, the median of their ratios, and the factor (spread) that two thirds are within; None: too few.

    A model that knows meters has a median of 1; one that knows sizes up to one factor for all scenes a spread of 1.
    """
    logs = np.log([scene[SIZE] for scene in by_scene if is_finite(scene.get(SIZE)) and scene[SIZE] > 0])
    if len(logs) < MIN_SCENES:
        return None
    return {"scenes": len(logs), "median": float(np.exp(np.median(logs))), "spread": float(np.exp(logs.std(ddof=1)))}
