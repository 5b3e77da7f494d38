"""Bytes of a frame's members: JPEG as it is, depth as byte-shuffled half floats under zstd."""

from __future__ import annotations

import numpy as np
import simplejpeg
import zstandard

ZSTD_LEVEL = 3
# DCT scales (eighths) that libjpeg-turbo decodes faster than the whole image; 5, 6 and 7 eighths are slower.
DCT_EIGHTHS = (1, 2, 3, 4, 8)


def encode_depth(depth: np.ndarray) -> bytes:
    """Half floats [H, W] -> bytes: all low bytes, then all high bytes, compressed. Exact."""
    planes = np.ascontiguousarray(depth).view(np.uint8).reshape(-1, 2).T
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False).compress(planes.tobytes())


def decode_depth(data: bytes, height: int, width: int) -> np.ndarray:
    """The inverse of encode_depth: half floats [H, W]. Raises ValueError unless `data` holds just that many."""
    size = 2 * height * width
    try:
        stored = zstandard.get_frame_parameters(data).content_size
        if stored != size:
            raise ValueError(f"depth: expected {size} bytes for {height} x {width}, found {stored}")
        raw = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"depth: not a zstd frame of {size} bytes ({error})") from error
    low, high = np.frombuffer(raw, dtype=np.uint8).reshape(2, -1)
    bits = high.astype("<u2")  # whole words: twelve times as fast as laying single bytes side by side
    bits <<= 8
    bits |= low
    return bits.view("<f2").reshape(height, width)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Height and width of a JPEG in pixels. Raises ValueError if it is none."""
    height, width, _, _ = simplejpeg.decode_jpeg_header(data)
    return int(height), int(width)


def decode_jpeg(data: bytes, scale: float = 1.0) -> tuple[np.ndarray, int]:
    """RGB [h, w, 3] at the smallest fast DCT scale of at least `scale`, and that scale in eighths.

    A pixel edge at x of the file lies at x * eighths / 8 of the result, whose size is that of the file times
    eighths / 8, rounded up. Raises ValueError for damaged or truncated data.
    """
    height, width = jpeg_size(data)
    eighths = next((k for k in DCT_EIGHTHS if k / 8 >= scale), 8)
    h, w = -(-height * eighths // 8), -(-width * eighths // 8)
    image = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=h, min_width=w, min_factor=1)
    assert image.shape == (h, w, 3), (image.shape, h, w)
    return image, eighths


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """RGB [H, W, 3] -> JPEG with 4:2:0 chroma."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=quality, colorsubsampling="420")
