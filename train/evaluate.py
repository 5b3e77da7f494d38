"""Is a checkpoint good? Poses, depths and points of held-out sequences against the truth, and against guessing.

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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console

import shards
from shards.splits import Part, shared_places
from shards.writer import atomic_file
from train.bootstrap import is_finite
from train.config import CONFIG_FILE, Precision, data_config, user_path
from train.distributed import World, fail, start_world
from train.guesses import GUESSES, guess_figures, mean_relative_pose
from train.lineage import saved_config, trained_before
from train.loader import Split, worker_count
from train.metrics import scene_figures
from train.page import make_page
from train.pictures import SceneResult, scene_result
from train.prepare import Batch
from train.protocol import Chosen, Protocol, choose
from train.report import METRICS_FILE, read_lines
from train.results import Evaluation, as_json_rows, headline, make_results, remarks, table, verdicts
from train.summary import describe_damage
from train.validate import Figures, predict, scene_name
from vggt import VGGT, VGGTConfig
from vggt.weights import fill, heads_in, read_checkpoint

RESULTS_FILE, PAGE_FILE = "results.json", "report.html"
PROTOCOLS = ("co3d-pose", "co3d-pose-fast")
HEADS = ("camera", "depth", "point")  # those that can be evaluated
IN_GALLERY = 2  # scenes of each kind: best, median, worst


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
    parser.add_argument("--shards", required=True, help="directory made by vggt-prep pack, or its URL")
    parser.add_argument(
        "--checkpoint", required=True, action="append", help="of a run, a file, folder or hub name; can be repeated"
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder that gets results.json and report.html")
    parser.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="fast: 10 sequences a category")
    parser.add_argument("--min-frames", type=int, default=50, help="of a sequence (the protocol's: 50)")
    parser.add_argument("--views", type=int, default=10, help="of a sequence (the protocol's: 10)")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="(the protocol's: test)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    parser.add_argument("--width", type=int, help="pixels of the images (default: as a run's checkpoint was trained)")
    parser.add_argument("--allow-shared-frames", action="store_true", help="that frames to test on are trained on")
    parser.add_argument("--precision", choices=get_args(Precision), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--workers", type=int, help="loader processes a rank (default: one for each core that is left)")
    return parser.parse_args()


def evaluate(arguments: argparse.Namespace, world: World) -> None:
    """Evaluate every checkpoint on the same frames; the main rank prints and writes. Raises ValueError, OSError."""
    labels: list[str] = arguments.checkpoint
    if len(set(labels)) < len(labels):
        raise ValueError(f"--checkpoint: one is given twice: {', '.join(labels)}")
    if arguments.workers is not None and arguments.workers < 0:
        raise ValueError(f"--workers: expected at least 0, found {arguments.workers}")
    shard_set = shards.open(arguments.shards)
    model = load_model(labels[0])
    protocol = Protocol(
        split=arguments.split,
        min_frames=arguments.min_frames,
        views=arguments.views,
        fast=arguments.protocol.endswith("fast"),
        seed=arguments.seed,
        width=(trained_width(labels) or model.config.image_size) if arguments.width is None else arguments.width,
    )
    job = Job(
        split=Split([shard_set], protocol.split),
        chosen=choose(shard_set, protocol),
        precision=arguments.precision or ("bf16" if world.device.type == "cuda" else "fp32"),
        workers=worker_count(arguments.workers, world.local_size),
        world=world,
        mean_pose=mean_relative_pose(shard_set, protocol.views),
    )
    world.from_main(lambda: probe(arguments.out))
    known = world.from_main(lambda: what_is_known(labels, job, protocol.split, arguments.allow_shared_frames))
    checkpoints, guesses, heads, damaged = [], [], {}, Counter[str]()
    for label in labels:
        if label != labels[0]:
            model = load_model(label)
        model.to(world.device)
        figures, guessed, bad = job.evaluate(model)
        checkpoints.append(Evaluation(label, figures))
        heads[label] = list(model.config.heads)
        guesses, damaged = guessed, damaged | bad  # the same for each checkpoint
    if not world.is_main:
        return
    unusable = [f"{c.category}/{c.name}" for c, row in zip(job.chosen, guesses[0].by_scene, strict=True) if not row]
    results = make_results(job.chosen, protocol, checkpoints, guesses, unusable)
    for label, row in results["checkpoints"].items():
        row["heads"] = heads[label]
    results |= {"shards": str(shard_set), "digest": shard_set.digest, "precision": job.precision}
    results["trained_on"] = known
    results["damaged"] = describe_damage([damaged]) if damaged else ""
    gallery = job.gallery(model, checkpoints[-1])
    publish(results, gallery, labels[-1], arguments.out)


def load_model(source: str) -> VGGT:
    """The model of a checkpoint, with those of the heads that can be evaluated that it has.

    Raises ValueError if there is no readable checkpoint, or nothing in it that could be evaluated.
    """
    state, found = read_checkpoint(source)
    heads = tuple(head for head in heads_in(state) if head in HEADS)
    if not heads:
        raise ValueError(f"{source}: has none of the heads {', '.join(HEADS)}: there is nothing to evaluate")
    try:
        config = replace(VGGTConfig.from_dict(found), heads=heads)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with torch.device("meta"):
        model = VGGT(config)
    fill(model, state, source)
    return model.eval()


def what_is_known(labels: list[str], job: Job, split: str, allow_shared_frames: bool) -> str:
    """Why the evaluated sequences may not be new to the checkpoints, as far as can be told; empty if they may be.

    Raises ValueError if the very frames were trained on, unless that is allowed.
    """
    if split == "train":
        return "of the split that is trained on"
    (shard_set,) = job.split.shard_sets
    trained: list[Part] = [(shard_set, "train")]
    unknown: list[str] = []
    for parts, problems in map(trained_before, labels):
        trained, unknown = trained + parts, unknown + problems
    only = {(0, scene.sequence) for chosen in job.chosen for scene in chosen.step.scenes}
    found = shared_places(trained, [(shard_set, split)], only)
    if not allow_shared_frames:
        found.check("--allow-shared-frames")
    return "; ".join([found.words] * found.any + unknown)


def trained_width(sources: list[str]) -> int | None:
    """The width of the images that the first of these checkpoints that the trainer wrote was trained on; None: none."""
    configs = ((saved_config(source), source) for source in sources)
    return next((data_config(config["data"], source).width for config, source in configs if config), None)


def run_of(source: str) -> Path | None:
    """The folder of the run that a checkpoint lies in, if it does."""
    path = Path(source).expanduser().absolute()
    folder = path.parent
    is_run = path.is_file() and folder.name == "checkpoints" and (folder.parent / CONFIG_FILE).is_file()
    return folder.parent if is_run else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is evaluated, and how."""

    split: Split
    chosen: list[Chosen]
    precision: Precision
    workers: int
    world: World
    mean_pose: torch.Tensor

    def evaluate(self, model: VGGT) -> tuple[list[dict[str, Any]], list[Evaluation], Counter[str]]:
        """The figures of each scene; those of guesses; and the damaged frames by file. The same on every rank."""
        mine: list[tuple[Figures, dict[str, Figures]]] = []  # without any where no frame could be used
        bad = Counter[str]()
        my_scenes = self.chosen[self.world.rank :: self.world.size]
        for scene, (raw, batch, predictions) in zip(my_scenes, self._predict(model, my_scenes), strict=True):
            usable = scene_name(raw) == f"{scene.category}/{scene.name}"  # else the loader took another sequence
            figures = scene_figures(predictions, batch) if usable else {}
            mine.append((figures, guess_figures(batch, self.mean_pose) if usable else {}))
            bad.update(raw["bad"])
            self._tell(len(mine))
        by_rank = self.world.gather((mine, bad))
        size = self.world.size
        rows = [by_rank[i % size][0][i // size] for i in range(len(self.chosen))]
        guesses = [Evaluation(name, as_json_rows([guessed.get(name, {}) for _, guessed in rows])) for name in GUESSES]
        return as_json_rows([figures for figures, _ in rows]), guesses, sum((b for _, b in by_rank), Counter())

    def gallery(self, model: VGGT, evaluation: Evaluation) -> list[tuple[str, SceneResult]]:
        """The best, the median and the worst scenes, predicted again: why each is there, and what to draw."""
        picked = pick(evaluation)
        found = []
        for (reason, number), (_, batch, predictions) in zip(
            picked, self._predict(model, [self.chosen[number] for _, number in picked]), strict=True
        ):
            name = f"{self.chosen[number].category}/{self.chosen[number].name}"
            found.append((reason, scene_result(name, predictions, batch)))
        return found

    def _predict(self, model: VGGT, chosen: list[Chosen]) -> Iterator[tuple[dict[str, Any], Batch, dict[str, Any]]]:
        steps = [scene.step for scene in chosen]
        return predict(model, self.split, steps, self.precision, self.world, self.workers)

    def _tell(self, done: int) -> None:
        """How far the main rank is, on a terminal."""
        if self.world.is_main and sys.stderr.isatty():
            total = min(done * self.world.size, len(self.chosen))
            end = "\n" if total == len(self.chosen) else ""
            print(f"\r{total} of {len(self.chosen)} sequences", end=end, file=sys.stderr, flush=True)


def pick(evaluation: Evaluation) -> list[tuple[str, int]]:
    """The scenes to show: what each is an example of, and its number. By poses, or by depth without a camera head."""
    keys = ("rotation_deg", "translation_deg")
    if not any(is_finite(figures.get(keys[0])) for figures in evaluation.by_scene):
        keys = ("depth_abs_rel",)
    errors = {
        number: sum(float(figures[key] or 0) for key in keys)
        for number, figures in enumerate(evaluation.by_scene)
        if all(is_finite(figures.get(key)) for key in keys)
    }
    order = sorted(errors, key=lambda number: errors[number])
    most = min(IN_GALLERY, -(-len(order) // 3))
    middle = (len(order) - most) // 2
    kinds = {"best": order[:most], "worst": order[most:][::-1][:most], "median": order[middle : middle + most]}
    picked: dict[int, str] = {}
    for kind, numbers in kinds.items():
        for number in numbers:
            picked.setdefault(number, kind)
    return [(kind, number) for shown in ("best", "median", "worst") for number, kind in picked.items() if kind == shown]


def probe(out: Path) -> None:
    """Make the folder of the results and try to write there: better now than when all is computed. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
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
            file.write(make_page(results, gallery, shown, read_lines(run / METRICS_FILE) if run else []).encode())
    finally:  # a full disk hides no figure, and whoever reads these no longer loses none
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        console.print(headline(results))
        console.print(table(results))
        for line in [*remarks(results), *verdicts(results)]:
            console.print(line)
    console.print(f"\n{out / PAGE_FILE}: pictures, and scenes to turn; {out / RESULTS_FILE}: all figures")


if __name__ == "__main__":
    main()
