"""What a shard set is made of: file names, the rows of the index, and the JSON member of a frame."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT = "vggt-shards"
VERSION = 1
DATASET_FILE = "dataset.json"
FRAMES_FILE = "frames.npy"
SEQUENCES_FILE = "sequences.npy"
PAIRS_FILE = "pairs.npy"  # optional
REPORT_FILE = "report.json"
WORK_FOLDER = ".pack"  # in a set until its pack is complete
SPLITS = ("train", "test")
SELF_CRC, CRC_ZEROS = "self_crc32", "00000000"  # of JSON that states its own CRC

JPEG, DEPTH, META = "jpg", "depth.zst", "json"  # the extensions of a frame's members


def frame_dtype(name_bytes: int) -> np.dtype:
    """A row of frames.npy. Offsets count from the start of the tar; depth_size 0 = camera only.

    extrinsics: camera-from-world, OpenCV axes; intrinsics in pixels of the stored image, (0, 0) the center of the
    top-left pixel; depth along z = half float * depth_scale, in the units of the translations.
    """
    return np.dtype(
        [
            ("name", f"S{max(name_bytes, 1)}"),
            ("sequence", "<u4"),
            ("tar", "<u4"),
            ("jpg_offset", "<u8"),
            ("jpg_size", "<u4"),
            ("jpg_crc", "<u4"),
            ("depth_offset", "<u8"),
            ("depth_size", "<u4"),
            ("depth_crc", "<u4"),
            ("height", "<u4"),
            ("width", "<u4"),
            ("depth_scale", "<f8"),
            ("extrinsics", "<f8", (3, 4)),
            ("intrinsics", "<f8", (3, 3)),
            ("row_crc", "<u4"),
        ]
    )


def sequence_dtype(category_bytes: int, name_bytes: int) -> np.dtype:
    """A row of sequences.npy: its frames are rows first .. first + count of frames.npy, in order."""
    return np.dtype(
        [
            ("category", f"S{max(category_bytes, 1)}"),
            ("name", f"S{max(name_bytes, 1)}"),
            ("split", "S5"),
            ("first", "<u8"),
            ("count", "<u4"),
        ]
    )


def pair_dtype(neighbors: int) -> np.dtype:
    """A row of pairs.npy, of the frame of the same row: other frames of its sequence that see what it sees.

    neighbors: numbers within the sequence, best first; overlap: in 255ths, 0 from the end of the list on. guessed: 1
    where the frame has no depth, so that cameras alone tell.
    """
    return np.dtype(
        [
            ("neighbors", "<u4", (neighbors,)),
            ("overlap", "u1", (neighbors,)),
            ("guessed", "u1"),
            ("row_crc", "<u4"),
        ]
    )


def row_crc(row: np.void) -> int:
    """CRC32 of a row of frames.npy or pairs.npy without its last field, which holds that CRC."""
    return zlib.crc32(row.tobytes()[:-4])


def self_crc(data: bytes, stated: str) -> str:
    """CRC-32 of a JSON object's bytes as 8 hex digits, taken with zeros in place of those that it states itself."""
    entry = f'"{SELF_CRC}": "%s"'
    return f"{zlib.crc32(data.replace((entry % stated).encode(), (entry % CRC_ZEROS).encode(), 1)):08x}"


@dataclass(frozen=True, kw_only=True)
class FrameMeta:
    """The JSON member of a frame: all that its row of the index says but where the bytes lie."""

    extrinsics: np.ndarray  # [3, 4]
    intrinsics: np.ndarray  # [3, 3]
    height: int
    width: int
    depth_scale: float
    source: str  # the image's path within the source
    jpg_crc: int
    depth_crc: int | None  # None: camera only

    def to_json(self) -> bytes:
        crc32 = {JPEG: self.jpg_crc} | ({} if self.depth_crc is None else {DEPTH: self.depth_crc})
        fields = {
            "extrinsics": self.extrinsics.tolist(),
            "intrinsics": self.intrinsics.tolist(),
            "height": self.height,
            "width": self.width,
            "depth_scale": self.depth_scale,
            "source": self.source,
            "crc32": crc32,
            SELF_CRC: CRC_ZEROS,
        }
        fields[SELF_CRC] = self_crc(self._encoded(fields), CRC_ZEROS)
        return self._encoded(fields)

    @staticmethod
    def _encoded(fields: dict[str, Any]) -> bytes:
        return json.dumps(fields, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> FrameMeta:
        """Raises ValueError if it is damaged, or a field is missing or of another type."""
        try:
            fields: dict[str, Any] = json.loads(data)
            if self_crc(data, fields[SELF_CRC]) != fields[SELF_CRC]:
                raise ValueError("does not match its own CRC")
            numbers = (int(fields["height"]), int(fields["width"]), float(fields["depth_scale"]))
            if not all(0 < number < 2**31 for number in numbers):
                raise ValueError("height, width and depth_scale: expected positive numbers")
            return cls(
                extrinsics=np.array(fields["extrinsics"], dtype=np.float64).reshape(3, 4),
                intrinsics=np.array(fields["intrinsics"], dtype=np.float64).reshape(3, 3),
                height=int(fields["height"]),
                width=int(fields["width"]),
                depth_scale=float(fields["depth_scale"]),
                source=str(fields["source"]),
                jpg_crc=int(fields["crc32"][JPEG]),
                depth_crc=fields["crc32"].get(DEPTH),
            )
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, OverflowError) as error:
            raise ValueError(f"not a frame's JSON member: {error!r}") from error


def member_key(category: str, sequence: str, frame: str) -> str:
    """The WebDataset key of a frame. WebDataset ends a key at the first dot of the file name: dots are escaped."""
    return f"{category}/{sequence}/{frame.replace('%', '%25').replace('.', '%2E')}"


def frame_name(key: str) -> tuple[str, str, str]:
    """The inverse of member_key: category, sequence, frame."""
    category, sequence, frame = key.split("/")
    return category, sequence, frame.replace("%2E", ".").replace("%25", "%")
