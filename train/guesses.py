"""What one gets without looking at the images: the measure for whether a model has learned anything."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shards import ShardSet
from train.metrics import depth_figures, pose_figures, relative_errors
from train.plan import draw_frames
from train.prepare import Batch
from vggt.geometry import relative_pose

MAX_SEQUENCES = 500  # that the mean pose is taken of
SAME_CAMERA, MEAN_POSE, FLAT_DEPTH = GUESSES = ("guess: one camera for all", "guess: mean pose", "guess: flat depth")


def mean_relative_pose(shard_set: ShardSet, views: int) -> Tensor:
    """What two views drawn at random have between them on average, in the split to train on if there is one: [3, 4].

    The rotation nearest to the mean of the rotation matrices, and the axis that the translations lie along most, of
    length 1. float64.
    """
    rows = shard_set.sequences[shard_set.split("train" if "train" in shard_set.dataset["splits"] else "test")]
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_SEQUENCES)).round().astype(int))]
    rng = np.random.default_rng(0)
    rotations, ways = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    for row in rows:
        frames = int(row["first"]) + np.array(draw_frames(rng, "uniform", int(row["count"]), views))
        poses = torch.from_numpy(shard_set.frames["extrinsics"][frames])
        i, j = torch.triu_indices(views, views, offset=1)
        relative = relative_pose(poses[i], poses[j])
        rotations += relative[:, :, :3].mean(0)
        way = torch.nn.functional.normalize(relative[:, :, 3], dim=-1)
        ways += way.T @ way
    u, _, v = torch.linalg.svd(rotations)
    nearest = u @ torch.diag(torch.tensor([1, 1, float(torch.linalg.det(u @ v))]).double()) @ v
    axis = torch.linalg.eigh(ways).eigenvectors[:, -1:]
    return torch.cat([nearest, axis], dim=1)


def guess_figures(batch: Batch, mean_pose: Tensor) -> dict[str, dict[str, float]]:
    """The figures of each guess on a scene (a batch of one); those of depth only if there is some."""
    truth = batch["extrinsics"][0].double()
    i, j = torch.triu_indices(len(truth), len(truth), offset=1)
    relative = relative_pose(truth[i], truth[j])
    same = torch.eye(3, 4, dtype=torch.float64, device=truth.device)
    guesses = {SAME_CAMERA: same, MEAN_POSE: mean_pose.to(truth.device)}
    found = {name: pose_figures(*relative_errors(pose.expand_as(relative), relative)) for name, pose in guesses.items()}
    found[FLAT_DEPTH] = {}
    if batch["has_scale"][0]:
        found[FLAT_DEPTH] = depth_figures(torch.ones_like(batch["depth"]), batch["depth"], batch["mask"])
    return {name: {key: float(value) for key, value in figures.items()} for name, figures in found.items()}
