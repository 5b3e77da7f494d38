"""How much of their time many GPUs would compute, predicted: operations and bytes by formula, no GPU needed.

    python bench/scaling.py

A step of 48 images of 350x518, 6 scenes of 8 views, for each recipe. Assumed are an H100's peak rates (dense, NVIDIA's
data sheet), of which a step reaches SHARE, and links that carry so many bytes a second out of each GPU while as many
come in. Efficiency: computing over computing and waiting, if exchange hides behind computing as far as it can, and if
none of it does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from train.config import load_config
from train.engine.adapters import attach
from train.engine.optim import freeze
from train.engine.settings import TrainConfig
from train.engine.traffic import step_traffic
from vggt import VGGT, preset
from vggt.flops import Flops, step_flops

ROOT = Path(__file__).parents[1]
BF16, TF32 = 989e12, 495e12  # operations a second, of the trunk and of the heads
SHARE = 0.4
SCENES, VIEWS, HEIGHT, WIDTH = 6, 8, 350, 518
RANKS, LINKS = (8, 64), (25e9, 400e9)
RECIPES = (("default", "ddp"), ("lora", "ddp"), ("full", "ddp"), ("full", "fsdp"))
TRUNK = ("encoder", "frame", "global")


def trainable(config: TrainConfig) -> VGGT:
    with torch.device("meta"):
        model = VGGT(preset("1b", heads=config.loss.heads))
    freeze(model, config.model.freeze)
    if config.model.lora is not None:
        attach(model, config.model.lora)
    return model


def computing(model: VGGT, strategy: str) -> float:
    """Seconds, with what is computed again in the backward pass."""
    seconds = 0.0
    for name, part in step_flops(model, SCENES, VIEWS, HEIGHT, WIDTH).items():
        rate = SHARE * (BF16 if name in TRUNK else TF32)
        seconds += (part.forward * (1 + again(name, part, strategy)) + part.backward) / rate
    return seconds


def again(name: str, part: Flops, strategy: str) -> int:
    """How often a part runs again in the backward pass."""
    if not part.backward or name == "camera":
        return 0
    return 2 if name == "frame" and strategy == "ddp" else 1


def main() -> None:
    images = f"{SCENES * VIEWS} images of {HEIGHT}x{WIDTH} a GPU"
    print(
        f"Predicted, not measured: {images}, an H100 at {SHARE:.0%} of its peak; the part of the time spent computing\n"
    )
    print("| recipe | ranks | computing | sent by each | at 25 GB/s | at 400 GB/s |\n|---|---|---|---|---|---|")
    for name, strategy in RECIPES:
        path = ROOT / "train" / "configs" / f"{name}.yaml"
        config = load_config(path, ["init=unused", f"strategy={strategy}"])
        model = trainable(config)
        took, bf16 = computing(model, strategy), config.precision == "bf16"
        for ranks in RANKS:
            sent = step_traffic(model, strategy, bf16=bf16, chunks=config.accum_steps, ranks=ranks).sent
            hidden, bare = zip(
                *((took / max(took, sent / link), took / (took + sent / link)) for link in LINKS), strict=True
            )
            cells = [f"{best:.0%} to {worst:.0%}" for best, worst in zip(hidden, bare, strict=True)]
            print(f"| {name}, {strategy} | {ranks} | {took:.2f} s | {sent / 1e9:.2f} GB | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
