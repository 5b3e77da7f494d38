"""What packing captures in nerfstudio's layout costs, against the work that cannot be avoided.

    python bench/own_captures.py        # about three minutes; one thread a process

Frames of 1440x1080: PNG from a pinhole camera, and JPEG from a distorted one. The floor, alone on the same frames: read
and decode the image, remap it where the camera is distorted, resize, encode; read and decode the depth, pick, compress.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from captures import GRAIN, LONG, SHORT
from pairs import ratio

from prep.importers.captures import CaptureOptions, Captures
from prep.packing.executors import process_pool
from prep.packing.lens import lens_of
from prep.packing.pack import pack
from prep.packing.plan import PackOptions
from prep.synth.orbit import make_orbit
from prep.synth.render import Camera, render
from prep.synth.turntable import ORBIT, make_scene
from shards.codecs import encode_depth, encode_jpeg
from shards.geometry import nearest

OPTIONS = PackOptions(min_frames=1, shard_frames=100)
FRAMES = 10
DISTORTION = {"k1": -0.12, "k2": 0.03, "p1": 5e-4, "p2": -3e-4}


def write_capture(folder: Path, suffix: str, distortion: dict[str, float]) -> None:
    """Rendered as if there were no distortion: only its cost counts here."""
    rng = np.random.default_rng(0)
    scene = make_scene(rng, "mixed")
    entries = []
    for i, small in enumerate(make_orbit(rng, ORBIT, scene.unit, FRAMES)):
        focal = small.intrinsics[0, 0] * LONG / max(small.height, small.width)
        k = np.array([[focal, 0, (LONG - 1) / 2], [0, focal, (SHORT - 1) / 2], [0, 0, 1]])
        camera = Camera(cam_from_world=small.cam_from_world, intrinsics=k, height=SHORT, width=LONG)
        image, depth, _ = render(scene, camera)
        grainy = np.clip(image + rng.normal(0, GRAIN, image.shape[:2])[..., None], 0, 255).astype(np.uint8)
        millimeters = np.where(np.isfinite(depth), depth * 2000 / scene.unit, 0).clip(0, 65535).astype(np.uint16)
        names = {"file_path": f"images/{i:03d}.{suffix}", "depth_file_path": f"depth/{i:03d}.png"}
        for name, picture in zip(names.values(), (grainy[..., ::-1], millimeters), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name), picture)
        pose = np.linalg.inv(np.vstack([small.cam_from_world, [0, 0, 0, 1]])) @ np.diag([1, -1, -1, 1])
        entries.append(names | {"transform_matrix": pose.tolist()})
    camera = {"fl_x": focal, "fl_y": focal, "cx": LONG / 2, "cy": SHORT / 2, "w": LONG, "h": SHORT}
    (folder / "transforms.json").write_text(json.dumps(camera | distortion | {"frames": entries}))


def floor(source: Captures) -> None:
    cv2.setNumThreads(1)
    height, width = OPTIONS.short_side, round(LONG * OPTIONS.short_side / SHORT)
    for capture in source.found:
        for frame in capture.frames:
            image = cv2.imdecode(np.frombuffer(frame.image.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
            image = cv2.cvtColor(np.asarray(image), cv2.COLOR_BGR2RGB)
            bits = cv2.imdecode(np.frombuffer(frame.depth.path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)
            if frame.camera.distortion is not None:
                image = lens_of(frame.camera.intrinsics, frame.camera.distortion, SHORT, LONG).image(image)
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            rows, columns = (
                nearest((np.arange(n) + 0.5) * m / n - 0.5, m) for n, m in zip((height, width), bits.shape, strict=True)
            )
            encode_jpeg(small, OPTIONS.quality)
            encode_depth((bits[rows[:, None], columns] * np.float32(1e-3)).astype(np.float16))


def packer(source: Captures, folder: Path, pool: Executor) -> Callable[[], None]:
    """Packs all of `source`, from nothing to the finished set."""
    numbers = count()

    def work() -> None:
        out = folder / f"out-{next(numbers)}"
        pack(source, out, OPTIONS, pool, max_bad=0, parallel=1)
        shutil.rmtree(out)

    return work


def main() -> None:
    with TemporaryDirectory() as name, process_pool(1, ["prep.packing.pack"]) as pool:
        for title, suffix, distortion in (("PNG", "png", {}), ("distorted JPEG", "jpg", DISTORTION)):
            folder = Path(name) / suffix
            write_capture(folder / "capture", suffix, distortion)
            source = Captures([folder / "capture"], CaptureOptions())
            ours = packer(source, folder, pool)
            found = ratio(ours, lambda source=source: pool.submit(floor, source).result())
            print(f"{title}, one worker, time over the floor (at most 1.25):", found)


if __name__ == "__main__":
    main()
