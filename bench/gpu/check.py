"""Everything that a CPU cannot show, on one GPU and within some minutes: what is wrong, and what it measures.

    make gpu-check MINUTES=9
    python bench/gpu/check.py --pretend           the same on a CPU, of the smallest model: that it works
    python bench/gpu/check.py --write-figures     what the full-size model gives on a CPU, to compare with

Stages come in the order of their worth, each in a process of its own with its own time. What they find is written as
it comes: to docs/gpu/<name of the GPU>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.pages import GOOD, PRETENDED, verdict, write_pages

ROOT = Path(__file__).parents[2]

NEEDS = (
    "gpu-check needs a CUDA GPU, and torch can use none here (see nvidia-smi); --pretend runs it on a CPU, to try it"
)
STOPPED = "stopped: its time was over"


@dataclass(frozen=True)
class Stage:
    """share: of the time; says: what its columns are."""

    title: str
    share: float
    says: str
    environment: dict[str, str] = field(default_factory=dict)


STEP = "seconds: of a step; share of peak: of the GPU's rate in bf16; allocated, reserved: the most memory."
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
STAGES = {
    "tests": Stage("Tests marked gpu", 0.16, "Of tests/train/engine/test_gpu.py."),
    "parity": Stage("The same as on a CPU", 0.10, "Of each output the largest difference over the largest value."),
    "recipe": Stage("A step of the recipe", 0.12, STEP),
    "waits": Stage("Waits of the host in a step", 0.05, "One is meant, in step.py; where: lines of Python."),
    "loading": Stage("Real shards", 0.17, "data wait: the part of the time that the trainer waits; share: of a step."),
    "others": Stage("A step of the other recipes", 0.10, STEP),
    "variants": Stage("What settings change", 0.12, STEP),
    "expandable": Stage("A step of the recipe, with segments that expand", 0.04, STEP, EXPANDABLE),
    "memory": Stage("Memory", 0.10, "Counted without content, and what a step took; the most images that fit."),
    "inference": Stage("Inference", 0.04, "Of one scene, without gradients, in bf16."),
}


def stage_function(name: str) -> Callable[[Any], Iterator[dict[str, Any]]]:
    """Imported only here: each needs torch, and some more."""
    from bench.gpu import data, gpu_tests, inference, parity, steps

    return {
        "tests": gpu_tests.gpu_tests,
        "parity": parity.parity,
        "recipe": steps.recipe,
        "waits": steps.waits,
        "loading": data.loading,
        "others": steps.others,
        "variants": steps.variants,
        "expandable": steps.recipe,
        "memory": steps.memory,
        "inference": inference.inference,
    }[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages (default 9)")
    parser.add_argument("--out", type=Path, help="folder of the results (default docs/gpu; with --pretend a new one)")
    parser.add_argument("--pretend", action="store_true", help="on a CPU, of the smallest model: figures mean nothing")
    parser.add_argument("--write-figures", action="store_true", help="a minute on a CPU, and 12 GB of memory")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    import torch

    if arguments.write_figures:
        from bench.gpu.parity import write_figures

        write_figures()
    elif not arguments.pretend and not torch.cuda.is_available():
        print(NEEDS, file=sys.stderr)
        sys.exit(2)
    elif arguments.stage:
        run_stage(arguments.stage, arguments.pretend)
    else:
        out = arguments.out or (Path(mkdtemp()) if arguments.pretend else ROOT / "docs" / "gpu")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            sys.exit(check(arguments.minutes, out, arguments.pretend))
        except KeyboardInterrupt:
            print(f"stopped; what was found is in {out}")
            sys.exit(130)


def run_stage(name: str, pretend: bool) -> None:
    """What a process of its own does."""
    import torch

    from bench.gpu.rig import ROW, Rig

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name != "parity"
    for row in stage_function(name)(Rig(pretend)):
        print(f"{ROW}{json.dumps(row)}", flush=True)


def check(minutes: float, out: Path, pretend: bool) -> int:
    """Run all stages; the number to exit with."""
    found = about(pretend)
    until, started = time.monotonic() + 60 * minutes, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        left = until - time.monotonic()
        result: dict[str, Any] = {"title": stage.title, "says": stage.says, "state": "no time left", "rows": []}
        found["stages"][name] = result
        print(f"{time.monotonic() - started:5.0f} s  {stage.title}", flush=True)
        if left > 0:
            for row in rows_of(name, stage, pretend, min(left, 60 * minutes * stage.share * 2), result):
                result["rows"].append(row)
                write_pages(out, found)
        print(f"         {len(result['rows'])} rows, {result['state']}", flush=True)
        write_pages(out, found)
    print(f"{verdict(found)}\n{write_pages(out, found)}")
    return 0 if verdict(found) == GOOD else 1


def about(pretend: bool) -> dict[str, Any]:
    import torch

    name = PRETENDED if pretend else torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "commit": commit.stdout.strip()}
    if not pretend:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"cuda": torch.version.cuda, "memory_gb": properties.total_memory / 1e9}
    return {"gpu": name, "cores": len(os.sched_getaffinity(0)), **facts, "stages": {}}


def finite(value: Any) -> Any:
    """JSON has no NaN."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def kill(process: subprocess.Popen[str]) -> None:
    """With what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def rows_of(name: str, stage: Stage, pretend: bool, limit: float, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a stage as they come; sets result["state"], and why if it failed. limit: seconds."""
    command = [sys.executable, __file__, "--stage", name, *(["--pretend"] if pretend else [])]
    from bench.gpu.rig import ROW

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | stage.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    began, said = time.monotonic(), []
    result["state"] = "running"
    late = []

    def stop(*_: object) -> None:
        late.append(True)
        kill(process)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        for line in process.stdout:
            if line.startswith(ROW):
                yield {key: finite(value) for key, value in json.loads(line.removeprefix(ROW)).items()}
            else:
                said.append(line.rstrip())
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        kill(process)
    result["seconds"] = round(time.monotonic() - began, 1)
    result["state"] = "done" if code == 0 else STOPPED if late else "failed"
    if result["state"] == "failed":
        result["said"] = said[-20:]


if __name__ == "__main__":
    main()
