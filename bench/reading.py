"""What reading shards costs, against OpenCV's JPEG and PNG16, and what an index of 1.5 million frames costs.

python bench/reading.py decode     part by part, at the stored resolution
python bench/reading.py index      generated: 20,000 sequences, 3,000 tars
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
from captures import Captures
from pairs import ratio

import shards
from prep.packing.frames import FrameOptions, pack_frame
from shards.codecs import decode_depth, decode_jpeg
from shards.index import sha256
from shards.schema import (
    CRC_ZEROS,
    DATASET_FILE,
    FORMAT,
    FRAMES_FILE,
    SELF_CRC,
    SEQUENCES_FILE,
    VERSION,
    frame_dtype,
    self_crc,
    sequence_dtype,
)
from shards.writer import json_bytes

SEQUENCES, FRAMES_EACH, TARS, PROCESSES = 20_000, 75, 3_000, 8


def decode() -> None:
    cv2.setNumThreads(1)
    with TemporaryDirectory() as folder:
        source = Captures(Path(folder), 2, 6)
        frames = [pack_frame(frame, FrameOptions()) for s in source.sequences() for frame in s.frames]
    jpegs = [frame.jpeg for frame in frames]
    depths = [(frame.depth or b"", frame.meta.height, frame.meta.width) for frame in frames]
    pngs = [cv2.imencode(".png", decode_depth(*depth).view(np.uint16))[1].tobytes() for depth in depths]

    def images() -> None:
        for jpeg in jpegs:
            decode_jpeg(jpeg)

    def cv2_images() -> None:
        for jpeg in jpegs:
            cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)

    def maps() -> None:
        for depth in depths:
            decode_depth(*depth)

    def cv2_maps() -> None:
        for png in pngs:
            cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)

    print("OpenCV's time over ours, JPEG:", ratio(cv2_images, images))
    print("PNG16 over depth (at least 4):", ratio(cv2_maps, maps))
    print("both (at least 2):", ratio(lambda: (cv2_images(), cv2_maps()), lambda: (images(), maps())))
    sizes = [sum(map(len, data)) / len(frames) / 1e3 for data in ([d for d, _, _ in depths], pngs)]
    print(f"depth: {sizes[0]:.0f} kB a frame, as PNG16 {sizes[1]:.0f} kB")


def generate(out: Path) -> None:
    """The index of a set without frames: rows with CRCs, tars of no bytes."""
    sequences = np.zeros(SEQUENCES, sequence_dtype(10, 18))
    sequences["category"], sequences["split"] = b"category", b"train"
    sequences["name"] = [f"sequence{i:08d}".encode() for i in range(SEQUENCES)]
    sequences["count"], sequences["first"] = FRAMES_EACH, np.arange(SEQUENCES) * FRAMES_EACH
    frames = np.zeros(SEQUENCES * FRAMES_EACH, frame_dtype(11))
    frames["name"] = np.tile([f"frame{i:06d}".encode() for i in range(FRAMES_EACH)], SEQUENCES)
    frames["sequence"] = np.repeat(np.arange(SEQUENCES), FRAMES_EACH)
    frames["tar"] = frames["sequence"] * TARS // SEQUENCES
    frames["extrinsics"] = np.random.default_rng(0).normal(size=(len(frames), 3, 4))
    raw, size = frames.tobytes(), frames.dtype.itemsize
    frames["row_crc"] = [zlib.crc32(raw[i : i + size - 4]) for i in range(0, len(raw), size)]
    np.save(out / FRAMES_FILE, frames)
    np.save(out / SEQUENCES_FILE, sequences)
    tars = [f"train-{i:06d}.tar" for i in range(TARS)]
    for tar in tars:
        (out / tar).touch()
    entries = {name: {"size": (out / name).stat().st_size, "sha256": "0" * 64} for name in [FRAMES_FILE, *tars]}
    entries[SEQUENCES_FILE] = {"size": (out / SEQUENCES_FILE).stat().st_size, "sha256": sha256(out / SEQUENCES_FILE)}
    dataset = {"format": FORMAT, "version": VERSION, SELF_CRC: CRC_ZEROS, "tars": tars, "files": entries}
    dataset[SELF_CRC] = self_crc(json_bytes(dataset), CRC_ZEROS)
    (out / DATASET_FILE).write_bytes(json_bytes(dataset))


def memory(*kinds: str) -> float:
    """MB of this process of these kinds, as the kernel counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in kinds) / 1e3


def use(out: Path, start: multiprocessing.Barrier, queue: multiprocessing.Queue) -> None:
    """Open the set, read all of its index, and say: seconds to open, MB that it added, private and proportional."""
    start.wait()
    before = memory("Anonymous")
    began = time.perf_counter()
    opened = shards.open(out)
    rows = len(opened.frames), len(opened.sequences)
    seconds = time.perf_counter() - began
    checked = sum(int(opened.frames[field].sum()) for field in ("tar", "height", "sequence"))
    assert rows == (SEQUENCES * FRAMES_EACH, SEQUENCES), checked
    start.wait()  # all have it in memory now
    queue.put((seconds, memory("Anonymous") - before, memory("Pss"), memory("Rss")))
    start.wait()


def index() -> None:
    with TemporaryDirectory() as name:
        generate(Path(name))
        file_size = (Path(name) / FRAMES_FILE).stat().st_size / 1e6
        fresh = multiprocessing.get_context("spawn")
        for processes in (1, PROCESSES):
            start, queue = fresh.Barrier(processes), fresh.Queue()
            running = [fresh.Process(target=use, args=(Path(name), start, queue)) for _ in range(processes)]
            for process in running:
                process.start()
            found = [queue.get() for _ in running]
            for process in running:
                process.join()
            seconds, private, pss, rss = (statistics.median(values) for values in zip(*found, strict=True))
            print(
                f"{processes} processes: open {seconds * 1e3:.0f} ms (at most 50), memory added {private:.1f} MB "
                f"(at most 20), mapped {file_size:.0f} MB; a process has {rss:.0f} MB, its share {pss:.0f} MB"
            )


if __name__ == "__main__":
    {"decode": decode, "index": index}[sys.argv[1]]()
