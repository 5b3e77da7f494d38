"""One frame from its source files to the bytes of its members: checked, resized, encoded."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from prep.importers.source import Frame
from shards.codecs import decode_jpeg, encode_depth, encode_jpeg, jpeg_size
from shards.geometry import nearest, scale_intrinsics
from shards.schema import FrameMeta

FAR_PERCENTILE = 98.0  # of the valid depths: what lies farther is mostly noise of the stereo
MASK_THRESHOLD = 128
ROTATION_TOLERANCE = 1e-3  # of R R^T to the identity: cameras are rounded in text files; the nearest rotation is stored
FOCAL_RANGE = (0.1, 100.0)  # over the image's longer side: fields of view of 157 to 0.6 degrees
MAX_PIXEL_ASPECT = 3.0  # fx over fy, or fy over fx
MAX_TRANSLATION = 1e10  # beyond it double precision leaves too little
MAX_SOURCE_TRANSLATION = MAX_TRANSLATION / 10  # the origin is moved before cameras are stored
SKEW_TOLERANCE = 1e-6  # of the focal length
MAX_OFF_CENTER = 0.375  # of a side: crops for training are centered on the principal point, and would be tiny
JPEG_START = b"\xff\xd8"
PNG_END = b"IEND\xaeB`\x82"


class BadFrameError(ValueError):
    """A frame that cannot be used; the message is the reason it is counted under, its detail what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """How frames are stored. short_side in pixels, 0 keeps the original JPEG; quality is JPEG's, 1 to 100."""

    short_side: int = 648
    quality: int = 95


@dataclass(frozen=True, kw_only=True)
class PackedFrame:
    jpeg: bytes
    depth: bytes | None
    meta: FrameMeta
    median_depth: float | None  # of what is known, in the units of the translations; None: nothing is


def pack_frame(frame: Frame, options: FrameOptions) -> PackedFrame:
    """Read, check, resize and encode a frame. Raises BadFrameError."""
    data = _read(frame.image, "image")
    try:
        source_size = jpeg_size(data)
        scale = min(1.0, options.short_side / min(source_size)) if options.short_side else 1.0
        image, eighths = decode_jpeg(data, scale)
    except ValueError as error:
        if data and not data.startswith(JPEG_START):
            raise BadFrameError("image is not a JPEG") from error
        raise BadFrameError("image is damaged", str(error)) from error
    if frame.size is not None and source_size != tuple(frame.size):
        raise BadFrameError("image is not of the annotated size", f"{source_size} against {frame.size}")
    extrinsics, intrinsics = frame.camera.opencv(*source_size)
    check_camera(extrinsics, intrinsics, *source_size)
    if np.abs(extrinsics[:, 3]).max() > MAX_SOURCE_TRANSLATION:
        raise BadFrameError("camera is too far from the origin", f"{extrinsics[:, 3]}")
    extrinsics = orthonormalized(extrinsics)
    # An edge at x of the source lies at x * factor of the stored image, which need not be the ratio of the sizes:
    # a decoder that scales by k/8 rounds sizes up.
    size, factor = source_size, (1.0, 1.0)
    if scale < 1:
        size = tuple(max(1, round(n * scale)) for n in source_size)
        factor = tuple(eighths / 8 * n / decoded for n, decoded in zip(size, image.shape[:2], strict=True))
        data = encode_jpeg(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), options.quality)
    depth = median_depth = None
    if frame.depth is not None:
        halves, median = _stored_depth(frame, source_size, size, factor)
        depth, median_depth = encode_depth(halves), None if median is None else median * frame.depth_scale
    meta = FrameMeta(
        extrinsics=extrinsics,
        intrinsics=scale_intrinsics(intrinsics, factor[1], factor[0]),
        height=size[0],
        width=size[1],
        depth_scale=frame.depth_scale,
        source=frame.path,
        jpg_crc=zlib.crc32(data),
        depth_crc=None if depth is None else zlib.crc32(depth),
    )
    return PackedFrame(jpeg=data, depth=depth, meta=meta, median_depth=median_depth)


def orthonormalized(extrinsics: np.ndarray) -> np.ndarray:
    """Camera-from-world [3, 4] with the nearest rotation, and the camera's center where it was.

    Poses are inverted by transposing them: at 500 km from the origin, an error of 1e-4 would be 50 m.
    """
    center = -np.linalg.solve(extrinsics[:, :3], extrinsics[:, 3])
    u, _, vt = np.linalg.svd(extrinsics[:, :3])
    rotation = u @ vt
    return np.column_stack([rotation, -rotation @ center])


def check_camera(extrinsics: np.ndarray, k: np.ndarray, height: int, width: int) -> None:
    """Raises BadFrameError unless a camera can be trained on.

    It must be finite, a rotation to ROTATION_TOLERANCE, of possible focal lengths, not skewed, its principal point near
    the center, and not too far from the origin.
    """
    if not np.isfinite(extrinsics).all() or not np.isfinite(k).all():
        raise BadFrameError("camera is not finite")
    rotation = extrinsics[:, :3]
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > ROTATION_TOLERANCE or np.linalg.det(rotation) < 0:
        raise BadFrameError("camera is not a rotation")
    if np.abs(extrinsics[:, 3]).max() > MAX_TRANSLATION:
        raise BadFrameError("camera is too far from the origin", f"{extrinsics[:, 3]}")
    if k[0, 0] <= 0 or k[1, 1] <= 0 or (k[2] != (0, 0, 1)).any():
        raise BadFrameError("intrinsics are not [fx 0 cx; 0 fy cy; 0 0 1]")
    if max(abs(k[0, 1]), abs(k[1, 0])) > SKEW_TOLERANCE * k[0, 0]:
        raise BadFrameError("intrinsics are skewed")
    focal = k[0, 0] / max(height, width), k[1, 1] / max(height, width)
    if min(focal) < FOCAL_RANGE[0] or max(focal) > FOCAL_RANGE[1]:
        raise BadFrameError("focal length is impossible for the image's size", f"{focal} of the longer side")
    if max(focal) > MAX_PIXEL_ASPECT * min(focal):
        raise BadFrameError("fx and fy are too different", f"{k[0, 0]} and {k[1, 1]}")
    places = (k[:2, 2] + 0.5) / (width, height)
    if np.abs(places - 0.5).max() > MAX_OFF_CENTER:
        raise BadFrameError("principal point is far from the center", f"at {places} of the sides")


def _stored_depth(
    frame: Frame, source: tuple[int, int], size: tuple[int, ...], factor: tuple[float, ...]
) -> tuple[np.ndarray, float | None]:
    """Half floats of the stored size, 0 where unknown, picked from the source's pixels, never averaged; their median.

    The latter is None if all are unknown.
    """
    assert frame.depth is not None
    bits = _read_png(frame.depth, "depth", np.uint16)
    mask = None
    if frame.mask is not None and os.path.exists(frame.mask):
        mask = _read_png(frame.mask, "depth mask", np.uint8)
    for name, array in (("depth", bits), ("depth mask", mask)):
        if array is not None and array.shape != source:
            raise BadFrameError(f"{name} is not of the image's size", f"{array.shape} against {source}")
    if size != source:
        rows, columns = (
            nearest((np.arange(n) + 0.5) / f - 0.5, m) for n, f, m in zip(size, factor, source, strict=True)
        )
        bits = bits[rows[:, None], columns]
        mask = None if mask is None else mask[rows[:, None], columns]
    depth = bits.view(np.float16)
    valid = np.isfinite(depth) & (depth > 0)
    if mask is not None:
        valid &= mask > MASK_THRESHOLD
    if not valid.any():
        return np.zeros_like(depth), None
    median, far = np.percentile(depth[valid].astype(np.float32), (50, FAR_PERCENTILE))
    return np.where(valid & (depth <= far), depth, np.float16(0)), float(median)


def _read(path: Path, what: str) -> bytes:
    try:
        if path.exists() and not path.is_file():  # nothing comes out of a pipe
            raise BadFrameError(f"{what} is not a file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadFrameError(f"{what} is missing") from error
    except (OSError, ValueError) as error:  # also a path that no file can have
        raise BadFrameError(f"{what} is not readable", str(error)) from error


def _read_png(path: Path, what: str, dtype: type) -> np.ndarray:
    """A PNG of one channel of this dtype: [H, W]. Raises BadFrameError."""
    data = _read(path, what)
    if PNG_END not in data[-64:]:  # OpenCV fills what is missing with zeros and says nothing
        raise BadFrameError(f"{what} is truncated")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # a header of absurd size
        image = None
    if image is None:
        raise BadFrameError(f"{what} is damaged")
    if image.dtype != dtype or image.ndim != 2:
        raise BadFrameError(f"{what} is not a {8 * np.dtype(dtype).itemsize}-bit gray PNG")
    return image
