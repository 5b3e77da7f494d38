"""Rendered captures of long corridors: views drawn at random from a walk through one rarely show the same."""

from __future__ import annotations

import numpy as np

from prep.synth.looks import f32, make_light, make_patchwork
from prep.synth.orbit import SIZES, aimed_cameras, make_pinhole
from prep.synth.render import Box, Camera, Ground, Scene, Shape, Sphere, Walls

CATEGORIES = ("corridor",)
LENGTH, WIDTH, HEIGHT = 20.0, 4.0, 3.2  # in the scene's unit
THINGS = 36  # along both sides
HALF_VIEW = (0.38, 0.65)  # radians, along the image's longer side
PATCHES = (11, 23, 47, 95)  # along the length: no place looks like another
SWING = 1.3  # radians to either side that the camera looks, as it walks


def make_scene(rng: np.random.Generator, category: str) -> Scene:
    """A corridor along x, with things along both of its sides; there is one category."""
    assert category in CATEGORIES
    unit = float(rng.uniform(1, 8))
    floor = Ground(radius=LENGTH * unit, texture=make_patchwork(rng, 512, PATCHES), tile=LENGTH * unit)
    size = f32([LENGTH / 2, WIDTH / 2, HEIGHT]) * f32(unit)
    texture = make_patchwork(rng, 512, PATCHES)
    walls = Walls(center=f32([0, 0, 0]), half_size=size, yaw=0.0, texture=texture, tile=LENGTH * unit)
    shapes: list[Shape] = [floor, walls]
    for i in range(THINGS):
        along = (i + rng.uniform(0.2, 0.8)) / THINGS * LENGTH - LENGTH / 2
        place, radius = np.array([along, rng.choice([-1, 1]) * rng.uniform(1.1, 1.7)]), rng.uniform(0.15, 0.4)
        look = {"texture": make_patchwork(rng, 64), "tile": float(rng.uniform(0.4, 1.0) * unit)}
        if rng.random() < 0.35:
            center = f32([*place, rng.uniform(0.4, 2)]) * f32(unit)
            shapes.append(Sphere(center=center, radius=radius * unit, **look))
        else:
            half = f32(radius * rng.uniform(0.5, 1.5, 3) * [1, 1, 2])
            center = f32([*place, half[2]]) * f32(unit)
            shapes.append(Box(center=center, half_size=half * f32(unit), yaw=float(rng.uniform(0, np.pi)), **look))
    return Scene(shapes=tuple(shapes), light=make_light(rng), unit=unit)


def make_walk(
    rng: np.random.Generator, unit: float, frames: int, sizes: tuple[tuple[int, int], ...] = SIZES
) -> list[Camera]:
    """A walk from one end to the other, that looks to the one side and the other."""
    (height, width), intrinsics = make_pinhole(rng, HALF_VIEW, sizes)
    time = np.linspace(0, 1, frames)
    x = (LENGTH - 2) * (time - 0.5) + rng.normal(0, 0.03, frames)
    y = 0.5 * np.sin(rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(2, 4) * time)
    z = 1.5 + 0.15 * np.sin(rng.uniform(0, 2 * np.pi) + 2 * np.pi * 3 * time)
    aside = SWING * np.sin(rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.uniform(3, 5) * time)
    down = rng.uniform(-0.05, 0.3) + rng.normal(0, 0.03, frames)
    ahead = np.stack([np.cos(aside), np.sin(aside), -np.tan(down)], axis=1)
    eyes = np.stack([x, y, z], axis=1)
    return aimed_cameras(rng, eyes * unit, (eyes + ahead) * unit, intrinsics, (height, width))
