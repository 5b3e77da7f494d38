"""`make gpu-check`: that nothing in it is first tried on the day that there is a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from bench.gpu.check import STAGES

CHECK = (sys.executable, "bench/gpu/check.py")


def test_without_a_gpu_it_says_in_one_line_what_it_needs(tmp_path):
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    for command in (("make", "gpu-check"), CHECK):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
        assert len(said) == 1
        assert "gpu-check needs" in said[0]


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu_that_pretends(tmp_path):
    command = (*CHECK, "--pretend", "--minutes", "30", "--out", tmp_path)
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text())
    assert set(found["stages"]) == set(STAGES)
    for name, result in found["stages"].items():
        assert result["state"] == "done", name
        assert len(result["rows"]) >= 3, name
    rows = {row["what"]: row for result in found["stages"].values() for row in result["rows"]}
    assert rows["tiny, against a CPU"]["good"]
    assert rows["default, 3 views of 56x56"]["teraflops_per_s"] > 0
    assert rows["default, 12 GB"]["images"] == 6  # of which the pretended memory holds two scenes of three
    counted = rows["default: counted without content"]["counted_gb"]
    assert 0.015 < counted < 0.1  # 5 MB of weights, 9 of gradients and moments, and what a chunk makes
    page = path.with_suffix(".md").read_text()
    assert page.count("\n## ") == len(STAGES)
    assert re.search(r"\| of a step: backward \|.*\| 0\.\d+ \|", page)


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_stopped_and_those_after_it_run(tmp_path):
    """Half a second for each: they are stopped, and the page says so."""
    command = (*CHECK, "--pretend", "--minutes", "0.1", "--out", tmp_path)
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    (path,) = tmp_path.glob("*.json")
    states = {result["state"] for result in json.loads(path.read_text())["stages"].values()}
    assert "stopped: its time was over" in states
    assert "failed" not in states
    assert "Not complete: tests" in path.with_suffix(".md").read_text()


def test_an_interrupted_check_says_where_its_results_are(tmp_path):
    command = (*CHECK, "--pretend", "--out", tmp_path)
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert "Tests marked gpu" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"stopped; what was found is in {tmp_path}" in said
