"""Color jitter: drawn with the scene, and applied by train.objective.color_jitter.

The definition is torchvision's ColorJitter (brightness, contrast, saturation, hue in random order) and grayscale;
one draw serves all views of a scene with probability 0.7, else each view has its own.
"""

from __future__ import annotations

import numpy as np

STRENGTH = 0.5  # brightness, contrast and saturation change by a factor of 1 +- this
HUE = 0.1  # of a full turn
P_JITTER, P_GREY, P_WHOLE_SCENE = 0.9, 0.05, 0.7


def draw_color_jitter(rng: np.random.Generator, views: int) -> np.ndarray:
    """The jitter of each view of a scene: [views, 9].

    Brightness, contrast, saturation, hue; the place of each in the order (-1: not applied); gray.
    """
    if rng.random() < P_WHOLE_SCENE:
        return np.repeat(_draw(rng)[None], views, axis=0)
    return np.stack([_draw(rng) for _ in range(views)])


def _draw(rng: np.random.Generator) -> np.ndarray:
    factors = rng.uniform(1 - STRENGTH, 1 + STRENGTH, 3)
    hue = rng.uniform(-HUE, HUE)
    order = rng.permutation(4) if rng.random() < P_JITTER else np.full(4, -1)
    return np.array([*factors, hue, *order, rng.random() < P_GREY], dtype=np.float32)


def no_color_jitter(views: int) -> np.ndarray:
    """The jitter that changes nothing: [views, 9]."""
    return np.repeat(np.array([[1, 1, 1, 0, -1, -1, -1, -1, 0]], dtype=np.float32), views, axis=0)
