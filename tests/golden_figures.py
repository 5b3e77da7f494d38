"""The reference figures, and the rule that filled the weights of the model that they were computed with."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared"  # more figures and real data, where they are at hand


def load_json(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def golden_weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Each tensor is drawn from PCG64 seeded with the CRC32 of its name, and scaled by what it is."""
    state = {}
    for name, shape in shapes.items():
        x = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(tuple(shape))
        x = x.astype(np.float32)
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "gamma":
            x = 0.5 + 0.1 * x
        elif len(shape) == 1:
            x = 1 + 0.1 * x if leaf == "weight" else 0.05 * x
        elif leaf in ("weight", "in_proj_weight"):
            x = x / np.sqrt(int(np.prod(shape[1:])))
        else:
            x = 0.2 * x
        if "output_conv2.2" in name or "pose_branch.fc2" in name:
            x = x * 0.3
        state[name] = torch.from_numpy(np.asarray(x, dtype=np.float32))
    return state
