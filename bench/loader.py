"""What loading costs, against the floor of decoding, against raw captures, with a large index, over a slow network.

    python bench/loader.py rates      one process and thread: against the floor, the plain way, a large index
    python bench/loader.py workers    two workers against one, time to the first batch, memory of a worker
    python bench/loader.py remote     an HTTP server that waits 50 ms before each answer, against the local set
    python bench/loader.py spread     the cost of a step's ranks and of steps, against the published sampler

Rendered captures of 1440x1080 (or those of CO3D_DIR ANNOTATION_DIR, given after the name) packed with the defaults,
8 views a scene, crops and aspects as in training.
The floor: decode the same JPEGs and depths and resize each once. The plain way: OpenCV decodes the raw files in full,
percentile of the depth, Pillow's Lanczos resize, float images, camera and world points, color jitter on the CPU.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from captures import Captures
from pairs import ratio
from PIL import Image

import shards
from prep.importers.co3d import Co3D
from prep.importers.source import Frame, Source
from prep.packing.depths import FAR_PERCENTILE
from prep.packing.executors import process_pool
from prep.packing.pack import pack
from prep.packing.plan import PackOptions
from shards.build_index import TarIndex, index_tar, write_index
from shards.codecs import decode_depth, decode_jpeg
from shards.index import sha256
from train.data.batches import TrainingSteps, load_ahead
from train.data.crops import crop_depth, crop_image
from train.data.plan import DataConfig, Step, TrainingPlan
from train.data.split import Split, read_step
from train.data.workers import make_loader
from train.objective.color_jitter import apply_color_jitter

CONFIG = DataConfig(views=(8, 8))
SEQUENCES, FRAMES, STEPS = 3, 16, 4  # a step is 6 scenes of 8 views
LARGE = 1_500_000  # frames
LATENCY = 0.05  # seconds


@contextmanager
def packed() -> Iterator[tuple[Source, Path]]:
    with TemporaryDirectory() as name, process_pool(2, ["prep.packing.pack"]) as pool:
        if len(sys.argv) == 4:
            source = Co3D(Path(sys.argv[2]), Path(sys.argv[3]), ("train",))
        else:
            source = Captures(Path(name), SEQUENCES, FRAMES)
        pack(source, Path(name) / "set", PackOptions(min_frames=1), pool, max_bad=0, parallel=2)
        yield source, Path(name) / "set"


def planned(split: Split, steps: int = STEPS) -> list[Step]:
    plan = TrainingPlan(config=CONFIG, lengths=split.lengths, seed=0, max_img_per_gpu=48, world_size=1)
    state, out = plan.start(), []
    for _ in range(steps):
        out.append(plan.step(state, 0))
        state = out[-1].after
    return out


def loading(split: Split) -> Callable[[], None]:
    steps = planned(split)

    def work() -> None:
        for batch in load_ahead(split, iter(steps), spare=0):
            assert "error" not in batch, batch

    return work


def floor(split: Split) -> Callable[[], None]:
    """Each frame of the same steps, decoded and resized to the same shape."""
    frames = []
    for step in planned(split):
        for scene, members in zip(step.scenes, read_step(split, step), strict=True):
            first = int(split.first[0][scene.sequence])
            frames += [
                (m, split.shard_sets[0].row(first + f), step.shape) for f, m in zip(scene.frames, members, strict=True)
            ]

    def work() -> None:
        for (jpeg, depth), row, shape in frames:
            size = int(row["height"]), int(row["width"])
            scale = max(shape.width / size[1], shape.height / size[0])
            center = ((size[1] - 1) / 2, (size[0] - 1) / 2)
            image, eighths = decode_jpeg(jpeg, scale)
            crop_image(image, eighths / 8, center, scale, shape)
            crop_depth(decode_depth(depth, *size), center, scale, shape)

    return work


def plain(source: Source, split: Split) -> Callable[[], None]:
    """Two images of each step: it takes long."""
    frames = cycle([frame for sequence in source.sequences() for frame in sequence.frames])
    shapes = [(step.shape.height, step.shape.width) for step in planned(split) for _ in range(2)]

    def work() -> None:
        for frame, shape in zip(islice(frames, len(shapes)), shapes, strict=True):
            read_plainly(frame, shape)

    return work


def read_plainly(frame: Frame, shape: tuple[int, int]) -> None:
    image = cv2.cvtColor(np.asarray(cv2.imread(str(frame.image))), cv2.COLOR_BGR2RGB)
    bits, mask = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in (frame.depth.path, frame.mask))
    depth = bits.view(np.float16).astype(np.float32) * (mask > 128)
    depth[depth > np.percentile(depth, FAR_PERCENTILE)] = 0
    scale = max(shape[0] / depth.shape[0], shape[1] / depth.shape[1])
    size = (round(depth.shape[1] * scale), round(depth.shape[0] * scale))
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))[: shape[0], : shape[1]]
    depth = cv2.resize(depth, size, interpolation=cv2.INTER_NEAREST)[: shape[0], : shape[1]]
    extrinsics, k = frame.camera.opencv(*bits.shape)
    v, u = np.mgrid[: shape[0], : shape[1]]
    camera = np.stack([(u - k[0, 2]) / k[0, 0] * depth, (v - k[1, 2]) / k[1, 1] * depth, depth], axis=-1)
    (camera - extrinsics[:, 3]) @ extrinsics[:, :3]
    jitter = np.array([[1.2, 0.8, 1.3, 0.05, 0, 1, 2, 3, 0]], dtype=np.float32)  # brightness, contrast, saturation, hue
    apply_color_jitter(torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)[None] / 255), jitter)


def enlarge(small: Path, out: Path) -> None:
    """A set of LARGE frames: the tar of `small` under many names, each its sequences again."""
    tar = small / "train-000000.tar"
    sequences, rows = index_tar(tar)
    np.save(out / "rows.npy", rows)
    size, digest = tar.stat().st_size, sha256(tar)
    tars = []
    for i in range(LARGE // len(rows)):
        name = f"train-{i:06d}.tar"
        (out / name).symlink_to(tar)
        named = [(category, f"{sequence}-{i:06d}", count) for category, sequence, count in sequences]
        tars.append(TarIndex(file=name, size=size, sha256=digest, sequences=named, rows=out / "rows.npy"))
    write_index(out, tars, source={}, options={})


def rates() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with packed() as (source, path), TemporaryDirectory() as large:
        split = Split([shards.open(path)], "train")
        ours, images = loading(split), 48 * STEPS
        batch = next(iter(load_ahead(split, iter(planned(split)[:1]), spare=0)))
        size = sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)) / 48
        began = time.perf_counter()
        ours()
        rate = images / (time.perf_counter() - began)
        print(f"{rate:.0f} images/s; {size / 1e6:.2f} MB an image of {tuple(batch['images'].shape[-2:])} (at most 1.4)")
        print("time over the floor (at most 1.25):", ratio(ours, floor(split)))
        by = images / (2 * STEPS)
        print(
            f"plain way's time over ours, of {by:g} times as many images (at least {25 / by:.2f}):",
            ratio(plain(source, split), ours),
        )
        enlarge(path, Path(large))
        many = Split([shards.open(large)], "train")
        print(
            f"with {len(many.shard_sets[0].frames):,} frames over {len(split.shard_sets[0].frames)} (at most 1.05):",
            ratio(loading(many), ours),
        )


def consume(path: str, workers: int, batches: int) -> float:
    """Images a second of that many batches, after the first."""
    split = Split([shards.open(path)], "train")
    plan = TrainingPlan(config=CONFIG, lengths=split.lengths, seed=0, max_img_per_gpu=48, world_size=1)
    loader = iter(make_loader(TrainingSteps(split, plan, 0, plan.start(), batches + workers), workers, False))
    for _ in range(workers):
        assert "error" not in next(loader)
    began = time.perf_counter()
    for batch in loader:
        assert "error" not in batch, batch
    return 48 * batches / (time.perf_counter() - began)


def medians(first: Callable[[], float], second: Callable[[], float], pairs: int = 7) -> str:
    """Median of first() / second(), run in turn, and its range."""
    found = sorted(first() / second() for _ in range(pairs))
    return f"{statistics.median(found):.2f} ({found[0]:.2f} to {found[-1]:.2f}, {pairs} pairs)"


PLANNED = """
import sys, time
import shards
from pathlib import Path
from train.data.batches import TrainingSteps
from train.data.split import Split
from train.data.workers import make_loader
from train.data.plan import DataConfig, TrainingPlan
def steps(views, last):
    split = Split([shards.open(sys.argv[1])], "train")
    config = DataConfig(views=views)
    plan = TrainingPlan(config=config, lengths=split.lengths, seed=0, max_img_per_gpu=48, world_size=1)
    return TrainingSteps(split, plan, 0, plan.start(), last)
"""
START = (
    PLANNED
    + """
began = time.perf_counter()
next(iter(make_loader(steps((8, 8), 60), 1, False)))
print(time.perf_counter() - began)
"""
)
MEMORY = (
    PLANNED
    + """
def used():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1e3
before, most = used(), 0
for batch in steps((2, 24), 40):
    most = max(most, used() - before)
print(most)
"""
)
SERVER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from web import served
with served(sys.argv[2]) as server:
    server.latency = float(sys.argv[3])
    print(server.url, flush=True)
    time.sleep(1e6)
"""


def measured(code: str, path: object) -> float:
    """The median of what three fresh processes print."""
    command = [sys.executable, "-c", code, str(path)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    return statistics.median(map(float, runs))


def workers() -> None:
    with packed() as (_, path), TemporaryDirectory() as large:
        two, one = (lambda n=n: consume(str(path), n, 24) for n in (2, 1))
        print("two workers over one (at least 1.8):", medians(two, one))
        enlarge(path, Path(large))
        for name, place in (("small", path), ("large", large)):
            print(
                f"{name} index: first batch after {measured(START, place):.2f} s (at most 2), memory that loading adds "
                f"{measured(MEMORY, place):.0f} MB (at most 250)"
            )


def remote() -> None:
    with packed() as (_, path):
        command = [sys.executable, "-c", SERVER, str(Path(__file__).parents[1] / "tests"), str(path), str(LATENCY)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        os.environ["XDG_CACHE_HOME"] = str(path.parent)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        try:
            for count in (1, 2, 4):
                far, near = (partial(consume, place, count, 12) for place in (url, str(path)))
                print(f"remote rate over local, {count} workers (at least 0.8):", medians(far, near, 5))
        finally:
            process.kill()


def spread(ranks: int = 8, steps: int = 2000) -> None:
    """Images, and pairs of patches that look at each other in global attention, of each rank and step."""
    rng = np.random.default_rng(0)

    def cost(views: np.ndarray, aspect: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scenes = 48 // views
        return scenes * views, scenes * (views * (518 * aspect // 14) * 37.0) ** 2

    shared = cost(rng.integers(2, 25, (steps, 1)), rng.uniform(0.33, 1, (steps, 1)))
    own = cost(rng.integers(2, 25, (steps, ranks)), rng.uniform(0.33, 1, (steps, ranks)))
    for name, (images, attention) in (("ours", shared), ("published: each rank draws", own)):
        within = (attention.max(1) / attention.min(1)).max(), (attention.max(1) / attention.mean(1)).mean()
        print(
            f"{name}: {images.min()} to {images.max()} images a rank; global attention within a step, largest over "
            f"smallest rank up to {within[0]:.1f}, over the mean {within[1]:.2f} on average; of steps, largest over "
            f"smallest {attention.max() / attention.min():.0f}"
        )


if __name__ == "__main__":
    {"rates": rates, "workers": workers, "remote": remote, "spread": spread}[sys.argv[1]]()
