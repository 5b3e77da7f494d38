"""docs/FORMAT.md is enough: a reader written from it alone, without NumPy's or our own reading of the files."""

from __future__ import annotations

import ast
import json
import struct
import zlib

import numpy as np
import simplejpeg
import zstandard

import shards
from shards.codecs import decode_depth

CODES = {"<u4": "I", "<u8": "Q", "<f8": "d"}


def read_rows(path):
    """The rows of a .npy file as dicts of bytes, numbers and lists, each with its raw bytes."""
    data = path.read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00"
    end = 10 + struct.unpack("<H", data[8:10])[0]
    header = ast.literal_eval(data[10:end].decode("latin-1"))
    fields = []
    for name, kind, *shape in header["descr"]:
        count = int(np.prod(shape[0])) if shape else 1
        fields.append((name, f"{kind[2:]}s" if kind[1] == "S" else f"{count}{CODES[kind]}"))
    layout = struct.Struct("<" + "".join(code for _, code in fields))
    for i in range(header["shape"][0]):
        raw = data[end + i * layout.size : end + (i + 1) * layout.size]
        values, row = list(layout.unpack(raw)), {}
        for name, code in fields:
            count = 1 if code.endswith("s") else int(code[:-1])
            taken, values = values[:count], values[count:]
            row[name] = taken[0].rstrip(b"\0").decode() if code.endswith("s") else taken
        yield row, raw


def read_frame(path, dataset, row, raw):
    """Image [H, W, 3], depth [H, W] and camera of a frame, every byte checked."""
    assert zlib.crc32(raw[:-4]) == row["row_crc"][0]
    data = (path / dataset["tars"][row["tar"][0]]).read_bytes()
    parts = {}
    for name in ("jpg", "depth"):
        offset, size = row[f"{name}_offset"][0], row[f"{name}_size"][0]
        parts[name] = data[offset : offset + size]
        assert zlib.crc32(parts[name]) == row[f"{name}_crc"][0]
    height, width = row["height"][0], row["width"][0]
    plain = zstandard.ZstdDecompressor().decompress(parts["depth"])
    half = height * width
    bits = bytes(byte for pair in zip(plain[:half], plain[half:], strict=True) for byte in pair)
    depth = np.array(struct.unpack(f"<{half}e", bits)).reshape(height, width) * row["depth_scale"][0]
    return simplejpeg.decode_jpeg(parts["jpg"]), depth, row["extrinsics"], row["intrinsics"]


def test_a_reader_written_from_the_specification_sees_the_same(shard_dir):
    dataset = json.loads((shard_dir / "dataset.json").read_text())
    assert (dataset["format"], dataset["version"]) == ("vggt-shards", 1)
    text = (shard_dir / "dataset.json").read_text()
    assert f"{zlib.crc32(text.replace(dataset['self_crc32'], '0' * 8).encode()):08x}" == dataset["self_crc32"]
    assert all((shard_dir / name).stat().st_size == entry["size"] for name, entry in dataset["files"].items())
    opened = shards.open(shard_dir)
    rows, sequences = list(read_rows(shard_dir / "frames.npy")), list(read_rows(shard_dir / "sequences.npy"))
    assert len(rows) == len(opened.frames)
    assert len(sequences) == len(opened.sequences)
    for i in (0, 30, len(rows) - 1):
        row, raw = rows[i]
        image, depth, extrinsics, intrinsics = read_frame(shard_dir, dataset, row, raw)
        expected = opened.frames[i]
        jpeg, stored = opened.read(i)
        assert np.array_equal(image, simplejpeg.decode_jpeg(jpeg))
        assert np.array_equal(depth, decode_depth(stored, *image.shape[:2]).astype(float) * expected["depth_scale"])
        assert np.array_equal(np.reshape(extrinsics, (3, 4)), expected["extrinsics"])
        assert np.array_equal(np.reshape(intrinsics, (3, 3)), expected["intrinsics"])
        sequence, _ = sequences[row["sequence"][0]]
        assert f"{sequence['category']}/{sequence['name']}/{row['name']}" == opened.key(i)
        assert sequence["first"][0] <= i < sequence["first"][0] + sequence["count"][0]
