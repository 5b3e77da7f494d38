"""The tests marked gpu, as rows; to pytest, a plugin that prints each as it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench.gpu.rig import ROOT, ROW, Rig, Row


def gpu_tests(rig: Rig) -> Iterator[Row]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.gpu.gpu_tests",
        "-m",
        "gpu",
        "tests/train/engine/test_gpu.py",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"PRETEND_GPU": "1"} if rig.pretend else {})
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if ROW in line:  # after what pytest has printed in it
            yield json.loads(line.partition(ROW)[2])
        else:
            print(line, end="")
    if process.wait() not in (0, 1):  # 1: some failed, which their rows say
        raise RuntimeError(f"pytest ended with {process.returncode}")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.failed or report.skipped:
        row: Row = {"what": report.nodeid.partition("::")[2], "seconds": report.duration, "good": report.passed}
        said = {"said": report.capstdout.strip()} if report.capstdout.strip() else {}
        print(f"{ROW}{json.dumps(row | said)}", file=sys.__stdout__, flush=True)
