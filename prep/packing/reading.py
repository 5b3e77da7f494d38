"""Files of a frame, read with reasons to count frames by."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import cv2
import numpy as np

PNG_END = b"IEND\xaeB`\x82"
PGM_START = b"P5"
HEIC_BRANDS = (b"heic", b"heix", b"mif1", b"msf1")


class BadFrameError(ValueError):
    """A frame that cannot be used; the message is the reason it is counted under, its detail what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def read_file(path: Path, what: str) -> bytes:
    try:
        if path.exists() and not path.is_file():  # nothing comes out of a pipe
            raise BadFrameError(f"{what} is not a file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadFrameError(f"{what} is missing") from error
    except (OSError, ValueError) as error:  # also a path that no file can have
        raise BadFrameError(f"{what} is not readable", str(error)) from error


def read_png(path: Path, what: str, dtype: type) -> np.ndarray:
    """A PNG, or a PGM, of one channel of this dtype: [H, W]. Raises BadFrameError."""
    data = read_file(path, what)
    if not data.startswith(PGM_START) and PNG_END not in data[-64:]:  # OpenCV fills what is missing in a PNG with zeros
        raise BadFrameError(f"{what} is truncated")
    image = read_image(data, what)
    if image.dtype != dtype or image.ndim != 2:
        raise BadFrameError(f"{what} is not a {8 * np.dtype(dtype).itemsize}-bit gray PNG or PGM")
    return image


def read_image(data: bytes, what: str, flags: int = cv2.IMREAD_UNCHANGED) -> np.ndarray:
    """What OpenCV makes of a file's bytes. Raises BadFrameError."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # a header of absurd size
        image = None
    if image is None:
        raise BadFrameError(f"{what} is damaged")
    return image


def read_rgb(data: bytes) -> np.ndarray:
    """The stored pixels, as RGB uint8 [H, W, 3], of an image in any format that OpenCV reads.

    An EXIF orientation is not applied: cameras belong to the stored pixels. Raises BadFrameError.
    """
    if data.startswith(b"\x89PNG") and PNG_END not in data[-64:]:
        raise BadFrameError("image is damaged", "it is truncated")
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS:
        return _read_heic(data)
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    return cv2.cvtColor(read_image(data, "image", flags), cv2.COLOR_BGR2RGB)


def _read_heic(data: bytes) -> np.ndarray:
    """As decoded, with the file's rotation applied: in HEIC, that is part of the image."""
    try:
        import pillow_heif
    except ImportError as error:
        raise BadFrameError("HEIC needs .venv/bin/pip install -c constraints.txt -e '.[heic]'") from error
    try:
        image = np.asarray(pillow_heif.open_heif(BytesIO(data), convert_hdr_to_8bit=True))
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise BadFrameError("image is damaged", str(error)) from error
    return np.ascontiguousarray(image[..., :3]) if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
