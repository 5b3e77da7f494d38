"""The tests marked gpu, as rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from bench.gpu.rig import ROOT, Rig, Row


def gpu_tests(rig: Rig) -> Iterator[Row]:
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/train/engine/test_gpu.py"]
        environment = os.environ | ({"PRETEND_GPU": "1"} if rig.pretend else {})
        subprocess.run([*command, f"--junit-xml={report}"], cwd=ROOT, env=environment, check=False)
        for case in ElementTree.parse(report).iter("testcase"):
            wrong = case.find("failure") if case.find("failure") is not None else case.find("error")
            row: Row = {"what": case.get("name"), "seconds": float(case.get("time", 0)), "good": wrong is None}
            said = case.find("system-out")
            yield row | ({"said": said.text.strip()} if said is not None and said.text else {})
