"""Proof that training works: on scenes it has not seen, against baselines; and on a single scene, to the end.

    python bench/proof.py heldout --out data/proof            renders, packs, fine-tunes, evaluates: minutes on 2 cores
    python bench/proof.py heldout --out data/scratch --scratch   the same from random weights: 20 minutes
    python bench/proof.py finetune --out data/finetune       three ways: what each gains and forgets; 15 minutes
    python bench/proof.py walks --out data/walks             views that overlap against views at random; 25 minutes
    python bench/proof.py overfit --shards data/co3d-mini     overfits 10 views of a capture: 7 minutes

heldout fine-tunes vggt-nano on rendered scenes of a family that it has not seen, or trains the small VGGT of proof.yaml
from scratch, and compares it with what it started from and with the best guess on held-out ones. overfit uses the first
sequence of the first category of a shard set's train split. Each says what was reached and what was not; the exit
status is 1 if something was not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from finetuning import finetune
from walks import walks

import shards
from train.config import load_config
from train.data.plan import DataState, Scene, Step, StepShape
from train.data.scenes import load_step
from train.data.split import Split
from train.engine.optim import make_optimizer, set_lr
from train.engine.settings import TrainConfig
from train.engine.step import train_step
from train.evaluation.metrics import METRICS, scene_metrics
from train.objective.losses import OBJECTIVE
from train.objective.targets import prepare
from train.report.words import comparison_line
from train.runtime.distributed import World
from vggt import VGGT, preset
from vggt.weights import write_folder

BIN = Path(sys.executable).parent
CONFIGS = Path(__file__).parents[1] / "train" / "configs"
# All of these must be better than those of the best baseline, beyond the noise.
HELDOUT = ("auc_30", "rotation_deg", "translation_deg", "depth_abs_rel")
OVERFIT = {"depth_abs_rel": 0.05, "auc_30": 0.9}  # at most; at least
HEADLINE_METRICS = (*OVERFIT, "depth_abs_rel_raw")


@dataclass(frozen=True)
class Plan:
    config: Path
    family: str
    scenes: int
    steps: int


FRAMES = 24  # of a scene
NANO = Plan(CONFIGS / "nano.yaml", "walk", scenes=200, steps=200)
SCRATCH = Plan(CONFIGS / "proof.yaml", "turntable", scenes=400, steps=3000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    heldout_parser = commands.add_parser("heldout", help="held-out rendered scenes, against baselines")
    heldout_parser.add_argument("--out", type=Path, required=True, help="folder for scenes, shards, run and report")
    heldout_parser.add_argument("--scratch", action="store_true", help="from random weights instead of vggt-nano")
    heldout_parser.add_argument("--scenes", type=int, help=f"default: {NANO.scenes}, or {SCRATCH.scenes} from scratch")
    heldout_parser.add_argument("--steps", type=int, help=f"default: {NANO.steps}, or {SCRATCH.steps} from scratch")
    finetune_parser = commands.add_parser("finetune", help="three ways to fine-tune: what they gain and forget")
    finetune_parser.add_argument("--out", type=Path, required=True, help="folder for scenes, shards, runs and reports")
    finetune_parser.add_argument("--seed", type=int, default=0, help="of training")
    walks_parser = commands.add_parser("walks", help="views that overlap against views at random")
    walks_parser.add_argument("--out", type=Path, required=True, help="folder for scenes, shards, runs and reports")
    walks_parser.add_argument("--seed", type=int, default=0, help="of training")
    overfit_parser = commands.add_parser("overfit", help="10 views of one capture")
    overfit_parser.add_argument("--shards", required=True, help="directory made by vggt-prep pack, or its URL")
    overfit_parser.add_argument("--steps", type=int, default=530)
    arguments = parser.parse_args()
    try:
        if arguments.command == "heldout":
            plan = SCRATCH if arguments.scratch else NANO
            plan = replace(plan, scenes=arguments.scenes or plan.scenes, steps=arguments.steps or plan.steps)
            reached = heldout(arguments.out.resolve(), plan)
        elif arguments.command == "finetune":
            reached = finetune(arguments.out.resolve(), call, arguments.seed)
        elif arguments.command == "walks":
            reached = walks(arguments.out.resolve(), call, arguments.seed)
        else:
            reached = overfit(arguments.shards, arguments.steps)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if reached else 1)


def heldout(out: Path, plan: Plan) -> bool:
    """Whether the trained model beats the best baseline in all of HELDOUT on the scenes of the test split."""
    captures, packed, run = (out / name for name in ("captures", "shards", "run"))
    began = time.monotonic()
    rendered = ("--scenes", plan.scenes, "--frames", FRAMES, "--family", plan.family, "--short-side", 150, "--seed", 1)
    call("vggt-prep", "synth", "--out", captures, *rendered)
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    call("vggt-prep", "pack", *source, "--out", packed)
    overrides = (f"data.shards={packed}", f"out_dir={run}", f"max_steps={plan.steps}")
    config = load_config(plan.config, list(overrides))
    start = config.init or untrained(out / "untrained", config)
    call("python", "train/main.py", "--config", plan.config, *overrides)
    trained = run / "checkpoints" / "latest"
    protocol = ("--min-frames", FRAMES, "--width", config.data.width)
    checkpoints = ("--checkpoint", start, "--checkpoint", trained)
    call("python", "-m", "train.evaluate", "--shards", packed, *checkpoints, *protocol, "--out", out / "report")
    results = json.loads((out / "report" / "results.json").read_text())
    print(f"\nLearning proof, {(time.monotonic() - began) / 60:.1f} minutes:")
    reached = True
    for name in HELDOUT:
        compared = [c for c in results["against_baseline"] if (c["metric"], c["after"]) == (name, str(trained))]
        if not compared:
            raise ValueError(f"no prediction of the trained model has a finite {name}")
        found = compared[0]
        reached &= found["gain"] == 1
        verdict = "reached" if found["gain"] == 1 else "NOT REACHED"
        print(f"  {verdict}: {found['before']} -> trained, {comparison_line(found)}")
    return reached


def untrained(folder: Path, config: TrainConfig) -> Path:
    """The model as the trainer starts from scratch."""
    torch.manual_seed(config.seed)
    model = VGGT(preset(config.model.preset, heads=config.loss.heads))
    write_folder(folder, model.state_dict(), asdict(model.config))
    return folder


def call(program: str, *arguments: object) -> None:
    """A command of this environment, as a user would type it."""
    print(f"$ {program} {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([str(BIN / program), *map(str, arguments)], check=True, cwd=CONFIGS.parents[1])


def overfit(location: str, steps: int) -> bool:
    """Whether a small model overfits 10 fixed views: with a broken gradient, normalization or convention it cannot."""
    config = load_config(SCRATCH.config, ["optim.lr=5e-4", f"max_steps={steps}"])
    split = Split([shards.open(location)], "train")
    frames = tuple(range(0, int(split.lengths[0][0]), max(1, int(split.lengths[0][0]) // 10)))[:10]
    scene = Scene(0, 0, frames, None)
    batch = load_step(split, Step(StepShape(len(frames), 84, 112), (scene,), DataState(1, ())))
    print(f"{batch['keys'][0][0]} and {len(frames) - 1} other views of that sequence, {steps} steps", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = prepare(batch, device, with_points=False)
    torch.manual_seed(config.seed)
    model = VGGT(preset(config.model.preset, heads=config.loss.heads, head_chunk=None)).to(device)
    metrics = overfit_views(model, inputs, config, World(0, 1, 1, device))
    reached = True
    for name, limit in OVERFIT.items():
        metric = METRICS[name]
        good = metrics[name] > limit if metric.higher_is_better else metrics[name] < limit
        reached &= good
        value, bound = metric.form.format(metrics[name]), metric.form.format(limit)
        print(f"  {'reached' if good else 'NOT REACHED'}: {metric.label} {value} (limit {bound})")
    return reached


def overfit_views(model: VGGT, batch: dict[str, torch.Tensor], config: TrainConfig, world: World) -> dict[str, float]:
    """Train on one batch with the trainer's own step; the metrics at the end."""
    optimizer = make_optimizer(model, config.optim)
    began = time.monotonic()
    for step in range(config.total_steps):
        set_lr(optimizer, config.optim, step, config.total_steps)
        outcome = train_step(model.train(), optimizer, batch, config, world)
        if (step + 1) % 50 == 0 or step + 1 == config.total_steps:
            with torch.no_grad():
                metrics = scene_metrics(model.eval()(batch["images"]), batch)
            shown = ", ".join(
                f"{METRICS[name].label} {METRICS[name].form.format(metrics[name])}" for name in HEADLINE_METRICS
            )
            objective, seconds = float(outcome.terms[OBJECTIVE]), time.monotonic() - began
            print(f"step {step + 1}, {seconds:.0f} s: objective {objective:.3f}, {shown}", flush=True)
    return metrics


if __name__ == "__main__":
    main()
