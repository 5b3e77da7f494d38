"""What make passes on: names as they are, whatever signs are in them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NAMES = ["my run", "exp #2", "it's", 'a "b"', "x;y & z", "~tilde", "*"]
ECHO = f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps(sys.argv), file=open(os.environ['SAID'], 'a'))\n"


@pytest.fixture
def make(tmp_path):
    """Run make with commands that only write down their arguments; what was called, by name."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("torchrun", "vggt-prep", "python", "pip", "pytest"):
        (tmp_path / ".venv/bin" / name).write_text(ECHO)
        (tmp_path / ".venv/bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "installed").write_text("")

    def run(*arguments, error=""):
        said = tmp_path / "said"
        said.write_text("")
        environment = {k: v for k, v in os.environ.items() if k not in ("SHARDS", "RUN", "INIT", "MAKEFLAGS")}
        done = subprocess.run(
            ["make", *arguments], cwd=tmp_path, env=environment | {"SAID": str(said)}, capture_output=True, text=True
        )
        assert bool(done.returncode) == bool(error), done.stderr
        assert error in done.stdout + done.stderr
        return [json.loads(line) for line in said.read_text().splitlines()]

    return run


@pytest.mark.parametrize("name", NAMES)
def test_names_reach_the_commands_as_they_are(make, tmp_path, name):
    shards = tmp_path / name
    shards.mkdir()
    (shards / "dataset.json").write_text("")
    (trained,) = make("finetune", f"SHARDS={shards}", f"RUN={name}", f"INIT=/m/{name}")
    assert f"data.shards={shards}" in trained
    assert f"out_dir=runs/{name}" in trained
    assert f"init=/m/{name}" in trained
    for best in ("latest", "best"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name / "checkpoints" / best).write_text("")
        (evaluated,) = make("eval", f"SHARDS={shards}", f"RUN={name}", f"INIT=/m/{name}", "ARGS=--views 4 --seed 2")
        assert evaluated[evaluated.index("--shards") + 1] == str(shards)
        assert evaluated[evaluated.index("--out") + 1] == f"runs/{name}/eval"
        assert f"runs/{name}/checkpoints/{best}" in evaluated
        assert evaluated[-4:] == ["--views", "4", "--seed", "2"]
    packed, _ = make("finetune", f"CO3D_DIR=/c/{name}", f"CO3D_ANNOTATION_DIR=/a/{name}", f"SHARDS={shards} 2")
    assert packed[1:] == [
        *("pack", "--co3d-dir", f"/c/{name}", "--out", f"{shards} 2", "--annotation-dir", f"/a/{name}")
    ]


def test_a_run_is_named_after_its_shards_and_one_process_needs_no_torchrun(make, tmp_path):
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "data" / "mine" / "dataset.json").write_text("")
    (trained,) = make("finetune", "SHARDS=data/mine/")
    assert trained[0].endswith("bin/python")
    assert "out_dir=runs/mine" in trained
    (adapted,) = make("finetune", "SHARDS=data/mine", "INIT=/m/vggt.pt", "RECIPE=lora")
    assert adapted[adapted.index("--config") + 1] == "train/configs/lora.yaml"
    (far,) = make("finetune", "SHARDS=https://host/sets/kitchen")
    assert {"data.shards=https://host/sets/kitchen", "out_dir=runs/kitchen"} <= {*far}
    for init in ((), ("INIT=nano",)):
        (small,) = make("finetune", "SHARDS=data/mine", "RECIPE=lora", *init)
        assert small[small.index("--config") + 1] == "train/configs/nano_lora.yaml"
    (several,) = make("finetune", "SHARDS=data/mine", "NPROC=2")
    assert several[0].endswith("bin/torchrun")
    assert "--nproc_per_node=2" in several


def test_the_demo_is_told_from_other_shards_through_links(make, tmp_path):
    (tmp_path / "data").mkdir()
    synth, packed, trained = make("finetune")
    assert (synth[1], packed[1]) == ("synth", "pack")
    assert "out_dir=runs/demo" in trained
    (tmp_path / "data/demo/shards").mkdir(parents=True)
    (tmp_path / "data/demo/shards/dataset.json").write_text("")
    (tmp_path / "runs/demo/checkpoints").mkdir(parents=True)
    (evaluated,) = make("eval")
    assert evaluated[-2:] == ["--min-frames", "24"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/dataset.json").write_text("")
    (evaluated,) = make("eval", "SHARDS=other", "RUN=demo")
    assert "--min-frames" not in evaluated
    make("shards", "CO3D_DIR=/c")
    assert not os.path.lexists(tmp_path / "data/shards")  # made room
    (tmp_path / "data/shards").mkdir()
    (tmp_path / "data/shards/dataset.json").write_text("")
    assert make("eval", error="data/shards is not the demo's any more: name the run") == []
    assert make("eval", "RUN=demo")


def test_before_training_there_is_nothing_to_evaluate_and_nothing_is_packed(make):
    assert make("eval", "CAPTURES=a", error="runs/captures: no such run; train it with make finetune") == []


def test_clean_removes_the_demo_and_nothing_of_yours(make, tmp_path):
    demo = tmp_path / "data/demo"
    mine = [demo / name for name in ("dataset.json", "captures/kitchen/a.json", "shards/dataset.json")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    make("clean")
    assert all(path.exists() for path in mine)
    (demo / "captures/synth.json").write_text("")  # the demo's own
    make("clean")
    assert [path.name for path in demo.iterdir()] == ["dataset.json"]
