"""A page to look at a shard set: images, depths, cameras, and whether they fit each other."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from prep.info import kind_of_depth
from shards import ShardSet, drawing
from shards.codecs import decode_depth, decode_jpeg
from shards.geometry import (
    AGREEMENT,
    DepthView,
    agreement,
    are_scattered,
    move_points,
    nearest,
    project,
    scale_intrinsics,
)
from shards.pairs import Pairs
from shards.writer import atomic_file

STRIP_FRAMES, STRIP_HEIGHT = 8, 150
PAIR_HEIGHT, PAIR_STEP = 300, 10  # without overlaps, the second view of a pair lies a tenth of the sequence later
CHECKER = 40  # pixels
POINTS = 4000  # a frame, of the view from above

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1500px; color: #222; padding: 0 1em }
img { max-width: 100%; display: block; margin: .3em 0 } h2 { margin: 1.6em 0 .2em; font-size: 1.1em }
p { margin: .2em 0 } .wrong { color: #b00; font-weight: bold }
"""
EXPLANATION = """
Each sequence: some of its images; their depths, near is red, far is blue, gray is unknown; its cameras from above, the
first red, the last blue, over points of its depths. Then a pair of views A and B: A, B, A as B should see it by the
depth of B and both cameras, and the same in a checkerboard with B. With right cameras and depths the last two look
like B but for what is hidden from A, where the thing in front appears twice; where lines break at the squares' edges,
a camera, an intrinsic or a depth is wrong. Of depth that is single points, A and B with these, by depth: the same
point must lie on the same thing in both. Last a frame from the middle beside three
others that see some of the same: most, as much as the median one, and least of those that are stored; and the part
that each of the two sees of the other.
"""


class View:
    """A frame at a small size: image [h, w, 3], and its geometry."""

    def __init__(self, shard_set: ShardSet, frame: int, height: int) -> None:
        row = shard_set.row(frame)
        size = int(row["height"]), int(row["width"])
        scale = min(1.0, height / size[0])
        shape = round(size[0] * scale), round(size[1] * scale)
        jpeg, depth_bytes = shard_set.read(frame)
        image, _ = decode_jpeg(jpeg)
        self.image = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
        rows, columns = (nearest((np.arange(n) + 0.5) * m / n - 0.5, m) for n, m in zip(shape, size, strict=True))
        full = np.zeros(size, np.float16) if depth_bytes is None else decode_depth(depth_bytes, *size)
        self.is_scattered = are_scattered(full)
        if self.is_scattered:
            scales = shape[0] / size[0], shape[1] / size[1]
            full = move_points(full, scales, (scales[0] / 2 - 0.5, scales[1] / 2 - 0.5), shape)
        else:
            full = full[rows[:, None], columns]
        depth = full.astype(np.float64) * row["depth_scale"]
        self.name = bytes(row["name"]).decode()
        intrinsics = scale_intrinsics(row["intrinsics"], shape[1] / size[1], shape[0] / size[0])
        self.geometry = DepthView(depth, np.array(row["extrinsics"]), intrinsics)


def write_preview(shard_set: ShardSet, out: Path, count: int) -> Iterator[str | None]:
    """Write a self-contained HTML page of `count` sequences, taken evenly; yields what is wrong with each, or None."""
    rows = shard_set.sequences
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    title = html.escape(f"{shard_set}: {len(chosen)} of {len(rows)} sequences")
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><h1>{title}</h1>'
    pairs = good_pairs(shard_set)
    with atomic_file(out) as file:
        file.write(f"{head}<p>{EXPLANATION}</p>".encode())
        for number in chosen:
            name = "/".join(bytes(rows[key][number]).decode() for key in ("split", "category", "name"))
            problem = None
            try:
                section = sequence_section(shard_set, pairs, int(rows["first"][number]), int(rows["count"][number]))
            except (ValueError, OSError) as error:
                problem = str(error)
                section = f'<p class="wrong">{html.escape(problem)}</p>'
            file.write(f"<h2>{html.escape(name)}</h2>{section}".encode())
            yield problem


def good_pairs(shard_set: ShardSet) -> Pairs | None:
    """None if the set has none, or damaged ones, as vggt-prep verify says."""
    try:
        return Pairs(shard_set)
    except ValueError:
        return None


def sequence_section(shard_set: ShardSet, pairs: Pairs | None, first: int, count: int) -> str:
    """The part of the page that shows the sequence of these frames. Raises ValueError or OSError if one is damaged."""
    frames = np.unique(np.linspace(first, first + count - 1, min(STRIP_FRAMES, count)).round().astype(int))
    views = [View(shard_set, int(frame), STRIP_HEIGHT) for frame in frames]
    cameras = shard_set.frames[first : first + count]
    known = np.mean([(view.geometry.depth > 0).mean() for view in views])
    k, size = cameras["intrinsics"][0], (int(cameras["width"][0]), int(cameras["height"][0]))
    angle = 2 * np.degrees(np.arctan(size[0] / 2 / k[0, 0]))
    depth = f"depth known at {100 * known:.2g}% of pixels"
    name = bytes(shard_set.sequences[int(cameras["sequence"][0])]["name"]).decode()
    lines = [f"{count} frames of {size[0]} x {size[1]}, {angle:.0f} degrees wide; {depth}"]
    lines += [words] if (words := kind_of_depth(shard_set.dataset, name)) else []
    pictures = [_strip(views, cameras)]
    if known and count > 1:
        pair = [View(shard_set, frame, PAIR_HEIGHT) for frame in _pair_of(pairs, first, count)]
        agreement, picture = _pair(*pair)
        lines.append(f"A = {pair[0].name}, B = {pair[1].name}: {agreement}")
        pictures.append(picture)
    if pairs is not None:
        words, picture = _neighbors(shard_set, pairs, first + count // 2)
        lines.append(words)
        pictures.append(picture)
    text = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    return text + "".join(f'<img src="data:image/jpeg;base64,{_base64(picture)}">' for picture in pictures)


def _strip(views: list[View], cameras: np.ndarray) -> np.ndarray:
    """Images above depths, the scale of these, and the cameras from above."""
    near, far = drawing.near_and_far(np.concatenate([view.geometry.depth.reshape(-1) for view in views]))
    depths = [drawing.color_depth(_seen(view), near, far) for view in views]
    body = drawing.stack([drawing.row([view.image for view in views]), drawing.row(depths)])
    points = []
    for view in views:
        cloud = view.geometry.points().T
        cloud = cloud[np.isfinite(cloud[:, 0])]
        points.append(cloud[:: max(1, len(cloud) // POINTS)])
    above = drawing.top_down(
        cameras["extrinsics"], cameras["intrinsics"], np.concatenate(points), len(body) - drawing.GAP
    )
    return np.concatenate([drawing.row([body, above]), drawing.scale_bar(len(body) + drawing.GAP, near, far)], axis=1)


def _seen(view: View) -> np.ndarray:
    """The depths of a view as they are drawn."""
    return drawing.as_dots(view.geometry.depth) if view.is_scattered else view.geometry.depth


def _pair_of(pairs: Pairs | None, first: int, count: int) -> tuple[int, int]:
    """The first frame of a sequence and the one that sees half of the same, if that is known, else one not far."""
    if pairs is not None:
        others, overlaps = pairs.neighbors(first)
        if len(others):
            return first, int(others[np.abs(overlaps - 0.5).argmin()])
    return first, first + max(1, count // PAIR_STEP)


def _pair(a: View, b: View) -> tuple[str, np.ndarray]:
    """How well two views fit each other, in words and as a picture."""
    if a.is_scattered or b.is_scattered:
        near, far = drawing.near_and_far(np.concatenate([v.geometry.depth.reshape(-1) for v in (a, b)]))
        dots = [np.where(_seen(v)[..., None] > 0, drawing.color_depth(_seen(v), near, far), v.image) for v in (a, b)]
        return "their single points, by depth", drawing.row(dots)
    shape = b.geometry.depth.shape
    pixels, _ = project(b.geometry.points(), a.geometry.extrinsics, a.geometry.intrinsics)
    warped = drawing.sample(a.image, pixels, shape)
    compared, agreeing = agreement(b.geometry, a.geometry)
    words = "no pixel has a depth in both"
    if compared:
        words = f"their depths agree to {AGREEMENT:.0%} at {agreeing / compared:.0%} of the pixels that both know"
    v, u = np.mgrid[: shape[0], : shape[1]] // CHECKER
    checker = np.where(((u + v) % 2 == 0)[..., None], warped, b.image)
    return words, drawing.row([a.image, b.image, warped, checker])


def _neighbors(shard_set: ShardSet, pairs: Pairs, frame: int) -> tuple[str, np.ndarray]:
    """A frame beside those of its neighbors that overlap with it most, as the median one does, and least."""
    others, overlaps = pairs.neighbors(frame)
    places = dict.fromkeys([0, len(others) // 2, len(others) - 1]) if len(others) else {}
    views = [View(shard_set, frame, STRIP_HEIGHT), *(View(shard_set, int(others[i]), STRIP_HEIGHT) for i in places)]
    found = ", ".join(f"{view.name} {overlaps[i]:.0%}" for i, view in zip(places, views[1:], strict=True))
    words = f"{views[0].name} overlaps with {found}" if found else f"{views[0].name} overlaps with no other frame"
    return words, drawing.row([view.image for view in views])


def _base64(picture: np.ndarray) -> str:
    return base64.b64encode(drawing.jpeg(picture)).decode()
