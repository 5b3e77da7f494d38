"""Everything that a CPU cannot show, on one GPU and within some minutes: what is wrong, and what it measures.

    make gpu-check MINUTES=9
    python bench/gpu/check.py --pretend --out /tmp/gpu     the same on a CPU, of the smallest model: that it works
    python bench/gpu/check.py --write-figures              what a GPU is compared with, anew

Stages come in the order of their worth, each in a process of its own with its own time. What they find is written as
it comes: to docs/gpu/<name of the GPU>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.pages import write_pages

ROOT = Path(__file__).parents[2]

NEEDS = (
    "gpu-check needs a CUDA GPU, and torch can use none here (see nvidia-smi); --pretend runs it on a CPU, to try it"
)
ROW = "ROW "  # begins a line of a stage that is one of its rows


@dataclass(frozen=True)
class Stage:
    """share: of the time; run: from a Rig to rows."""

    title: str
    share: float
    environment: dict[str, str] = field(default_factory=dict)


STAGES = {
    "tests": Stage("Tests marked gpu", 0.16),
    "parity": Stage("The same as on a CPU", 0.10),
    "recipe": Stage("A step of the recipe", 0.12),
    "waits": Stage("Waits of the host in a step", 0.05),
    "loading": Stage("Real shards", 0.17),
    "others": Stage("A step of the other recipes", 0.10),
    "variants": Stage("What settings change", 0.12),
    "expandable": Stage(
        "A step of the recipe, with segments that expand", 0.04, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    ),
    "memory": Stage("Memory: counted and true; how many images fit", 0.10),
    "inference": Stage("Inference", 0.04),
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
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "gpu")
    parser.add_argument("--pretend", action="store_true", help="on a CPU, of the smallest model")
    parser.add_argument("--write-figures", action="store_true", help="of the full size, by a CPU")
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
        sys.exit(check(arguments.minutes, arguments.out, arguments.pretend))


def run_stage(name: str, pretend: bool) -> None:
    """What a process of its own does."""
    import torch

    from bench.gpu.rig import Rig

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name not in ("tests", "parity")
    for row in stage_function(name)(Rig(pretend)):
        print(f"{ROW}{json.dumps(row)}", flush=True)


def check(minutes: float, out: Path, pretend: bool) -> int:
    """Run all stages; the number to exit with."""
    found = about(pretend)
    until, started = time.monotonic() + 60 * minutes, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    for name, stage in STAGES.items():
        left = until - time.monotonic()
        result: dict[str, Any] = {"title": stage.title, "state": "no time left", "rows": []}
        found["stages"][name] = result
        print(f"{time.monotonic() - started:5.0f} s  {stage.title}", flush=True)
        if left > 0:
            for row in rows_of(name, stage, pretend, min(left, 60 * minutes * stage.share * 2), result):
                result["rows"].append(row)
                write_pages(out, found)
        print(f"         {len(result['rows'])} rows, {result['state']}", flush=True)
        write_pages(out, found)
    bad = [row["what"] for result in found["stages"].values() for row in result["rows"] if row.get("good") is False]
    unfinished = [name for name, result in found["stages"].items() if result["state"] != "done"]
    print(f"{out}: {len(bad)} rows are not good{': ' * bool(bad)}{'; '.join(bad)}")
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}")
    return 1 if bad or unfinished else 0


def about(pretend: bool) -> dict[str, Any]:
    import torch

    name = "a CPU that pretends" if pretend else torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    facts = {"date": date.today().isoformat(), "torch": torch.__version__, "commit": commit.stdout.strip()}
    if not pretend:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"cuda": torch.version.cuda, "memory_gb": properties.total_memory / 1e9}
    return {"gpu": name, "cores": len(os.sched_getaffinity(0)), **facts, "stages": {}}


def rows_of(name: str, stage: Stage, pretend: bool, limit: float, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a stage as they come; sets result["state"], and why if it failed. limit: seconds."""
    command = [sys.executable, __file__, "--stage", name, *(["--pretend"] if pretend else [])]
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
    previous = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        for line in process.stdout:
            if line.startswith(ROW):
                yield json.loads(line.removeprefix(ROW))
            else:
                said.append(line.rstrip())
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    result["seconds"] = round(time.monotonic() - began, 1)
    result["state"] = "done" if code == 0 else "stopped: its time was over" if code == -signal.SIGKILL else "failed"
    if result["state"] == "failed":
        result["said"] = said[-20:]


if __name__ == "__main__":
    main()
