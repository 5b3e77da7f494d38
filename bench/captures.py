"""Captures for benchmarks, as large as Co3D's: rendered at 1440x1080, with grain, and depth as noisy as stereo's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from prep.importers.cameras import OpenCVCamera
from prep.importers.source import DepthFile, Frame, Sequence
from prep.synth.orbit import make_orbit
from prep.synth.render import Camera, render
from prep.synth.synth import stereo_depth
from prep.synth.turntable import ORBIT, make_scene
from shards.codecs import encode_jpeg

LONG, SHORT = 1440, 1080
GRAIN = 2  # of 255, of images: without it JPEGs would be much smaller than photographs
NOISE = 0.003  # of depth: its low bits look as random as those of stereo


@dataclass
class Captures:
    """Rendered sequences as a source of frames, every other one portrait. Makes its files in `folder`."""

    folder: Path
    sequence_count: int
    frame_count: int
    skipped: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.made = [self._sequence(i) for i in range(self.sequence_count)]

    def describe(self) -> dict[str, Any]:
        return {"kind": "rendered"}

    def identity(self, frame: Frame) -> str:
        return str(frame.image)

    def sequences(self) -> list[Sequence]:
        return self.made

    def _sequence(self, index: int) -> Sequence:
        rng = np.random.default_rng(index)
        scene = make_scene(rng, "mixed")
        height, width = (LONG, SHORT) if index % 2 else (SHORT, LONG)
        frames = []
        for i, small in enumerate(make_orbit(rng, ORBIT, scene.unit, self.frame_count)):
            focal = small.intrinsics[0, 0] * LONG / max(small.height, small.width)
            k = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
            camera = Camera(cam_from_world=small.cam_from_world, intrinsics=k, height=height, width=width)
            frames.append(self._frame(rng, f"sequence{index}-{i:03d}", camera, render(scene, camera)))
        name = f"sequence{index}"
        return Sequence(split="train", category="rendered", name=name, frames=frames, bad=[])

    def _frame(self, rng: np.random.Generator, name: str, camera: Camera, rendered: tuple[np.ndarray, ...]) -> Frame:
        image, depth, cosine = rendered
        grainy = image + rng.normal(0, GRAIN, image.shape[:2])[..., None]
        bits, mask = stereo_depth(rng, depth * rng.normal(1, NOISE, depth.shape).astype(np.float32), cosine)
        paths = [self.folder / f"{name}{suffix}" for suffix in (".jpg", ".depth.png", ".mask.png")]
        paths[0].write_bytes(encode_jpeg(np.clip(grainy, 0, 255).astype(np.uint8), quality=90))
        for path, picture in ((paths[1], bits), (paths[2], mask)):
            path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        return Frame(
            name=name,
            path=paths[0].name,
            image=paths[0],
            size=(camera.height, camera.width),
            depth=DepthFile(path=paths[1], encoding="half", kind="stereo"),
            mask=paths[2],
            camera=OpenCVCamera(extrinsics=camera.cam_from_world, intrinsics=camera.intrinsics),
        )
