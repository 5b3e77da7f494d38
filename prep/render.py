"""A small ray caster: textured ground, boxes and spheres under a sun, with exact depth. float32, z up.

Rays are cast through pixel centres with a direction of unit z in the camera's frame, so the ray parameter *is* the
depth along the optical axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
FAR = np.float32(np.inf)
SHADOW_OFFSET = 1e-3  # of the unit: how far above its own surface a shadow ray starts


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The disc of `radius` about the origin in the plane z = 0."""

    radius: float
    texture: Array  # [T, T, 3] in 0..1, repeats
    tile: float  # length of one repeat

    def intersect(self, origin: Array, direction: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = -origin[..., 2] / direction[..., 2]
            hit = origin + t[..., None] * direction
        inside = (t > 0) & (hit[..., 0] ** 2 + hit[..., 1] ** 2 < self.radius**2)
        return np.where(inside, t, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        """Normals [N, 3] and texture coordinates [N, 2] in repeats, for points on it [N, 3]."""
        normal = np.broadcast_to(np.float32([0, 0, 1]), points.shape)
        return normal, points[:, :2] / self.tile


@dataclass(frozen=True, kw_only=True)
class Sphere:
    centre: Array  # [3]
    radius: float
    texture: Array
    tile: float

    def intersect(self, origin: Array, direction: Array) -> Array:
        offset = origin - self.centre
        a = (direction * direction).sum(-1)
        b = (offset * direction).sum(-1)
        c = (offset * offset).sum(-1) - self.radius**2
        root = b * b - a * c
        t = (-b - np.sqrt(np.maximum(root, 0))) / a
        return np.where((root > 0) & (t > 0), t, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        normal = (points - self.centre) / self.radius
        longitude = np.arctan2(normal[:, 1], normal[:, 0])
        latitude = np.arcsin(np.clip(normal[:, 2], -1, 1))
        # A whole number of repeats around, so that the texture closes.
        around = max(1, round(2 * np.pi * self.radius / self.tile))
        return normal, np.stack([longitude, latitude], axis=-1) * np.float32(around / (2 * np.pi))


@dataclass(frozen=True, kw_only=True)
class Box:
    """Upright, turned by `yaw` radians about z; half_size along its own x, y, z."""

    centre: Array  # [3]
    half_size: Array  # [3]
    yaw: float
    texture: Array
    tile: float

    @property
    def box_from_world(self) -> Array:
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return np.float32([[c, s, 0], [-s, c, 0], [0, 0, 1]])

    def intersect(self, origin: Array, direction: Array) -> Array:
        o, d = (origin - self.centre) @ self.box_from_world.T, direction @ self.box_from_world.T
        with np.errstate(divide="ignore", invalid="ignore"):
            a, b = (-self.half_size - o) / d, (self.half_size - o) / d
        enter, leave = np.minimum(a, b).max(-1), np.maximum(a, b).min(-1)
        return np.where((enter < leave) & (enter > 0), enter, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        local = (points - self.centre) @ self.box_from_world.T
        axis = np.abs(local / self.half_size).argmax(-1)
        sign = np.sign(np.take_along_axis(local, axis[:, None], axis=-1))
        normal = (np.eye(3, dtype=np.float32)[axis] * sign) @ self.box_from_world
        across = np.array([[1, 2], [0, 2], [0, 1]])[axis]  # the two axes of each face
        # A shift a face keeps the pattern from being the same on opposite ones.
        shift = (axis[:, None] * 0.37 + sign * 0.21).astype(np.float32)
        return normal, np.take_along_axis(local, across, axis=-1) / self.tile + shift


Shape = Ground | Sphere | Box


@dataclass(frozen=True, kw_only=True)
class Scene:
    shapes: tuple[Shape, ...]
    sun: Array  # [3], unit vector towards it
    sun_colour: Array  # [3]
    sky_colour: Array  # [3], also the ambient light
    unit: float  # length that sizes are of the order of


@dataclass(frozen=True, kw_only=True)
class Camera:
    cam_from_world: NDArray[np.float64]  # [3, 4]
    intrinsics: NDArray[np.float64]  # [3, 3]
    height: int
    width: int

    def rays(self) -> tuple[Array, Array]:
        """Origin [3] and directions [H * W, 3] in the world, of unit z in the camera."""
        k, rotation = self.intrinsics, self.cam_from_world[:, :3]
        x = (np.arange(self.width) - k[0, 2]) / k[0, 0]
        y = (np.arange(self.height) - k[1, 2]) / k[1, 1]
        x, y = np.meshgrid(x, y)
        direction = np.stack([x, y, np.ones_like(x)], axis=-1).reshape(-1, 3) @ rotation
        return (-rotation.T @ self.cam_from_world[:, 3]).astype(np.float32), direction.astype(np.float32)


def look_at(eye: NDArray[np.float64], target: NDArray[np.float64], roll: float) -> NDArray[np.float64]:
    """Camera-from-world [3, 4] of a camera at `eye` that looks at `target`, turned by `roll` radians about z."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, forward])
    return np.concatenate([rotation, -rotation @ eye[:, None]], axis=1)


def render(scene: Scene, camera: Camera) -> tuple[NDArray[np.uint8], Array, Array]:
    """RGB [H, W, 3], depth along z [H, W] (inf where there is nothing), and the cosine of the view angle [H, W]."""
    origin, direction = camera.rays()
    depths = np.stack([shape.intersect(origin, direction) for shape in scene.shapes])
    nearest = depths.argmin(0)
    depth = depths.min(0)
    height = direction[:, 2] / np.linalg.norm(direction, axis=-1)
    colour = scene.sky_colour * (0.75 + 0.25 * np.clip(height, -1, 1))[:, None]
    cosine = np.zeros(len(direction), dtype=np.float32)
    for i, shape in enumerate(scene.shapes):
        pixels = np.flatnonzero((nearest == i) & np.isfinite(depth))
        if len(pixels):
            points = origin + depth[pixels, None] * direction[pixels]
            normal, uv = shape.surface(points)
            view = direction[pixels] / np.linalg.norm(direction[pixels], axis=-1, keepdims=True)
            cosine[pixels] = -(normal * view).sum(-1)
            colour[pixels] = sample(shape.texture, uv) * light(scene, points, normal)
    image = (np.clip(colour, 0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)
    shape_hw = (camera.height, camera.width)
    return image.reshape(*shape_hw, 3), depth.reshape(shape_hw), cosine.reshape(shape_hw)


def light(scene: Scene, points: Array, normal: Array) -> Array:
    """Sun with shadows, and sky from above, on surface points: [N, 3]."""
    start = points + normal * np.float32(SHADOW_OFFSET * scene.unit)
    lit = np.ones(len(points), dtype=bool)
    for shape in scene.shapes:
        if not isinstance(shape, Ground):
            lit &= ~np.isfinite(shape.intersect(start, scene.sun))
    sun = np.maximum(normal @ scene.sun, 0) * lit
    sky = 0.65 + 0.35 * normal[:, 2]
    return sun[:, None] * scene.sun_colour + sky[:, None] * scene.sky_colour * 0.5


def sample(texture: Array, uv: Array) -> Array:
    """Bilinear look-up of a repeating texture [T, T, 3] at uv [N, 2] in repeats: [N, 3]."""
    size = texture.shape[0]
    place = np.mod(uv, 1).astype(np.float32) * size
    # OpenCV takes maps of fewer than 32,768 rows: lay the points out as a square.
    side = int(np.ceil(np.sqrt(len(place))))
    grid = np.zeros((side * side, 2), dtype=np.float32)
    grid[: len(place)] = place
    grid = grid.reshape(side, side, 2)
    values = cv2.remap(texture, grid[..., 0], grid[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return values.reshape(-1, 3)[: len(place)]
