"""python -m train.evaluate: the protocol, its figures, and what is said when something is not as it should be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import BIN, run_command, vggt_prep
from evaluations import OPTIONS, changed, evaluate_here
from layout_writers import WRITERS, rendered
from runs import LOCAL, SCRATCH, run_trainer
from scipy.spatial.transform import Rotation

import shards
from train import evaluate
from train.data.views import draw_frames
from train.engine.folder import run_of
from train.evaluation.baselines import BASELINES, baseline_metrics, mean_relative_pose
from train.evaluation.evaluator import pick
from train.evaluation.metrics import METRICS
from train.evaluation.protocol import FAST_SEQUENCES, Protocol, choose
from train.evaluation.results import Evaluation


@pytest.fixture(scope="module")
def results(shard_dir, exported, tmp_path_factory):
    return evaluate_here(shard_dir, exported, tmp_path_factory.mktemp("evaluation"))


def test_figures_of_all_scenes_are_means_over_categories(results, exported):
    label = str(exported)
    scenes = results["scenes"]
    assert len(scenes) == 7
    for name, found in results["checkpoints"][label]["metrics"].items():
        by_category = {}
        for scene in scenes:
            by_category.setdefault(scene["scene"].split("/")[0], []).append(scene["metrics"][label][name])
        assert found["mean"] == pytest.approx(np.mean([np.mean(v) for v in by_category.values()])), name
        assert found["low"] <= found["mean"] <= found["high"]
    assert set(results["checkpoints"][label]["metrics"]) == set(METRICS)


@pytest.mark.dist
def test_torchrun_gives_the_numbers_of_one_process(results, shard_dir, exported, tmp_path):
    command = [BIN / "torchrun", *LOCAL, "--nproc_per_node=2", "-m", "train.evaluate"]
    options = ("--shards", shard_dir, "--checkpoint", exported, "--out", tmp_path, "--workers", "1", *OPTIONS)
    done = run_command(command[0].name, *command[1:], *options, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    label = str(exported)
    assert found["scenes"][3]["frames"] == results["scenes"][3]["frames"]
    for name, expected in results["checkpoints"][label]["metrics"].items():
        for part in ("mean", "low", "high"):
            assert found["checkpoints"][label]["metrics"][name][part] == pytest.approx(expected[part], abs=1e-4), name


@pytest.mark.parametrize("name", ["results.json", "report.html"])
def test_files_of_the_users_own_are_not_replaced(shard_dir, exported, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(SystemExit):
        evaluate_here(shard_dir, exported, tmp_path)
    assert "is of no evaluation; give another --out" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.slow
def test_trained_beats_untrained_side_by_side_with_intervals(shard_dir, tmp_path, capsys):
    done = run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=30", "checkpoint.every=29", "val_every=15")
    assert done.returncode == 0, done.stderr
    first, last = (tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt" for step in (29, 30))
    untrained = tmp_path / "untrained.pt"
    saved = torch.load(last, weights_only=True)
    for value in saved["model"].values():
        value.copy_(torch.randn_like(value) * 0.02)
    torch.save({key: saved[key] for key in ("model", "model_config")}, untrained)
    found = evaluate_here(shard_dir, [untrained, last], tmp_path / "out", *OPTIONS[:-2])
    assert found["protocol"]["width"] == 56  # as the run was trained, though the first says nothing of one
    comparison = next(c for c in found["comparisons"] if c["metric"] == "depth_abs_rel")
    assert comparison["gain"] == 1
    change = comparison["change"]
    assert change["low"] < change["mean"] < change["high"] < 0
    one, other = (found["checkpoints"][str(path)]["metrics"]["depth_abs_rel"]["mean"] for path in (untrained, last))
    assert comparison["means"] == [pytest.approx(one), pytest.approx(other)]
    said = capsys.readouterr().out
    for words in ("better beyond the noise", "best baseline", "published", "report.html", str(last)):
        assert words in said
    assert "During training" in (tmp_path / "out" / "report.html").read_text()
    again = evaluate_here(shard_dir, first, tmp_path / "again", *OPTIONS[:-2])
    assert again["protocol"]["width"] == 56  # as its run was trained


def test_several_shard_sets_are_evaluated_together_and_each_by_itself(
    results, shard_dir, captures, exported, tmp_path, capsys
):
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    done = vggt_prep("pack", *source, "--out", tmp_path / "b", "--split", "train", "--category", "balls")
    assert done.returncode == 0, done.stderr
    both = evaluate_here(shard_dir, exported, tmp_path / "both", *OPTIONS, "--shards", str(tmp_path / "b"))
    label = str(exported)
    assert set(both["shards"]) == {str(shard_dir), str(tmp_path / "b")}
    ours, theirs = ([scene["metrics"][label] for scene in found["scenes"][:7]] for found in (both, results))
    assert ours == theirs
    assert both["by_shards"][str(shard_dir)][label] == results["checkpoints"][label]["metrics"]
    rest = [scene["metrics"][label]["rotation_deg"] for scene in both["scenes"][7:]]
    found = both["by_shards"][str(tmp_path / "b")]
    assert found["sequences"] == len(rest)
    assert found[label]["rotation_deg"]["mean"] == pytest.approx(np.mean(rest))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{tmp_path / 'b'} alone ({len(rest)} sequences): {label} pose AUC@30" in said


def test_what_is_gained_on_one_set_and_lost_on_another_is_said(shard_dir, captures, exported, tmp_path, capsys):
    """A checkpoint whose depths are worse; and whose sizes are told where lengths are meters."""

    def spoil(state):
        state["depth_head.scratch.output_conv2.2.weight"] *= -3

    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations", "--split", "train")
    done = vggt_prep("pack", *source, "--out", tmp_path / "balls", "--category", "balls", "--short-side", 100)
    assert done.returncode == 0, done.stderr
    for seed in range(5):
        views = rendered(frames=12, seed=seed)
        WRITERS["tum"](tmp_path / "captures" / str(seed), views)  # in meters
    fx, fy, cx, cy = views[0].intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]]
    options = ("--intrinsics", f"{fx},{fy},{cx},{cy}", "--test-tail", 0.2, "--trust", "--short-side", 100)
    done = vggt_prep("pack", tmp_path / "captures", "--out", tmp_path / "tum", *options)
    assert done.returncode == 0, done.stderr
    spoilt, options = (
        changed(exported, tmp_path / "spoilt.pt", spoil),
        ("--min-frames", "7", "--shards", str(tmp_path / "tum")),
    )
    found = evaluate_here(tmp_path / "balls", [exported, spoilt], tmp_path / "out", *OPTIONS, *options)
    for place in ("balls", "tum"):
        part = found["by_shards"][str(tmp_path / place)]
        change = next(c for c in part["comparisons"] if c["metric"] == "depth_abs_rel")
        scenes = [scene for scene in found["scenes"] if scene["shards"] == str(tmp_path / place)]
        both = [np.mean([s["metrics"][str(path)]["depth_abs_rel"] for s in scenes]) for path in (exported, spoilt)]
        assert change["means"] == pytest.approx(both)
        assert both[0] != both[1]
    assert found["sizes"][str(exported)]["scenes"] == 5
    said = capsys.readouterr().out
    assert f"Against {exported}, on {tmp_path / 'tum'} alone:" in said
    assert f"{exported}: takes things for" in said


def test_protocol_draws_depend_on_names_and_seed_alone(shard_dir):
    opened = shards.open(shard_dir)
    protocol = Protocol(split="train", min_frames=20, width=56)
    chosen = choose([opened], protocol)
    assert chosen == choose([shards.open(shard_dir)], protocol)
    for scene in chosen:
        frames = scene.step.scenes[0].frames
        assert len(set(frames)) == 10
        assert max(frames) < 24
    other = choose([opened], Protocol(split="train", min_frames=20, width=56, seed=1))
    assert [c.step.scenes[0].frames for c in other] != [c.step.scenes[0].frames for c in chosen]
    assert len({c.step.scenes[0].frames for c in chosen}) == len(chosen)


def test_protocol_keeps_the_shape_of_images_up_to_square(shard_dir):
    chosen = choose([shards.open(shard_dir)], Protocol(split="train", min_frames=20, width=112))
    shapes = {(c.step.shape.height, c.step.shape.width) for c in chosen}
    assert shapes == {(84, 112), (112, 112)}  # 240 x 320, and 320 x 240 cut to a square


class ManySequences:
    """The sequences of an index, without frames."""

    def __init__(self, counts):
        names = [(f"cat{i % 3}", f"seq{i:03d}", "test", i, count) for i, count in enumerate(counts)]
        kinds = [("category", "S8"), ("name", "S8"), ("split", "S5"), ("first", "u8"), ("count", "u4")]
        self.sequences = np.array([(a.encode(), b.encode(), c.encode(), i, n) for a, b, c, i, n in names], kinds)

    def split(self, _):
        return np.arange(len(self.sequences))

    def row(self, _):
        return {"height": 480, "width": 640}


def test_fast_takes_ten_sequences_of_each_category_and_short_ones_are_left_out():
    many = ManySequences([50 + i % 5 if i % 4 else 49 for i in range(120)])
    everything, fast = choose([many], Protocol()), choose([many], Protocol(fast=True))
    assert len(everything) == 90
    counts = [sum(c.category == f"cat{i}" for c in fast) for i in range(3)]
    assert counts == [FAST_SEQUENCES] * 3
    assert {c.name for c in fast} < {c.name for c in everything}
    by_name = {c.name: c for c in everything}
    assert all(by_name[c.name] == c for c in fast)
    assert Protocol(fast=True).deviations == []
    assert Protocol(min_frames=24, views=5).deviations == ["min_frames 24 instead of 50", "views 5 instead of 10"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "no sequence of the test split has 50 frames, as the protocol asks for; the longest has 24"),
        (("--views", "30"), "the longest has 24: give --min-frames 24 --views 24 or less"),
        (("--min-frames", "8"), "--min-frames 8: expected at least the 10 of --views"),
        (("--views", "1"), "--views: expected at least 2, found 1"),
        (("--width", "100"), "--width: expected a multiple of 14"),
    ],
)
def test_what_cannot_be_evaluated_is_said(shard_dir, exported, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit):
        evaluate_here(shard_dir, exported, tmp_path / "out", "--seed", "0", *options)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_takes_no_results_is_said_before_anything_is_computed(
    shard_dir, exported, tmp_path, capsys, monkeypatch
):
    (tmp_path / "out").write_text("a file")
    monkeypatch.setattr(evaluate.Evaluator, "evaluate", lambda *_: pytest.fail("it was computed"))
    with pytest.raises(SystemExit):
        evaluate_here(shard_dir, exported, tmp_path / "out")
    assert f"{tmp_path / 'out'}" in capsys.readouterr().err


def test_checkpoint_without_a_depth_head_gives_poses(shard_dir, exported, tmp_path, capsys):
    def without(state):
        for name in [name for name in state if not name.startswith(("aggregator", "camera_head"))]:
            del state[name]

    path = changed(exported, tmp_path / "cameras.pt", without)
    found = evaluate_here(shard_dir, path, tmp_path / "out")
    assert {h for name in found["checkpoints"][str(path)]["metrics"] for h in METRICS[name].heads} == {"camera"}
    assert "has no depth head, so none of its metrics" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "report.html").exists()


def test_checkpoint_without_any_head_is_refused(shard_dir, exported, tmp_path, capsys):
    def without(state):
        for name in [name for name in state if not name.startswith("aggregator")]:
            del state[name]

    path = changed(exported, tmp_path / "bare.pt", without)
    with pytest.raises(SystemExit):
        evaluate_here(shard_dir, path, tmp_path / "out")
    assert "has none of the heads camera, depth, point" in capsys.readouterr().err


def test_predictions_that_are_nan_are_counted_and_the_rest_evaluated(shard_dir, exported, tmp_path, capsys):
    def spoil(state):
        name = next(n for n in state if n.startswith("depth_head") and "output_conv2.2.bias" in n)
        state[name] = torch.full_like(state[name], 3e38)  # whose exponential is infinite

    path = changed(exported, tmp_path / "nan.pt", spoil)
    found = evaluate_here(shard_dir, path, tmp_path / "out")
    row = found["checkpoints"][str(path)]
    assert len(row["not_finite"]) == 7
    assert "depth_abs_rel" not in row["metrics"]
    assert row["metrics"]["auc_30"]["scenes"] == 7
    said = " ".join(capsys.readouterr().out.split())
    assert "predictions that are NaN or infinite in 7 scenes" in said
    assert "predictions that are NaN or infinite in 7 scenes" in (tmp_path / "out" / "report.html").read_text()


def test_scenes_without_depth_count_for_cameras(shard_dir, exported, tmp_path, capsys, monkeypatch):
    """Of which some have no depth at all, and some only depths that are not known."""
    from train.data import scenes as loader

    plain = loader.crop_depth

    def crop(depth, *arguments):
        found = plain(depth, *arguments)
        return found * 0 if crop.calls[0] < 8 else found

    crop.calls = [0]

    def counted(*arguments):
        found = crop(*arguments)
        crop.calls[0] += 1
        return found

    monkeypatch.setattr(loader, "crop_depth", counted)
    found = evaluate_here(shard_dir, exported, tmp_path / "out")
    assert len(found["without_depth"]) == 2
    figures = found["checkpoints"][str(exported)]["metrics"]
    assert figures["depth_abs_rel"]["scenes"] == 5
    assert figures["auc_30"]["scenes"] == 7
    assert "2 scenes without true depth count for cameras only" in " ".join(capsys.readouterr().out.split())


def test_scenes_shown_are_best_median_and_worst_whatever_their_number():
    def kinds(errors):
        rows = [{"rotation_deg": error, "translation_deg": 0.0} for error in errors]
        return {kind: [n for k, n in pick(Evaluation("a", rows)) if k == kind] for kind in ("best", "worst")}

    assert kinds([3.0, 1.0]) == {"best": [1], "worst": [0]}
    assert kinds([3.0, 1.0, 2.0]) == {"best": [1], "worst": [0]}
    assert kinds([1.0]) == {"best": [0], "worst": []}
    assert kinds([float(n) for n in range(9)]) == {"best": [0, 1], "worst": [8, 7]}
    assert pick(Evaluation("a", [{"rotation_deg": None}])) == []


def test_a_run_is_known_by_its_checkpoint_alone(tmp_path, monkeypatch):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "best").touch()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert run_of(str(folder / "best")) == tmp_path / "run"
    monkeypatch.chdir(folder)
    assert run_of("best") == tmp_path / "run"
    monkeypatch.chdir(tmp_path / "run")
    assert run_of("facebook/VGGT-1B") is None
    (tmp_path / "run" / "vggt.pt").touch()
    assert run_of("vggt.pt") is None


def test_mean_pose_equals_scipy_mean_rotation(shard_dir):
    opened = shards.open(shard_dir)
    found = mean_relative_pose([opened], 4).numpy()
    rng = np.random.default_rng(0)
    rotations = []
    for row in opened.sequences[opened.split("train")]:
        frames = int(row["first"]) + np.array(draw_frames(rng, "uniform", int(row["count"]), 4))
        poses = opened.frames["extrinsics"][frames]
        rotations += [poses[i, :, :3] @ poses[j, :, :3].T for i in range(4) for j in range(i + 1, 4)]
    assert np.allclose(found[:, :3], Rotation.from_matrix(rotations).mean().as_matrix(), atol=1e-6)
    assert np.linalg.norm(found[:, 3]) == pytest.approx(1)


def test_guesses_are_what_they_say():
    truth = torch.eye(3, 4)[None, None].repeat(1, 3, 1, 1)
    truth[0, :, 0, 3] = torch.tensor([0.0, 1.0, 2.0])
    depth = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    batch = {"extrinsics": truth, "depth": depth, "mask": depth > 0, "has_scale": torch.tensor([True])}
    sideways = torch.cat([torch.eye(3), torch.tensor([[1.0], [0], [0]])], dim=1).double()
    same, mean, flat = (baseline_metrics(batch, sideways)[name] for name in BASELINES)
    assert (same["rotation_deg"], same["translation_deg"]) == (0, 90)
    assert (mean["rotation_deg"], mean["translation_deg"]) == (0, 0)
    assert flat["depth_abs_rel"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert baseline_metrics(batch | {"has_scale": torch.tensor([False])}, sideways)[BASELINES[2]] == {}


def test_a_set_that_is_given_twice_under_other_names_is_refused(shard_dir, exported, tmp_path, capsys):
    """Its scenes would count twice, and intervals be too narrow."""
    (tmp_path / "link").symlink_to(shard_dir)
    with pytest.raises(SystemExit):
        evaluate_here(shard_dir, exported, tmp_path / "out", *OPTIONS, "--shards", str(tmp_path / "link"))
    assert "--shards: two of them hold the same" in capsys.readouterr().err
