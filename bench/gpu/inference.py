"""The model without training: images a second and memory by views, and what keeping every output costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch

from bench.gpu.rig import Rig, Row
from bench.model import keeping_all
from vggt import VGGT

HEADS = ("camera", "depth", "point")


def inference(rig: Rig) -> Iterator[Row]:
    model = rig.model(rig.recipe("default", "loss.point=1")).eval()
    for views in (1, *rig.views, 2 * max(rig.views)):
        for title, keep in (("", False), (", keeping every output", True)):
            yield {"what": f"views: {views}{title}", **forward(rig, model, views, keep)}


def forward(rig: Rig, model: VGGT, views: int, keep: bool) -> Row:
    rig.forget()
    images = torch.rand(1, views, 3, rig.height(1.0), rig.width, device=rig.device)

    def run() -> None:
        with torch.no_grad(), torch.autocast(rig.device.type, torch.bfloat16):
            model(images)

    try:
        with keeping_all(model) if keep else nullcontext():
            took = rig.seconds(run)
    except RuntimeError as error:
        rig.check_memory(error)
        return {"error": "out of memory"}
    return {"seconds": took, "images_per_s": views / took, **rig.peaks()}
