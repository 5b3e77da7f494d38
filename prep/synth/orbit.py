"""How the camera of a rendered capture moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prep.synth.render import Camera, look_at


def landscape_and_portrait(short_side: int) -> tuple[tuple[int, int], ...]:
    """Heights and widths of images whose long side is four thirds of the short one."""
    return (short_side, short_side * 4 // 3), (short_side * 4 // 3, short_side)


SIZES = landscape_and_portrait(240)


@dataclass(frozen=True, kw_only=True)
class Orbit:
    """Ranges that an orbit is drawn from: angles in radians, distance in the scene's unit."""

    turn: tuple[float, float]  # from the first frame to the last
    elevation: tuple[float, float]
    distance: tuple[float, float]
    half_view: tuple[float, float] = (0.42, 0.62)  # half the field of view, along the image's longer side


def make_orbit(
    rng: np.random.Generator, orbit: Orbit, unit: float, frames: int, sizes: tuple[tuple[int, int], ...] = SIZES
) -> list[Camera]:
    """A hand-held walk around the origin: part of a circle, uneven in pace, height, distance and aim.

    sizes: heights and widths of images in pixels, of which the walk has one.
    """
    size, intrinsics = make_pinhole(rng, orbit.half_view, sizes)
    start, turn = rng.uniform(0, 2 * np.pi), rng.uniform(*orbit.turn) * rng.choice([-1, 1])
    azimuth = start + turn * np.linspace(0, 1, frames) + rng.normal(0, 0.02, frames)
    elevation = (
        rng.uniform(*orbit.elevation)
        + 0.12 * np.sin(np.linspace(0, rng.uniform(3, 9), frames))
        + rng.normal(0, 0.01, frames)
    )
    distance = rng.uniform(*orbit.distance) * (1 + 0.1 * np.sin(np.linspace(0, rng.uniform(3, 9), frames)))
    flat = np.cos(elevation)
    eyes = np.stack([np.cos(azimuth) * flat, np.sin(azimuth) * flat, np.sin(elevation)], axis=1) * distance[:, None]
    cameras = []
    for eye in eyes * unit:
        target = (np.array([0, 0, 0.3]) + rng.normal(0, 0.06, 3)) * unit
        cameras += aimed_cameras(rng, eye[None], target[None], intrinsics, size)
    return cameras


def make_pinhole(
    rng: np.random.Generator, half_view: tuple[float, float], sizes: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], np.ndarray]:
    """Height and width of the images, and intrinsics [3, 3]: one of `sizes`, half the field of view in radians."""
    height, width = sizes[int(rng.integers(len(sizes)))]
    focal = max(height, width) / 2 / np.tan(rng.uniform(*half_view))
    center = (np.array([width, height]) - 1) / 2 + rng.normal(0, 0.01, 2) * width
    return (height, width), np.array([[focal, 0, center[0]], [0, focal, center[1]], [0, 0, 1.0]])


def aimed_cameras(
    rng: np.random.Generator, eyes: np.ndarray, targets: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int]
) -> list[Camera]:
    """Cameras at `eyes` [n, 3] that look at `targets` [n, 3], held not quite level."""
    return [
        Camera(
            cam_from_world=look_at(eye, target, rng.normal(0, 0.03)),
            intrinsics=intrinsics,
            height=size[0],
            width=size[1],
        )
        for eye, target in zip(eyes, targets, strict=True)
    ]
