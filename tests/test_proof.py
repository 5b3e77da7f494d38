"""Short forms of make proof: that the trainer's step learns what it is shown, and the way to the figures is whole."""

from __future__ import annotations

import re

import pytest
from conftest import run_command, vggt_prep


@pytest.mark.slow
def test_ten_views_of_a_real_capture_are_learned_by_heart(co3d_mini, tmp_path):
    """In a third of the proof's steps: a broken gradient, normalization or pose convention cannot come this far."""
    source = ("--co3d-dir", co3d_mini / "co3d", "--annotation-dir", co3d_mini / "annotations", "--category", "chair")
    packed = vggt_prep("pack", *source, "--out", tmp_path / "set", "--short-side", 120)
    assert packed.returncode == 0, packed.stderr
    done = run_command("python", "bench/proof.py", "overfit", "--shards", tmp_path / "set", "--steps", 180, timeout=900)
    assert "chair/106_12648_23157/" in done.stdout
    auc, error = re.search(r"step 180, .* depth error ([\d.]+)%, pose AUC@30 ([\d.]+)", done.stdout).groups()[::-1]
    assert float(auc) > 0.5
    assert float(error) < 10


@pytest.mark.slow
def test_proof_goes_from_scenes_to_a_verdict(tmp_path):
    out = tmp_path / "proof"
    done = run_command("python", "bench/proof.py", "heldout", "--out", out, "--scenes", 64, "--steps", 60, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"reached: baseline: .* -> trained, (\w+ \w+)", done.stdout) == [
        *("pose AUC", "camera rotation", "camera direction", "depth error")
    ]
    assert "During training" in (out / "report" / "report.html").read_text()


@pytest.mark.slow
def test_proof_from_scratch_says_that_too_few_steps_reach_nothing(tmp_path):
    command = ("bench/proof.py", "heldout", "--out", tmp_path / "proof", "--scratch", "--scenes", 16, "--steps", 5)
    done = run_command("python", *command, timeout=900)
    assert done.returncode == 1, done.stderr
    assert "NOT REACHED: baseline: " in done.stdout
