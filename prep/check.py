"""Measure whether a capture's cameras fit its images, and its depths the cameras; compare with common mistakes.

SIFT features are matched between views without using the cameras. The two features of a match must then lie on each
other's epipolar lines, and the point triangulated from them must have the stored depth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from prep.importers.source import Capture
from prep.matches import MatchedView, Pair, epipolar_distances, inverse, matched_pairs, triangulated

MIN_PAIRS = 3
NEAR = 4.0  # pixels from the given cameras' epipolar lines: phone tracking is no more accurate
FITS, BETTER = 0.6, 0.15  # fraction of matches that must be near; margin by which another hypothesis must win
FOCAL_FACTORS, FOCAL_BETTER = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.2), 0.03  # to try; margin by which one must win
MIN_PARALLAX = 1.0  # degrees, for a match to be triangulated
DEPTH_FITS = 1.15  # stored and triangulated depths agree within this factor
UNITS = {1000.0: "depths are 1000 times too large (millimeters?)", 1e-3: "depths are 1000 times too small (meters?)"}
MIN_DEPTHS = 30
RELIEF = 0.1  # shuffled spread above this: not nearly flat
NOISE, LIKE_CHANCE = 0.05, 0.25  # spread of depths that fit; part of the shuffled spread above which they do not
BEHIND = 0.3  # fraction of points in front of both cameras, below which the cameras look the other way
SURE = 2.0  # standard errors
UNIT_OFF = 10.0  # beyond this factor, depths are in another unit, along rays or the axis
TYPICAL, TRIMS = 0.3, 5  # distance of initial inliers from the median log ratio; rounds of the fit


@dataclass(frozen=True)
class CaptureCheck:
    """What was measured of a capture; None: was not. fits: None if it cannot tell; words: why, or what fits better."""

    name: str
    pairs: int
    near: float | None
    depth_ratio: float | None
    fits: bool | None
    words: str


def check_capture(capture: Capture) -> CaptureCheck:
    """Raises nothing for a bad capture: its check says so."""
    pairs, usable, reasons = matched_pairs(capture.frames)
    if len(pairs) < MIN_PAIRS:
        words = f"only {len(pairs)} pairs of views have enough matches to tell"
        if reasons:
            words += f"; {reasons.total()} frames could not be used: {reasons.most_common(1)[0][0]}"
        return CaptureCheck(capture.name, len(pairs), None, None, None if usable else False, words)
    scores = {name: _score(pairs, change) for name, change in HYPOTHESES.items()}
    given = scores.pop(GIVEN)
    best = max(scores, key=lambda name: scores[name])
    by_pair = [_compared_depths(pair) for pair in pairs if pair[0].depth is not None]
    depths = _joined(by_pair)
    ratio = float(np.median(depths.ratios)) if len(depths.ratios) >= MIN_DEPTHS else None
    words = None
    if scores[best] > given + BETTER and scores[best] >= FITS:
        words = f"{scores[best]:.0%} would fit if {best}"
    elif given < FITS:
        words = "cameras and images do not fit"
    elif ratio is not None:
        words = _wrong_depth(ratio, by_pair)
    if words is not None:
        return CaptureCheck(capture.name, len(pairs), given, ratio, False, words)
    some = any(a.depth is not None for a, *_ in pairs)
    without = "too few depths at matches to compare with" if some else "no depth to compare with"
    words = "cameras and images fit" + (", and so do the depths" if ratio is not None else f"; {without}")
    focal, score = max(((f, _score(pairs, _longer(f))) for f in FOCAL_FACTORS), key=lambda found: found[1])
    if score > given + FOCAL_BETTER:
        words += f"; better with a focal length {focal:g} times as long ({score:.0%} near, not {given:.0%}): "
        words += "are these the intrinsics of another camera? Then correct them (--intrinsics, where a layout has none)"
    return CaptureCheck(capture.name, len(pairs), given, ratio, True, words)


# a view -> extrinsics and intrinsics under a hypothesis
Change = Callable[[MatchedView], tuple[np.ndarray, np.ndarray]]
GIVEN = "as given"


def _exchanged(k: np.ndarray, *, focal: bool, center: bool) -> np.ndarray:
    k = k.copy()
    if focal:
        k[0, 0], k[1, 1] = k[1, 1], k[0, 0]
    if center:
        k[0, 2], k[1, 2] = k[1, 2], k[0, 2]
    return k


def _longer(factor: float) -> Change:
    return lambda v: (v.extrinsics, v.intrinsics * [[factor, 1, 1], [1, factor, 1], [1, 1, 1]])


FLIP = np.diag([1.0, -1.0, -1.0])
HYPOTHESES: dict[str, Change] = {
    GIVEN: lambda v: (v.extrinsics, v.intrinsics),
    "the poses were the other way round (camera-to-world)": lambda v: (inverse(v.extrinsics), v.intrinsics),
    "the cameras' y and z pointed the other way (OpenGL)": lambda v: (FLIP @ v.extrinsics, v.intrinsics),
    "the rotations were transposed": lambda v: (
        np.column_stack([v.extrinsics[:, :3].T, v.extrinsics[:, 3]]),
        v.intrinsics,
    ),
    "the translations had the other sign": lambda v: (
        np.column_stack([v.extrinsics[:, :3], -v.extrinsics[:, 3]]),
        v.intrinsics,
    ),
    "each image had the pose of the one before": lambda v: (v.before, v.intrinsics),
    "each image had the pose of the one after": lambda v: (v.after, v.intrinsics),
    "fx and fy were exchanged": lambda v: (v.extrinsics, _exchanged(v.intrinsics, focal=True, center=False)),
    "width and height were exchanged": lambda v: (v.extrinsics, _exchanged(v.intrinsics, focal=True, center=True)),
}


def _score(pairs: list[Pair], change: Change) -> float:
    """Mean over pairs of the fraction of matches near epipolar lines, 0 where points lie behind the cameras."""
    found = []
    for a, b, x, y in pairs:
        cameras = change(a), change(b)
        near = epipolar_distances(*cameras, x, y) < NEAR
        points = triangulated(*cameras, x[near], y[near])
        depths = np.array([pose[2, :3] @ points + pose[2, 3] for pose, _ in cameras])
        found.append(near.mean() if not near.any() or (depths > 0).all(axis=0).mean() > BEHIND else 0.0)
    return float(np.mean(found))


@dataclass(frozen=True)
class ComparedDepths:
    """For matches [n]: stored depth, its ratio to the triangulated depth z, the ratio of ray length to z, and by what
    fraction z is off where a match is off by as much as the pair's typically are."""

    stored: np.ndarray
    ratios: np.ndarray
    lengths: np.ndarray
    noise: np.ndarray


def _joined(parts: list[ComparedDepths]) -> ComparedDepths:
    values = [[np.empty(0), *(getattr(part, field.name) for part in parts)] for field in fields(ComparedDepths)]
    return ComparedDepths(*map(np.concatenate, values))


def _compared_depths(pair: Pair) -> ComparedDepths:
    """Of a pair whose first view has depth."""
    a, b, x, y = pair
    assert a.depth is not None
    cameras = (a.extrinsics, a.intrinsics), (b.extrinsics, b.intrinsics)
    distances = epipolar_distances(*cameras, x, y)
    near = distances < NEAR
    x, y = x[near], y[near]
    points = triangulated(*cameras, x, y) if len(x) else np.empty((3, 0))
    rays = [points - inverse(view.extrinsics)[:, 3:] for view in (a, b)]
    cosine = (rays[0] * rays[1]).sum(axis=0) / np.prod([np.linalg.norm(ray, axis=0) for ray in rays], axis=0)
    z = a.extrinsics[2, :3] @ points + a.extrinsics[2, 3]
    columns, rows = np.rint(x).astype(int).T
    inside = (rows < a.depth.shape[0]) & (columns < a.depth.shape[1])
    depth = a.depth[np.minimum(rows, a.depth.shape[0] - 1), np.minimum(columns, a.depth.shape[1] - 1)]
    good = inside & (z > 0) & (depth > 0) & (cosine < np.cos(np.radians(MIN_PARALLAX)))
    lengths = np.linalg.norm(rays[0][:, good], axis=0) / z[good]
    typical = np.median(distances[near]) if near.any() else 0.0  # across epipolar lines, and so along them
    noise = typical / (a.intrinsics[0, 0] * np.arccos(cosine[good]))
    return ComparedDepths(depth[good], depth[good] / z[good], lengths, noise)


def _wrong_depth(ratio: float, by_pair: list[ComparedDepths]) -> str | None:
    """What is wrong with depths whose median ratio to triangulated depths is `ratio`; None: nothing is.

    What is said of all matches must not hang on some pairs: the matches of a pair share the errors of its cameras.
    """
    depths = _joined(by_pair)
    spread, by_chance = _spread(depths.ratios), _shuffled_spread(depths)
    like_chance, error = _jackknifed(_like_chance, by_pair)
    if by_chance > RELIEF and spread > NOISE and like_chance - SURE * error > np.log(LIKE_CHANCE):
        return "the depths are not those of what the images show: are they of other frames, or turned?"
    steepness, error = _jackknifed(_steepness, by_pair)
    if steepness - SURE * error > 0.5 and 1 / UNIT_OFF < ratio < UNIT_OFF:
        return "the depths are along the pixels' rays, not along the axis: they grow toward the corners"
    if 1 / DEPTH_FITS < ratio < DEPTH_FITS:
        return None
    unit = next((words for factor, words in UNITS.items() if 0.5 < ratio / factor < 2), None)
    return unit or f"depths are {ratio:.3g} times what the cameras say: is the focal length right?"


def _jackknifed(statistic: Callable[[ComparedDepths], float], by_pair: list[ComparedDepths]) -> tuple[float, float]:
    """A statistic of all pairs, and its standard error from leaving each out (Tukey 1958)."""
    parts = [part for part in by_pair if len(part.ratios)]
    value = statistic(_joined(parts))
    if len(parts) < MIN_PAIRS:
        return value, np.inf
    without = [statistic(_joined(parts[:i] + parts[i + 1 :])) for i in range(len(parts))]
    spread = np.var(without) if np.isfinite(without).all() else np.inf
    return value, float(np.sqrt((len(parts) - 1) * spread))


def _like_chance(depths: ComparedDepths) -> float:
    """How the spread, less what comes of matching, compares with that of shuffled depths, as a logarithm."""
    spread = max(_spread(depths.ratios) ** 2 - np.median(depths.noise) ** 2, 1e-6) ** 0.5
    return float(np.log(spread / max(_shuffled_spread(depths), 1e-6)))


def _spread(ratios: np.ndarray) -> float:
    """The median absolute deviation of the logarithms."""
    logarithms = np.log(ratios)
    return float(np.median(np.abs(logarithms - np.median(logarithms))))


def _shuffled_spread(depths: ComparedDepths) -> float:
    """What the spread would be if each match had the depth of another one."""
    others = np.random.default_rng(0).permutation(len(depths.stored))
    return _spread(depths.ratios / depths.stored * depths.stored[others])


def _steepness(depths: ComparedDepths) -> float:
    """The slope of a line fitted to log ratio over log length, without outliers; nan: there are too few matches."""
    x, y = np.log(depths.lengths), np.log(depths.ratios)
    kept, slope = np.abs(y - np.median(y)) < TYPICAL, np.nan
    for _ in range(TRIMS):
        if kept.sum() < MIN_DEPTHS or np.ptp(x[kept]) < 1e-3:
            return np.nan
        slope, offset = np.polyfit(x[kept], y[kept], 1)
        residual = np.abs(y - slope * x - offset)
        kept = residual < 3 * np.median(residual)
    return float(slope)
