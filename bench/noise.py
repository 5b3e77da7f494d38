"""Batches of nothing in particular: as the loader sends them, and as the trainer prepares them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from train.objective.targets import Batch, prepare


def raw_noise(scenes: int, views: int, height: int, width: int) -> dict[str, Any]:
    """Cameras in one place before noise, all of it colored at random."""
    g, shape = torch.Generator().manual_seed(0), (scenes, views)
    k = torch.tensor([[300.0, 0, (width - 1) / 2], [0, 300, (height - 1) / 2], [0, 0, 1]])
    return {
        "images": torch.randint(256, (*shape, 3, height, width), dtype=torch.uint8, generator=g),
        "depth": (torch.rand(*shape, height, width, generator=g) + 1).half(),
        "depth_scale": torch.ones(shape),
        "intrinsics": k.repeat(*shape, 1, 1),
        "extrinsics": torch.eye(4, dtype=torch.float64)[:3].repeat(*shape, 1, 1),
        "color_jitter": torch.tensor([1.2, 0.8, 1.1, 0.05, 0, 1, 2, 3, 0]).repeat(*shape, 1),
    }


def noise(scenes: int, views: int, height: int, width: int) -> Batch:
    return prepare(raw_noise(scenes, views, height, width), torch.device("cpu"), with_points=True)
