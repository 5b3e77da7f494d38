"""What the model costs, as ratios and as memory a view.

    python bench/model.py speed      a middle-sized model: kept outputs and head chunks, against doing without
    python bench/model.py memory     full size: peak memory of training and inference by views, a process each
    python bench/model.py full       full size: a training step's time, against keeping everything
    python bench/model.py lora       full size: adapters on all attention of the aggregator: peak memory by views
    python bench/model.py lora-speed a middle-sized model: a step of the same, over the usual way

`plain` keeps the outputs of all pairs of blocks and sends all frames through a dense head at once, without
recomputation; `by block` keeps the input of each block that is computed again, as is usual. All in float32 on the CPU,
images of 266x518, camera and depth head trained, aggregator frozen. All but the speeds need 16 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from noise import noise
from pairs import ratio
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from train.objective.losses import LossConfig, losses, normalizer_of
from vggt import VGGT, VGGTConfig
from vggt.lora import add_lora

PROCESSES = ("train", "train-plain", "infer", "infer-all", "lora", "lora-by-block")
ATTENTION = ("*aggregator*attn.qkv", "*aggregator*attn.proj")
HEIGHT, WIDTH = 266, 518
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back to the system: its heap would keep gaps
MIDDLE = {
    "embed_dim": 384,
    "vit_depth": 8,
    "vit_heads": 6,
    "depth": 12,
    "num_heads": 6,
    "camera_heads": 12,
    "dense_layers": (2, 5, 8, 11),
    "dense_features": 128,
    "dense_channels": (96, 192, 384, 384),
}


def build(sizes: dict, chunk: int | None) -> VGGT:
    with torch.device("meta"):  # the published initialisation would take longer than some measurements
        model = VGGT(VGGTConfig(**sizes, heads=("camera", "depth"), head_chunk=chunk))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.aggregator.requires_grad_(False)
    return model


@contextlib.contextmanager
def keeping_all(model: VGGT) -> Iterator[None]:
    """The aggregator keeps the outputs of all pairs until the heads are done."""
    forward = model.aggregator.forward
    model.aggregator.forward = lambda images, keep: forward(images, keep=set(range(model.config.depth)))
    try:
        yield
    finally:
        model.aggregator.forward = forward


@contextlib.contextmanager
def unchunked(model: VGGT) -> Iterator[None]:
    """All frames pass through the dense head at once, and nothing is computed again in the backward pass."""
    chunk, model.depth_head.chunk = model.depth_head.chunk, None
    try:
        yield
    finally:
        model.depth_head.chunk = chunk


@contextlib.contextmanager
def by_block(model: VGGT) -> Iterator[None]:
    """Each block of the trunk keeps its input, and runs again in the backward pass."""
    parts = (model.aggregator, model.aggregator.patch_embed)
    for part in parts:
        part.by_block = True
    try:
        yield
    finally:
        for part in parts:
            part.by_block = False


def train(model: VGGT, batch: dict[str, Tensor]) -> None:
    config = LossConfig()
    predictions = model.train()(batch["images"])
    losses(predictions, batch, normalizer_of(batch, config), config)["loss_objective"].backward()
    model.zero_grad(set_to_none=True)


def infer(model: VGGT, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model.eval()(batch["images"])


def within(*contexts: Any, work: Callable[..., None], model: VGGT, batch: dict[str, Tensor]) -> Callable[[], None]:
    def run() -> None:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context(model))
            work(model, batch)

    return run


def speed(views: int = 4) -> None:
    model, batch = build(MIDDLE, 1), noise(1, views, HEIGHT, WIDTH)
    print(f"middle-sized model, {views} views, time over time:")
    for title, work, other in (
        ("forward, 4 outputs kept over 12", infer, keeping_all),
        ("forward, head a frame at a time over all at once", infer, unchunked),
        ("forward and backward, the same", train, unchunked),
    ):
        parts = {"work": work, "model": model, "batch": batch}
        print(f"  {title:50} {ratio(within(**parts), within(other, **parts))}", flush=True)


def full(chunk: int, views: int = 1) -> None:
    parts = {"work": train, "model": build({}, chunk), "batch": noise(1, views, HEIGHT, WIDTH)}
    result = ratio(within(**parts), within(keeping_all, unchunked, **parts))
    print(f"full size, {views} view, forward, losses and backward, head in chunks of {chunk}, over plain: {result}")


def memory(chunk: int) -> None:
    for title, kind, all_views in (
        (f"training, head in chunks of {chunk}", "train", (2, 4, 8, 16)),
        ("training, plain", "train-plain", (2, 4, 8)),
        (f"inference, 4 outputs kept, head in chunks of {chunk}", "infer", (2, 4, 8)),
        (f"inference, 24 outputs kept, head in chunks of {chunk}", "infer-all", (2, 4, 8)),
    ):
        print_growth(title, kind, all_views, chunk)


def print_growth(title: str, kind: str, all_views: tuple[int, ...], chunk: int) -> None:
    print(title)
    last = None
    for views in all_views:
        command = [sys.executable, __file__, "part", "--kind", kind, "--views", str(views), "--chunk", str(chunk)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | RETURNED)
        peak, seconds = map(float, done.stdout.split())
        growth = f", {(peak - last[1]) / (views - last[0]):.3f} GB a view more" if last else ""
        print(f"  {views:3} views: {peak:6.2f} GB{growth}, {seconds:.0f} s", flush=True)
        last = (views, peak)


def lora(chunk: int) -> None:
    for title, kind, all_views in (("by block", "lora-by-block", (4, 8)), ("as it is", "lora", (4, 8, 16))):
        print_growth(f"training adapters of rank 16, {title}", kind, all_views, chunk)


def lora_speed(chunk: int) -> None:
    model = adapted(MIDDLE, chunk)
    for views in (2, 4, 8):
        parts = {"work": train, "model": model, "batch": noise(1, views, HEIGHT, WIDTH)}
        found = ratio(within(**parts), within(by_block, **parts), pairs=5)
        print(f"middle-sized model, {views} views, time over by block: {found}", flush=True)


def adapted(sizes: dict, chunk: int | None) -> VGGT:
    model = build(sizes, chunk)
    add_lora(model, ATTENTION, rank=16, alpha=16)
    return model


def peak(kind: str, views: int, chunk: int) -> None:
    """What a process of its own does: prints its peak resident memory in GB (10^9 bytes), and the time it took."""
    contexts = {"train-plain": (keeping_all, unchunked), "infer-all": (keeping_all,), "lora-by-block": (by_block,)}
    work, make = infer if kind.startswith("infer") else train, adapted if kind.startswith("lora") else build
    run = within(*contexts.get(kind, ()), work=work, model=make({}, chunk), batch=noise(1, views, HEIGHT, WIDTH))
    began = time.monotonic()
    run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "full", "lora", "lora-speed", "part"))
    parser.add_argument("--chunk", type=int, default=VGGTConfig().head_chunk, help="frames of a dense head's chunk")
    parser.add_argument("--kind", choices=PROCESSES, help=argparse.SUPPRESS)
    parser.add_argument("--views", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.what == "part":
        peak(arguments.kind, arguments.views, arguments.chunk)
    elif arguments.what == "speed":
        speed()
    else:
        {"memory": memory, "full": full, "lora": lora, "lora-speed": lora_speed}[arguments.what](arguments.chunk)


if __name__ == "__main__":
    main()
