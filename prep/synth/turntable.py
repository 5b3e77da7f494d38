"""Rendered turn-table captures: a few things on a textured ground under the sky, and a walk around them."""

from __future__ import annotations

import numpy as np

from prep.synth.looks import f32, make_light, make_texture
from prep.synth.orbit import Orbit
from prep.synth.render import Box, Ground, Scene, Shape, Sphere

CATEGORIES = ("balls", "blocks", "mixed")
ORBIT = Orbit(turn=(0.6 * np.pi, 2 * np.pi), elevation=(0.35, 0.8), distance=(2.6, 3.6))
WALK = Orbit(turn=(np.pi / 3, 2 / 3 * np.pi), elevation=ORBIT.elevation, distance=ORBIT.distance)


def make_scene(rng: np.random.Generator, category: str) -> Scene:
    """Two to five things about the origin of a textured ground, in a unit of length of its own, under a low sun."""
    unit = float(rng.uniform(1, 8))  # structure from motion knows no meters either
    ground = Ground(radius=rng.uniform(3.5, 6) * unit, texture=make_texture(rng), tile=rng.uniform(0.8, 2) * unit)
    shapes: list[Shape] = [ground]
    things = rng.integers(2, 6)
    for i in range(things):
        round_one = category == "balls" or (category == "mixed" and rng.random() < 0.5)
        size = rng.uniform(0.35, 0.6) if i == 0 else rng.uniform(0.15, 0.45)
        angle, distance = rng.uniform(0, 2 * np.pi), 0.15 if i == 0 else rng.uniform(0.6, 1.2)
        place = np.array([np.cos(angle), np.sin(angle)]) * distance
        texture, tile = make_texture(rng), rng.uniform(0.5, 1.2) * unit
        if round_one:
            center = f32([*place, size]) * f32(unit)
            shapes.append(Sphere(center=center, radius=size * unit, texture=texture, tile=tile))
        else:
            half = size * rng.uniform(0.5, 1.2, 3)
            center = f32([*place, half[2]]) * f32(unit)
            yaw = rng.uniform(0, np.pi)
            shapes.append(Box(center=center, half_size=f32(half * unit), yaw=yaw, texture=texture, tile=tile))
    return Scene(shapes=tuple(shapes), light=make_light(rng), unit=unit)
