"""The embedded dataset: rendered turn-table captures, written in Co3D's layout with VGGT's annotation files."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Executor, as_completed, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prep.synth.render import Box, Camera, Ground, Scene, Shape, Sphere, look_at, render
from shards.codecs import encode_jpeg
from shards.locks import locked
from shards.writer import write_json

CATEGORIES = ("balls", "blocks", "mixed")
SIZES = ((240, 320), (320, 240))  # height, width: landscape and portrait
TEST_FRACTION = 8  # one scene in so many is held out
DONE_FILE = "synth.json"


@dataclass(frozen=True, kw_only=True)
class SynthOptions:
    scenes: int = 40
    frames: int = 30
    seed: int = 0


def synth(out: Path, options: SynthOptions, executor: Executor, on_scene: Callable[[], None] = lambda: None) -> bool:
    """Render into out/co3d and out/annotations; False if just that is there already.

    The directory appears when it is whole. Raises ValueError if `out` holds anything else.
    """
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
        if json.loads((out / DONE_FILE).read_bytes()) == asdict(options):
            return True
    except (OSError, ValueError):
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
            split = "test" if futures[future] % TEST_FRACTION == TEST_FRACTION - 1 else "train"
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


def write_scene(root: Path, index: int, options: SynthOptions) -> tuple[str, str, list[dict[str, Any]]]:
    """Render one scene's frames to files; returns its category, its name and the annotations of its frames."""
    cv2.setNumThreads(1)  # there is a process a core
    rng = np.random.default_rng((options.seed, index))
    category = CATEGORIES[index % len(CATEGORIES)]
    name = f"scene_{index:05d}"
    folder = root / category / name
    for part in ("images", "depths", "depth_masks"):
        (folder / part).mkdir(parents=True)
    scene = make_scene(rng, category)
    annotations = []
    for i, camera in enumerate(make_orbit(rng, scene.unit, options.frames)):
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


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def make_scene(rng: np.random.Generator, category: str) -> Scene:
    """Two to five things about the origin of a textured ground, in a unit of length of its own, under a low sun."""
    unit = float(rng.uniform(1, 8))  # structure from motion knows no meters either
    ground = Ground(radius=rng.uniform(3.5, 6) * unit, texture=make_texture(rng), tile=rng.uniform(0.8, 2) * unit)
    shapes: list[Shape] = [ground]
    things = rng.integers(2, 6)
    for i in range(things):
        round_one = category == "balls" or (category == "mixed" and rng.random() < 0.5)
        size = rng.uniform(0.35, 0.6) if i == 0 else rng.uniform(0.15, 0.45)
        angle, distance = rng.uniform(0, 2 * np.pi), 0.15 if i == 0 else rng.uniform(0.6, 1.2)
        place = np.array([np.cos(angle), np.sin(angle)]) * distance
        texture, tile = make_texture(rng), rng.uniform(0.5, 1.2) * unit
        if round_one:
            center = f32([*place, size]) * f32(unit)
            shapes.append(Sphere(center=center, radius=size * unit, texture=texture, tile=tile))
        else:
            half = size * rng.uniform(0.5, 1.2, 3)
            center = f32([*place, half[2]]) * f32(unit)
            yaw = rng.uniform(0, np.pi)
            shapes.append(Box(center=center, half_size=f32(half * unit), yaw=yaw, texture=texture, tile=tile))
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2)
    sun = f32([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)])
    return Scene(
        shapes=tuple(shapes),
        sun=sun,
        sun_color=f32(rng.uniform(0.7, 1.1)) * f32([1, rng.uniform(0.88, 1), rng.uniform(0.75, 1)]),
        sky_color=f32(rng.uniform([0.35, 0.45, 0.55], [0.6, 0.7, 0.9])),
        unit=unit,
    )


def make_texture(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """A repeating pattern in a color of its own, with noise at several scales: [size, size, 3] in 0..1."""
    base = rng.uniform(0.15, 0.9, 3)
    pattern = np.zeros((size, size), dtype=np.float32)
    for cells in (4, 8, 16, 32):
        noise = rng.standard_normal((cells, cells)).astype(np.float32)
        wrapped = np.pad(noise, 2, mode="wrap")
        scaled = cv2.resize(wrapped, None, fx=size / cells, fy=size / cells, interpolation=cv2.INTER_CUBIC)
        pattern += scaled[(edge := 2 * size // cells) : edge + size, edge : edge + size] * np.float32(4 / cells) ** 0.5
    kind = rng.integers(3)
    row, column = np.mgrid[:size, :size] * int(rng.integers(2, 6)) // size
    if kind == 1:
        pattern += np.where((row + column) % 2, 0.9, -0.9).astype(np.float32)
    elif kind == 2:
        pattern += np.where(row % 2, 0.9, -0.9).astype(np.float32)
    other = rng.uniform(-0.25, 0.25, 3)
    return np.clip(base + pattern[..., None] * (0.12 + other * 0.6), 0.02, 1).astype(np.float32)


def make_orbit(rng: np.random.Generator, unit: float, frames: int) -> list[Camera]:
    """A hand-held walk around the origin: part of a circle, uneven in pace, height, distance and aim."""
    height, width = SIZES[int(rng.integers(len(SIZES)))]
    focal = max(height, width) / 2 / np.tan(rng.uniform(0.42, 0.62))
    center = (np.array([width, height]) - 1) / 2 + rng.normal(0, 0.01, 2) * width
    intrinsics = np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1.0]])
    start, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 2) * np.pi * rng.choice([-1, 1])
    azimuth = start + turn * np.linspace(0, 1, frames) + rng.normal(0, 0.02, frames)
    elevation = (
        rng.uniform(0.35, 0.8) + 0.12 * np.sin(np.linspace(0, rng.uniform(3, 9), frames)) + rng.normal(0, 0.01, frames)
    )
    distance = rng.uniform(2.6, 3.6) * (1 + 0.1 * np.sin(np.linspace(0, rng.uniform(3, 9), frames)))
    cameras = []
    for a, e, d in zip(azimuth, elevation, distance, strict=True):
        eye = np.array([np.cos(a) * np.cos(e), np.sin(a) * np.cos(e), np.sin(e)]) * d * unit
        target = (np.array([0, 0, 0.3]) + rng.normal(0, 0.06, 3)) * unit
        pose = look_at(eye, target, rng.normal(0, 0.03))
        cameras.append(Camera(cam_from_world=pose, intrinsics=intrinsics, height=height, width=width))
    return cameras


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
