"""What only a GPU can show: its own clock beside the host's, its memory, its collectives, its signals.

`make test` runs these where there is one; PRETEND_GPU=1 on a CPU, which shows no more than that they work.
"""

from __future__ import annotations

import copy
import os
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from batches import NO_QUANTILE, gradients, make_batch, make_model
from conftest import ROOT, run_command
from golden_figures import GOLDEN, golden_weights, load_json, load_tensors
from runs import SCRATCH, assert_same_run, checkpoint, metrics, run_trainer, start, trainer, wait_for
from torch.nn.parallel import DistributedDataParallel

from train.config import load_config
from train.engine.parallel import full_state_dict, shard
from train.objective.targets import prepare
from train.runtime.distributed import World
from vggt import VGGT, preset
from vggt.memory import hold_in_bf16

# CUDA and nccl warn once of much that is no error.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
if not torch.cuda.is_available() and "PRETEND_GPU" not in os.environ:
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def tiny():
    model = VGGT(preset("tiny"))
    model.load_state_dict(golden_weights(load_json("tiny_manifest.json")))
    return model.eval().to(DEVICE)


@pytest.fixture
def world():
    """A process group of this process only, of the GPU's own kind."""
    backend, device = ("nccl", DEVICE) if ON_GPU else ("gloo", None)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    yield World(0, 1, 1, DEVICE)
    dist.destroy_process_group()


def golden():
    g = load_tensors(GOLDEN / "tiny_forward_portrait.npz")
    return g["images"].to(DEVICE), g["query_points"].to(DEVICE)


def test_forward_never_waits_for_the_device(tiny):
    images, query = golden()
    with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        tiny(images, query)
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            tiny(images, query)
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")


def test_a_frozen_aggregator_in_bf16_gives_the_same_bits_under_autocast(tiny):
    held = copy.deepcopy(tiny)
    held.aggregator.requires_grad_(False)
    hold_in_bf16(held.aggregator)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16), torch.no_grad():
        one, two = (model(*golden()) for model in (tiny, held))
    for name in ("pose_enc", "depth", "depth_conf", "world_points", "track"):
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_single_rank_has_the_gradients_of_none(world, strategy):
    batch = {name: value.to(world.device) for name, value in make_batch(3).items()}
    plain = make_model(load_config(None, NO_QUANTILE)).to(world.device)
    shared = copy.deepcopy(plain)
    expected = gradients(plain, batch, 2, NO_QUANTILE)
    shared = DistributedDataParallel(shared) if strategy == "ddp" else shard(shared, bf16=False, world=world)
    found = full_state_dict(gradients(shared, batch, 2, NO_QUANTILE), world)
    largest = max(value.abs().max() for value in expected.values()).item()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.cpu() - expected[name].cpu()).abs().max() <= 1e-4 * largest, name


def raw_batch(pinned):
    """As the loader sends it."""
    rng, shape = np.random.default_rng(0), (4, 6)
    raw = {
        "images": torch.from_numpy(rng.integers(0, 256, (*shape, 3, 210, 280), dtype=np.uint8)),
        "depth": torch.from_numpy(rng.uniform(1, 2, (*shape, 210, 280)).astype(np.float16)),
        "depth_scale": torch.ones(shape),
        "intrinsics": torch.tensor([[300.0, 0, 140], [0, 300, 105], [0, 0, 1]]).repeat(*shape, 1, 1),
        "extrinsics": torch.eye(4, dtype=torch.float64)[:3].repeat(*shape, 1, 1),
        "color_jitter": torch.tensor([1.2, 0.8, 1.1, 0.05, 0, 1, 2, 3, 0]).repeat(*shape, 1),
    }
    return {name: value.pin_memory() for name, value in raw.items()} if pinned else raw


def test_a_batch_that_is_overwritten_on_the_host_was_copied_before():
    """Copies do not wait, and stand behind other work; what the host makes in the meantime is not in them."""
    expected = prepare(raw_batch(False), torch.device("cpu"), with_points=True)
    busy = torch.rand(4096 if ON_GPU else 64, 4096 if ON_GPU else 64, device=DEVICE)
    for _ in range(3):
        for _ in range(20):
            busy = (busy @ busy).clamp(0, 1)
        raw = raw_batch(ON_GPU)
        found = prepare(raw, DEVICE, with_points=True)
        sizes = {name: value.shape for name, value in raw.items()}
        kinds = {name: value.dtype for name, value in raw.items()}
        del raw
        others = [torch.zeros(sizes[name], dtype=kinds[name], pin_memory=ON_GPU) for name in sizes]
        assert len(others) == 6
        for name, value in expected.items():
            assert torch.allclose(found[name].cpu().float(), value.float(), rtol=1e-4, atol=1e-4), name


def run_script(code, shard_dir, out, *settings, **environment):
    """The trainer, changed by a script that starts it."""
    script = out.with_suffix(".py")
    script.write_text(code)
    arguments = trainer(shard_dir, out, *SCRATCH, *settings)[2:]
    return run_command("python", script, *arguments, **ENVIRONMENT | environment)


DETERMINISTIC = """
import os
import signal
import torch
import train.engine.run
import train.main
if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    train.main.main()
"""
# The same, until a signal comes in its second step.
STOPPED = DETERMINISTIC.replace(
    "if __name__",
    """real, steps = train.engine.run.train_step, []
def stopping(*arguments, **options):
    steps.append(len(steps))
    if len(steps) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
        options["stop"] = True
    return real(*arguments, **options)
train.engine.run.train_step = stopping
if __name__""",
)


def test_a_resumed_run_is_the_same_to_the_bit_with_deterministic_algorithms(shard_dir, published, tmp_path):
    """Without them, sums in an order of the moment make it another one: the largest difference is printed.

    Position embeddings stay as they are: the gradient of their interpolation has no deterministic algorithm.
    """
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for code, out in ((DETERMINISTIC, whole), (STOPPED, resumed), (DETERMINISTIC, resumed)):
        settings = ("max_steps=4", f"init={published}", "model.freeze=['*pos_embed']")
        done = run_script(code, shard_dir, out, *settings, CUBLAS_WORKSPACE_CONFIG=":4096:8")
        assert done.returncode == 0, done.stderr
        assert ("stopped, and saved" in done.stdout) == (code == STOPPED)
    assert_same_run(whole, resumed, 4)
    for name in ("one", "two"):
        assert run_trainer(shard_dir, tmp_path / name, *SCRATCH, "max_steps=4").returncode == 0
    one, two = (checkpoint(tmp_path / name, 4)["model"] for name in ("one", "two"))
    print("largest difference without:", max((one[name] - two[name]).abs().max().item() for name in one))


PLAIN = """
import torch
import train.main
if __name__ == "__main__":
    train.main.main()
    held = torch.cuda.memory_snapshot() if torch.cuda.is_available() else []
    print("expandable", any(segment["is_expandable"] for segment in held))
"""


def test_segments_that_expand_change_nothing(shard_dir, tmp_path):
    for name, settings in (("plain", {}), ("expandable", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})):
        done = run_script(PLAIN, shard_dir, tmp_path / name, "max_steps=3", **settings)
        assert done.returncode == 0, done.stderr
        assert f"expandable {ON_GPU and bool(settings)}" in done.stdout
    one, two = metrics(tmp_path / "plain"), metrics(tmp_path / "expandable")
    assert one.keys() == two.keys()
    for line, terms in one.items():
        for name, value in terms.items():
            assert value == pytest.approx(two[line][name], rel=1e-3, abs=1e-3), (line, name)


SHORT_OF_MEMORY = """
import torch
import train.engine.run
import train.main
real = train.engine.run.train_step
def short(*arguments, **options):
    if torch.cuda.is_available():
        held = torch.cuda.memory_reserved() + 1e6
        torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
        torch.empty(10**9, device="cuda")
    torch.empty(10**15)
    return real(*arguments, **options)
if __name__ == "__main__":
    train.engine.run.train_step = short
    train.main.main()
"""


def test_out_of_memory_says_what_to_lower_and_leaves_the_checkpoint(shard_dir, tmp_path):
    out = tmp_path / "run"
    assert run_trainer(shard_dir, out, *SCRATCH, "max_steps=2").returncode == 0
    done = run_script(SHORT_OF_MEMORY, shard_dir, out, "max_steps=3")
    assert done.returncode == 1
    assert "Error: step 3: out of memory" in done.stderr
    assert "lower model.head_chunk" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint(out, 2)["data"]["step"] == 2
    assert run_trainer(shard_dir, out, *SCRATCH, "max_steps=3").returncode == 0


def test_a_signal_in_a_step_finishes_it_and_saves(shard_dir, tmp_path):
    out = tmp_path / "run"
    process = start(trainer(shard_dir, out, *SCRATCH, "max_steps=400"))
    wait_for(out / "checkpoints" / "step-00000003.pt", process)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "stopped, and saved" in said
    last = max(int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*.pt"))
    assert 3 <= last < 400
    assert checkpoint(out, last)["data"]["step"] == last
