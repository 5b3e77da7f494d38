"""SIFT matches between the views of a capture, found without its cameras, and two-view geometry to test on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import cv2
import numpy as np

from prep.importers.source import Frame
from prep.packing.frames import FrameOptions, pack_frame
from prep.packing.reading import BadFrameError
from shards.codecs import decode_depth, decode_jpeg
from shards.overlap import View, Views, views_of

PAIRS = 15  # of views, evenly over the capture
SHORT_SIDE = 480
MATCH_RATIO, CLEAN = 0.75, 1.5  # Lowe's ratio of SIFT distances; RANSAC's epipolar threshold in pixels
MIN_MATCHES = 25
MOST_GUESSED, GUESSES, LIKELY = 200, 3, 0.8  # frames to guess overlaps of; those to try for one; the overlap sought


@dataclass
class MatchedView:
    """An image with its camera, and those before and after it in the capture."""

    image: np.ndarray  # gray
    depth: np.ndarray | None
    extrinsics: np.ndarray
    intrinsics: np.ndarray
    before: np.ndarray  # extrinsics of the frame before
    after: np.ndarray


Pair = tuple[MatchedView, MatchedView, np.ndarray, np.ndarray]  # with pixels [n, 2] of the matches in both


def matched_pairs(frames: list[Frame]) -> tuple[list[Pair], int, Counter[str]]:
    """Matched pairs of views, evenly over the capture; how many frames were usable, and why the others were not.

    The gap within a pair starts as the gap between pairs, and is halved until there are enough matches. Where the order
    of the frames does not help, those are tried that should see the same by their cameras, whose poses may be wrong.
    """
    sift = cv2.SIFT.create(3000)
    reasons: Counter[str] = Counter()
    usable = 0

    @cache
    def seen(number: int) -> tuple[MatchedView, Any] | None:
        nonlocal usable
        try:
            view = _view(frames, number)
        except BadFrameError as error:
            reasons[str(error)] += 1
            return None
        usable += 1
        return view, sift.detectAndCompute(view.image, None)

    @cache
    def guessed_views() -> tuple[np.ndarray, Views | None]:
        some = np.unique(np.linspace(0, len(frames) - 1, MOST_GUESSED).round().astype(int))
        sized = {int(i): _sized(frames[i], size_of_cameras()) for i in some}
        usable = [i for i, view in sized.items() if np.isfinite(view.extrinsics).all()]
        return np.array(usable), views_of(sized[i] for i in usable) if usable else None

    @cache
    def size_of_cameras() -> tuple[int, int]:
        """Of the images that the cameras' intrinsics are of: the first usable one is packed at another size."""
        number = next(i for i in range(len(frames)) if seen(i) is not None)
        view, _ = seen(number) or (None, None)
        assert view is not None
        height, width = view.image.shape
        larger = frames[number].camera.opencv(height, width)[1][0, 0] / view.intrinsics[0, 0]
        return round(height * larger), round(width * larger)

    def partners(number: int) -> Iterator[int]:
        gap = max(1, len(frames) // PAIRS)
        while gap:
            yield min(number + gap, len(frames) - 1)
            gap //= 2
        some, views = guessed_views()
        if views is None:
            return
        nearest = int(np.abs(some - number).argmin())
        others = np.delete(np.arange(len(some)), nearest)
        overlaps = views.overlaps(np.stack([np.full(len(others), nearest), others], axis=1))
        yield from map(int, some[others[np.argsort(np.abs(overlaps - LIKELY))[:GUESSES]]])

    pairs = []
    for number in np.unique(np.linspace(0, max(0, len(frames) - 2), PAIRS).round().astype(int)):
        first = seen(int(number))
        if first is None:
            continue
        tried = {int(number)}
        for partner in partners(int(number)):
            second = None if partner in tried else seen(partner)
            tried.add(partner)
            pair = None if second is None else _matched(first, second)
            if pair is not None:
                pairs.append(pair)
                break
    return pairs, usable, reasons


def _sized(frame: Frame, size: tuple[int, int]) -> View:
    """A frame of which the camera alone is known."""
    return View(None, size, *frame.camera.opencv(*size))


def _view(frames: list[Frame], number: int) -> MatchedView:
    """Raises BadFrameError."""
    # Without quarter turns: they may come from the poses, which may be wrong.
    packed = pack_frame(replace(frames[number], quarter_turns=0), FrameOptions(short_side=SHORT_SIDE))
    size = packed.meta.height, packed.meta.width
    around = [frames[max(0, number - 1)], frames[min(len(frames) - 1, number + 1)]]
    before, after = (frame.camera.opencv(*size)[0] for frame in around)
    image, _ = decode_jpeg(packed.jpeg)
    depth = None if packed.depth is None else decode_depth(packed.depth, *size).astype(float)
    return MatchedView(
        image=cv2.cvtColor(image, cv2.COLOR_RGB2GRAY),
        depth=None if depth is None else depth * packed.meta.depth_scale,
        extrinsics=packed.meta.extrinsics,
        intrinsics=packed.meta.intrinsics,
        before=before,
        after=after,
    )


def _matched(a: tuple[MatchedView, Any], b: tuple[MatchedView, Any]) -> Pair | None:
    """The matches of two views, cleaned by the geometry that fits these best, whatever the cameras say."""
    (view_a, (keys_a, of_a)), (view_b, (keys_b, of_b)) = a, b
    if of_a is None or of_b is None or len(of_b) < 2:
        return None
    matches = [m for m, n in cv2.BFMatcher().knnMatch(of_a, of_b, k=2) if m.distance < MATCH_RATIO * n.distance]
    if len(matches) < MIN_MATCHES:
        return None
    pixels_a = np.array([keys_a[m.queryIdx].pt for m in matches])
    pixels_b = np.array([keys_b[m.trainIdx].pt for m in matches])
    _, clean = cv2.findFundamentalMat(pixels_a, pixels_b, cv2.FM_RANSAC, CLEAN, 0.999)
    clean = np.zeros(len(matches), bool) if clean is None else clean[:, 0] > 0
    return (view_a, view_b, pixels_a[clean], pixels_b[clean]) if clean.sum() >= MIN_MATCHES else None


def epipolar_distances(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """The distance [n] of matches from their epipolar lines, to first order (Sampson 1982), in pixels."""
    (pose_a, k_a), (pose_b, k_b) = a, b
    rotation = pose_b[:, :3] @ pose_a[:, :3].T
    t = pose_b[:, 3] - rotation @ pose_a[:, 3]
    if np.linalg.norm(t) == 0:
        return np.full(len(x), np.inf)
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]]) / np.linalg.norm(t)
    fundamental = np.linalg.inv(k_b).T @ cross @ rotation @ np.linalg.inv(k_a)
    x, y = (np.column_stack([pixels, np.ones(len(pixels))]) for pixels in (x, y))
    lines_b, lines_a = x @ fundamental.T, y @ fundamental
    size = (lines_b[:, :2] ** 2).sum(axis=1) + (lines_a[:, :2] ** 2).sum(axis=1)
    return np.abs((y * lines_b).sum(axis=1)) / np.sqrt(np.maximum(size, 1e-30))


def triangulated(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Points of the world [3, n] that two cameras see at pixels [n, 2]."""
    if not len(x):
        return np.empty((3, 0))
    points = cv2.triangulatePoints(a[1] @ a[0], b[1] @ b[0], x.T, y.T)
    return points[:3] / np.where(points[3] == 0, 1e-12, points[3])


def inverse(pose: np.ndarray) -> np.ndarray:
    return np.column_stack([pose[:, :3].T, -pose[:, :3].T @ pose[:, 3]])
