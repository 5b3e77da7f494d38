from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from forked import module_of, run_forked, start_server
from golden_figures import SHARED, golden_weights, load_json

from prep.cli import main as vggt_prep_main
from shards.schema import FrameMeta
from vggt import preset

if "PYTEST_XDIST_WORKER" in os.environ:  # there is a process a core: threads of several would wait for each other
    torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script; what is tested inherits it
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def pytest_sessionstart():
    start_server()


def run_command(*arguments, timeout=200, **environment):
    """A command of this environment, as a user would type it; its output is captured."""
    module, rest = module_of(list(map(str, arguments[1:]))) if arguments[0] == "python" else (None, [])
    if module:
        return run_forked(module, rest, environment, timeout)
    return subprocess.run(
        [str(BIN / arguments[0]), *map(str, arguments[1:])],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def vggt_prep(*arguments, **environment):
    """The command; without changes to its environment in this process, for starting another takes longer than it."""
    if environment:
        return run_command("vggt-prep", *arguments, **environment)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(vggt_prep_main, [str(argument) for argument in arguments], prog_name="vggt-prep")
    signal.signal(signal.SIGTERM, before)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


def frame_meta(**changes):
    """A camera's record in a shard, of a small frame without depth."""
    fields = {"extrinsics": np.eye(4)[:3], "intrinsics": np.eye(3), "height": 2, "width": 3, "depth_scale": 1.0}
    return FrameMeta(**fields | {"source": "a.jpg", "jpg_crc": 1, "depth_crc": None} | changes)


@pytest.fixture(scope="session")
def captures(tmp_path_factory):
    """Eight rendered scenes of 24 frames in Co3D's layout, seven to train on."""
    out = tmp_path_factory.mktemp("captures") / "synth"
    done = vggt_prep("synth", "--out", out, "--scenes", 8, "--frames", 24, "--seed", 7)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def shard_dir(captures, tmp_path_factory):
    """The same, packed at a reduced size into several shards."""
    out = tmp_path_factory.mktemp("shards") / "set"
    options = ("--short-side", 150, "--shard-frames", 60)
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    done = vggt_prep("pack", *source, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """A checkpoint as published, of the smallest size, with all its heads."""
    path = tmp_path_factory.mktemp("init") / "model.pt"
    torch.save(golden_weights(load_json("tiny_manifest.json")), path)
    return path


@pytest.fixture(scope="session")
def exported(published):
    """The same as this project exports it: it says what it is of."""
    path = published.with_name("exported.pt")
    torch.save({"model": torch.load(published, weights_only=True), "model_config": asdict(preset("tiny"))}, path)
    return path


@pytest.fixture(scope="session")
def co3d_mini():
    """Real posed RGB-D in Co3D's layout, where it is at hand."""
    path = SHARED / "co3d-mini"
    if not path.is_dir():
        pytest.skip("no real captures beside this checkout")
    return path
