"""Whether a GPU computes what a CPU does.

python bench/gpu/parity.py     writes the full-size figures anew, on a CPU: a minute, and 12 GB of memory
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from golden_figures import GOLDEN, golden_weights, load_json, load_tensors
from torch import Tensor

from bench.gpu.rig import Rig, Row, off
from vggt import VGGT, VGGTConfig, preset

FIGURES = GOLDEN / "full_size.npz"
NAMES = ("pose_enc", "depth", "depth_conf", "world_points", "world_points_conf")
HEADS = ("camera", "depth", "point")
FP32, BF16 = 1e-4, 0.1  # limits of the largest difference over the largest value; that of bf16 only catches nonsense


def parity(rig: Rig) -> Iterator[Row]:
    for shape in ("square", "landscape", "portrait"):
        figures = load_tensors(GOLDEN / f"tiny_forward_{shape}.npz")
        figures["pose_enc"] = figures["pose_enc_list"][-1]
        model = filled(preset("tiny", heads=HEADS), "tiny_manifest.json")
        yield from compare(rig, f"tiny, {shape}, against the published code", model, figures, every=1)
    size = rig.size
    model = filled(preset(size, heads=HEADS), f"{'vggt_1b' if size == '1b' else size}_manifest.json")
    figures = load_tensors(FIGURES) if size == "1b" else outputs(model)
    yield from compare(rig, f"{size}, against a CPU", model, {"images": images()} | figures, every=7)


def filled(config: VGGTConfig, manifest: str) -> VGGT:
    """A model whose weights follow from the names of its tensors."""
    with torch.device("meta"):
        model = VGGT(config)
    wanted = model.state_dict().keys()
    shapes = {name: shape for name, shape in load_json(manifest).items() if name in wanted}
    model.load_state_dict(golden_weights(shapes), assign=True)
    return model.eval()


def images() -> Tensor:
    drawn = np.random.Generator(np.random.PCG64(0)).random((1, 2, 3, 112, 154))
    return torch.from_numpy(drawn.astype(np.float32))


def outputs(model: VGGT) -> dict[str, Tensor]:
    """Of `images`, every seventh pixel of maps."""
    with torch.no_grad():
        out = model(images())
    return {name: thinned(out[name], 7) for name in NAMES}


def thinned(value: Tensor, every: int) -> Tensor:
    return value if value.ndim < 4 else value[:, :, ::every, ::every]


def compare(rig: Rig, what: str, model: VGGT, figures: dict[str, Tensor], *, every: int) -> Iterator[Row]:
    model = model.to(rig.device)
    for precision, limit in (("fp32", FP32), ("bf16", BF16)):
        with torch.no_grad(), torch.autocast(rig.device.type, torch.bfloat16, enabled=precision == "bf16"):
            out = model(figures["images"].to(rig.device))
        found = {name: off(thinned(out[name].float(), every), figures[name]) for name in NAMES}
        yield {
            "what": what,
            "precision": precision,
            **found,
            "limit": limit,
            "good": all(value <= limit for value in found.values()),
        }


def write_figures() -> None:
    """A CPU's, of the full size: a minute, and 12 GB of memory."""
    found = outputs(filled(preset("1b", heads=HEADS), "vggt_1b_manifest.json"))
    np.savez_compressed(FIGURES, **{name: value.numpy() for name, value in found.items()})
