"""How much two views see of each other, by a few points of their depths, on small depth maps.

The overlap of a pair is the smaller of two fractions: of the known pixels of A, those that B sees too, and the other
way round. So a close-up within a wide view has a small overlap: the wide one knows nothing of the rest from it. Only
ratios of depths count, so that a scene's unit does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from shards.codecs import decode_depth
from shards.geometry import scale_intrinsics
from shards.reader import ShardSet

SIDE = 96  # pixels of a small map's longer side
POINTS = 256  # of a view
FEW = 4  # points: a fraction of fewer is not believed
NOISE_PAIRS = 48  # that the noise is measured on
# Of the depth, if its noise can be measured or not; and in standard deviations of the noise.
LEAST_TOLERANCE, USUAL_TOLERANCE, MOST_TOLERANCE, NOISES = 0.01, 0.03, 0.1, 3
COMPARABLE = 0.2  # depths that differ more are of two surfaces
GUESSED = (0.5, 1.0, 2.0)  # of a typical depth: where a view without depth is taken to see something
TRIED_AXES = 64  # of other cameras
PARALLEL = 0.05  # sine of the angle between two axes below which they meet nowhere
OUTWARD = 4.0  # typical depth over the typical distance between cameras, where the axes do not meet before them


class View:
    """A view with a small depth map: what it sees of another one's points is looked up there.

    depth [H, W] times depth_scale: along z in the translations' units, 0 where unknown; None: none is known.
    size: (H, W).
    """

    def __init__(
        self,
        depth: np.ndarray | None,
        size: tuple[int, int],
        extrinsics: np.ndarray,
        intrinsics: np.ndarray,
        depth_scale: float = 1.0,
    ) -> None:
        step = max(1, -(-max(size) // SIDE))
        self.extrinsics, self.intrinsics = extrinsics, scale_intrinsics(intrinsics, 1 / step, 1 / step)
        self.limits = np.array([size[1] / step, size[0] / step]) - 0.5  # where the image ends: u, v
        self.shape = (-(-size[0] // step), -(-size[1] // step))
        depth = np.zeros(size, np.float16) if depth is None else depth
        self.map = shrunk(depth, step).astype(np.float32) * np.float32(depth_scale)
        self.has_depth = bool((self.map > 0).any())

    @property
    def center(self) -> np.ndarray:
        """Of the camera, in the world [3]."""
        return -self.extrinsics[:, :3].T @ self.extrinsics[:, 3]

    def some_pixels(self) -> np.ndarray:
        """Up to POINTS known pixels, evenly over the image, as places in the flat map; if none is known, any."""
        order = spread_order(self.shape)
        known = order[self.map.reshape(-1)[order] > 0] if self.has_depth else order
        return np.resize(known[:POINTS], POINTS)

    def points(self, guesses: np.ndarray) -> np.ndarray:
        """Points of the world [POINTS, 3] that it sees; without depth, at these depths in turn."""
        places = self.some_pixels()
        v, u = np.divmod(places, self.shape[1])
        z = self.map.reshape(-1)[places] if self.has_depth else np.resize(guesses, POINTS)
        k = self.intrinsics
        rays = np.stack([(u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(POINTS)], axis=1)
        return (rays * z[:, None] - self.extrinsics[:, 3]) @ self.extrinsics[:, :3]


def stored_view(shard_set: ShardSet, frame: int) -> View:
    """A frame of a shard set. Raises DamagedMemberError, ValueError, StorageError."""
    row = shard_set.row(frame)
    size = int(row["height"]), int(row["width"])
    _, depth = shard_set.read(frame)
    known = None if depth is None else decode_depth(depth, *size)
    return View(known, size, np.array(row["extrinsics"]), np.array(row["intrinsics"]), float(row["depth_scale"]))


def shrunk(depth: np.ndarray, step: int) -> np.ndarray:
    """A depth map in blocks of step x step pixels: the middle one, or the nearest known where that is unknown."""
    as_bits = depth.view(np.uint16) if depth.dtype == np.float16 else depth  # numpy is slow with half floats
    rows, columns = (-size % step for size in depth.shape)
    padded = np.pad(as_bits, ((0, rows), (0, columns)))
    blocks = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step)
    small = blocks[:, step // 2, :, step // 2].copy()
    if (holes := small == 0).any():
        some = blocks.transpose(0, 2, 1, 3)[holes]
        farthest = np.array(np.inf if some.dtype.kind == "f" else np.iinfo(some.dtype).max, some.dtype)
        nearest = np.where(some == 0, farthest, some).min(axis=(1, 2))
        small[holes] = np.where(nearest == farthest, 0, nearest)
    return small.view(depth.dtype)


@cache
def spread_order(shape: tuple[int, int]) -> np.ndarray:
    """All pixels of a map in an order whose every beginning is spread evenly (Roberts' R2 sequence, 2018)."""
    count = np.arange(8 * shape[0] * shape[1])
    plastic = 1.32471795724474602596  # the real root of x^3 = x + 1
    rows, columns = ((0.5 + count / plastic**power % 1) % 1 for power in (1, 2))
    places = (rows * shape[0]).astype(np.int64) * shape[1] + (columns * shape[1]).astype(np.int64)
    _, first = np.unique(places, return_index=True)
    return places[np.sort(first)]


@dataclass(frozen=True)
class Views:
    """Views of a scene, ready to be compared; `seen` for one direction, `overlaps` for both."""

    points: np.ndarray  # float32 [n, POINTS, 3], about `origin`
    has_depth: np.ndarray  # bool [n]
    rotations: np.ndarray  # float32 [n, 3, 3]
    translations: np.ndarray  # float32 [n, 3]
    pinholes: np.ndarray  # float32 [n, 4]: fx, fy, cx, cy
    limits: np.ndarray  # float32 [n, 2]
    low: list[np.ndarray]  # float32 [h, w] each: the depths that agree with a map lie between `low` and `high`;
    high: list[np.ndarray]  # 0 where it is unknown

    def __len__(self) -> int:
        return len(self.points)

    def seen(self, sources: np.ndarray, target: int, count: int = POINTS) -> np.ndarray:
        """Of each source's known pixels, the fraction that the target sees: float32 [len(sources)].

        Points outside the image, or behind the camera, are not seen. Of those inside, the fraction that has the depth
        which the target knows there; where it knows none, they count as the others do. Without depth in either view,
        everything inside the image is taken to be seen: a guess.
        """
        places = self.points[sources, :count]
        rays = places.reshape(-1, 3) @ self.rotations[target].T + self.translations[target]
        z = rays[:, 2].reshape(places.shape[:2])
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            fx, fy, cx, cy = self.pinholes[target]
            u = rays[:, 0].reshape(z.shape) / z * fx + cx
            v = rays[:, 1].reshape(z.shape) / z * fy + cy
            right, bottom = self.limits[target]
            inside = (z > 0) & (u > -0.5) & (v > -0.5) & (u < right) & (v < bottom)
        fraction = inside.mean(axis=1, dtype=np.float32)
        compared = self.has_depth[sources] & self.has_depth[target]
        if compared.any():
            low, high = self.low[target], self.high[target]
            rows, columns = (np.rint(np.where(inside, x, 0)).astype(np.int32) for x in (v, u))
            places = np.minimum(rows, low.shape[0] - 1) * low.shape[1] + np.minimum(columns, low.shape[1] - 1)
            top = high.reshape(-1)[places]
            known = inside & (top > 0)
            agreeing = known & (z < top) & (z > low.reshape(-1)[places])
            rate = agreeing.sum(axis=1) / np.maximum(known.sum(axis=1), FEW * count / POINTS)
            fraction = np.where(compared, fraction * rate, fraction)
        return fraction

    def overlaps(self, pairs: np.ndarray) -> np.ndarray:
        """The overlap of pairs of views [n, 2]: float32 [n]."""
        found = np.ones(len(pairs), np.float32)
        for source, target in (pairs.T, pairs.T[::-1]):
            order = np.argsort(target, kind="stable")
            targets, starts = np.unique(target[order], return_index=True)
            for one, group in zip(targets, np.split(order, starts)[1:], strict=True):
                found[group] = np.minimum(found[group], self.seen(source[group], int(one)))
        return found


def views_of(views: Iterable[View]) -> Views:
    """The views of one scene, with the tolerance that the noise of its depths asks for."""
    views = list(views)
    guesses = np.empty(0) if all(view.has_depth for view in views) else _guessed_depths(views)
    origin = np.median([view.center for view in views], axis=0)  # float32 is exact enough about it
    rotations = np.array([view.extrinsics[:, :3] for view in views])
    bounds = [_neighborhood(view.map) for view in views]
    made = Views(
        points=np.array([view.points(guesses) - origin for view in views], np.float32),
        has_depth=np.array([view.has_depth for view in views]),
        rotations=rotations.astype(np.float32),
        translations=np.array([view.extrinsics[:, 3] + view.extrinsics[:, :3] @ origin for view in views], np.float32),
        pinholes=np.array([view.intrinsics[[0, 1, 0, 1], [0, 1, 2, 2]] for view in views], np.float32),
        limits=np.array([view.limits for view in views], np.float32),
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
    )
    tolerance = _tolerance(made, [view.map for view in views])
    for low, high in bounds:
        low *= 1 - tolerance
        high *= 1 + tolerance
    return made


def _neighborhood(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest known depth among each pixel and its 8 neighbors; 0 where none is known.

    A pixel may lie on a slope or an edge, and few are known where the depth is of single points.
    """
    far = np.float32(np.inf)
    low = np.pad(np.where(depth > 0, depth, far), 1, constant_values=far)
    high = np.pad(depth, 1)
    low = np.minimum(np.minimum(low[:-2], low[1:-1]), low[2:])
    high = np.maximum(np.maximum(high[:-2], high[1:-1]), high[2:])
    low = np.minimum(np.minimum(low[:, :-2], low[:, 1:-1]), low[:, 2:])
    high = np.maximum(np.maximum(high[:, :-2], high[:, 1:-1]), high[:, 2:])
    return np.where(low == far, 0, low), high


def _tolerance(views: Views, maps: list[np.ndarray]) -> float:
    """By what fraction depths of the same point differ: NOISES times the noise between views that see the same.

    Of many views those that follow each other are compared, of few all.
    """
    count = len(views)
    if count * (count - 1) // 2 <= NOISE_PAIRS:
        pairs = np.stack(np.triu_indices(count, 1), axis=1)
    else:
        firsts = np.unique(np.linspace(0, count - 2, NOISE_PAIRS).round().astype(int))
        pairs = np.stack([firsts, firsts + 1], axis=1)
    differences = [_differences(views, int(i), int(j), maps[j]) for i, j in pairs]
    found = np.concatenate([np.empty(0), *(part for part in differences if len(part) >= POINTS / 4)])
    if not len(found):
        return USUAL_TOLERANCE
    return float(np.clip(NOISES * 1.4826 * np.median(found), LEAST_TOLERANCE, MOST_TOLERANCE))


def _differences(views: Views, source: int, target: int, depth: np.ndarray) -> np.ndarray:
    """|log(depth / known depth)| of the points of a view in the next one, where the two may be of one surface."""
    if not (views.has_depth[source] and views.has_depth[target]):
        return np.empty(0)
    x, y, z = (views.points[source] @ views.rotations[target].T + views.translations[target]).T
    x, y, z = (values[z > 0] for values in (x, y, z))
    fx, fy, cx, cy = views.pinholes[target]
    columns, rows = np.rint(x / z * fx + cx), np.rint(y / z * fy + cy)
    inside = (columns >= 0) & (rows >= 0) & (columns < depth.shape[1]) & (rows < depth.shape[0])
    known = depth[rows[inside].astype(int), columns[inside].astype(int)]
    difference = np.abs(np.log(z[inside][known > 0] / known[known > 0]))
    return difference[difference < COMPARABLE]


def _guessed_depths(views: list[View]) -> np.ndarray:
    """Depths at which views that know none are taken to see something: those of the others, or where the axes meet."""
    known = [view.map[view.map > 0] for view in views if view.has_depth]
    if known:
        return np.percentile(np.concatenate(known), [10, 50, 90])
    return np.array(GUESSED) * _typical_depth(views)


def _typical_depth(views: list[View]) -> float:
    """How far before the cameras their axes meet; if they do not, in proportion to the cameras' distances."""
    centers = np.array([view.center for view in views])
    axes = np.array([view.extrinsics[2, :3] for view in views])
    some = np.unique(np.linspace(0, len(views) - 1, TRIED_AXES).round().astype(int))
    between = centers[some][None] - centers[some][:, None]  # [a, b, 3]: from a to b
    cosine = axes[some] @ axes[some].T
    along_a, along_b = (np.einsum("abi,ai->ab", between, axes[some]), np.einsum("abi,bi->ab", between, axes[some]))
    sine_squared = 1 - cosine**2
    with np.errstate(divide="ignore", invalid="ignore"):
        depth = (along_a - along_b * cosine) / sine_squared  # where axis a is nearest to axis b
    crossing = sine_squared > PARALLEL**2
    if crossing.any() and np.median(depth[crossing]) > 0:
        return float(np.median(depth[crossing]))
    return OUTWARD * float(np.median(np.linalg.norm(between, axis=2))) or 1.0
