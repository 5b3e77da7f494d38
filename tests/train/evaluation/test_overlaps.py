"""Errors of cameras by how much two views see of each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import run_command, vggt_prep
from evaluations import OPTIONS, evaluate_here
from runs import SMALL

import shards
from shards.overlap import stored_view, views_of
from train.data.plan import DataState, Scene, Step, StepShape
from train.data.scenes import load_step
from train.data.split import Split
from train.evaluation.overlaps import EDGES, errors_by_pair, metrics_by_overlap
from train.evaluation.protocol import Protocol, choose
from train.objective.targets import prepare
from vggt.geometry import encode_pose


@pytest.fixture(scope="module")
def batch(shard_dir):
    split = Split([shards.open(shard_dir)], "train")
    step = Step(StepShape(5, 98, 126), (Scene(0, 0, (0, 3, 8, 15, 23), None),), DataState(0, ()))
    return prepare(load_step(split, step), torch.device("cpu"), with_points=False)


def predicted(batch, turned=0.0):
    """The true cameras, but for the second, which is turned by so many degrees."""
    extrinsics = batch["extrinsics"].clone().double()
    angle = torch.tensor(np.radians(turned))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])
    extrinsics[:, 1] = turn.double() @ extrinsics[:, 1]
    return {"pose_enc": encode_pose(extrinsics, batch["intrinsics"].double(), *batch["images"].shape[-2:])}


def test_each_pair_has_the_overlap_of_its_frames_and_its_own_errors(batch, shard_dir):
    pairs = np.array(errors_by_pair(predicted(batch, turned=20), batch))
    assert len(pairs) == 10
    touched = np.array([1 in pair for pair in zip(*np.triu_indices(5, 1), strict=True)])
    assert pairs[touched, 1] == pytest.approx(20, abs=0.1)
    assert pairs[~touched, 1] == pytest.approx(0, abs=0.1)
    opened = shards.open(shard_dir)
    first = int(opened.sequences["first"][opened.split("train")[0]])
    stored = views_of(stored_view(opened, first + i) for i in (0, 3, 8, 15, 23))
    whole = stored.overlaps(np.stack(np.triu_indices(5, 1), axis=1))  # these are not cropped
    assert np.corrcoef(pairs[:, 0], whole)[0, 1] > 0.95


def test_without_depth_or_cameras_there_is_nothing_to_bin(batch):
    assert errors_by_pair({}, batch) == []
    mask = batch["mask"].clone()
    mask[:, 2] = False  # of one view: the pairs of the others are left
    assert len(errors_by_pair(predicted(batch), batch | {"mask": mask})) == 6
    lost = predicted(batch)
    lost["pose_enc"][:, 1] = torch.nan
    assert sum(pair[1:] == (180.0, 90.0) for pair in errors_by_pair(lost, batch)) == 4  # the worst there is


def test_bins_are_means_over_scenes_and_hold_every_pair_once():
    far, near = (0.05, 40.0, 10.0), (1.0, 2.0, 1.0)
    scenes = [[far, far, near], [near, (0.6, 4.0, 50.0)], [], []]
    bins = metrics_by_overlap(scenes, ["a", "a", "b", "b"])
    assert [tuple(b["overlap"]) for b in bins] == [(0.0, 0.1), (0.5, 0.75), (0.75, 1.0)]
    assert [b["pairs"] for b in bins] == [2, 1, 2]
    assert [b["metrics"]["rotation_deg"]["mean"] for b in bins] == [40.0, 4.0, 2.0]
    assert bins[0]["metrics"]["auc_30"]["mean"] == 0
    assert bins[2]["metrics"]["rotation_deg"]["scenes"] == 2
    assert EDGES[0] == 0
    assert EDGES[-1] == 1


def test_an_evaluation_says_it_in_its_table_results_and_page(shard_dir, exported, tmp_path, capsys):
    results = evaluate_here(shard_dir, exported, tmp_path, *OPTIONS, "--views-from", "overlap")
    (bins,) = results["by_overlap"].values()
    assert sum(b["pairs"] for b in bins) == 7 * 6
    assert results["protocol"]["views_from"] == "overlap"
    said = capsys.readouterr().out
    assert "4 frames that see some of the same of each" in said
    assert "overlap of two views" in said
    assert "views_from overlap instead of uniform" in said
    assert "pose AUC@30 by the overlap of two views" in (tmp_path / "report.html").read_text()


def test_views_drawn_by_overlap_see_more_of_each_other(captures, tmp_path):
    """On walks where views at random rarely meet."""
    done = vggt_prep(
        "synth", "--out", tmp_path / "c", "--family", "corridor", "--scenes", 8, "--frames", 40, "--short-side", 60
    )
    assert done.returncode == 0, done.stderr
    source = ("--co3d-dir", tmp_path / "c" / "co3d", "--annotation-dir", tmp_path / "c" / "annotations")
    vggt_prep("pack", *source, "--out", tmp_path / "set")
    opened = shards.open(tmp_path / "set")
    means = {}
    for views_from in ("uniform", "overlap"):
        values = []
        for chosen in choose([opened], Protocol(split="train", min_frames=40, views=4, views_from=views_from)):
            scene = chosen.step.scenes[0]
            first = int(opened.sequences["first"][opened.split("train")[scene.sequence]])
            views = views_of(stored_view(opened, first + frame) for frame in scene.frames)
            values.append(views.overlaps(np.stack(np.triu_indices(4, 1), axis=1)))
        means[views_from] = np.mean(values)
    assert means["overlap"] > 2 * means["uniform"]


def test_a_run_by_overlap_says_what_it_draws_and_is_resumed_with_the_same_settings_only(shard_dir, tmp_path):
    def run(steps, *settings):
        command = (
            "train/main.py",
            f"data.shards={shard_dir}",
            f"out_dir={tmp_path / 'run'}",
            *SMALL,
            "model.freeze=[]",
        )
        drawn = (
            "data.sampling=overlap",
            "data.overlap=[0.2, 0.3]",
            "data.views=[1, 3]",
            "data.view_weights={1: 0.5, 2: 0.2}",
        )
        return run_command("python", *command, *drawn, f"max_steps={steps}", *settings)

    done = run(1)
    assert done.returncode == 0, done.stderr
    assert "of the frames have no other with an overlap of 0.2 to 0.3, and get what comes nearest; 0.0%" in done.stdout
    done = run(2)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    refused = run(3, "data.view_weights={1: 0.5}")
    assert "was trained with data.view_weights={1: 0.5, 2: 0.2}, now it is data.view_weights={1: 0.5}" in refused.stderr
