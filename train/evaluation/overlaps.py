"""Errors of cameras by how much two views see of each other: do they fail at wide baselines, or everywhere?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from shards.overlap import View, views_of
from train.evaluation.bootstrap import estimate
from train.evaluation.poses import pair_errors, pose_metrics
from train.objective.targets import Batch
from vggt.geometry import decode_pose

EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of the bins
BINNED = ("auc_30", "rotation_deg")

WORST = (180.0, 90.0)  # degrees: of rotation and direction
PairErrors = list[tuple[float, float, float]]  # overlap, and errors of rotation and direction in degrees


def errors_by_pair(predictions: dict[str, Any], batch: Batch) -> PairErrors:
    """Of the pairs of views with depth of a batch of one scene; an error that is not finite counts as the largest.

    Empty without a camera head.
    """
    if "pose_enc" not in predictions or batch["images"].shape[1] < 2:
        return []
    height, width = batch["images"].shape[-2:]
    extrinsics, _ = decode_pose(predictions["pose_enc"].double(), height, width)
    errors = [x[0].cpu().numpy() for x in pair_errors(extrinsics, batch["extrinsics"].double())]
    depths = (batch["depth"] * batch["mask"])[0].cpu().numpy()
    truth = (batch[name][0].double().cpu().numpy() for name in ("extrinsics", "intrinsics"))
    views = views_of(View(depth, (height, width), *camera) for depth, *camera in zip(depths, *truth, strict=True))
    pairs = np.stack(np.triu_indices(len(depths), 1), axis=1)
    values = np.stack(
        [views.overlaps(pairs), *(np.nan_to_num(x, nan=y) for x, y in zip(errors, WORST, strict=True))], axis=1
    )
    return [(o, r, t) for o, r, t in values[views.has_depth[pairs].all(axis=1)].tolist()]


def metrics_by_overlap(scenes: Sequence[PairErrors], categories: Sequence[str]) -> list[dict[str, Any]]:
    """For each bin that some pairs fall into: its ends, how many pairs, and BINNED as means over scenes.

    categories: of each scene; means are means over categories.
    """
    usable = [(np.array(pairs), category) for pairs, category in zip(scenes, categories, strict=True) if pairs]
    bins = []
    for low, high in pairwise(EDGES):
        parts, groups, count = [], [], 0
        for pairs, category in usable:
            inside = (pairs[:, 0] >= low) & ((pairs[:, 0] < high) | (high == EDGES[-1]))
            count += int(inside.sum())
            if inside.any():
                parts.append(pose_metrics(*torch.from_numpy(pairs[inside, 1:].T)))
                groups.append(category)
        if parts:
            found = {name: asdict(estimate([float(part[name]) for part in parts], groups)) for name in BINNED}
            bins.append({"overlap": [low, high], "pairs": count, "metrics": found})
    return bins
