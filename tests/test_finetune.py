"""The README's first command, from a copy of the repository without data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The tracked files alone, with this environment instead of a new one."""
    tmp_path = tmp_path_factory.mktemp("checkout")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, files.stdout.split("\0")):
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "repo" / name)
    (tmp_path / "repo" / ".venv").symlink_to(ROOT / ".venv")
    (ROOT / ".venv" / "installed").touch()  # newer than the copies
    return tmp_path / "repo"


def make(checkout, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )


def figures(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_make_finetune_renders_packs_trains_and_tells(checkout):
    done = make(checkout, "finetune")
    assert done.returncode == 0, done.stderr
    run = checkout / "runs" / "demo"
    for name in (
        "checkpoints/latest",
        "checkpoints/best",
        "config.yaml",
        "contact_sheet.png",
        "metrics.jsonl",
        "tensorboard",
    ):
        assert (run / name).exists(), name
    tested = [line for line in figures(run) if line["split"] == "test"]
    assert tested[-1]["loss_objective"] < 0.8 * tested[0]["loss_objective"]
    assert tested[-1]["depth_abs_rel"] < 0.8 * tested[0]["depth_abs_rel"]
    assert "It got better, on scenes that were never trained on." in done.stdout

    evaluated = make(checkout, "eval")
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.count("cameras are better than the baseline (pose AUC@30") == 2
    assert evaluated.stdout.count("its depth is better than the baseline (depth error") == 2
    assert (run / "eval" / "report.html").exists()

    again = make(checkout, "finetune")
    assert again.returncode == 0
    assert "data/shards is there: using it" in again.stdout
    assert "it is finished" in again.stdout


def test_make_finetune_takes_real_captures_in_the_same_place(checkout, co3d_mini):
    """After the demo, with the same defaults: its shards make room, and nothing of it is lost."""
    if not (checkout / "data" / "demo").exists():
        assert make(checkout, "shards").returncode == 0
    real = (f"CO3D_DIR={co3d_mini / 'co3d'}", f"CO3D_ANNOTATION_DIR={co3d_mini / 'annotations'}")
    for processes in (1, 2):
        steps = f"ARGS=max_steps={30 // processes} log_every=5"
        name = f"real run #{processes}"
        done = make(checkout, "finetune", *real, f"NPROC={processes}", f"RUN={name}", steps)
        assert done.returncode == 0, done.stderr
        tested = [line for line in figures(checkout / "runs" / name) if line["split"] == "test"]
        assert tested[-1]["depth_abs_rel"] < tested[0]["depth_abs_rel"]
    assert not (checkout / "data" / "shards").is_symlink()
    assert (checkout / "data" / "demo" / "shards" / "dataset.json").exists()
