"""Runs with adapters: their checkpoints hold these and the heads alone, and can be used wherever others can."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import run_command
from evaluations import evaluate_here
from runs import assert_same_run, checkpoint, metrics, run_trainer

from vggt import VGGT
from vggt.weights import read_checkpoint

LORA = 'model.lora={names: ["aggregator*attn.qkv", "aggregator*attn.proj"], rank: 4, alpha: 8}'

EVALUATION = ("--split", "train", "--min-frames", "20", "--views", "3", "--width", "56", "--allow-shared-frames")


def adapters(init):
    return [f"init={init}", LORA, 'optim.lr_factors=[{names: "*lora_*", factor: 10}]']


@pytest.fixture(scope="module")
def run(shard_dir, published, tmp_path_factory):
    """Four steps, the aggregator held in bf16."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = [*adapters(published), "precision=bf16", "model.aggregator_dtype=bf16", "max_steps=4"]
    done = run_trainer(shard_dir, folder / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert "aggregator 0.6 M, 0.02 M of them trained" in done.stdout
    return folder / "run"


def export(run, out, *arguments):
    return run_command("python", "-m", "train.export", run / "checkpoints/latest", "--out", out, *arguments)


def test_a_checkpoint_holds_adapters_and_heads_alone_and_both_learn(run, published):
    first, last = checkpoint(run, 1)["model"], checkpoint(run, 4)["model"]
    assert {name.partition(".")[0] for name in first} == {"aggregator", "camera_head", "depth_head"}
    of_aggregator = [name for name in first if name.startswith("aggregator")]
    assert all(name.endswith(("lora_down", "lora_up")) for name in of_aggregator)
    assert len(of_aggregator) == 2 * 2 * (3 + 4 + 4)
    assert all(not torch.equal(first[name], last[name]) for name in of_aggregator)
    assert (run / "checkpoints/latest").stat().st_size < 0.6 * 3 * published.stat().st_size


def test_a_resumed_run_equals_one_that_was_not_stopped(run, shard_dir, published, tmp_path):
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    for step in (3, 4):
        (tmp_path / "run/checkpoints" / f"step-{step:08d}.pt").unlink()
    settings = [*adapters(published), "precision=bf16", "model.aggregator_dtype=bf16", "max_steps=4"]
    done = run_trainer(shard_dir, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert_same_run(tmp_path / "run", run, 4)


def test_merged_it_loads_wherever_the_original_does_and_predicts_what_the_run_did(run, shard_dir, exported, tmp_path):
    done = export(run, tmp_path / "merged.pt")
    assert done.returncode == 0, done.stderr
    merged, _ = read_checkpoint(tmp_path / "merged.pt")
    original, _ = read_checkpoint(exported)
    assert {n: (v.shape, v.dtype) for n, v in merged.items()} == {n: (v.shape, v.dtype) for n, v in original.items()}
    same = {name for name, value in merged.items() if torch.equal(value, original[name])}
    assert {name.partition(".")[0] for name in same} >= {"point_head", "track_head"}
    assert not any(name.endswith(("attn.qkv.weight", "attn.proj.weight")) and "aggregator" in name for name in same)
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        one, two = (VGGT.from_pretrained(path)(images) for path in (run / "checkpoints/latest", tmp_path / "merged.pt"))
    assert torch.equal(one["depth"], two["depth"])
    assert "world_points" in two
    found = evaluate_here(shard_dir, [exported, run / "checkpoints/latest"], tmp_path / "out", *EVALUATION)
    assert len(found["checkpoints"]) == 2
    for metric in ("depth_abs_rel", "rotation_deg"):
        means = [row["metrics"][metric]["mean"] for row in found["checkpoints"].values()]
        assert means[0] != means[1]


def test_export_does_not_overwrite_what_the_adapters_belong_to(run, published, monkeypatch, tmp_path):
    """Wherever it is called from: the run may have been given a path from its own folder."""
    content = published.read_bytes()
    done = export(run, published)
    assert done.returncode == 1
    assert "is what is to be exported" in done.stderr
    assert published.read_bytes() == content


def test_adapters_are_no_init_and_belong_to_one_checkpoint(run, shard_dir, published, tmp_path):
    done = run_trainer(shard_dir, tmp_path / "new", f"init={run}/checkpoints/latest", "max_steps=1")
    assert done.returncode == 1
    assert "holds the adapters of a run, and not the model that they belong to; merge them first" in done.stderr

    other = {name: value + 1e-3 for name, value in read_checkpoint(published)[0].items()}
    torch.save(other, tmp_path / "other.pt")
    for arguments in (("--init", tmp_path / "other.pt"), ("--init", tmp_path / "gone.pt")):
        done = export(run, tmp_path / "out.pt", *arguments)
        assert done.returncode == 1
        assert "give the one that it began from as --init" in done.stderr
        assert not (tmp_path / "out.pt").exists()

    shutil.copytree(run, tmp_path / "run", symlinks=True)
    content = checkpoint(tmp_path / "run", 4)
    content["config"]["init"] = content["adapters"]["init"] = str(tmp_path / "other.pt")
    torch.save(content, tmp_path / "run/checkpoints/step-00000004.pt")
    settings = [*adapters(tmp_path / "other.pt"), "precision=bf16", "model.aggregator_dtype=bf16", "max_steps=5"]
    done = run_trainer(shard_dir, tmp_path / "run", *settings)
    assert done.returncode == 1
    assert "other.pt is another checkpoint than the one that this run began from" in done.stderr
    with pytest.raises(ValueError, match=r"other.pt, which is not the checkpoint that it began from"):
        read_checkpoint(tmp_path / "run/checkpoints/step-00000004.pt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([LORA, "model.freeze=[]"], "model.lora: corrects weights that are there already; give init"),
        (["init=x", "model.lora={rank: 4}"], "model.lora.names: not given"),
        (["init=x", "model.lora={names: [], rank: 4}"], "model.lora.names: expected patterns of linear layers"),
        (["init=x", 'model.lora={names: ["*"], rank: 0}'], "model.lora.rank: expected at least 1, found 0"),
        (["init=nano", "model.preset=nano", LORA, "loss.match=1"], "loss.match: is for whole models from scratch"),
        (["init=nano", "model.preset=nano", LORA.replace("qkv", "kqv")], "'aggregator*attn.kqv' matches no linear"),
        (["init=nano", "model.preset=nano", LORA, "model.freeze=[]"], "trains itself; add it to model.freeze"),
    ],
)
def test_settings_of_adapters_that_cannot_be_are_said(shard_dir, tmp_path, settings, words):
    done = run_trainer(shard_dir, tmp_path / "run", *settings, "max_steps=1")
    assert done.returncode == 1
    assert words in done.stderr


def test_a_run_is_not_resumed_with_other_adapters_or_without(run, shard_dir, published):
    settings = [f"init={published}", "precision=bf16", "model.aggregator_dtype=bf16", "max_steps=5"]
    for lora in ("model.lora=null", LORA.replace("rank: 4", "rank: 2")):
        done = run_trainer(shard_dir, run, *settings, lora, 'optim.lr_factors=[{names: "*lora_*", factor: 10}]')
        assert done.returncode == 1
        assert "was trained with model.lora" in done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_adapters_learn_the_same_with_either_strategy_and_go_on_under_the_other(shard_dir, published, tmp_path):
    for held in ("fp32", "bf16"):
        curves = []
        settings = [*adapters(published), "precision=bf16", f"model.aggregator_dtype={held}"]
        for strategy in ("ddp", "fsdp"):
            out = tmp_path / held / strategy
            done = run_trainer(shard_dir, out, *settings, f"strategy={strategy}", "max_steps=3", processes=2)
            assert done.returncode == 0, done.stderr
            assert "Warning" not in done.stderr
            curves.append(metrics(out))
        other = run_trainer(shard_dir, tmp_path / held / "fsdp", *settings, "strategy=ddp", "max_steps=4")
        assert other.returncode == 0, other.stderr
        assert curves[0].keys() == curves[1].keys()
        for line, terms in curves[0].items():
            for name, value in terms.items():
                assert value == pytest.approx(curves[1][line][name], rel=5e-3, abs=5e-3), (line, name)
