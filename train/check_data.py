"""Look at what training would load: the plan, how fast it comes, a batch, and whether its views fit each other.

    python -m train.check_data --config train/configs/default.yaml data.shards=data/co3d
    python -m train.check_data data.shards=data/mine data.width=252 --steps 50 --out look

Nothing is trained, and no weights are needed. The cross-view check unprojects the first view of each scene with its
depth and projects the points into the others: where both know a depth, right cameras make them agree.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

import shards
from shards import drawing
from shards.geometry import AGREEMENT, DepthView, agreement
from train.config import load_config, user_path
from train.data.batches import TrainingSteps
from train.data.loader import stream
from train.data.plan import TrainingPlan
from train.data.split import Split, stored_neighbors
from train.data.workers import worker_count
from train.engine.settings import TrainConfig
from train.report.drawn_views import draw_pairs, drawn_pairs, median
from train.report.pictures import save_picture
from train.report.words import count, describe_damage

PLANNED, SHOWN, MAX_VIEWS, ROW_HEIGHT = 8, 4, 8, 150  # steps in the table; scenes, views and pixels on the sheet
DOUBTFUL = 0.4  # below that fraction of agreeing pixels, something is probably wrong
STRANGERS = 0.1  # views that overlap less
SHEET_FILE, VIEWS_FILE = "data.png", "views.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of a run; without it the defaults")
    parser.add_argument("--steps", type=int, default=20, help="batches to load (default 20)")
    parser.add_argument(
        "--out", type=user_path, default=Path("."), help=f"folder for {SHEET_FILE} and {VIEWS_FILE} (here)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.shards=DIR data.workers=4")
    arguments = parser.parse_intermixed_args()
    try:
        # Nothing is frozen here that could lack its weights.
        config = load_config(arguments.config, ["model.freeze=[]", *arguments.overrides])
        if arguments.steps < 1 or not config.data.sources:
            raise ValueError("expected data.shards=DIRECTORY, and --steps of at least 1")
        show(config, arguments.steps, arguments.out)
    except (ValueError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells expect it of a Ctrl-C


def show(config: TrainConfig, steps: int, out: Path) -> None:
    """Print the plan, load `steps` batches, and draw the first of them into `out`."""
    split = Split([shards.open(source.path) for source in config.data.sources], config.data.train_split)
    plan = TrainingPlan(
        config=config.data,
        lengths=split.lengths,
        neighbors=stored_neighbors(split, config.data.samplings),
        seed=config.seed,
        max_img_per_gpu=config.max_img_per_gpu,
        world_size=1,
    )
    for shard_set, lengths in zip(split.shard_sets, split.lengths, strict=True):
        print(f"{shard_set}: {count(len(lengths), 'sequence')} of {int(lengths.min())} to {int(lengths.max())} frames")
        short = int((lengths < config.data.views[1]).sum())
        if short:
            print(f"{short:,} of them have fewer frames than the {config.data.views[1]} of data.views: some repeat")
    print_plan(plan)
    workers = worker_count(config.data.workers, 1)
    checks: dict[str, float] = {}
    first, waited, images, size = None, 0.0, 0, 0
    damaged: Counter[str] = Counter()
    began = time.perf_counter()
    batches = stream(
        lambda last: TrainingSteps(split, plan, 0, last or plan.start(), steps), range(steps), workers, False
    )
    for batch in batches:
        if first is None:
            first, waited = batch, time.perf_counter() - began
            began = time.perf_counter()  # of the others
        else:
            images += batch["images"].shape[:2].numel()
            size += sum(batch[name].nbytes for name in ("images", "depth"))
        damaged.update(batch["bad"])
        checks |= check_batch(batch)
    assert first is not None
    rate = (
        f", then {images / (time.perf_counter() - began):,.0f} images/s of {size / images / 1e6:.2f} MB"
        if images
        else ""
    )
    print(f"\n{workers} worker(s): first batch after {waited:.1f} s{rate} (with the check below)")
    if damaged:
        print(f"damaged and replaced: {describe_damage([damaged])}")
    print_checks(checks)
    out.mkdir(parents=True, exist_ok=True)
    save_picture(out / SHEET_FILE, draw_batch(first))
    print(
        f"{out / SHEET_FILE}: views and depths of the first step's scenes, cropped as they are trained on "
        f"(at most {SHOWN} scenes and {MAX_VIEWS} views of each)"
    )
    drawn = drawn_pairs(split, plan)
    save_picture(out / VIEWS_FILE, draw_pairs(drawn))
    for sampling, (overlaps, _) in drawn.items():
        print(f"{sampling:>8} sampling: two views overlap by {describe_overlaps(overlaps)}")
    print(f"{out / VIEWS_FILE}: what views of a scene have in common, by data.sampling")
    if median(drawn["uniform"][0]) < STRANGERS and "uniform" in config.data.samplings:
        first = "" if "overlap" in drawn else " (vggt-prep pairs SET first)"
        print(f"Most views that are drawn at random see nearly nothing of each other: try data.sampling=overlap{first}")


def describe_overlaps(overlaps: np.ndarray) -> str:
    if not len(overlaps):
        return "nothing: scenes have one view"
    low, middle, high = np.percentile(overlaps, [10, 50, 90])
    return f"{middle:.0%} (median; 80% of the pairs by {low:.0%} to {high:.0%})"


def print_plan(plan: TrainingPlan) -> None:
    table = Table("step", "views", "height x width", "scenes", "sequence: frames of the first one")
    state = plan.start()
    for _ in range(PLANNED):
        step = plan.step(state, 0)
        scene, shape = step.scenes[0], step.shape
        frames = " ".join(map(str, scene.frames))
        drawn = (str(state.step), str(shape.views), f"{shape.height} x {shape.width}", str(len(step.scenes)))
        table.add_row(*drawn, f"{scene.sequence}: {frames}")
        state = step.after
    Console(markup=False, emoji=False).print(table)


def check_batch(batch: dict[str, Any]) -> dict[str, float]:
    """Of each scene with depth, by its first key: the fraction of pixels at which the views agree with the first."""
    found = {}
    depths = (batch["depth"].double() * batch["depth_scale"][..., None, None]).numpy()
    for keys, depth, extrinsics, intrinsics in zip(
        batch["keys"], depths, batch["extrinsics"].numpy(), batch["intrinsics"].numpy(), strict=True
    ):
        fraction = cross_view_agreement(depth, extrinsics, intrinsics)
        if fraction is not None:
            found[keys[0]] = fraction
    return found


def cross_view_agreement(depth: np.ndarray, extrinsics: np.ndarray, intrinsics: np.ndarray) -> float | None:
    """Of view 0's points that fall where another view has a depth, the fraction whose depth it confirms.

    depth [S, H, W] (0: unknown), extrinsics [S, 3, 4], intrinsics [S, 3, 3]. None without depth in view 0 and another
    one; NaN if there is depth, but no point of view 0 falls where another has some, as with depths in a wrong unit.
    Correct data does not reach 1, due to occlusion; excluding points that seem occluded would let wrong cameras
    pass.
    """
    if not (depth[0] > 0).any() or not (depth[1:] > 0).any():
        return None
    first, *others = map(DepthView, depth, extrinsics, intrinsics)
    compared, agreeing = np.sum([agreement(first, other) for other in others], axis=0)
    return agreeing / compared if compared else math.nan


def print_checks(checks: dict[str, float]) -> None:
    if not checks:
        print("cross-view check: not possible, as no scene has depth in two views")
        return
    known = {key: fraction for key, fraction in checks.items() if not math.isnan(fraction)}
    apart = len(checks) - len(known)
    if known:
        fractions = np.array(list(known.values()))
        print(
            f"cross-view check of {len(known)} scenes: points of the first view agree with the others' depth to "
            f"{AGREEMENT:.0%} at {np.median(fractions):.0%} of the pixels (median; 10% of the scenes are below "
            f"{np.percentile(fractions, 10):.0%}); what one view hides from the other cannot agree"
        )
        worst = sorted(known, key=lambda key: known[key])[:3]
        print("  least: " + ", ".join(f"{key} {known[key]:.0%}" for key in worst))
    if apart:
        print(f"In {apart} of {len(checks)} scenes no point of the first view falls where another view has a depth.")
    if not known or np.median(list(known.values())) < DOUBTFUL:
        print("  Cameras, depth unit or intrinsics are probably wrong: look at vggt-prep preview.")
    elif apart > len(known):
        print("  Do their views show different parts? If not, depth unit or cameras are wrong: see vggt-prep preview.")


def draw_batch(batch: dict[str, Any]) -> np.ndarray:
    """Images above depths, some scenes of a batch: [H, W, 3]."""
    blocks = []
    for i in range(min(SHOWN, len(batch["keys"]))):
        images = batch["images"][i, :MAX_VIEWS].numpy().transpose(0, 2, 3, 1)
        depth = batch["depth"][i, :MAX_VIEWS].float().numpy() * batch["depth_scale"][i, :MAX_VIEWS, None, None].numpy()
        near, far = drawing.near_and_far(depth)
        width = round(ROW_HEIGHT * images.shape[2] / images.shape[1])
        rows = [
            drawing.row(
                [cv2.resize(np.ascontiguousarray(cell), (width, ROW_HEIGHT), interpolation=kind) for cell in cells]
            )
            for cells, kind in ((images, cv2.INTER_AREA), (drawing.color_depth(depth, near, far), cv2.INTER_NEAREST))
        ]
        title = drawing.text(f"{batch['keys'][i][0].rpartition('/')[0]}, {images.shape[1]} x {images.shape[2]}", 600)
        body = drawing.stack([title, *rows])
        blocks.append(np.concatenate([body, drawing.scale_bar(len(body), near, far)], axis=1))
    return drawing.stack(blocks)


if __name__ == "__main__":
    main()
