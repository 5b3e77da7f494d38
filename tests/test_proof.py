"""Short forms of make proof: that the trainer's step learns what it is shown, and the way to the figures is whole."""

from __future__ import annotations

import json
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
@pytest.mark.parametrize(("start", "steps"), [((), 60), (("--scratch",), 200)])
def test_proof_goes_from_scenes_to_a_verdict(tmp_path, start, steps):
    out = tmp_path / "proof"
    command = ("bench/proof.py", "heldout", "--out", out, "--scenes", 64, "--steps", steps, *start)
    done = run_command("python", *command, timeout=900)
    assert done.returncode in (0, 1), done.stderr
    results = json.loads((out / "report" / "results.json").read_text())
    gains = {c["metric"]: c["gain"] for c in results["against_baseline"] if "latest" in c["after"]}
    assert gains["depth_abs_rel"] == 1, gains
    assert re.search(r"reached: baseline: .* -> trained, depth error", done.stdout)
    assert "During training" in (out / "report" / "report.html").read_text()
    if not start:
        assert done.returncode == 0, done.stdout  # the cameras, too
