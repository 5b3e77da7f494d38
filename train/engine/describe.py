"""A run in words: what is about to happen, what happened, what to do next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shards.splits import SharedPlaces
from train.data.plan import scenes_per_rank
from train.data.split import Split, StoredNeighbors, lonely_frames
from train.engine.checkpoint import BEST, LATEST, step_file, steps_saved
from train.engine.folder import CHECKPOINTS
from train.engine.settings import TrainConfig
from train.engine.traffic import step_traffic
from train.evaluation.bootstrap import MIN_SCENES
from train.evaluation.comparison import compare
from train.evaluation.history import ValidationHistory
from train.objective.losses import OBJECTIVE
from train.report.logger import METRICS_FILE
from train.report.pictures import SHEET_FILE
from train.report.words import HEADLINE_METRICS, count, describe_change, metric_of, run_verdict
from train.runtime.distributed import World
from train.runtime.jsonl import read_jsonl
from vggt.lora import LoraLinear
from vggt.model import VGGT
from vggt.weights import NANO

FEW_SEQUENCES = 500  # to train on, for which adapters are advised


def describe_start(
    config: TrainConfig,
    model: VGGT,
    train: Split,
    neighbors: Sequence[StoredNeighbors | None],
    val: Split | None,
    validated: SharedPlaces | None,
    world: World,
    workers: int,
) -> str:
    """What is trained on what: a few lines before the first step."""
    low, high = config.data.views
    sizes = sorted({low, high})
    steps = [f"{count(scenes_per_rank(config.max_img_per_gpu, views), 'scene')} of {views} views" for views in sizes]
    short = sum(int((lengths < high).sum()) for lengths in train.lengths)
    lines = [
        f"model {config.model.preset}: {_parts(model)}{_adapters(config, model)}",
        *_data(config, train, neighbors),
        *(
            [f"{count(short, 'sequence')} shorter than {high} views: their frames repeat in larger scenes"]
            * bool(short)
        ),
        f"validating on {_validated(config, val, validated)}",
        f"{count(world.size, 'process', 'processes')} on {world.device.type}, {config.strategy}, {config.precision}, "
        f"{count(workers, 'loader worker')} each{_exchange(config, model, world)}",
        f"a step takes {', or '.join(steps)} a process, at most {config.max_img_per_gpu * world.size} images in all, "
        f"in {count(config.accum_steps, 'chunk')}; its shape is drawn again for each step",
        f"{config.total_steps:,} steps, validation every {config.val_every:,}{_early(config)}, checkpoint every "
        f"{config.checkpoint.every:,}; everything goes to {config.out_dir}",
        *_advice(config, train, validated),
    ]
    return "\n".join(lines)


def _early(config: TrainConfig) -> str:
    steps = [str(step) for step in config.val_at if step < config.total_steps and step % config.val_every]
    return f" and at {' and '.join(steps)}" if steps else ""


def _advice(config: TrainConfig, train: Split, validated: SharedPlaces | None) -> list[str]:
    """What may spoil the run, and is easily mended now."""
    lines = []
    sequences = sum(map(len, train.lengths))
    if config.init not in (None, NANO.name) and config.model.lora is None and sequences < FEW_SEQUENCES:
        lines.append(
            f"{count(sequences, 'sequence')} to train on: for fewer than {FEW_SEQUENCES}, adapters do less harm "
            "(RECIPE=lora of make, or --config train/configs/lora.yaml; docs/TRAINING.md)"
        )
    tested = 0 if validated is None else validated.tested
    if config.guard != "off" and tested < MIN_SCENES:
        lines.append(
            f"guard: {count(tested, 'sequence')} to validate on cannot tell harm from noise, {MIN_SCENES} are the least"
        )
    return lines


def _parts(model: VGGT) -> str:
    """The parameters of each module, in millions, and how many of them train."""
    parts = []
    for name, module in model.named_children():
        trained, total = (
            sum(p.numel() for p in module.parameters() if p.requires_grad or not only) / 1e6 for only in (True, False)
        )
        some = f", {trained:.2f} M of them trained"
        all_of_it = trained > 0.99 * total  # a token that only pre-training used is frozen
        parts.append(f"{name} {total:.1f} M" + ("" if all_of_it else some if trained else " (frozen)"))
    return ", ".join(parts)


def _exchange(config: TrainConfig, model: VGGT, world: World) -> str:
    if world.size == 1:
        return ""
    bf16, chunks = config.precision == "bf16", config.accum_steps
    traffic = step_traffic(model, config.strategy, bf16=bf16, chunks=chunks, ranks=world.size)
    return f"; in a step each sends up to {traffic.sent / 1e6:,.1f} MB to others"


def _adapters(config: TrainConfig, model: VGGT) -> str:
    layers = sum(isinstance(module, LoraLinear) for module in model.modules())
    return f"; adapters of rank {config.model.lora.rank} on {layers} linear layers" if config.model.lora else ""


def _data(config: TrainConfig, train: Split, neighbors: Sequence[StoredNeighbors | None]) -> list[str]:
    lines = []
    for shard_set, lengths, source in zip(train.shard_sets, train.lengths, config.data.sources, strict=True):
        weight = f", weight {source.weight:g}" if len(config.data.sources) > 1 else ""
        size = f"{count(len(lengths), 'sequence')} of {int(lengths.sum()):,} frames in all"
        lines.append(f"data {shard_set}: {size}{weight}")
    outside, alone = lonely_frames(train, neighbors, config.data.overlap)
    if outside or alone:
        low, high = config.data.overlap
        lines.append(
            f"data.overlap: {outside:.1%} of the frames have no other with an overlap of {low:g} to {high:g}, and get "
            f"what comes nearest; {alone:.1%} overlap with none that is known, and get others at random"
        )
    return lines


def _validated(config: TrainConfig, val: Split | None, validated: SharedPlaces | None) -> str:
    if val is None or validated is None:
        return "nothing (no such split)"
    of = f"of {sum(map(len, val.lengths)):,} of the {config.data.val_split} split"
    return f"{count(validated.tested, 'sequence')} {of}, {validated.words}"


def describe_run(config: TrainConfig, out_dir: Path, validated: SharedPlaces | None, *, whole: bool) -> str:
    """What a run achieved, from its files. whole: whether it took all its steps."""
    logged = [line for line in read_jsonl(out_dir / METRICS_FILE, "split") if OBJECTIVE in line]
    trained = [line for line in logged if line["split"] == config.data.train_split]
    if not trained:
        return f"Done: {config.total_steps:,} steps. {out_dir / METRICS_FILE} has none of their losses."
    ends = [f"{line[OBJECTIVE]:.3f} (log line of step {line['step']:,})" for line in (trained[0], trained[-1])]
    moved = f"went from {ends[0]} to {ends[1]}" if len(trained) > 1 else f"was {ends[0]}"
    last = trained[-1]["step"]  # beyond the total, if that was lowered
    done = f"Done: {max(last, config.total_steps):,}" if whole else f"Ended after {last:,} of {config.total_steps:,}"
    text = ["", f"{done} steps. The training objective {moved}."]
    if validated:
        text += _validations(config, ValidationHistory(out_dir), validated)
    text.append("")
    if (out_dir / SHEET_FILE).exists():
        text.append(f"Look at  {out_dir / SHEET_FILE}  (views, predicted and true depth, errors, cameras from above)")
    text += [
        f"Curves:   {program('tensorboard')} --logdir {shlex.quote(f'{out_dir}/tensorboard')}",
        *_to_use(config, ValidationHistory(out_dir)),
        "",
        *_next_steps(config),
    ]
    return "\n".join(text)


def _validations(config: TrainConfig, history: ValidationHistory, validated: SharedPlaces) -> list[str]:
    """The last validation against the first, scene by scene, and which was the best."""
    lines = history.comparable
    if len(lines) < 2:
        return []
    first, last = lines[0], lines[-1]
    measured = sum(len(scene) > 1 for scene in last["scenes"])  # something beside the name
    text = [
        f"On {count(measured, 'sequence')} of the {config.data.val_split} split, {validated.words}, "
        f"step {first['step']} -> step {last['step']}:"
    ]
    gains = []
    for name in HEADLINE_METRICS:
        found = compare(first["scenes"], last["scenes"], name)
        if found is not None:
            gains.append(None if found.change.low is None else found.gain)
            change = describe_change(name, found.before, found.after, asdict(found.change))
            text.append(f"  {change}  ({metric_of(name).meaning})")
    text.append(run_verdict(gains, seen=validated.any or bool(validated.unknown)))
    if any(None in scene.values() for scene in last["scenes"]):
        text.append("Some of the last predictions or losses are not finite: look at the log above.")
    return text


def _to_use(config: TrainConfig, history: ValidationHistory) -> list[str]:
    """The checkpoint to use: the best, what the run began from if nothing was better, or the last."""
    folder, rule, validations = history.out_dir / CHECKPOINTS, config.checkpoint.best, history.comparable
    if isinstance(rule, str):
        by = rule
    else:
        measured = [name for name in rule if any(name in scene for line in validations for scene in line["scenes"])]
        together = " together" if len(measured) > 1 else ""
        by = f"{' and '.join(measured or rule)}{together}, no headline metric worse beyond the noise"
    if not isinstance(rule, str) and validations and len(validations[-1]["scenes"]) < MIN_SCENES:
        by += f", which {count(len(validations[-1]['scenes']), 'scene')} cannot tell"
    best = history.best_step(rule, steps_saved(folder))
    if best == 0 and len(validations) > 1:
        began = config.init or "nothing"
        return [f"Use:      what you started from, {began}: by {by}, no validation was better than the first"]
    use, why = folder / LATEST, "the last"
    if best and (folder / BEST).resolve() == step_file(folder, best).resolve():
        use, why = folder / BEST, f"step {best}, the best by {by}"
    return [
        f"Use:      {use}  ({why}; {program('python')} -m vggt --width {config.data.width} shows what it makes of "
        "photographs, -m train.export lays it over the checkpoint it started from)"
    ]


def program(name: str) -> str:
    """How a program beside this Python is called here: where it is not activated, by its path."""
    path, found = Path(sys.executable).with_name(name), shutil.which(name)
    return name if found is not None and Path(found).absolute() == path else shlex.quote(os.path.relpath(path))


def _next_steps(config: TrainConfig) -> list[str]:
    if config.init in (None, NANO.name):
        place, out = shlex.quote(config.data.sources[0].path), Path(config.out_dir)
        what = "This was a model from scratch" if config.init is None else "This was vggt-nano, a small VGGT"
        return [
            f"{what}: it shows how everything works, not what VGGT can do. Next:",
            *[f"  is it better, and where:       make eval SHARDS={place} RUN={shlex.quote(out.name)}"]
            * (out.parent == Path("runs")),
            "  your data, if this was not it: make finetune CAPTURES=<folders> (or CO3D_DIR=<co3d>) SHARDS=data/mine",
            f"  VGGT itself, on this data:     make finetune SHARDS={place} INIT=<the published checkpoint>",
        ]
    return ["Next: more steps (ARGS='max_steps=...'), or more data; stop when the metrics above stop improving."]
