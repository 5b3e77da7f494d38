"""A run in words: what is about to happen, what happened, what the numbers mean, what to do next."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from shards.splits import SharedPlaces
from train.bootstrap import Estimate, paired
from train.checkpoint import BEST, step_file
from train.config import TrainConfig
from train.distributed import World
from train.loader import Split
from train.losses import OBJECTIVE
from train.memory import estimate_memory
from train.metrics import FIGURES, Figure
from train.plan import scenes_per_rank
from train.report import METRICS_FILE, SCENES_FILE, read_lines
from train.validate import best_step, comparable
from vggt import VGGT

# What is told of a validation, of all its figures.
TOLD = (OBJECTIVE, "auc_30", "rotation_deg", "translation_deg", "depth_abs_rel", "points_chamfer")
OBJECTIVE_FIGURE = Figure("objective", "what training minimises", ())


def describe_start(
    config: TrainConfig,
    model: VGGT,
    train: Split,
    val: Split | None,
    validated: SharedPlaces | None,
    world: World,
    workers: int,
) -> str:
    """What is trained on what: a few lines before the first step."""
    counts = {name: [0, 0] for name, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]][0 if parameter.requires_grad else 1] += parameter.numel()
    parts = ", ".join(f"{name} {(t or f) / 1e6:.1f} M{'' if t else ' (frozen)'}" for name, (t, f) in counts.items())
    low, high = config.data.views
    steps = [
        f"{count(scenes_per_rank(config.max_img_per_gpu, views), 'scene')} of {views} views"
        for views in sorted({low, high})
    ]
    held = "nothing (no such split)"
    if val and validated:
        of = f"of {sum(map(len, val.lengths)):,} of the {config.data.val_split} split"
        held = f"{count(validated.tested, 'sequence')} {of}, {validated.words}"
    short = sum(int((lengths < high).sum()) for lengths in train.lengths)
    lines = [
        f"model {config.model.preset}: {parts}",
        *(
            f"data {shard_set}: {count(len(lengths), 'sequence')} of {int(lengths.sum()):,} frames in all"
            + (f", weight {source.weight:g}" if len(config.data.sources) > 1 else "")
            for shard_set, lengths, source in zip(train.shard_sets, train.lengths, config.data.sources, strict=True)
        ),
        *([f"{count(short, 'sequence')} shorter than {high} views: theirs repeat in scenes of more"] if short else []),
        f"validating on {held}",
        f"{count(world.size, 'process', 'processes')} on {world.device.type}, {config.strategy}, {config.precision}, "
        f"{count(workers, 'loader worker')} each",
        f"a step takes {', or '.join(steps)} a process, at most {config.max_img_per_gpu * world.size} images in all, "
        f"in {count(config.accum_steps, 'chunk')}; its shape is drawn anew each time",
        f"memory a process, beside PyTorch itself: {estimate_memory(model, config, world)}",
        f"{config.total_steps:,} steps, validation every {config.val_every:,}, checkpoint every "
        f"{config.checkpoint.every:,}; everything goes to {config.out_dir}",
    ]
    return "\n".join(lines)


def count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def describe_damage(by_rank: list[Counter[str]]) -> str:
    """The files that hold damaged frames, those with the most first."""
    files = sum(by_rank, Counter[str]()).most_common()
    more = f" and {len(files) - 5} more files" if len(files) > 5 else ""
    return ", ".join(f"{file} ({count})" for file, count in files[:5]) + more


def describe_run(config: TrainConfig, out_dir: Path, validated: SharedPlaces | None) -> str:
    """What a finished run achieved, from its metrics.jsonl."""
    lines = read_lines(out_dir / METRICS_FILE)
    trained = [line for line in lines if line["split"] == config.data.train_split]
    if not trained:
        return f"Done: {config.total_steps:,} steps. {out_dir / METRICS_FILE} has none of their losses."
    told = [f"{line[OBJECTIVE]:.3f} (log line of step {line['step']:,})" for line in (trained[0], trained[-1])]
    moved = f"went from {told[0]} to {told[1]}" if len(trained) > 1 else f"was {told[0]}"
    text = ["", f"Done: {config.total_steps:,} steps. The training objective {moved}."]
    validations = comparable(read_lines(out_dir / SCENES_FILE))
    if len(validations) > 1 and validated:
        text += _compare(validations, config, out_dir, validated)
    sheet = f"{out_dir}/contact_sheet.png"
    shown = (
        [f"Look at  {sheet}  (views, predicted and true depth, errors, cameras from above)"]
        if Path(sheet).exists()
        else []
    )
    text += [
        "",
        *shown,
        f"Curves:   tensorboard --logdir {shlex.quote(f'{out_dir}/tensorboard')}",
        f"Weights:  {out_dir}/checkpoints/latest  (python -m vggt shows what it makes of photographs, python -m "
        "train.export lays it over the checkpoint it started from)",
        "",
        *_next_steps(config),
    ]
    return "\n".join(text)


def describe_figures(means: dict[str, float]) -> str:
    """The figures of a validation in a line."""
    told = ((name, FIGURES.get(name, OBJECTIVE_FIGURE)) for name in TOLD if name in means)
    return ", ".join(f"{figure.label} {figure.form.format(means[name])}" for name, figure in told)


def _compare(
    validations: list[dict[str, Any]], config: TrainConfig, out_dir: Path, validated: SharedPlaces
) -> list[str]:
    """The last validation against the first, scene by scene, and which was the best."""
    first, last = validations[0], validations[-1]
    told = sum(len(scene) > 1 for scene in last["scenes"])  # beside its name
    text = [
        f"On {count(told, 'sequence')} of the {config.data.val_split} split, {validated.words}, "
        f"step {first['step']} -> step {last['step']}:"
    ]
    signs = []
    for name in TOLD:
        figure = FIGURES.get(name, OBJECTIVE_FIGURE)
        change = paired(first["scenes"], last["scenes"], name)
        if change is None:
            continue
        before, after, difference = change
        gain = difference.sign if figure.higher_is_better else -difference.sign
        signs.append(gain)
        values = f"{figure.form.format(before)} -> {figure.form.format(after)}"
        text.append(f"  {figure.label}: {values}, {describe_change(difference, figure)}  ({figure.meaning})")
    text.append(_verdict(signs, seen=validated.any))
    if any(None in scene.values() for scene in last["scenes"]):
        text.append("Some of the last predictions or losses are not finite: look at the log above.")
    best, link = best_step(validations, config.checkpoint.best), out_dir / "checkpoints" / BEST
    if best == first["step"] == 0:
        text.append(
            f"By {config.checkpoint.best}, no validation was better than the first: keep what you started from."
        )
    elif best is not None and best != last["step"] and link.resolve() == step_file(link.parent, best).resolve():
        text.append(f"By {config.checkpoint.best}, step {best} was the best: {link}")
    return text


def describe_change(difference: Estimate, figure: Figure) -> str:
    """A difference in a figure in words, against its noise."""
    if difference.low is None or difference.high is None:
        return f"too few scenes ({difference.scenes}) to tell from noise"
    low, high = (figure.form.format(value) for value in (difference.low, difference.high))
    interval = f"95% interval of the change {low} to {high}"
    if not difference.sign:
        return f"no change beyond the noise ({interval})"
    better = (difference.sign > 0) == figure.higher_is_better
    return f"{'better' if better else 'WORSE'} beyond the noise ({interval})"


def _verdict(signs: list[int], *, seen: bool) -> str:
    better, worse = signs.count(1), signs.count(-1)
    if not better and not worse:
        return "Nothing changed beyond the noise: train for longer, or validate on more scenes (data.val_scenes)."
    if not worse:
        places = "places that it has seen, or may have: new ones may differ" if seen else "scenes that it has not seen"
        return f"It got better, on {places}."
    if not better:
        return "It got worse: try fewer steps, a lower optim.lr, or more sequences."
    return f"{better} of these figures got better, {worse} got worse: compare the curves, and see checkpoint.best."


def _next_steps(config: TrainConfig) -> list[str]:
    if config.init is None:
        return [
            "This was a model from scratch: it shows that everything works, not what VGGT can do. Next:",
            "  your data, if this was not it: make finetune CO3D_DIR=<co3d> CO3D_ANNOTATION_DIR=<annotations>",
            f"  VGGT itself, on this data:     make finetune SHARDS={shlex.quote(config.data.sources[0].path)} "
            "INIT=<the published checkpoint>",
        ]
    return ["Next: more steps (ARGS='max_steps=...'), or more data; stop when the figures above stop improving."]
