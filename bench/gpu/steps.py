"""Steps of the recipes on a GPU: their time, memory, waits, and what settings change."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vggt.model
import vggt.vit
from bench.gpu.rig import Rig, Row, replaced
from bench.live_bytes import LiveBytes, no_content
from bench.noise import noise
from train.data.plan import scenes_per_rank
from train.engine.settings import TrainConfig
from train.engine.step import forward_backward
from vggt import VGGT
from vggt.flops import step_flops
from vggt.layers import Block, compile_blocks

# Operations a second in bf16, dense, by NVIDIA's data sheets.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "4090": 165e12,
}
BUDGETS = (12, 16, 24, 40, 80)  # GB
MOST = 384  # images that are tried
CHUNKS = (1, 2, 4, 8)
ENCODED = (2, 4, 8)
IN_FLOAT32 = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)  # of the camera head, which the others cannot
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def recipe(rig: Rig) -> Iterator[Row]:
    """The published recipe: heads."""
    size = 64 if rig.pretend else 8192
    yield {"what": f"products of matrices of {size} x {size} in bf16", "teraflops_per_s": matmul_rate(rig, size) / 1e12}
    for aspect in (0.33, 1.0):
        yield from steps(rig, "default", aspect)


def others(rig: Rig) -> Iterator[Row]:
    for name in ("lora", "lora_24gb", "lora_12gb", "small_gpu", "full"):
        yield from steps(rig, name, 1.0)


def steps(rig: Rig, name: str, aspect: float) -> Iterator[Row]:
    config = rig.recipe(name)
    model = rig.model(config)
    for views in (views for views in rig.views if views <= config.data.views[1]):
        what = f"{name}, {views} views of {rig.height(aspect)}x{rig.width}"
        yield step(rig, what, config, model, views, aspect)


def step(rig: Rig, what: str, config: TrainConfig, model: VGGT, views: int = 0, aspect: float = 1.0) -> Row:
    """One row; views: those in the middle without any."""
    views = views or rig.views[1]
    scenes, height = scenes_per_rank(config.max_img_per_gpu, views), rig.height(aspect)
    rig.forget(model.parameters())
    try:
        took = rig.seconds(rig.step(config, scenes, views, height, model))
    except RuntimeError as error:
        rig.check_memory(error)
        return {"what": what, "images": scenes * views, "good": False, "error": "out of memory"}
    asked = step_flops(model, scenes, views, height, rig.width)
    rate = sum(part.forward + part.backward for part in asked.values()) / took
    row = {"what": what, "images": scenes * views, "seconds": took, "images_per_s": scenes * views / took}
    peak = peak_rate(rig)
    return row | {"teraflops_per_s": rate / 1e12, "share_of_peak": peak and rate / peak, **rig.peaks()}


def peak_rate(rig: Rig) -> float | None:
    name = "" if rig.pretend else torch.cuda.get_device_name()
    return next((rate for known, rate in PEAKS.items() if known in name), None)


def matmul_rate(rig: Rig, size: int) -> float:
    a = torch.rand(size, size, device=rig.device, dtype=torch.bfloat16)
    return 2 * size**3 / rig.seconds(lambda: a @ a)


def variants(rig: Rig) -> Iterator[Row]:
    """What settings change, one at a time: heads by chunk, attention, compiled blocks, the encoder's chunk."""
    config = rig.recipe("default")
    model = rig.model(config)
    for chunk in CHUNKS:
        model.depth_head.chunk = chunk
        yield step(rig, f"default, head_chunk {chunk}", config, model)
    config = rig.recipe("lora")
    model = rig.model(config)
    for name, backend in BACKENDS.items():
        with sdpa_kernel([backend, *IN_FLOAT32], set_priority=True):
            yield step(rig, f"lora, {name} attention", config, model)
    model.aggregator.keep_every_block()
    yield step(rig, "lora, every block keeps its input", config, model)
    with eager_compiler() if rig.pretend else nullcontext():
        compile_blocks(model)
        yield step(rig, "lora, every block keeps its input, compiled", config, model)
    config = rig.recipe("full")
    model = rig.model(config)
    for frames in ENCODED:
        with replaced(vggt.vit, "FRAMES", frames):
            yield step(rig, f"full, {frames} images of the encoder at a time", config, model)
    model.aggregator.keep_every_block()
    yield step(rig, "full, every block keeps its input", config, model)


def eager_compiler() -> AbstractContextManager[None]:
    """What is compiled on a CPU takes minutes: traced only."""
    own = nn.Module.compile
    return replaced(Block, "compile", lambda self, dynamic: own(self, dynamic=dynamic, backend="eager"))


def waits(rig: Rig) -> Iterator[Row]:
    """How often the host waits for the device in a step: once is meant, for the flags that decide whether it counts."""
    for name in ("default", "lora", "full"):
        config = rig.recipe(name)
        run = rig.step(config, 2, 2, rig.height(0.5))
        run()
        places = Counter(waits_of(rig, run))
        number = sum(places.values())
        where = ", ".join(f"{place} ({times})" for place, times in places.items())
        row = {"what": f"a step of {name}", "waits": number, "where": where}
        yield row if rig.pretend else row | {"good": number == 1}


def waits_of(rig: Rig, run: Callable[[], object]) -> list[str]:
    """The lines of Python where the host waited."""
    with warnings.catch_warnings(record=True) as caught, ExitStack() as after:
        warnings.simplefilter("always")
        if not rig.pretend:
            torch.cuda.set_sync_debug_mode("warn")
            after.callback(torch.cuda.set_sync_debug_mode, "default")
        run()
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in found]


def memory(rig: Rig) -> Iterator[Row]:
    """What was counted without content against what a step took; and how many images fit into so much."""
    for name in ("default", "lora", "full"):
        config, views = rig.recipe(name), rig.views[1]
        scenes, height = scenes_per_rank(config.max_img_per_gpu, views), rig.height(1.0)
        counted = counted_bytes(rig, config, scenes, views, height)
        row = step(rig, f"{name}: counted without content", config, rig.model(config))
        truth = (row.get("allocated_gb") or 0.0) * 1e9
        found = {"what": row["what"], "counted_gb": counted / 1e9, "allocated_gb": truth / 1e9}
        yield found | ({"counted_over_truth": counted / truth} if truth else {})
    total = max(BUDGETS) * 1e9 if rig.pretend else torch.cuda.get_device_properties(0).total_memory
    for name in ("default", "lora", "full"):
        config = rig.recipe(name)
        model = rig.model(config)
        for budget in (size for size in BUDGETS if size * 1e9 <= 1.06 * total):
            yield {"what": f"{name}, {budget} GB", "images": most_images(rig, config, model, budget * 1e9 / total)}


def counted_bytes(rig: Rig, config: TrainConfig, scenes: int, views: int, height: int) -> int:
    """The peak of a step and what it begins with: weights, their gradients, and the moments of AdamW."""
    model, content = rig.model(config).cpu(), noise(scenes, views, height, rig.width)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in model.parameters())
    with no_content(model), replaced(vggt.model, "check_images", lambda *_: None):  # which reads values
        batch = {name: torch.empty_like(value) for name, value in content.items()}
        with LiveBytes() as live:
            forward_backward(model, batch, config)
    return live.peak + weights + 8 * trained + sum(value.nbytes for value in batch.values())


def most_images(rig: Rig, config: TrainConfig, model: VGGT, fraction: float) -> int:
    """The most in steps of the middle number of views, to a tenth, in that part of the memory; at most about MOST."""
    if not rig.pretend:
        torch.cuda.set_per_process_memory_fraction(min(fraction, 1.0))
    fits, fails, views = 0, 0, rig.views[1]
    while fits * views < MOST and (fails == 0 or fails - fits > max(1, fits // 10)):
        scenes = (fits + fails) // 2 if fails else max(1, 2 * fits)
        if runs(rig, config, model, scenes, views):
            fits = scenes
        else:
            fails = scenes
    if not rig.pretend:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return fits * views


def runs(rig: Rig, config: TrainConfig, model: VGGT, scenes: int, views: int) -> bool:
    rig.forget(model.parameters())
    if rig.pretend:
        return scenes <= 2
    try:
        run = rig.step(config, scenes, views, rig.height(1.0), model)
        run()
        run()  # with the optimizer's moments
        rig.wait()
    except RuntimeError as error:
        rig.check_memory(error)
        return False
    return True
