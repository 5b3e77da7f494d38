"""What rendered things look like: textures, and the light they stand in."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from prep.synth.render import Light


def f32(values: Any) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def make_texture(rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """A repeating pattern in a color of its own, with noise at several scales: [size, size, 3] in 0..1."""
    base = rng.uniform(0.15, 0.9, 3)
    pattern = np.zeros((size, size), dtype=np.float32)
    for cells in (4, 8, 16, 32):
        noise = rng.standard_normal((cells, cells)).astype(np.float32)
        wrapped = np.pad(noise, 2, mode="wrap")
        scaled = cv2.resize(wrapped, None, fx=size / cells, fy=size / cells, interpolation=cv2.INTER_CUBIC)
        pattern += scaled[(edge := 2 * size // cells) : edge + size, edge : edge + size] * np.float32(4 / cells) ** 0.5
    kind = rng.integers(3)
    row, column = np.mgrid[:size, :size] * int(rng.integers(2, 6)) // size
    if kind == 1:
        pattern += np.where((row + column) % 2, 0.9, -0.9).astype(np.float32)
    elif kind == 2:
        pattern += np.where(row % 2, 0.9, -0.9).astype(np.float32)
    other = rng.uniform(-0.25, 0.25, 3)
    return np.clip(base + pattern[..., None] * (0.12 + other * 0.6), 0.02, 1).astype(np.float32)


def make_patchwork(rng: np.random.Generator, size: int = 128, patches: tuple[int, ...] = (2, 5, 11, 23)) -> np.ndarray:
    """Colors of all kinds, hardly the same at any two places of it: [size, size, 3] in 0..1.

    patches: how many there are along a side, large and small ones.
    """
    texture = np.broadcast_to(f32(rng.uniform(0.15, 0.85, 3)), (size, size, 3)).copy()
    contrast = rng.uniform(0.1, 0.3)
    for cells in patches:
        noise = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        noise = 0.6 * noise + 0.4 * noise.mean(2, keepdims=True)
        wrapped = np.pad(noise, ((1, 1), (1, 1), (0, 0)), mode="wrap")
        scaled = cv2.resize(wrapped, None, fx=size / cells, fy=size / cells, interpolation=cv2.INTER_LINEAR)
        edge = size // cells
        texture += scaled[edge : edge + size, edge : edge + size] * np.float32(contrast * (2 / cells) ** 0.2)
    return np.clip(texture, 0.02, 1)


def make_light(rng: np.random.Generator) -> Light:
    """A low sun, and a sky."""
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.2)
    return Light(
        sun=f32([np.cos(azimuth) * np.cos(height), np.sin(azimuth) * np.cos(height), np.sin(height)]),
        sun_color=f32(rng.uniform(0.7, 1.1)) * f32([1, rng.uniform(0.88, 1), rng.uniform(0.75, 1)]),
        sky_color=f32(rng.uniform([0.35, 0.45, 0.55], [0.6, 0.7, 0.9])),
    )
