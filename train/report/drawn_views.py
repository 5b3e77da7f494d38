"""What views of a scene have in common, by how they are drawn: histograms to look at."""

from __future__ import annotations

import contextlib
import math
from functools import cache, partial

import cv2
import numpy as np

from shards import drawing
from shards.overlap import View, stored_view, views_of
from shards.reader import DamagedMemberError
from train.data.plan import TrainingPlan
from train.data.split import Split, StoredNeighbors, stored_neighbors
from train.data.views import draw_frames, draw_overlapping

SCENES = 30  # that are drawn in each way
BARS, BAR_WIDTH, HEIGHT = 20, 18, 110  # in pixels
COLOR = (70, 120, 180)
QUANTITIES = (("part of a view that the other one sees", 1.0), ("rotation between two views, degrees", 180.0))

Drawn = dict[str, list[np.ndarray]]  # sampling -> overlaps and rotations in degrees, of all pairs of views [n]


def drawn_pairs(split: Split, plan: TrainingPlan) -> Drawn:
    """The pairs of views of some sequences of the plan, with as many views as it says, drawn in each way.

    By overlap only if the sets have a good pairs.npy; frames that are damaged are left out. Raises StorageError.
    """
    samplings, neighbors = ["uniform", "nearby"], list[StoredNeighbors | None]()
    with contextlib.suppress(ValueError):  # no pairs, or damaged ones, of which others speak
        neighbors = list(stored_neighbors(split, ["overlap"] * len(split.shard_sets)))
        samplings.append("overlap")
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {sampling: [] for sampling in samplings}
    state = plan.start()
    for number in range(SCENES):
        step = plan.step(state, 0)
        scene, state = step.scenes[0], step.after
        first, length = (int(x[scene.source][scene.sequence]) for x in (split.first, split.lengths))
        view = cache(partial(_view, split, scene.source, first))
        for sampling in samplings:
            rng = np.random.default_rng((plan.seed, number))
            if sampling == "overlap":
                stored, config = neighbors[scene.source], plan.config
                assert stored is not None
                near = partial(stored, scene.sequence)
                frames = draw_overlapping(rng, near, length, step.shape.views, config.overlap, config.spread)
            else:
                frames = draw_frames(rng, sampling, length, step.shape.views)
            found[sampling].append(_pairs([v for frame in dict.fromkeys(frames) if (v := view(frame)) is not None]))
    return {sampling: [np.concatenate(part) for part in zip(*pairs, strict=True)] for sampling, pairs in found.items()}


def _view(split: Split, source: int, first: int, frame: int) -> View | None:
    try:
        return stored_view(split.shard_sets[source], first + frame)
    except DamagedMemberError:
        return None


def _pairs(views: list[View]) -> tuple[np.ndarray, np.ndarray]:
    """Overlaps, and rotations in degrees, of all pairs of views."""
    if len(views) < 2:
        return np.empty(0), np.empty(0)
    i, j = np.triu_indices(len(views), 1)
    rotations = np.array([view.extrinsics[:, :3] for view in views])
    cosines = (np.einsum("pab,pab->p", rotations[i], rotations[j]) - 1) / 2
    return views_of(views).overlaps(np.stack([i, j], axis=1)), np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def median(values: np.ndarray) -> float:
    """NaN of none."""
    return float(np.median(values)) if len(values) else math.nan


def draw_pairs(drawn: Drawn) -> np.ndarray:
    """A row a sampling, a column a quantity: [H, W, 3]."""
    rows = []
    for sampling, values in drawn.items():
        cells = [
            drawing.stack(
                [
                    drawing.text(f"{sampling}: {title}; median {median(part):.3g}", BARS * BAR_WIDTH),
                    _histogram(part, most),
                ]
            )
            for part, (title, most) in zip(values, QUANTITIES, strict=True)
        ]
        rows.append(drawing.row(cells))
    return drawing.stack(rows)


def _histogram(values: np.ndarray, most: float) -> np.ndarray:
    """Bars of the fractions of values from 0 to `most`, with these ends written below."""
    counts, _ = np.histogram(values, BARS, (0, most))
    picture = np.full((HEIGHT, BARS * BAR_WIDTH, 3), drawing.BACKGROUND, np.uint8)
    for i, height in enumerate(np.rint(counts / max(counts.max(), 1) * (HEIGHT - 1)).astype(int)):
        left = i * BAR_WIDTH
        cv2.rectangle(picture, (left + 1, HEIGHT - 1 - int(height)), (left + BAR_WIDTH - 2, HEIGHT - 1), COLOR, -1)
    ends = drawing.text("0", BARS * BAR_WIDTH)
    label = f"{most:g}"
    cv2.putText(
        ends,
        label,
        (BARS * BAR_WIDTH - 8 * len(label) - 4, 15),
        cv2.FONT_HERSHEY_SIMPLEX,
        0.42,
        drawing.INK,
        1,
        cv2.LINE_AA,
    )
    return drawing.stack([picture, ends])
