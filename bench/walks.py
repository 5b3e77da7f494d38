"""Views that see the same against views at random, on walks through corridors: what vggt-nano learns from either."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetuning import CONFIG, SHOWN, changes, described

from train.data.plan import Sampling
from train.engine.folder import CHECKPOINTS
from train.evaluation.metrics import METRICS

SCENES, FRAMES, VIEWS, STEPS = 240, 80, 4, 400
SAMPLINGS: tuple[Sampling, ...] = ("uniform", "overlap")

Call = Callable[..., None]


def walks(out: Path, call: Call, seed: int) -> bool:
    """Whether training by overlap makes rotations and depth better than training at random, of views that overlap.

    call: runs a command. Writes to `out`.
    """
    captures, packed, folder = out / "captures", out / "shards", out / f"seed-{seed}"
    sizes = ("--scenes", SCENES, "--frames", FRAMES, "--short-side", 60, "--seed", 5)
    call("vggt-prep", "synth", "--out", captures, "--family", "corridor", *sizes)
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    call("vggt-prep", "pack", *source, "--out", packed)
    labels = {"nano": "nano"}
    for sampling in SAMPLINGS:
        run = folder / sampling
        settings = (f"data.shards={packed}", f"out_dir={run}", f"seed={seed}", f"data.sampling={sampling}")
        lengths = (f"max_steps={STEPS}", f"val_every={STEPS}", "val_at=[]", "data.workers=1")
        call("python", "train/main.py", "--config", CONFIG, *settings, *lengths)
        labels[f"trained on {sampling}"] = str(run / CHECKPOINTS / "latest")
    found = {drawn: evaluate(folder / f"on-{drawn}", packed, labels, drawn, call) for drawn in SAMPLINGS}
    print("\n| model | " + " | ".join(f"{drawn} views: {SHOWN[name]}" for drawn in SAMPLINGS for name in SHOWN) + " |")
    print("|---" * (1 + len(SAMPLINGS) * len(SHOWN)) + "|")
    for label, place in labels.items():
        means = [found[drawn]["checkpoints"][place]["metrics"] for drawn in SAMPLINGS]
        print(f"| {label} | " + " | ".join(cell(name, row[name]) for row in means for name in SHOWN) + " |")
    first, second = (f"trained on {sampling}" for sampling in SAMPLINGS)
    reached = False
    for drawn in SAMPLINGS:
        scenes = {k: [scene["metrics"][v] for scene in found[drawn]["scenes"]] for k, v in labels.items()}
        compared = changes(scenes, first, second)
        for change in compared.values():
            print(f"  on {drawn} views, {first} -> {second}: {described(change)}")
        if drawn == "overlap":
            reached = all(compared[name].gain == 1 for name in ("rotation_deg", "depth_abs_rel"))
    print(f"  {'reached' if reached else 'NOT REACHED'}: better rotations and depth of views that overlap")
    return reached


def cell(name: str, estimate: dict[str, float]) -> str:
    form = METRICS[name].form.replace(" degrees", "°")
    mean, low, high = (form.format(estimate[key]) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def evaluate(out: Path, shards: Path, labels: dict[str, str], drawn: Sampling, call: Call) -> dict[str, Any]:
    options = ("--min-frames", FRAMES, "--views", VIEWS, "--views-from", drawn, "--width", 56, "--out", out)
    given = [part for label in labels.values() for part in ("--checkpoint", label)]
    call("python", "-m", "train.evaluate", "--shards", shards, *given, *options)
    return json.loads((out / "results.json").read_text())
