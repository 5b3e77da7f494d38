"""A small ray caster: textured ground, boxes and spheres under a sun, with exact depth. float32, z up.

Rays are cast through pixel centers with a direction of unit z in the camera's frame, so the ray parameter *is* the
depth along the optical axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

Array = np.ndarray  # float32
FAR = np.float32(np.inf)
SHADOW_OFFSET = 1e-3  # of the unit: how far above its own surface a shadow ray starts


def dot(a: Array, b: Array) -> Array:
    """[3, ...] x [3, ...] -> [...]; the three terms are written out, which is several times faster than a sum."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """The disc of `radius` about the origin in the plane z = 0."""

    radius: float
    texture: Array  # [T, T, 3] in 0..1, repeats
    tile: float  # length of one repeat

    def intersect(self, origin: Array, direction: Array) -> Array:
        """Ray parameters [N] of the first hit, FAR without one; origin and direction [3, N], either may be [3, 1]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            t = -origin[2] / direction[2]
            x, y = origin[0] + t * direction[0], origin[1] + t * direction[1]
        return np.where((t > 0) & (x * x + y * y < self.radius**2), t, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        """Normals [3, N] and texture coordinates [2, N] in repeats, for points on it [3, N]."""
        return np.broadcast_to(np.array([[0], [0], [1]], dtype=np.float32), points.shape), points[:2] / np.float32(
            self.tile
        )


@dataclass(frozen=True, kw_only=True)
class Sphere:
    center: Array  # [3]
    radius: float
    texture: Array
    tile: float

    def intersect(self, origin: Array, direction: Array) -> Array:
        offset = origin - self.center[:, None]
        a, b = dot(direction, direction), dot(offset, direction)
        root = b * b - a * (dot(offset, offset) - np.float32(self.radius**2))
        t = (-b - np.sqrt(np.maximum(root, 0))) / a
        return np.where((root > 0) & (t > 0), t, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        normal = (points - self.center[:, None]) / np.float32(self.radius)
        longitude = np.arctan2(normal[1], normal[0])
        latitude = np.arcsin(np.clip(normal[2], -1, 1))
        # A whole number of repeats around, so that the texture closes.
        around = max(1, round(2 * np.pi * self.radius / self.tile))
        return normal, np.stack([longitude, latitude]) * np.float32(around / (2 * np.pi))


@dataclass(frozen=True, kw_only=True)
class Box:
    """Upright, turned by `yaw` radians about z; half_size along its own x, y, z."""

    center: Array  # [3]
    half_size: Array  # [3]
    yaw: float
    texture: Array
    tile: float

    def turn(self, vectors: Array, sign: int = 1) -> Array:
        """World to box [3, N], or back with sign -1."""
        c, s = np.float32(np.cos(self.yaw)), np.float32(sign * np.sin(self.yaw))
        return np.stack([c * vectors[0] + s * vectors[1], c * vectors[1] - s * vectors[0], vectors[2]])

    def intersect(self, origin: Array, direction: Array) -> Array:
        o, d = self.turn(origin - self.center[:, None]), self.turn(direction)
        half = self.half_size[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / d
            a, b = (-half - o) * inverse, (half - o) * inverse
        near, far = np.minimum(a, b), np.maximum(a, b)
        enter = np.maximum(np.maximum(near[0], near[1]), near[2])
        leave = np.minimum(np.minimum(far[0], far[1]), far[2])
        return np.where((enter < leave) & (enter > 0), enter, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        local = self.turn(points - self.center[:, None])
        axis = np.abs(local / self.half_size[:, None]).argmax(0)[None]
        sign = np.sign(np.take_along_axis(local, axis, axis=0))
        normal = self.turn(np.where(np.arange(3)[:, None] == axis, sign, np.float32(0)), sign=-1)
        across = np.concatenate([np.where(axis == 0, 1, 0), np.where(axis == 2, 1, 2)])  # the two axes of a face
        # A shift a face keeps the pattern from being the same on opposite ones.
        shift = (axis * 0.37 + sign * 0.21).astype(np.float32)
        return normal, np.take_along_axis(local, across, axis=0) / np.float32(self.tile) + shift


@dataclass(frozen=True, kw_only=True)
class Walls(Box):
    """A box seen from within."""

    def intersect(self, origin: Array, direction: Array) -> Array:
        o, d = self.turn(origin - self.center[:, None]), self.turn(direction)
        with np.errstate(divide="ignore", invalid="ignore"):
            leave = (np.copysign(self.half_size[:, None], d) - o) / d
        leave = np.minimum(np.minimum(leave[0], leave[1]), leave[2])
        return np.where(leave > 0, leave, FAR)

    def surface(self, points: Array) -> tuple[Array, Array]:
        normal, uv = super().surface(points)
        return -normal, uv


Shape = Ground | Sphere | Box


@dataclass(frozen=True, kw_only=True)
class Light:
    sun: Array  # [3], unit vector towards it
    sun_color: Array  # [3]
    sky_color: Array  # [3], also the ambient light


@dataclass(frozen=True, kw_only=True)
class Scene:
    shapes: tuple[Shape, ...]
    light: Light
    unit: float  # length that sizes are of the order of


@dataclass(frozen=True, kw_only=True)
class Camera:
    cam_from_world: np.ndarray  # [3, 4]
    intrinsics: np.ndarray  # [3, 3]
    height: int
    width: int

    def rays(self) -> tuple[Array, Array]:
        """Origin [3, 1] and directions [3, H * W] in the world, of unit z in the camera."""
        k, rotation = self.intrinsics, self.cam_from_world[:, :3]
        x = (np.arange(self.width) - k[0, 2]) / k[0, 0]
        y = (np.arange(self.height) - k[1, 2]) / k[1, 1]
        # Written out: a threaded matrix product would have the worker processes fight for cores.
        along_x, along_y, along_z = rotation.astype(np.float32)[:, :, None, None]
        direction = x.astype(np.float32) * along_x + y.astype(np.float32)[:, None] * along_y + along_z
        return (-rotation.T @ self.cam_from_world[:, 3:]).astype(np.float32), direction.reshape(3, -1)


def look_at(eye: np.ndarray, target: np.ndarray, roll: float) -> np.ndarray:
    """Camera-from-world [3, 4] of a camera at `eye` that looks at `target`, turned by `roll` radians about z."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    rotation = np.stack([c * right + s * down, c * down - s * right, forward])
    return np.concatenate([rotation, -rotation @ eye[:, None]], axis=1)


def render(scene: Scene, camera: Camera) -> tuple[np.ndarray, Array, Array]:
    """RGB [H, W, 3], depth along z [H, W] (inf where there is nothing), and the cosine of the view angle [H, W]."""
    origin, direction = camera.rays()
    depths = np.stack([shape.intersect(origin, direction) for shape in scene.shapes])
    nearest = depths.argmin(0)
    depth = depths.min(0)
    view = direction / np.sqrt(dot(direction, direction))
    color = scene.light.sky_color[:, None] * (0.75 + 0.25 * view[2])
    cosine = np.zeros(len(depth), dtype=np.float32)
    for i, shape in enumerate(scene.shapes):
        pixels = np.flatnonzero((nearest == i) & np.isfinite(depth))
        if len(pixels):
            points = origin + depth[pixels] * direction[:, pixels]
            normal, uv = shape.surface(points)
            cosine[pixels] = -dot(normal, view[:, pixels])
            color[:, pixels] = sample(shape.texture, uv) * shade(scene, points, normal)
    image = (np.sqrt(np.clip(color.T, 0, 1)) * 255 + 0.5).astype(np.uint8)  # a gamma of 2
    shape_hw = (camera.height, camera.width)
    return image.reshape(*shape_hw, 3), depth.reshape(shape_hw), cosine.reshape(shape_hw)


def shade(scene: Scene, points: Array, normal: Array) -> Array:
    """Sun with shadows, and sky from above, on surface points [3, N]: [3, N]."""
    start = points + normal * np.float32(SHADOW_OFFSET * scene.unit)
    lit = np.ones(points.shape[1], dtype=bool)
    for shape in scene.shapes:
        if not isinstance(shape, Ground | Walls):
            lit &= ~np.isfinite(shape.intersect(start, scene.light.sun[:, None]))
    sun = np.maximum(dot(normal, scene.light.sun), 0) * lit
    sky = (0.65 + 0.35 * normal[2]) * np.float32(0.5)
    return sun * scene.light.sun_color[:, None] + sky * scene.light.sky_color[:, None]


def sample(texture: Array, uv: Array) -> Array:
    """Bilinear look-up of a repeating texture [T, T, 3] at uv [2, N] in repeats: [3, N]."""
    # OpenCV takes maps of fewer than 32,768 rows: lay the points out as a square.
    count = uv.shape[1]
    side = int(np.ceil(np.sqrt(count)))
    place = np.zeros((2, side * side), dtype=np.float32)
    place[:, :count] = (uv - np.floor(uv)) * np.float32(texture.shape[0])
    x, y = place.reshape(2, side, side)
    values = cv2.remap(texture, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
    return values.reshape(-1, 3)[:count].T
