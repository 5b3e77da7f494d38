"""A run in words: what is about to happen, what happened, what the numbers mean, what to do next."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.distributed import World
from train.loader import Split
from train.memory import estimate_memory
from train.plan import scenes_per_rank
from train.report import METRICS_FILE
from vggt import VGGT

MEANINGS = {
    "loss_objective": ("objective", "what training minimises", "{:.3f}"),
    "rotation_deg": ("camera rotation error", "between two views; 0 is perfect", "{:.1f} degrees"),
    "translation_deg": (
        "camera direction error",
        "of the way between two views; a guess gives 57",
        "{:.1f} degrees",
    ),
    "auc_30": (
        "pose AUC@30",
        "share of right pairs of views, over limits up to 30 degrees",
        "{:.3f}",
    ),
    "depth_abs_rel": ("depth error", "mean share of the true depth, after one scale a scene", "{:.1%}"),
}


def describe_start(
    config: TrainConfig, model: VGGT, train: Split, val: Split | None, world: World, workers: int
) -> str:
    """What is trained on what: a few lines before the first step."""
    counts = {name: [0, 0] for name, _ in model.named_children()}
    for name, parameter in model.named_parameters():
        counts[name.split(".")[0]][0 if parameter.requires_grad else 1] += parameter.numel()
    parts = ", ".join(f"{name} {(t or f) / 1e6:.1f} M{'' if t else ' (frozen)'}" for name, (t, f) in counts.items())
    low, high = config.data.views
    steps = [
        f"{scenes_per_rank(config.max_img_per_gpu, views)} scene(s) of {views} views" for views in sorted({low, high})
    ]
    held = f"{sum(map(len, val.lengths)):,} sequences in {config.data.val_split}" if val else "nothing (no such split)"
    lines = [
        f"model {config.model.preset}: {parts}",
        *(
            f"data {shard_set}: {len(lengths):,} sequences of {int(lengths.sum()):,} frames"
            + (f", weight {source.weight:g}" if len(config.data.sources) > 1 else "")
            for shard_set, lengths, source in zip(train.shard_sets, train.lengths, config.data.sources, strict=True)
        ),
        f"validating on {held}",
        f"{world.size} process(es) on {world.device.type}, {config.strategy}, {config.precision}, {workers} loader "
        "worker(s) each",
        f"a step takes {', or '.join(steps)} a process, at most {config.max_img_per_gpu * world.size} images in all, "
        f"in {config.accum_steps} chunk(s); its shape is drawn anew each time",
        f"memory a process: {estimate_memory(model, config, world)}",
        f"{config.total_steps:,} steps, validation every {config.val_every:,}, checkpoint every "
        f"{config.checkpoint.every:,}; everything goes to {config.out_dir}",
    ]
    return "\n".join(lines)


def describe_damage(by_rank: list[Counter[str]]) -> str:
    """The files that hold damaged frames, those with the most first."""
    files = sum(by_rank, Counter[str]()).most_common()
    more = f" and {len(files) - 5} more files" if len(files) > 5 else ""
    return ", ".join(f"{file} ({count})" for file, count in files[:5]) + more


def describe_run(config: TrainConfig, out_dir: Path) -> str:
    """What a finished run achieved, from its metrics.jsonl."""
    lines = [json.loads(line) for line in (out_dir / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["split"] == config.data.train_split]
    tested = [line for line in lines if line["split"] == config.data.val_split]
    if not trained:
        return f"Done: {config.total_steps:,} steps. {out_dir / METRICS_FILE} has none of their losses."
    first, last = (f"{line['loss_objective']:.3f}" for line in (trained[0], trained[-1]))
    moved = f"went from {first} to {last}" if len(trained) > 1 else f"was {first}"
    text = [
        "",
        f"Done: {config.total_steps:,} steps. The training objective {moved}, each over {config.log_every} steps.",
    ]
    if len(tested) > 1:
        text += _compare(tested[0], tested[-1], config)
    sheet = f"{out_dir}/contact_sheet.png"
    shown = (
        [f"Look at  {sheet}  (views, predicted and true depth, errors, cameras from above)"]
        if Path(sheet).exists()
        else []
    )
    text += [
        "",
        *shown,
        f"Curves:   tensorboard --logdir {out_dir}/tensorboard",
        f"Weights:  {out_dir}/checkpoints/latest  (python -m vggt shows what it makes of photographs, python -m "
        "train.export lays it over the checkpoint it started from)",
        "",
        *_next_steps(config),
    ]
    return "\n".join(text)


def _compare(before: dict[str, Any], after: dict[str, Any], config: TrainConfig) -> list[str]:
    text = [f"On sequences of the {config.data.val_split} split, never trained on, before -> after:"]
    for key, (name, meaning, form) in MEANINGS.items():
        if before.get(key) is not None and after.get(key) is not None:
            text.append(f"  {name}: {form.format(before[key])} -> {form.format(after[key])}  ({meaning})")
    if None in (before["loss_objective"], after["loss_objective"]):
        return [*text, "A loss on them is not finite: look at the log above."]
    if after["loss_objective"] < before["loss_objective"]:
        return [*text, "The objective went down on them, too: what was learned holds for scenes it has not seen."]
    return [*text, "The objective went up on them: try fewer steps, a lower optim.lr, or more sequences."]


def _next_steps(config: TrainConfig) -> list[str]:
    if config.init is None:
        return [
            "This was a small model from scratch: it shows that everything works, not what VGGT can do. Next:",
            "  your data:   make finetune CO3D_DIR=<co3d> CO3D_ANNOTATION_DIR=<annotations>",
            "  VGGT itself: make finetune CO3D_DIR=... CO3D_ANNOTATION_DIR=... INIT=<the published checkpoint>",
        ]
    return ["Next: more steps (ARGS='max_steps=...'), or more data; stop when the figures above stop improving."]
