"""Rendered captures of rooms and yards full of things, few places of which look alike: to learn matching from."""

from __future__ import annotations

import numpy as np

from prep.synth.looks import f32, make_light, make_patchwork, make_texture
from prep.synth.orbit import Orbit
from prep.synth.render import Box, Ground, Scene, Shape, Sphere, Walls

CATEGORIES = ("room", "hall", "yard")
ORBIT = Orbit(turn=(0.25 * np.pi, np.pi), elevation=(0.15, 0.7), distance=(2.0, 3.2), half_view=(0.38, 0.65))
HELD_OUT_ORBIT = Orbit(turn=(2 / 3 * np.pi, 2 / 3 * np.pi), elevation=ORBIT.elevation, distance=(2.2, 3.0))


def make_scene(rng: np.random.Generator, category: str) -> Scene:
    """Five to nine things about the origin, more in a ring about them; a room, a large one, or a yard under the sky."""
    unit = float(rng.uniform(1, 8))
    half = rng.uniform(4.5, 6, 2) * (1.4 if category == "hall" else 1)
    floor = Ground(radius=float(1.5 * half.max() * unit), texture=make_patchwork(rng), tile=rng.uniform(3, 7) * unit)
    shapes: list[Shape] = [floor]
    yaw = float(rng.uniform(0, np.pi))
    if category != "yard":
        height = rng.uniform(3.2, 4.2)
        size = f32([*half, height]) * f32(unit)
        texture, tile = make_patchwork(rng), rng.uniform(12, 20) * unit
        shapes.append(Walls(center=f32([0, 0, 0]), half_size=size, yaw=yaw, texture=texture, tile=tile))
    for i in range(rng.integers(5, 10)):
        distance = rng.uniform(0, 0.3) if i == 0 else rng.uniform(0.4, 1.3)
        shapes.append(_thing(rng, distance, rng.uniform(0.12, 0.45), unit))
    for _ in range(rng.integers(2, 7)):
        shapes.append(_thing(rng, rng.uniform(4, 4.8), rng.uniform(0.3, 0.7), unit))
    return Scene(shapes=tuple(shapes), light=make_light(rng), unit=unit)


def _thing(rng: np.random.Generator, distance: float, size: float, unit: float) -> Sphere | Box:
    """A sphere or box on the floor, or at times above it."""
    angle = rng.uniform(0, 2 * np.pi)
    place = np.array([np.cos(angle), np.sin(angle)]) * distance
    texture = make_texture(rng, 64) if rng.random() < 0.3 else make_patchwork(rng, 64)
    tile = float(rng.uniform(1, 2.5) * max(size, 0.4) * unit)
    above = rng.uniform(0.2, 1) if rng.random() < 0.25 else 0.0
    if rng.random() < 0.35:
        center = f32([*place, size + above]) * f32(unit)
        return Sphere(center=center, radius=size * unit, texture=texture, tile=tile)
    half = size * rng.uniform(0.4, 1.3, 3)
    center = f32([*place, half[2] + above]) * f32(unit)
    return Box(center=center, half_size=f32(half * unit), yaw=float(rng.uniform(0, np.pi)), texture=texture, tile=tile)
