"""What a step asks of its device, shown on one whose tensors have no content: what asks for a value there fails."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from train.config import load_config
from train.data.color_jitter import draw_color_jitter
from train.engine.adapters import attach
from train.engine.optim import freeze, make_optimizer
from train.engine.step import train_step
from train.objective.targets import prepare
from train.runtime.distributed import World
from vggt import VGGT, preset

HEIGHT, WIDTH = 42, 56
DEVICE = torch.device("meta")


class Copies(TorchDispatchMode):
    """Copies from host to device, and whether the host waits for each."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" and x.ndim for x in tensors) and any(x.is_meta for x in tree_leaves(out)):
            self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return out


class Launches(TorchDispatchMode):
    """Counts operations that are kernels on a GPU: not views, nor what only takes memory."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += not (func.is_view or "empty" in str(func) or "_unsafe_view" in str(func))
        return func(*args, **(kwargs or {}))


class Flags(World):
    """A world that knows what a step would hear from the device: that all is well."""

    def sum(self, values):
        asked.append(values)
        return torch.zeros(values.shape)


asked: list[torch.Tensor] = []


def from_the_host(*_, **__):
    raise AssertionError("numbers become a tensor on the device by a copy, which waits for it")


def raw_batch(scenes, views):
    """As the loader sends it."""
    rng = np.random.default_rng(0)
    shape = (scenes, views)
    k = torch.tensor([[60.0, 0, 28], [0, 60, 21], [0, 0, 1]])
    return {
        "images": torch.zeros(*shape, 3, HEIGHT, WIDTH, dtype=torch.uint8),
        "depth": torch.ones(*shape, HEIGHT, WIDTH, dtype=torch.float16),
        "depth_scale": torch.ones(shape),
        "intrinsics": k.expand(*shape, 3, 3),
        "extrinsics": torch.eye(4, dtype=torch.float64)[:3].expand(*shape, 3, 4),
        "color_jitter": torch.from_numpy(np.stack([draw_color_jitter(rng, views) for _ in range(scenes)])),
    }


def make_model(config):
    model = VGGT(preset("tiny", heads=config.loss.heads, head_chunk=config.model.head_chunk)).train()
    freeze(model, config.model.freeze)
    if config.model.lora is not None:
        attach(model, config.model.lora)
    return model


EVERY_LOSS = ["loss.point=1", "loss.match=1", "loss.camera_norm=l2"]  # of points also their normals
SETTINGS = {
    "heads": [],
    "adapters": ['model.lora={names: ["aggregator.*attn.*"], rank: 4}'],
    "everything": ["model.freeze=[]", "optim.muon_lr=0.01", *EVERY_LOSS],
}


@contextmanager
def a_device():
    """Makes one that has no content do for a GPU: it copies no numbers, and knows autocast and fused kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
            patch.setattr(owner, name, from_the_host)
        patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
        known = sys.modules["torch.optim.optimizer"]
        patch.setattr(known, "_get_fused_kernels_supported_devices", lambda: ["meta"])
        yield


def step_of(*settings, scenes=3, views=2):
    """A step, as a function of no arguments: its batch is the loader's."""
    config = load_config(None, ["model.preset=tiny", "init=x", "precision=fp32", *settings])
    model, raw = make_model(config).to(DEVICE), raw_batch(scenes, views)
    optimizer = make_optimizer(model, config.optim)

    def step():
        with a_device():
            batch = prepare(raw, DEVICE, with_points=config.loss.point > 0)
            return train_step(model, optimizer, batch, config, Flags(0, 1, 1, DEVICE), tried=6)

    return step


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_waits_for_the_device_once_and_moves_nothing_but_its_batch(setting):
    """For the flags that decide whether the step counts."""
    step = step_of(*SETTINGS[setting])
    asked.clear()
    with Copies() as copies:
        assert step().finite
    assert len(asked) == 1
    assert copies.waits == [False] * 7  # what the batch holds, and two for the jitter


def launches(*settings, **sizes):
    """Of a first step, which makes the optimizer's moments: 3 for each of 103 parameters."""
    step = step_of(*settings, **sizes)
    with Launches() as counted:
        step()
    return counted.number - 3 * 103


def test_what_is_launched_grows_little_with_frames_and_not_with_scenes():
    """A frame at a time goes through the dense head, forward, again and backward."""
    few, many = launches(views=2), launches(views=4)
    assert (many - few) / 6 <= 300
    whole = [launches("model.head_chunk=null", "accum_steps=1", scenes=scenes) for scenes in (16, 32)]
    assert whole[0] == whole[1] <= 2400
