"""What packing costs, against the work that cannot be avoided and against the plain way.

    python bench/packing.py        # about five minutes; one thread a process

The floor, alone on the same frames: read the files, decode the JPEG at the best DCT scale, decode both PNGs, apply the
mask, resize, encode, compress. The plain way: OpenCV decodes it all in full, takes the percentile of the full depth,
resizes, and writes JPEG and 16-bit PNG.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from captures import SHORT, Captures
from pairs import ratio

import shards
from prep.importers.source import Frame
from prep.packing.depths import FAR_PERCENTILE
from prep.packing.executors import process_pool
from prep.packing.pack import pack
from prep.packing.plan import PackOptions
from shards.codecs import decode_jpeg, encode_depth, encode_jpeg
from shards.geometry import nearest

OPTIONS = PackOptions(min_frames=1, shard_frames=10)
SEQUENCES, FRAMES = 4, 10  # a shard a sequence: as much work for each of two workers


def floor(frames: list[Frame]) -> None:
    cv2.setNumThreads(1)
    for frame in frames:
        height, width = target = _target(frame)
        image, _ = decode_jpeg(frame.image.read_bytes(), OPTIONS.short_side / SHORT)
        bits, mask = (_png(path) for path in (frame.depth.path, frame.mask))
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        rows, columns = (
            nearest((np.arange(n) + 0.5) * m / n - 0.5, m) for n, m in zip(target, bits.shape, strict=True)
        )
        depth = np.where(mask > 128, bits, 0)[rows[:, None], columns]
        encode_jpeg(small, OPTIONS.quality)
        encode_depth(depth.view(np.float16))


def plain(frames: list[Frame]) -> None:
    cv2.setNumThreads(1)
    for frame in frames:
        height, width = _target(frame)
        image = np.asarray(cv2.imread(str(frame.image)))
        bits, mask = (
            np.asarray(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)) for path in (frame.depth.path, frame.mask)
        )
        depth = np.where(mask > 128, bits, 0).view(np.float16).astype(np.float32)
        depth[depth > np.percentile(depth[depth > 0], FAR_PERCENTILE)] = 0
        small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        picked = cv2.resize(depth, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.float16)
        cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, OPTIONS.quality])
        cv2.imencode(".png", picked.view(np.uint16))


def _target(frame: Frame) -> tuple[int, int]:
    assert frame.size is not None
    height, width = (round(n * OPTIONS.short_side / min(frame.size)) for n in frame.size)
    return height, width


def _png(path: Path | None) -> np.ndarray:
    assert path is not None
    return cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_UNCHANGED)


def packer(source: Captures, folder: Path, pool: Executor, workers: int) -> Callable[[], None]:
    """Packs all of `source`, from nothing to the finished set."""
    numbers: Iterator[int] = count()

    def work() -> None:
        out = folder / f"{workers}-{next(numbers)}"
        pack(source, out, OPTIONS, pool, max_bad=0, parallel=workers)
        shutil.rmtree(out)

    return work


def sizes(source: Captures, folder: Path, pool: Executor) -> None:
    """Bytes a frame, of all files of the set, against those of the original JPEG and depth PNG."""
    pack(source, folder / "sizes", OPTIONS, pool, max_bad=0, parallel=1)
    opened = shards.open(folder / "sizes")
    frames = [frame for sequence in source.sequences() for frame in sequence.frames]
    ours = sum(entry["size"] for entry in opened.dataset["files"].values()) / len(frames)
    raw = sum(
        path.stat().st_size for frame in frames for path in (frame.image, frame.depth and frame.depth.path) if path
    ) / len(frames)
    print(f"a frame: {ours / 1e3:.0f} kB; original JPEG and depth PNG: {raw / 1e3:.0f} kB; share {ours / raw:.3f}")


def main() -> None:
    with (
        TemporaryDirectory() as name,
        process_pool(1, ["prep.packing.pack"]) as one,
        process_pool(2, ["prep.packing.pack"]) as two,
    ):
        folder = Path(name)
        source = Captures(folder, SEQUENCES, FRAMES)
        frames = [frame for sequence in source.sequences() for frame in sequence.frames]
        sizes(source, folder, one)
        ours = packer(source, folder, one, 1)
        print(
            "one worker, time over the floor (at most 1.25):", ratio(ours, lambda: one.submit(floor, frames).result())
        )
        print("one worker, time over the plain way:", ratio(ours, lambda: one.submit(plain, frames).result()))
        print("one worker, time over two (at least 1.8):", ratio(ours, packer(source, folder, two, 2)))


if __name__ == "__main__":
    main()
