"""What a run trained, laid over what it started from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_command
from golden_figures import golden_weights, load_json
from runs import SCRATCH, SMALL, run_trainer

from train.export import export as make_export
from vggt import VGGT, preset
from vggt.weights import read_checkpoint

UMASK = os.umask(0o022)
os.umask(UMASK)


@pytest.fixture(scope="module")
def published():
    """As if some of it had been stored in half precision."""
    weights = golden_weights(load_json("tiny_manifest.json"))
    half = ("camera_head.pose_branch.fc1.weight", "track_head.tracker.fmap_norm.weight")
    return {name: value.half() if name in half else value for name, value in weights.items()}


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
def test_export_holds_what_was_trained_unrounded_and_leaves_the_rest_as_it_was(run, published, tmp_path, name):
    done = export(run, tmp_path / name)
    assert done.returncode == 0, done.stderr
    state, _ = read_checkpoint(tmp_path / name)
    assert {n: list(v.shape) for n, v in state.items()} == load_json("tiny_manifest.json")
    trained = {n for n in state if n.startswith(("camera_head.", "depth_head."))}
    assert f"{len(state):,} tensors, {len(trained):,} of them trained" in done.stdout
    saved = torch.load(run / "run/checkpoints/latest", weights_only=True)["model"]
    for n, value in state.items():
        if n in trained:
            assert torch.equal(value, saved[n]), n
        else:
            assert value.dtype == published[n].dtype
            assert value.numpy().tobytes() == published[n].numpy().tobytes(), n
    assert sum(not torch.equal(state[n], published[n]) for n in trained) > 0.9 * len(trained)
    if name == "folder":
        model = VGGT.from_pretrained(tmp_path / name)
        assert model.config == preset("tiny", head_chunk=model.config.head_chunk)


def test_half_says_how_much_of_what_was_trained_it_takes_back(run, published, tmp_path):
    done = export(run, tmp_path / "half.pt", "--half")
    assert done.returncode == 0, done.stderr
    state, _ = read_checkpoint(tmp_path / "half.pt")
    assert {value.dtype for value in state.values()} == {torch.float16}
    saved = torch.load(run / "run/checkpoints/latest", weights_only=True)["model"]
    trained = [n for n in saved if n.startswith(("camera_head.", "depth_head."))]
    off = torch.cat([(state[n].float() - saved[n]).flatten() for n in trained]).norm()
    change = torch.cat([(published[n].float() - saved[n]).flatten() for n in trained]).norm()
    assert f"took back {100 * off / change:.2g}% of what training changed" in done.stdout
    assert 0.001 < off / change < 1


@pytest.mark.slow
def test_weights_that_were_rounded_for_a_while_come_back_as_they_were(run, shard_dir, published, tmp_path):
    """Frozen and held in bf16 first, in float32 since a resume."""
    shutil.copytree(run / "run", tmp_path / "run", symlinks=True)
    settings = [*SMALL, "precision=bf16", "model.aggregator_dtype=fp32", f"init={run}/init.pt", "max_steps=3"]
    done = run_command(
        "python", "train/main.py", f"data.shards={shard_dir}", f"out_dir={tmp_path}/run", *settings, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    done = export(tmp_path, tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr
    state, _ = read_checkpoint(tmp_path / "out.pt")
    frozen = [name for name in state if name.startswith("aggregator.")]
    assert all(torch.equal(state[name], published[name]) for name in frozen)


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


def test_export_refuses_an_init_with_other_frozen_weights(run, published, tmp_path):
    name = "aggregator.frame_blocks.0.attn.qkv.weight"
    torch.save(published | {name: published[name] + 1}, tmp_path / "other.pt")
    done = export(run, tmp_path / "out.pt", "--init", tmp_path / "other.pt")
    assert done.returncode == 1
    assert f"{name} is frozen, but has other values" in done.stderr


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_a_single_file_says_of_which_model_it_is(run, tmp_path, name):
    assert export(run, tmp_path / name).returncode == 0
    assert VGGT.from_pretrained(tmp_path / name).config.embed_dim == preset("tiny").embed_dim
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_export_does_not_overwrite_what_it_reads(run):
    for path in (run / "run/checkpoints/latest", run / "init.pt"):
        before = path.read_bytes()
        file = path if path.suffix else path.resolve()
        done = export(run, file)
        assert done.returncode == 1
        assert "is what is to be exported" in done.stderr
        assert path.read_bytes() == before


def test_export_refuses_what_is_no_checkpoint_of_the_trainer(run, tmp_path):
    done = run_command("python", "-m", "train.export", run / "init.pt", "--out", tmp_path / "out.pt")
    assert done.returncode == 1
    assert "init.pt: not a checkpoint of the trainer, it has no config, model_config" in done.stderr


@pytest.mark.parametrize("name", ["x.foo", "x.PT", "model.safetensor"])
def test_a_name_with_another_ending_is_no_folder(run, tmp_path, name):
    done = export(run, tmp_path / name)
    assert done.returncode == 1
    assert f"{name}: expected a name that ends in .pt or .safetensors, or one of a folder" in done.stderr
    assert not (tmp_path / name).exists()


def test_a_folder_and_the_weights_in_it_are_the_same_to_export(run, tmp_path):
    """And what is in a run's folder of checkpoints is what it is resumed from."""
    assert export(run, tmp_path / "folder").returncode == 0
    weights = (tmp_path / "folder" / "model.safetensors").read_bytes()
    for init, out in (("folder/model.safetensors", "folder"), ("folder", "folder/model.safetensors")):
        done = export(run, tmp_path / out, "--init", tmp_path / init)
        assert "is what is to be exported" in done.stderr
        assert (tmp_path / "folder" / "model.safetensors").read_bytes() == weights
    done = export(run, run / "run/checkpoints/step-00000001.pt")
    assert "is among the checkpoints of a run" in done.stderr


def test_a_damaged_checkpoint_is_not_exported_as_a_whole_one(run, tmp_path):
    content = bytearray((run / "run/checkpoints/latest").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pt").write_bytes(content)
    done = run_command("python", "-m", "train.export", tmp_path / "flipped.pt", "--out", tmp_path / "out.pt")
    assert done.returncode == 1
    assert "flipped.pt: damaged" in done.stderr
    assert not (tmp_path / "out.pt").exists()


def test_export_knows_what_a_run_started_from_though_nothing_was_frozen(run, published, shard_dir, tmp_path):
    """Not the link it was read through: that names another one later."""
    torch.save({"model": published}, tmp_path / "first.pt")
    (tmp_path / "latest").symlink_to("first.pt")
    settings = [*SMALL, *SCRATCH, f"init={tmp_path}/latest", "max_steps=1"]
    done = run_command(
        "python", "train/main.py", f"data.shards={shard_dir}", f"out_dir={tmp_path}/run", *settings, OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    other = {name: value + 1 if name.startswith("track") else value for name, value in published.items()}
    torch.save({"model": other}, tmp_path / "second.pt")
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("second.pt")
    assert export(tmp_path, tmp_path / "out.pt").returncode == 0
    state, _ = read_checkpoint(tmp_path / "out.pt")
    assert torch.equal(state["track_head.tracker.fmap_norm.weight"], published["track_head.tracker.fmap_norm.weight"])
    done = export(tmp_path, tmp_path / "other.pt", "--init", tmp_path / "second.pt")
    assert done.returncode == 1
    assert "second.pt: is not the checkpoint that" in done.stderr


def test_export_of_a_run_from_scratch_takes_no_init(run, shard_dir, tmp_path):
    assert run_trainer(shard_dir, tmp_path / "run", *SCRATCH, "max_steps=1").returncode == 0
    done = export(tmp_path, tmp_path / "out.pt", "--init", run / "init.pt")
    assert done.returncode == 1
    assert "is of a run from scratch, which started from nothing" in done.stderr


def test_a_config_json_that_is_not_a_models_is_not_overwritten(run, tmp_path):
    (tmp_path / "config.json").write_text('{"title": "of a project"}')
    (tmp_path / "model.pt").write_bytes(b"weights beside it")
    done = export(run, tmp_path)
    assert done.returncode == 1
    assert "config.json: is there, and was not written by this program" in done.stderr
    assert (tmp_path / "config.json").read_text() == '{"title": "of a project"}'


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_another_models_folder_is_not_overwritten(run, tmp_path, name):
    """Its configuration may have names that ours has, too."""
    (tmp_path / name).write_text('{"model_type": "dinov2", "image_size": 518, "patch_size": 14}')
    done = export(run, tmp_path)
    assert done.returncode == 1
    assert f"{name}: is there, and was not written by this program; give another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_checkpoint_of_a_run_is_not_overwritten_by_whatever_path_it_is_named(run, tmp_path, monkeypatch):
    checkpoints = run / "run" / "checkpoints"
    newest = (checkpoints / "latest").resolve()
    before = newest.read_bytes()
    copy = shutil.copy(newest, tmp_path / "copy.pt")
    (tmp_path / "link").symlink_to(checkpoints)
    monkeypatch.chdir(checkpoints)
    for out in (Path(newest.name), tmp_path / "link" / newest.name):
        with pytest.raises(ValueError, match="is among the checkpoints of a run"):
            make_export(Path(copy), out)
    assert newest.read_bytes() == before
