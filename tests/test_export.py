"""What a run trained, laid over what it started from."""

from __future__ import annotations

import pytest
import torch
from conftest import run_command
from golden_figures import golden_weights, load_json
from test_train import SMALL

from vggt import VGGT, preset
from vggt.weights import read_checkpoint


@pytest.fixture(scope="module")
def published():
    return golden_weights(load_json("tiny_manifest.json"))


@pytest.fixture(scope="module")
def run(shard_dir, published, tmp_path_factory):
    """Two steps from a checkpoint with all heads; the aggregator is frozen, and held in bf16."""
    folder = tmp_path_factory.mktemp("run")
    torch.save({"model": published}, folder / "init.pt")
    settings = [*SMALL, "precision=bf16", "model.aggregator_dtype=bf16", f"init={folder}/init.pt", "max_steps=2"]
    done = run_command(
        "python", "train/main.py", f"data.shards={shard_dir}", f"out_dir={folder}/run", *settings, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    return folder


def export(run, out, *arguments):
    return run_command("python", "-m", "train.export", run / "run/checkpoints/latest", "--out", out, *arguments)


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "folder"])
def test_export_has_the_manifests_names_shapes_and_types_and_leaves_the_rest_as_it_was(run, published, tmp_path, name):
    done = export(run, tmp_path / name)
    assert done.returncode == 0, done.stderr
    state, _ = read_checkpoint(tmp_path / name)
    assert {n: list(v.shape) for n, v in state.items()} == load_json("tiny_manifest.json")
    assert {v.dtype for v in state.values()} == {torch.float32}
    trained = {n for n in state if n.startswith(("camera_head.", "depth_head."))}
    assert f"{len(state):,} tensors, {len(trained):,} of them trained" in done.stdout
    for n, value in state.items():
        same = value.numpy().tobytes() == published[n].numpy().tobytes()
        # A few trained tensors get no gradient in two steps, such as the first round's empty pose.
        assert same or n in trained, n
    changed = [n for n in trained if not torch.equal(state[n], published[n])]
    assert len(changed) > 0.9 * len(trained)


def test_an_exported_folder_opens_without_being_told_its_configuration(run, tmp_path):
    export(run, tmp_path / "folder")
    model = VGGT.from_pretrained(tmp_path / "folder")
    assert model.config == preset("tiny", head_chunk=model.config.head_chunk)


def test_a_checkpoint_of_the_trainer_opens_as_it_is(run):
    model = VGGT.from_pretrained(run / "run/checkpoints/latest")
    assert model.config.heads == ("camera", "depth")
    with torch.no_grad():
        assert torch.isfinite(model(torch.rand(2, 3, 28, 42))["depth"]).all()


def test_export_refuses_an_init_that_the_run_did_not_start_from(run, published, tmp_path):
    torch.save({n: v for n, v in published.items() if not n.startswith("depth_head.")}, tmp_path / "other.pt")
    done = export(run, tmp_path / "out.pt", "--init", tmp_path / "other.pt")
    assert done.returncode == 1
    assert "depth_head." in done.stderr
    assert "did not start from it" in done.stderr
    assert not (tmp_path / "out.pt").exists()


def test_export_refuses_what_is_no_checkpoint_of_the_trainer(run, tmp_path):
    done = run_command("python", "-m", "train.export", run / "init.pt", "--out", tmp_path / "out.pt")
    assert done.returncode == 1
    assert "init.pt: no checkpoint of the trainer, it has no config, model_config" in done.stderr
