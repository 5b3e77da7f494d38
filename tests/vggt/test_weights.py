"""Checkpoints in and out: by name, whole or refused, and never executed."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict

import pytest
import torch
from conftest import run_command
from golden_figures import golden_weights, load_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vggt import VGGT, VGGTConfig, preset
from vggt.weights import load_weights, read_checkpoint


@pytest.fixture(scope="module")
def weights():
    return golden_weights(load_json("tiny_manifest.json"))


def is_filled(model, weights):
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def write_plain(weights, folder):
    torch.save(weights, folder / "a.pt")
    return folder / "a.pt"


def write_nested(weights, folder):
    torch.save({"model": weights, "optimizer": {"step": 3}}, folder / "a.pt")
    return folder / "a.pt"


def write_safetensors(weights, folder):
    save_file(weights, folder / "a.safetensors")
    return folder / "a.safetensors"


def write_folder_of_safetensors(weights, folder):
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"img_size": 518, "patch_size": 14}))  # not ours
    return folder


def write_folder_of_pt(weights, folder):
    torch.save(weights, folder / "model.pt")
    return folder


WRITERS = [write_plain, write_nested, write_safetensors, write_folder_of_safetensors, write_folder_of_pt]


@pytest.mark.parametrize("write", WRITERS)
def test_published_checkpoints_load_by_name(weights, tmp_path, write):
    source = write(weights, tmp_path)
    assert is_filled(VGGT.from_pretrained(source, preset("tiny")), weights)
    assert is_filled(VGGT.from_pretrained(str(source), preset("tiny"), heads=("camera", "track")), weights)


def test_a_loaded_model_is_whole_and_trains(weights, tmp_path):
    """It is built without weights at first: nothing may be left that has none."""
    model = VGGT.from_pretrained(write_plain(weights, tmp_path), preset("tiny"))
    assert not model.training
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"aggregator.patch_embed.mask_token"}
    (tmp_path / "a.pt").write_bytes(b"")  # what was read from may go
    fresh = VGGT(preset("tiny"))
    fresh.load_state_dict(weights)
    images = torch.rand(2, 3, 28, 42)
    for m in (model, fresh.eval()):
        m(images)["depth"].mean().backward()
    assert torch.equal(model.depth_head.norm.weight.grad, fresh.depth_head.norm.weight.grad)
    assert model.depth_head.norm.weight.grad.abs().sum() > 0


def test_heads_that_a_checkpoint_has_not_are_refused_unless_left_out(weights, tmp_path):
    torch.save({n: v for n, v in weights.items() if not n.startswith("track_head.")}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"missing: track_head\.(.|\n)*It has no track_head at all"):
        VGGT.from_pretrained(tmp_path / "a.pt", preset("tiny"))
    VGGT.from_pretrained(tmp_path / "a.pt", preset("tiny", heads=("camera", "depth", "point")))


def test_weights_of_another_type_become_the_models(weights, tmp_path):
    torch.save({name: value.half() for name, value in weights.items()}, tmp_path / "a.pt")
    model = VGGT.from_pretrained(tmp_path / "a.pt", preset("tiny"))
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("heads", [("camera", "depth", "point", "track"), ("depth", "camera")])
def test_saved_models_come_back_with_their_configuration(weights, tmp_path, heads):
    config = preset("tiny", heads=heads, head_chunk=3)
    model = VGGT(config)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.save_pretrained(tmp_path / "new" / "folder")
    again = VGGT.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == config
    assert is_filled(again, weights)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_a_configuration_survives_json():
    config = preset("demo", heads=("depth",), head_chunk=None)
    assert VGGTConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    assert VGGTConfig.from_dict({}) == VGGTConfig()


def test_hugging_face_names_load_through_its_client(weights, tmp_path):
    """From the client's own cache: its layout, its code, no network."""
    snapshot = tmp_path / "hub" / "models--someone--VGGT-tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    model = VGGT(preset("tiny"))
    model.load_state_dict(weights)
    model.save_pretrained(snapshot)
    code = "from vggt import VGGT; print(VGGT.from_pretrained('someone/{}').config.embed_dim)"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = run_command("python", "-c", code.format("VGGT-tiny"), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "64"
    done = run_command("python", "-c", code.format("VGGT-absent"), **environment)
    assert "someone/VGGT-absent: no such file here, and not to be had from Hugging Face" in done.stderr


def test_checkpoints_that_do_not_fit_are_refused_with_the_names_and_change_nothing(weights, tmp_path):
    broken = dict(weights)
    del broken["camera_head.embed_pose.bias"]
    broken["aggregator.surplus"] = torch.zeros(1)
    broken["camera_head.embed_pose.weight"] = torch.zeros(2, 2)
    torch.save(broken, tmp_path / "broken.pt")
    model = VGGT(preset("tiny"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_weights(model, tmp_path / "broken.pt")
    message = str(caught.value)
    assert "1 missing: camera_head.embed_pose.bias" in message
    assert "1 unexpected: aggregator.surplus" in message
    assert "camera_head.embed_pose.weight (file [2, 2], model [128, 9])" in message
    assert is_filled(model, before)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/executed",))

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="more than tensors in it"):
        VGGT.from_pretrained(tmp_path / "evil.pt", preset("tiny"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("config", ["[1]", "null", '{"head_chunk": "1"}', '{"depth": null}', '{"patch_size": 0}', "{"])
def test_configurations_that_cannot_be_are_refused_by_name(weights, tmp_path, config):
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=tmp_path.name):
        VGGT.from_pretrained(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_damage_to_a_checkpoint_ends_in_another_error(tmp_path, data):
    path = tmp_path / "a.pt"
    torch.save({"model": {"a": torch.zeros(3)}, "model_config": {"depth": 4}}, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        read_checkpoint(path)


def test_checkpoints_of_the_old_format_load(weights, tmp_path):
    torch.save(weights, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert is_filled(VGGT.from_pretrained(tmp_path / "a.pt", preset("tiny")), weights)


@pytest.mark.parametrize("write", WRITERS[:4])
def test_truncated_files_are_refused_by_name(weights, tmp_path, write):
    source = write(weights, tmp_path)
    file = source if source.is_file() else source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{file.name}: not a readable"):
        read_checkpoint(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.pt", "absent.pt: no such file; expected a .pt or .safetensors file, a folder with one, nano"),
        ("", "expected model.safetensors or model.pt in this folder"),
        ("list.pt", "expected names and tensors"),
        ("text.pt", "not a readable checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, source, message):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / source)


def test_a_full_disk_leaves_no_half_written_weights(weights, tmp_path):
    """A file size limit stands for the full disk."""
    code = (
        "import resource, sys, torch; from vggt import VGGT, preset;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "VGGT(preset('tiny')).save_pretrained(sys.argv[1])"
    )
    done = run_command("python", "-c", code, tmp_path)
    assert "model.safetensors: cannot be written, is the disk full?" in done.stderr
    assert list(tmp_path.iterdir()) == []
