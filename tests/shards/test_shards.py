from __future__ import annotations

import json
import pickle
import shutil
import zlib

import numpy as np
import pytest
from conftest import frame_meta, run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import shards
from shards.build_index import index_tar
from shards.codecs import decode_depth, decode_jpeg, encode_depth
from shards.geometry import nearest, scale_intrinsics
from shards.schema import FrameMeta, frame_name, member_key


@given(arrays.arrays(np.uint16, st.tuples(st.integers(1, 20), st.integers(1, 20))))
@settings(max_examples=50, deadline=None)
def test_depth_comes_back_bit_for_bit(bits):
    data = encode_depth(bits.view(np.float16))
    assert np.array_equal(decode_depth(data, *bits.shape).view(np.uint16), bits)


@pytest.mark.parametrize("damage", [lambda d: d[:-3], lambda d: b"", lambda d: b"x" + d, lambda d: d + d])
def test_damaged_depth_is_an_error(damage):
    data = encode_depth(np.ones((4, 6), np.float16))
    with pytest.raises(ValueError, match="depth"):
        decode_depth(damage(data), 4, 7)


@given(st.text(st.characters(exclude_characters="/", exclude_categories=("Cs", "Cc")), min_size=1))
@settings(max_examples=100, deadline=None)
def test_every_frame_name_survives_as_a_key(name):
    key = member_key("apple", "1_2_3", name)
    assert "." not in key.rpartition("/")[2]
    assert frame_name(key) == ("apple", "1_2_3", name)


def test_a_shard_set_says_what_it_holds(shard_dir):
    opened = shards.open(shard_dir)
    assert len(opened.frames) == 8 * 24
    assert len(opened.split("train")) == 7
    assert len(opened.split("test")) == 1
    assert len(opened.tars) > 2
    assert set(np.minimum(opened.frames["height"], opened.frames["width"])) == {150}
    for row in opened.sequences:
        frames = opened.frames[row["first"] : row["first"] + row["count"]]
        assert len(set(frames["tar"])) == 1  # a sequence is in one shard
        assert list(frames["name"]) == sorted(frames["name"])
    assert pickle.loads(pickle.dumps(opened)).digest == opened.digest


STOCK_READER = """
import json, sys, zlib, webdataset
for sample in webdataset.WebDataset(sys.argv[1:], shardshuffle=False):
    crcs = {name: zlib.crc32(sample[name]) for name in ("jpg", "depth.zst")}
    print(json.dumps([sample["__key__"], crcs, json.loads(sample["json"])]))
"""


def test_stock_webdataset_reads_the_same_bytes(shard_dir):
    """In a process that has no code of ours."""
    opened = shards.open(shard_dir)
    done = run_command("python", "-c", STOCK_READER, *(shard_dir / tar for tar in opened.tars))
    samples = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(samples) == len(opened.frames), done.stderr
    for i, (key, crcs, meta) in enumerate(samples):
        row = opened.frames[i]
        assert key == opened.key(i)
        assert [crcs["jpg"], crcs["depth.zst"]] == [zlib.crc32(part) for part in opened.read(i)]
        assert np.array_equal(meta["extrinsics"], row["extrinsics"])
        assert np.array_equal(meta["intrinsics"], row["intrinsics"])
        assert meta["crc32"] == crcs


def test_reading_a_frame_takes_hardly_more_than_its_bytes(shard_dir, monkeypatch):
    opened = shards.open(shard_dir)
    taken = []
    pread = shards.reader.os.pread
    monkeypatch.setattr(shards.reader.os, "pread", lambda fd, n, at: taken.append(n) or pread(fd, n, at))
    wanted = sum(len(part) for i in range(50) for part in opened.read(i))
    assert sum(taken) <= 1.05 * wanted


def copy(shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_flipped_bit_in_a_member_is_found(shard_dir, tmp_path):
    path = copy(shard_dir, tmp_path)
    opened = shards.open(path)
    row = opened.frames[5]
    for offset, size, what in (("jpg_offset", "jpg_size", "jpg"), ("depth_offset", "depth_size", "depth")):
        tar = path / opened.tars[row["tar"]]
        good = tar.read_bytes()
        damaged = bytearray(good)
        damaged[int(row[offset]) + int(row[size]) // 2] ^= 4
        tar.write_bytes(damaged)
        with pytest.raises(shards.DamagedMemberError, match=rf"{what} of .*scene_.*frame000006"):
            opened.read(5)
        with pytest.raises(ValueError, match="does not match the CRC"):
            index_tar(tar)
        tar.write_bytes(good)
    opened.read(5)


def test_a_flipped_bit_in_the_index_is_found(shard_dir, tmp_path):
    path = copy(shard_dir, tmp_path)
    frames = np.load(path / "frames.npy")
    frames["intrinsics"][3, 0, 0] += 1
    np.save(path / "frames.npy", frames)
    with pytest.raises(shards.DamagedMemberError, match="row 3"):
        shards.open(path).read(3)


def damage_version(path):
    dataset = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(dataset | {"version": 2}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (lambda p: (p / "dataset.json").unlink(), "no finished shard set"),
        (lambda p: (p / "dataset.json").write_text("{"), "not the description of a shard set"),
        (lambda p: (p / "dataset.json").write_text("[]"), "not the description of a shard set"),
        (damage_version, "expected vggt-shards version 1, found vggt-shards 2"),
        (lambda p: (p / "train-000000.tar").unlink(), "train-000000.tar: is missing"),
        (lambda p: (p / "frames.npy").write_bytes(b"short"), "frames.npy: has 5 bytes, not .* vggt-prep index"),
    ],
)
def test_a_set_that_is_not_whole_is_refused(shard_dir, tmp_path, damage, message):
    path = copy(shard_dir, tmp_path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        shards.open(path)


def test_frames_without_depth_are_camera_only():
    meta = frame_meta()
    again = FrameMeta.from_json(meta.to_json())
    assert again.depth_crc is None
    assert np.array_equal(again.extrinsics, meta.extrinsics)


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"extrinsics": 1}', b"\xff"])
def test_a_wrong_json_member_is_an_error(data):
    with pytest.raises(ValueError, match=r".+"):
        FrameMeta.from_json(data)


@pytest.mark.parametrize(("source", "target"), [(100, 50), (1080, 648), (99, 33), (640, 480), (300, 75), (7, 5)])
def test_picking_pixels_is_unbiased(source, target):
    """On average the picked pixel lies where the target pixel does: no map shifts against its image."""
    place = (np.arange(target) + 0.5) * source / target - 0.5
    shift = nearest(place, source) - place
    assert np.abs(shift).max() <= 0.5 + 1e-9
    period = target // np.gcd(source, target) * 2
    whole = shift[: target - target % period] if target >= period else shift
    assert abs(whole.mean()) < 0.51 / len(whole) + 1e-9


def test_scaled_intrinsics_see_the_same_rays():
    k = np.array([[500.0, 0, 310.5], [0, 480, 251.25], [0, 0, 1]])
    scaled = scale_intrinsics(k, 0.45, 0.3)
    for u, v in ((-0.5, -0.5), (639.5, 479.5), (13, 200)):  # edges map to edges
        ray = np.linalg.solve(k, [u, v, 1])
        expected = ((u + 0.5) * 0.45 - 0.5, (v + 0.5) * 0.3 - 0.5)
        assert np.allclose((scaled @ ray)[:2], expected)


def test_a_jpeg_decodes_at_the_smallest_fast_scale_that_is_enough(shard_dir):
    opened = shards.open(shard_dir)
    jpeg, _ = opened.read(0)
    height, width = int(opened.frames[0]["height"]), int(opened.frames[0]["width"])
    for scale, eighths in ((1.0, 8), (0.51, 8), (0.5, 4), (0.3, 3), (0.05, 1), (1.4, 8)):
        image, found = decode_jpeg(jpeg, scale)
        assert found == eighths
        assert image.shape == (-(-height * eighths // 8), -(-width * eighths // 8), 3)
