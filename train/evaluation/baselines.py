"""Baselines that do not look at the images: a model that has learned anything is better than these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shards import ShardSet
from train.data.views import draw_frames
from train.evaluation.depths import depth_metrics
from train.evaluation.poses import pose_metrics, relative_errors
from train.objective.targets import Batch
from vggt.geometry import relative_pose

MAX_SEQUENCES = 500  # that the mean pose is taken of
SAME_CAMERA, MEAN_POSE, FLAT_DEPTH = BASELINES = (
    "baseline: one camera for all",
    "baseline: mean pose",
    "baseline: flat depth",
)


def mean_relative_pose(shard_sets: Sequence[ShardSet], views: int) -> Tensor:
    """The average pose of one random view relative to another, in each set's train split if it has one: [3, 4].

    The rotation nearest to the mean of the rotation matrices, and the axis that the translations lie along most, of
    length 1. float64.
    """
    rng = np.random.default_rng(0)
    rotations, directions = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    i, j = torch.triu_indices(views, views, offset=1)
    for shard_set in shard_sets:
        rows = shard_set.sequences[shard_set.split("train" if "train" in shard_set.dataset["splits"] else "test")]
        most = MAX_SEQUENCES // len(shard_sets)
        for row in rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int))]:
            frames = int(row["first"]) + np.array(draw_frames(rng, "uniform", int(row["count"]), views))
            poses = torch.from_numpy(shard_set.frames["extrinsics"][frames])
            relative = relative_pose(poses[i], poses[j])
            rotations += relative[:, :, :3].mean(0)
            direction = torch.nn.functional.normalize(relative[:, :, 3], dim=-1)
            directions += direction.T @ direction
    u, _, v = torch.linalg.svd(rotations)
    nearest = u @ torch.diag(torch.tensor([1, 1, float(torch.linalg.det(u @ v))]).double()) @ v
    axis = torch.linalg.eigh(directions).eigenvectors[:, -1:]
    return torch.cat([nearest, axis], dim=1)


def baseline_metrics(batch: Batch, mean_pose: Tensor) -> dict[str, dict[str, float]]:
    """The metrics of each baseline on a scene (a batch of one); those of depth only if there is some."""
    truth = batch["extrinsics"][0].double()
    i, j = torch.triu_indices(len(truth), len(truth), offset=1)
    relative = relative_pose(truth[i], truth[j])
    same = torch.eye(3, 4, dtype=torch.float64, device=truth.device)
    baselines = {SAME_CAMERA: same, MEAN_POSE: mean_pose.to(truth.device)}
    found = {
        name: pose_metrics(*relative_errors(pose.expand_as(relative), relative)) for name, pose in baselines.items()
    }
    found[FLAT_DEPTH] = {}
    if batch["has_scale"][0]:
        found[FLAT_DEPTH] = depth_metrics(torch.ones_like(batch["depth"]), batch["depth"], batch["mask"])
    return {name: {key: float(value) for key, value in metrics.items()} for name, metrics in found.items()}
