"""From a capture as people have it to a trained model and its evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import run_command, vggt_prep
from golden_figures import SHARED
from layout_writers import rendered, write_image
from runs import SCRATCH, metrics, run_trainer

import shards
from train.evaluation.points import umeyama

pytestmark = pytest.mark.slow

REAL = SHARED / "captures"
STEPS = 20


def train_and_evaluate(shard_dir, out):
    """Losses by step and split, and the metrics of the evaluation."""
    small = (f"data.shards={shard_dir}", "data.width=56", "data.views=[2, 3]", "max_img_per_gpu=6")
    looked = run_command("python", "-m", "train.check_data", *small, "--steps", 4, "--out", out / "look")
    assert looked.returncode == 0, looked.stdout + looked.stderr
    done = run_trainer(shard_dir, out / "run", *SCRATCH, f"max_steps={STEPS}", f"checkpoint.every={STEPS}")
    assert done.returncode == 0, done.stderr
    options = (
        "--shards",
        shard_dir,
        "--checkpoint",
        out / "run" / "checkpoints" / "latest",
        "--out",
        out / "eval",
        "--workers",
        0,
    )
    done = run_command("python", "-m", "train.evaluate", *options, "--views", 3, "--min-frames", 3)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((out / "eval" / "results.json").read_text())["checkpoints"].values()
    return metrics(out / "run"), found["metrics"]


def falls(lines):
    """Whether the training loss did: its mean over the last steps against that over the first."""
    losses = [values["loss_objective"] for (_, split), values in sorted(lines.items()) if split == "train"]
    assert len(losses) == STEPS
    return np.mean(losses[-5:]) < np.mean(losses[:5])


@pytest.mark.skipif(not REAL.exists(), reason="no real captures beside this checkout")
@pytest.mark.parametrize("name", ["sevenscenes", "nerfstudio", "tum", "colmap"])
def test_a_real_capture_is_packed_trained_on_and_evaluated(name, tmp_path):
    camera = ("--intrinsics", "585,585,320,240") if name == "tum" else ()
    done = vggt_prep("pack", REAL / name, "--out", tmp_path / "set", *camera)
    assert done.returncode == 0, done.stderr
    lines, found = train_and_evaluate(tmp_path / "set", tmp_path)
    assert falls(lines)
    assert np.isfinite([found[key]["mean"] for key in ("rotation_deg", "depth_abs_rel")]).all(), found


def test_what_colmap_makes_of_rendered_images_has_the_true_cameras_and_is_trained_on(tmp_path):
    """Features, matches and mapping by COLMAP itself, without a look at the truth."""
    import pycolmap

    project = tmp_path / "project"
    views = rendered(frames=60, seed=5)[:36]
    for i, view in enumerate(views):
        write_image(project / "images" / f"{i:03d}.png", view.image)
    pycolmap.set_random_seed(0)
    database = project / "database.db"
    pycolmap.extract_features(database, project / "images", camera_mode=pycolmap.CameraMode.SINGLE)
    pycolmap.match_exhaustive(database)
    (project / "sparse").mkdir()
    pycolmap.incremental_mapping(database, project / "images", project / "sparse")
    done = vggt_prep("pack", project, "--out", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "project: cameras and images fit" in done.stdout
    opened = shards.open(tmp_path / "set")
    assert len(opened.frames) == len(views)
    for sequence in opened.sequences:
        rows = opened.frames[int(sequence["first"]) : int(sequence["first"]) + int(sequence["count"])]
        truth = np.stack([views[int(name)].cam_from_world for name in rows["name"]])
        found = rows["extrinsics"]
        centers = [-np.einsum("nij,ni->nj", poses[:, :, :3], poses[:, :, 3]) for poses in (found, truth)]
        source, target = (torch.from_numpy(points)[None] for points in centers)
        scale, rotation, translation = umeyama(source, target, torch.ones(1, len(rows), dtype=torch.bool))
        moved = (scale[:, None, None] * source @ rotation.mT + translation[:, None])[0].numpy()
        extent = np.linalg.norm(np.ptp(centers[1], axis=0))
        assert np.linalg.norm(moved - centers[1], axis=1).max() < 0.01 * extent
        relative = [poses[:, :, :3] @ poses[0, :, :3].T for poses in (found, truth)]  # a world turned is no error
        turns = relative[0] @ relative[1].swapaxes(1, 2)
        degrees = np.degrees(np.arccos(np.clip((np.trace(turns, axis1=1, axis2=2) - 1) / 2, -1, 1)))
        assert degrees.max() < 1
    lines, found = train_and_evaluate(tmp_path / "set", tmp_path)
    assert falls(lines)
    assert np.isfinite([found[key]["mean"] for key in ("rotation_deg", "depth_abs_rel")]).all(), found
