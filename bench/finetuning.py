"""Three ways to fine-tune vggt-nano on few scenes: what each gains on them, and what it forgets.

Heads only, adapters (LoRA), everything; the last two also with scenes of the old family in between (replay). The old
family is the one that nano was trained on, the new one is not. And a run that is deliberately bad, which the guard must
tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import load_config
from train.engine.folder import CHECKPOINTS
from train.evaluation.comparison import Comparison, compare
from train.evaluation.metrics import METRICS
from train.report.words import describe_change
from train.runtime.jsonl import read_jsonl

CONFIG = Path(__file__).parents[1] / "train" / "configs" / "nano.yaml"
NEW, OLD = "walk", "rooms"
SCENES, FRAMES, VIEWS, STEPS = 160, 24, 8, 120
# The roles of the splits are exchanged: one scene in eight is trained on, 20 in all, and 140 are held out.
SWAPPED = ["data.train_split=test", "data.val_split=train", "data.val_scenes=24", "data.workers=1"]
LORA = [
    'model.freeze=["*aggregator*"]',
    'model.lora={names: ["aggregator.*blocks.*"], rank: 16, alpha: 16}',
    'optim.lr_factors=[{names: "*lora_*", factor: 10}]',
]
WAYS: dict[str, tuple[list[str], bool]] = {  # settings, and whether old scenes are mixed in
    "heads": (['model.freeze=["*aggregator*"]'], False),
    "lora": (LORA, False),
    "all": ([], False),
    "lora + replay": (LORA, True),
    "all + replay": ([], True),
}
SHOWN = {"auc_30": "AUC@30", "rotation_deg": "rotation", "depth_abs_rel": "depth AbsRel"}
BAD_FACTOR, BAD_STEPS = 30, 200

Call = Callable[..., None]
Scenes = list[dict[str, Any]]  # the metrics of each


def finetune(out: Path, call: Call, seed: int) -> bool:
    """Whether adapters gain on the new family, forget less than everything at no smaller gain, and the guard tells the
    bad run. call: runs a command. Writes to `out`.
    """
    sets = {family: render(out, family, call) for family in (NEW, OLD)}
    folder, runs = out / f"seed-{seed}", dict[str, Path]()
    for way, (settings, replay) in WAYS.items():
        runs[way] = folder / way.replace(" + ", "-")
        shards = f"[{{path: {sets[NEW]}}}, {{path: {sets[OLD]}}}]" if replay else sets[NEW]
        train(call, runs[way], seed, shards, *settings, f"max_steps={STEPS}", f"val_every={STEPS}", "val_at=[]")
    scenes = {family: evaluate(folder / f"on-{family}", place, runs, call) for family, place in sets.items()}
    told = guard_tells(folder / "bad", sets[NEW], seed, call)
    print_table(scenes)
    reached = {
        "lora gains on the new family": all(c.gain == 1 for c in changes(scenes[NEW], "nano", "lora").values()),
        "lora gains no less than all": all(c.gain >= 0 for c in changes(scenes[NEW], "all", "lora").values()),
        "lora forgets less than all": max(c.gain for c in changes(scenes[OLD], "all", "lora").values()) == 1
        and min(c.gain for c in changes(scenes[OLD], "all", "lora").values()) >= 0,
        f"the guard tells a learning rate {BAD_FACTOR} times as high within {BAD_STEPS} steps": told,
    }
    for what, is_so in reached.items():
        print(f"  {'reached' if is_so else 'NOT REACHED'}: {what}")
    for family in (NEW, OLD):
        for change in changes(scenes[family], "all", "lora").values():
            print(f"  on {family}, all -> lora: {described(change)}")
    return all(reached.values())


def render(out: Path, family: str, call: Call) -> Path:
    captures, packed = out / f"{family}-captures", out / family
    sizes = ("--scenes", SCENES, "--frames", FRAMES, "--short-side", 60, "--seed", 11)
    call("vggt-prep", "synth", "--out", captures, "--family", family, *sizes)
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    call("vggt-prep", "pack", *source, "--out", packed)
    return packed


def train(call: Call, run: Path, seed: int, shards: Path | str, *settings: str) -> None:
    places = (f"data.shards={shards}", f"out_dir={run}", f"seed={seed}")
    call("python", "train/main.py", "--config", CONFIG, *places, *SWAPPED, *settings)


def evaluate(out: Path, shards: Path, runs: dict[str, Path], call: Call) -> dict[str, Scenes]:
    """The metrics of nano and of every way on held-out scenes."""
    # Ten scenes of each category: thirty.
    options = (
        "--split",
        "train",
        "--protocol",
        "co3d-pose-fast",
        "--min-frames",
        FRAMES,
        "--views",
        VIEWS,
        "--out",
        out,
    )
    labels = {"nano": "nano"} | {way: str(run / CHECKPOINTS / "latest") for way, run in runs.items()}
    given = [part for label in labels.values() for part in ("--checkpoint", label)]
    call("python", "-m", "train.evaluate", "--shards", shards, *given, *options)
    results = json.loads((out / "results.json").read_text())
    return {way: [scene["metrics"][label] for scene in results["scenes"]] for way, label in labels.items()}


def changes(scenes: dict[str, Scenes], before: str, after: str) -> dict[str, Comparison]:
    found = {name: compare(scenes[before], scenes[after], name) for name in SHOWN}
    return {name: change for name, change in found.items() if change is not None}


def described(change: Comparison) -> str:
    return describe_change(change.metric, change.before, change.after, asdict(change.change))


def print_table(scenes: dict[str, dict[str, Scenes]]) -> None:
    """A row a way: each metric on the new family and on the old one, with the interval of its change."""
    print("\n| way | " + " | ".join(f"{family}: {SHOWN[name]}" for family in (NEW, OLD) for name in SHOWN) + " |")
    print("|---" * (1 + 2 * len(SHOWN)) + "|")
    for way in ("nano", *WAYS):
        cells = []
        for family in (NEW, OLD):
            for name, change in changes(scenes[family], "nano", way).items():
                form = METRICS[name].form.replace(" degrees", "°")
                spread = f" ({form.format(change.change.low)} to {form.format(change.change.high)})"
                cells.append(form.format(change.after) + (spread if way != "nano" else ""))
        print(f"| {way} | {' | '.join(cells)} |")


def guard_tells(run: Path, shards: Path, seed: int, call: Call) -> bool:
    """Whether a run whose learning rate is far too high is called harmful, and stopped, by the guard."""
    rate = BAD_FACTOR * load_config(CONFIG, []).optim.lr
    train(call, run, seed, shards, f"optim.lr={rate}", f"max_steps={BAD_STEPS}", "val_every=50", "guard=stop")
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if line["split"] == "guard"]
    harmful = [line["step"] for line in lines if any(value == -1 for key, value in line.items() if "gain_" in key)]
    ended = lines[-1]["step"]
    print(f"guard: warned at steps {harmful}, ended the run at step {ended}")
    return bool(harmful) and ended < BAD_STEPS
