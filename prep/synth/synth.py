"""The embedded dataset: rendered captures, written in Co3D's layout with VGGT's annotation files."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Executor, as_completed, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prep.synth import corridor, rooms, turntable
from prep.synth.orbit import landscape_and_portrait, make_orbit
from prep.synth.render import Camera, Scene, render
from shards.codecs import encode_jpeg
from shards.locks import locked
from shards.writer import write_json


@dataclass(frozen=True, kw_only=True)
class Family:
    """Scenes of a kind, and how the camera moves in those for training and in those for testing."""

    categories: tuple[str, ...]
    make_scene: Callable[[np.random.Generator, str], Scene]
    make_cameras: Callable[..., list[Camera]]  # of rng, unit=, frames=, sizes=
    make_held_out_cameras: Callable[..., list[Camera]] | None = None  # None: the same


FAMILIES = {
    "turntable": Family(
        categories=turntable.CATEGORIES,
        make_scene=turntable.make_scene,
        make_cameras=partial(make_orbit, orbit=turntable.ORBIT),
    ),
    "walk": Family(
        categories=turntable.CATEGORIES,
        make_scene=turntable.make_scene,
        make_cameras=partial(make_orbit, orbit=turntable.WALK),
    ),
    "rooms": Family(
        categories=rooms.CATEGORIES,
        make_scene=rooms.make_scene,
        make_cameras=partial(make_orbit, orbit=rooms.ORBIT),
        make_held_out_cameras=partial(make_orbit, orbit=rooms.HELD_OUT_ORBIT),
    ),
    "corridor": Family(
        categories=corridor.CATEGORIES,
        make_scene=corridor.make_scene,
        make_cameras=corridor.make_walk,
    ),
}
TEST_FRACTION = 8  # one scene in so many is held out
DONE_FILE = "synth.json"


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    scenes: int = 40
    frames: int = 30
    seed: int = 0
    family: str = "turntable"  # of FAMILIES
    short_side: int = 240  # pixels; the long side is four thirds of it


def synth(out: Path, options: SynthOptions, executor: Executor, on_scene: Callable[[], None] = lambda: None) -> bool:
    """Render into out/co3d and out/annotations; False if just that is there already.

    The directory appears when it is whole. Raises ValueError if `out` holds anything else.
    """
    out = out.resolve()  # a link stays one
    if out.is_mount():
        raise ValueError(
            f"{out}: a mount point, which cannot be replaced by what is made beside it; give a folder in it"
        )
    work = out.with_name(f".{out.name}.unfinished-synth")
    if _is_done(out, options):
        return False
    work.mkdir(parents=True, exist_ok=True)
    with locked(work, f"{out}: another vggt-prep synth is at work there"):
        if _is_done(out, options):  # by another one, until just now
            shutil.rmtree(work, ignore_errors=True)  # yet another one may just lock it
            return False
        _render(work / "content", options, executor, on_scene)
        (work / "content").replace(out)
        shutil.rmtree(work, ignore_errors=True)
    return True


def _is_done(out: Path, options: SynthOptions) -> bool:
    """Whether this rendering is there. Raises ValueError if `out` holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        if SynthOptions(**json.loads((out / DONE_FILE).read_bytes())) == options:
            return True
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(f"{out}: exists, and is not this rendering; give another --out, or remove it first")


def _render(folder: Path, options: SynthOptions, executor: Executor, on_scene: Callable[[], None]) -> None:
    """Render into folder/co3d and folder/annotations, in place of what an interrupted one has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    annotations: dict[str, dict[str, Any]] = {}
    futures = {executor.submit(write_scene, folder / "co3d", i, options): i for i in range(options.scenes)}
    try:
        for future in as_completed(futures):
            category, sequence, frames = future.result()
            split = "test" if is_held_out(futures[future]) else "train"
            annotations.setdefault(f"{category}_{split}", {})[sequence] = frames
            on_scene()
    finally:
        for future in futures:
            future.cancel()
        if not isinstance(sys.exc_info()[1], KeyboardInterrupt):  # on interrupt, the workers' owner ends them
            wait(futures)  # running jobs still write
    (folder / "annotations").mkdir()
    for name, sequences in annotations.items():
        data = gzip.compress(json.dumps(sequences, sort_keys=True).encode(), mtime=0)
        (folder / "annotations" / f"{name}.jgz").write_bytes(data)
    write_json(folder / DONE_FILE, asdict(options))


def is_held_out(index: int) -> bool:
    return index % TEST_FRACTION == TEST_FRACTION - 1


def write_scene(root: Path, index: int, options: SynthOptions) -> tuple[str, str, list[dict[str, Any]]]:
    """Render one scene's frames to files; returns its category, its name and the annotations of its frames."""
    cv2.setNumThreads(1)  # there is a process a core
    rng = np.random.default_rng((options.seed, index))
    family = FAMILIES[options.family]
    category = family.categories[index % len(family.categories)]
    name = f"scene_{index:05d}"
    folder = root / category / name
    for part in ("images", "depths", "depth_masks"):
        (folder / part).mkdir(parents=True)
    scene = family.make_scene(rng, category)
    make_cameras = (family.make_held_out_cameras if is_held_out(index) else None) or family.make_cameras
    sizes = landscape_and_portrait(options.short_side)
    annotations = []
    for i, camera in enumerate(make_cameras(rng, unit=scene.unit, frames=options.frames, sizes=sizes)):
        image, depth, cosine = render(scene, camera)
        bits, mask = stereo_depth(rng, depth, cosine)
        file = f"frame{i + 1:06d}"
        (folder / "images" / f"{file}.jpg").write_bytes(encode_jpeg(image, quality=95))
        fast = [cv2.IMWRITE_PNG_COMPRESSION, 1]
        _write_png(folder / "depths" / f"{file}.jpg.geometric.png", bits, fast)
        _write_png(folder / "depth_masks" / f"{file}.png", mask, fast)
        annotations.append(
            {
                "filepath": f"{category}/{name}/images/{file}.jpg",
                "extri": camera.cam_from_world.tolist(),
                "intri": camera.intrinsics.tolist(),
            }
        )
    return category, name, annotations


def _write_png(path: Path, image: np.ndarray, parameters: list[int]) -> None:
    path.write_bytes(cv2.imencode(".png", image, parameters)[1].tobytes())


def stereo_depth(rng: np.random.Generator, depth: np.ndarray, cosine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Simulate multi-view stereo of a depth map [H, W]: the bits of half floats, and the mask of good ones.

    At grazing angles, at object edges and in blobs of poor texture, depth is missing, or wrong and masked out. Depth
    that the mask keeps is exact to half-float precision.
    """
    height, width = depth.shape
    blobs = cv2.resize(rng.standard_normal((12, 16)).astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    hit = np.isfinite(depth)
    filled = np.where(hit, depth, 0).astype(np.float32)
    spread = cv2.dilate(filled, np.ones((3, 3))) - cv2.erode(filled, np.ones((3, 3)))
    good = hit & (cosine > 0.15) & (spread < 0.1 * filled) & (blobs < 1.3)
    wrong = hit & ~good & (rng.random(depth.shape) < 0.3)
    noisy = np.where(wrong, filled * rng.uniform(0.7, 1.5, depth.shape), np.where(good, filled, 0))
    return noisy.astype(np.float16).view(np.uint16), np.where(good, 255, 0).astype(np.uint8)
