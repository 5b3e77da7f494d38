"""What it costs to measure which frames see the same, and how many of the best are found.

python bench/overlap.py        # about eight minutes; one thread
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from captures import Captures
from pairs import ratio

from prep.packing.executors import process_pool
from prep.packing.pack import pack
from prep.packing.pairs import NEIGHBORS, add_pairs, fill_rows
from prep.packing.plan import PackOptions
from prep.synth import corridor
from prep.synth.render import render
from shards.codecs import decode_depth, encode_depth
from shards.geometry import scale_intrinsics
from shards.overlap import View, Views, views_of
from shards.schema import pair_dtype

OPTIONS = PackOptions(min_frames=1)
FRAMES = 100  # of 1440x1080
LONG, SIZE, ENLARGED = 5000, (162, 216), 4  # frames of a video; they are rendered small, and stored at 648x864
BEST, ASKED = 20, 100  # neighbors that must be found, of so many frames


def packer(source: Captures, folder: Path, pool: Executor, *, pairs: bool) -> Callable[[], None]:
    def work() -> None:
        out = folder / "set"
        pack(source, out, OPTIONS, pool, max_bad=0, parallel=1)
        if pairs:
            add_pairs(out, pool)
        shutil.rmtree(out)

    return work


Stored = list[tuple[bytes, np.ndarray, np.ndarray]]  # depth, extrinsics, intrinsics of each frame


def video() -> Stored:
    """A walk through a corridor, as it lies in the tars."""
    rng = np.random.default_rng(0)
    scene = corridor.make_scene(rng, "corridor")
    stored = []
    for camera in corridor.make_walk(rng, scene.unit, LONG, (SIZE,)):
        _, depth, _ = render(scene, camera)
        known = np.where(np.isfinite(depth), depth, 0).astype(np.float16).view(np.uint16)
        large = np.kron(known, np.ones((ENLARGED, ENLARGED), np.uint16)).view(np.float16)
        k = scale_intrinsics(camera.intrinsics, ENLARGED, ENLARGED)
        stored.append((encode_depth(large), camera.cam_from_world, k))
    return stored


def measured(stored: Stored) -> tuple[Views, np.ndarray]:
    size = SIZE[0] * ENLARGED, SIZE[1] * ENLARGED
    views = views_of(View(decode_depth(depth, *size), size, e, k) for depth, e, k in stored)
    rows = np.zeros(len(views), pair_dtype(NEIGHBORS))
    fill_rows(rows, views)
    return views, rows


def found(views: Views, rows: np.ndarray) -> float:
    """The fraction of the BEST true neighbors that a row holds, over some frames, against all pairs; equals count."""
    fractions = []
    for i in np.linspace(0, len(views) - 1, ASKED).astype(int):
        others = np.delete(np.arange(len(views)), i)
        levels = np.rint(views.overlaps(np.stack([np.full(len(others), i), others], axis=1)) * 255)
        best = np.sort(levels[levels > 0])[::-1][:BEST]
        fractions.append((rows["overlap"][i][: len(best)] >= best[-1]).mean() if len(best) else 1.0)
    return float(np.mean(fractions))


def main() -> None:
    cv2.setNumThreads(1)
    with TemporaryDirectory() as name, process_pool(1, ["prep.packing.pack", "prep.packing.pairs"]) as one:
        source = Captures(Path(name), 1, FRAMES)
        with_pairs, without = (packer(source, Path(name), one, pairs=pairs) for pairs in (True, False))
        print(f"packing {FRAMES} frames with pairs over without (at most 1.25):", ratio(with_pairs, without, pairs=7))
    stored = video()
    began = time.perf_counter()
    views, rows = measured(stored)
    print(f"a sequence of {LONG} frames: {time.perf_counter() - began:.1f} s on one core (at most 20)")
    print(f"the {BEST} best neighbors that are found (at least 0.95): {found(views, rows):.3f}")


if __name__ == "__main__":
    main()
