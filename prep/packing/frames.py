"""One frame from its source files to the bytes of its members: checked, resized, encoded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import cv2
import numpy as np

from prep.importers.source import Frame
from prep.packing.depths import NEAR_CENTER, Target, stored_depth
from prep.packing.lens import lens_of
from prep.packing.reading import BadFrameError, read_file, read_rgb
from shards.codecs import decode_jpeg, encode_depth, encode_jpeg, jpeg_size
from shards.geometry import scale_intrinsics
from shards.schema import FrameMeta

ROTATION_TOLERANCE = 1e-3  # of R R^T to the identity: cameras are rounded in text files; the nearest rotation is stored
FOCAL_RANGE = (0.1, 100.0)  # over the image's longer side: fields of view of 157 to 0.6 degrees
MAX_PIXEL_ASPECT = 3.0  # fx over fy, or fy over fx
MAX_TRANSLATION = 1e10  # beyond it double precision leaves too little
MAX_SOURCE_TRANSLATION = MAX_TRANSLATION / 10  # the origin is moved before cameras are stored
SKEW_TOLERANCE = 1e-6  # of the focal length
MAX_OFF_CENTER = 0.375  # of a side: crops for training are centered on the principal point, and would be tiny
JPEG_START = b"\xff\xd8"


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
    """Read, check, undistort, resize and encode a frame. Raises BadFrameError."""
    data = read_file(frame.image, "image")
    distortion = frame.camera.distortion
    as_jpeg = data.startswith(JPEG_START) and distortion is None and not frame.quarter_turns
    try:
        image, eighths, source = _decode(data, options, as_jpeg)
    except ValueError as error:
        raise error if isinstance(error, BadFrameError) else BadFrameError("image is damaged", str(error)) from error
    if frame.size is not None and source != tuple(frame.size):
        raise BadFrameError("image is not of the annotated size", f"{source} against {frame.size}")
    extrinsics, intrinsics = frame.camera.opencv(*source)
    check_camera(extrinsics, intrinsics, *source)
    if np.abs(extrinsics[:, 3]).max() > MAX_SOURCE_TRANSLATION:
        raise BadFrameError("camera is too far from the origin", f"{extrinsics[:, 3]}")
    extrinsics = orthonormalized(extrinsics)
    if distortion is not None and not np.isfinite(distortion.coefficients).all():
        raise BadFrameError("camera is not finite")
    of_source = intrinsics
    lens = None if distortion is None else lens_of(intrinsics, distortion, *source)
    if lens is not None:
        image, intrinsics = lens.image(image), lens.intrinsics
        check_camera(extrinsics, intrinsics, *source)
    # An edge at x of the source lies at x * factor of the stored image, which need not be the ratio of the sizes:
    # a decoder that scales by k/8 rounds sizes up.
    scale = _scale(source, options)
    size, factor = source, (1.0, 1.0)
    if scale < 1:
        size = max(1, round(source[0] * scale)), max(1, round(source[1] * scale))
        factor = tuple(eighths / 8 * n / decoded for n, decoded in zip(size, image.shape[:2], strict=True))
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    turns = frame.quarter_turns
    if scale < 1 or not as_jpeg:
        data = encode_jpeg(np.ascontiguousarray(np.rot90(image, turns)), options.quality)
    depth, depth_scale, median_depth = None, 1.0, None
    target = Target(source, size, factor, lens, of_source, turns)
    intrinsics = scale_intrinsics(intrinsics, factor[1], factor[0])
    if frame.depth is not None:
        halves, depth_scale, median_depth = stored_depth(frame, target, extrinsics, intrinsics)
        depth = None if median_depth is None else encode_depth(halves)
    for _ in range(turns):
        extrinsics, intrinsics = turned_camera(extrinsics, intrinsics, size[1])
        size = size[::-1]
    meta = FrameMeta(
        extrinsics=extrinsics,
        intrinsics=intrinsics,
        height=size[0],
        width=size[1],
        depth_scale=depth_scale,
        source=frame.path,
        jpg_crc=zlib.crc32(data),
        depth_crc=None if depth is None else zlib.crc32(depth),
    )
    return PackedFrame(jpeg=data, depth=depth, meta=meta, median_depth=median_depth)


def _decode(data: bytes, options: FrameOptions, as_jpeg: bool) -> tuple[np.ndarray, int, tuple[int, int]]:
    """RGB [h, w, 3], its scale in eighths, and height and width of the source. Raises ValueError.

    as_jpeg: whether it may be decoded at a smaller size.
    """
    if not data.startswith(JPEG_START):
        image = read_rgb(data)
        return image, 8, (image.shape[0], image.shape[1])
    source = jpeg_size(data)
    image, eighths = decode_jpeg(data, _scale(source, options) if as_jpeg else 1.0)  # OpenCV would fill what is damaged
    return image, eighths, source


def _scale(size: tuple[int, int], options: FrameOptions) -> float:
    return min(1.0, options.short_side / min(size)) if options.short_side else 1.0


def turned_camera(extrinsics: np.ndarray, k: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The camera of an image of so many columns after a quarter turn counterclockwise."""
    turn = np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    turned = np.array([[k[1, 1], 0, k[1, 2]], [0, k[0, 0], width - 1 - k[0, 2]], [0, 0, 1]])
    return turn @ extrinsics, turned


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
        exchanged = (k[1::-1, 2] + 0.5) / (width, height)
        advice = ": are width and height exchanged?" if np.abs(exchanged - 0.5).max() < NEAR_CENTER else ""
        raise BadFrameError(f"principal point is far from the center{advice}", f"at {places} of the sides")
