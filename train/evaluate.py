"""Is a checkpoint good? Poses, depths and points of held-out sequences against the truth, and against baselines.

    python -m train.evaluate --shards data/co3d --checkpoint runs/finetune/checkpoints/best --out eval
    python -m train.evaluate --shards data/co3d --checkpoint vggt-1b.pt --checkpoint vggt-mine.pt --out eval
    torchrun --nproc_per_node=8 -m train.evaluate --shards data/co3d --checkpoint facebook/VGGT-1B --out eval

The protocol is the one of VGGT's camera poses on Co3D: of each test sequence of at least 50 frames 10 random ones, all
45 pairs of these, pooled by category; the mean over categories. The first checkpoint is what others are compared with,
the last one is what report.html shows. It prints a table, and writes results.json and report.html into --out.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

import shards
from shards.splits import Part, shared_places
from shards.writer import atomic_file
from train.config import user_path
from train.data.split import Split
from train.data.workers import worker_count
from train.engine.folder import run_of
from train.engine.lineage import began_from, trained_before, trained_width
from train.evaluation.baselines import mean_relative_pose
from train.evaluation.evaluator import Evaluator
from train.evaluation.metrics import METRICS
from train.evaluation.protocol import Protocol, choose
from train.evaluation.results import make_results
from train.evaluation.scene_result import SceneResult
from train.report.logger import METRICS_FILE
from train.report.page import make_page
from train.report.tables import overlap_table, table
from train.report.words import describe_damage, headline, remarks, verdicts
from train.runtime.distributed import World, fail, start_world
from train.runtime.jsonl import read_jsonl
from train.runtime.precision import Precision
from vggt import VGGT, VGGTConfig
from vggt.weights import fill, heads_in, read_checkpoint

RESULTS_FILE, PAGE_FILE = "results.json", "report.html"
PROTOCOLS = ("co3d-pose", "co3d-pose-fast")


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        with start_world(tf32=arguments.precision != "fp32") as world:
            evaluate(arguments, world)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells expect it of a Ctrl-C


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shards", required=True, action="append", help="directory made by vggt-prep pack, or its URL; can be repeated"
    )
    parser.add_argument(
        "--checkpoint", required=True, action="append", help="of a run, a file, folder or hub name; can be repeated"
    )
    parser.add_argument("--with-init", action="store_true", help="also, and first, what the run of the last began from")
    parser.add_argument("--out", type=user_path, required=True, help="folder that gets results.json and report.html")
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="fast: 10 sequences a category")
    parser.add_argument("--min-frames", type=int, default=50, help="of a sequence (the protocol's: 50)")
    parser.add_argument("--views", type=int, default=10, help="of a sequence (the protocol's: 10)")
    parser.add_argument(
        "--views-from",
        choices=("uniform", "overlap"),
        default="uniform",
        help="how frames are drawn (uniform); overlap: each sees some of the same as one before",
    )
    parser.add_argument("--split", choices=("train", "test"), default="test", help="(the protocol's: test)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--width", type=int, help="pixels of the images (default: as a run's checkpoint was trained)")
    parser.add_argument("--allow-shared-frames", action="store_true", help="that frames to test on are trained on")
    parser.add_argument("--precision", choices=get_args(Precision), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--workers", type=int, help="loader processes a rank (default: one for each core that is left)")
    return parser.parse_args()


def evaluate(arguments: argparse.Namespace, world: World) -> None:
    """Evaluate every checkpoint on the same frames; the main rank prints and writes. Raises ValueError, OSError."""
    labels: list[str] = [*(began_from(arguments.checkpoint[-1]) if arguments.with_init else ()), *arguments.checkpoint]
    for option, given in (("--checkpoint", labels), ("--shards", arguments.shards)):
        if len(set(given)) < len(given):
            raise ValueError(f"{option}: one is given twice: {', '.join(given)}")
    if arguments.workers is not None and arguments.workers < 0:
        raise ValueError(f"--workers: expected at least 0, found {arguments.workers}")
    shard_sets = [shards.open(place) for place in arguments.shards]
    if len({shard_set.digest for shard_set in shard_sets}) < len(shard_sets):
        raise ValueError(f"--shards: two of them hold the same: {', '.join(arguments.shards)}")
    model = load_model(labels[0])
    widths = {label: width for label in labels if (width := trained_width(label)) is not None}
    protocol = Protocol(
        split=arguments.split,
        min_frames=arguments.min_frames,
        views=arguments.views,
        views_from=arguments.views_from,
        fast=arguments.protocol.endswith("fast"),
        seed=arguments.seed,
        width=next(iter(widths.values()), model.config.image_size) if arguments.width is None else arguments.width,
    )
    evaluator = Evaluator(
        split=Split(shard_sets, protocol.split),
        sequences=choose(shard_sets, protocol),
        precision=arguments.precision or ("bf16" if world.device.type == "cuda" else "fp32"),
        workers=worker_count(arguments.workers, world.local_size),
        world=world,
        mean_pose=mean_relative_pose(shard_sets, protocol.views),
    )
    world.from_main(lambda: probe(arguments.out))
    known = world.from_main(lambda: what_is_known(labels, evaluator, protocol.split, arguments.allow_shared_frames))
    checkpoints, baselines, heads, damaged = [], [], {}, Counter[str]()
    for label in labels:
        if label != labels[0]:
            model = load_model(label)
        evaluation, baselines, bad = evaluator.evaluate(model.to(world.device), label)
        checkpoints.append(evaluation)
        heads[label] = list(model.config.heads)
        damaged |= bad  # the same for each checkpoint, as the baselines are
    if not world.is_main:
        return
    results = make_results(evaluator.sequences, protocol, checkpoints, baselines, evaluator.metric)
    for label, row in results["checkpoints"].items():
        row["heads"] = heads[label]
    results |= {"shards": {str(shard_set): shard_set.digest for shard_set in shard_sets}}
    results |= {"precision": evaluator.precision, "trained_on": known}
    results["trained_at_other_width"] = {label: width for label, width in widths.items() if width != protocol.width}
    results["damaged"] = describe_damage([damaged]) if damaged else ""
    gallery = evaluator.gallery(model, checkpoints[-1])
    publish(results, gallery, labels[-1], arguments.out)


def load_model(source: str) -> VGGT:
    """The model of a checkpoint, with those of its heads that can be evaluated.

    Raises ValueError if there is no readable checkpoint, or nothing in it that could be evaluated.
    """
    state, values = read_checkpoint(source)
    measured = {head for metric in METRICS.values() for head in metric.heads}
    heads = tuple(head for head in heads_in(state) if head in measured)
    if not heads:
        raise ValueError(f"{source}: has none of the heads {', '.join(sorted(measured))}: there is nothing to evaluate")
    try:
        config = replace(VGGTConfig.from_dict(values), heads=heads)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with torch.device("meta"):
        model = VGGT(config)
    fill(model, state, source)
    return model.eval()


def what_is_known(labels: list[str], evaluator: Evaluator, split: str, allow_shared_frames: bool) -> str:
    """Why the evaluated sequences may not be new to the checkpoints, as far as can be told; empty if they may be.

    Raises ValueError if the very frames were trained on, unless that is allowed, or the split to train on is asked for.
    """
    shard_sets = evaluator.split.shard_sets
    trained: list[Part] = []
    unknown: list[str] = []
    for parts, problems in map(trained_before, labels):
        trained, unknown = trained + parts, unknown + problems
    only = {(scene.source, scene.sequence) for sequence in evaluator.sequences for scene in sequence.step.scenes}
    tested = [(shard_set, split) for shard_set in shard_sets]
    shared = shared_places(trained, tested, only)
    if not allow_shared_frames and split != "train":
        # What does not say it may well have been trained on these sets.
        supposed = [(shard_set, "train") for shard_set in shard_sets]
        (shared_places(trained + supposed, tested, only) if unknown else shared).check("--allow-shared-frames")
    return "; ".join([shared.words] * shared.any + [*dict.fromkeys(unknown)])


def probe(out: Path) -> None:
    """Make the folder of the results and try to write there: better now than when all is computed.

    Raises OSError, and ValueError if files of these names are the user's own.
    """
    out.mkdir(parents=True, exist_ok=True)
    if (out / RESULTS_FILE).exists() or (out / PAGE_FILE).exists():
        try:
            json.loads((out / RESULTS_FILE).read_bytes())["checkpoints"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{out}: holds a {RESULTS_FILE} or {PAGE_FILE} that is of no evaluation; give another --out"
            ) from error
    with atomic_file(out / f".{RESULTS_FILE}") as file:
        file.write(b"{}")
    (out / f".{RESULTS_FILE}").unlink()


def publish(results: dict[str, Any], gallery: list[tuple[str, SceneResult]], shown: str, out: Path) -> None:
    """Print the table and what it means; write results.json and report.html."""
    try:
        with atomic_file(out / RESULTS_FILE) as file:
            file.write(json.dumps(results, indent=1).encode())
        run = run_of(shown)
        with atomic_file(out / PAGE_FILE) as file:
            file.write(
                make_page(results, gallery, shown, read_jsonl(run / METRICS_FILE, "split") if run else []).encode()
            )
    finally:  # neither a full disk nor a closed terminal may lose the results
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        console.print(headline(results))
        console.print(table(results))
        if any(results["by_overlap"].values()):
            console.print(overlap_table(results))
        for line in [*remarks(results), *verdicts(results)]:
            console.print(line)
    console.print(f"\n{out / PAGE_FILE}: pictures and 3D scenes; {out / RESULTS_FILE}: all metrics")


if __name__ == "__main__":
    main()
