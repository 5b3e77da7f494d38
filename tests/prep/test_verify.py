"""Damage is found: by verify wherever it is, by the reader wherever it matters, and never blessed by a new index."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import frame_meta, vggt_prep
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from prep.verify import verify
from shards.build_index import index_tar, rebuild_index, write_index
from shards.codecs import decode_depth, encode_depth
from shards.index import map_rows
from shards.schema import CRC_ZEROS, SELF_CRC, FrameMeta, frame_dtype, row_crc, self_crc
from shards.writer import json_bytes, write_tar


@pytest.fixture(scope="module")
def small_set(captures, tmp_path_factory):
    """One sequence of 24 frames: small enough to be damaged a thousand times."""
    out = tmp_path_factory.mktemp("small") / "set"
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    done = vggt_prep("pack", *source, "--out", out, "--short-side", 48, "--split", "test")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def attempt(function, *arguments):
    """What the function returns, or the ValueError or OSError that it raises; anything else is a crash."""
    try:
        return function(*arguments), None
    except (ValueError, OSError) as error:
        return None, error


def linked(source, target, name, data):
    """The set `source` with one file replaced."""
    target.mkdir()
    for path in source.iterdir():
        if path.name != name:
            os.link(path, target / path.name)
    if data is not None:
        (target / name).write_bytes(data)
    return target


def damages(rng, files):
    """(file, what was done, new bytes), forever: flipped bits, bytes set again, ends cut off."""
    while True:
        name = str(rng.choice(sorted(files), p=[0.2, 0.2, 0.1, 0.5]))  # half of them in the tar
        data = bytearray(files[name])
        place = int(rng.integers(len(data)))
        kind = rng.integers(3)
        if kind == 0:
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[place] = (data[place] + int(rng.integers(1, 256))) % 256
        else:
            del data[place:]
        yield name, f"{name}: kind {kind} at {place}", bytes(data)


def everything(path):
    opened = shards.open(path)
    return [(opened.key(i), *opened.read(i)) for i in range(len(opened.frames))]


def test_a_thousand_damages_are_all_found_and_none_is_read_as_pixels(small_set, executor, tmp_path):
    names = ("test-000000.tar", "frames.npy", "sequences.npy", "dataset.json")
    files = {name: (small_set / name).read_bytes() for name in names}
    good = everything(small_set)
    assert verify(str(small_set), executor).problems == []
    rng = np.random.default_rng(4)
    for number, (name, what, data) in zip(range(1000), damages(rng, files), strict=False):
        path = linked(small_set, tmp_path / f"damaged-{number}", name, data)
        assert verify(str(path), executor).problems, what
        read, error = attempt(everything, path)
        assert read == good or str(path) in str(error), what
        shutil.rmtree(path)


def test_verify_names_each_damaged_frame(shard_dir, tmp_path):
    opened = shards.open(shard_dir)
    frames = [3, 5]
    tar = opened.tars[opened.frames[3]["tar"]]
    data = bytearray((shard_dir / tar).read_bytes())
    for frame in frames:
        data[int(opened.frames[frame]["jpg_offset"]) + 50] ^= 1
    path = linked(shard_dir, tmp_path / "set", tar, bytes(data))
    done = vggt_prep("verify", path)
    assert done.returncode == 1
    for frame in frames:
        assert f"{tar}: the jpg of {opened.key(frame)} does not match its CRC" in done.stderr
    assert "Traceback" not in done.stderr
    whole = vggt_prep("verify", shard_dir)
    assert whole.returncode == 0, whole.stderr
    assert "4 of 4 tars checked: 192 frames as packed" in whole.stdout


def test_a_sample_checks_that_share_of_the_tars(shard_dir, executor):
    tars = len(shards.open(shard_dir).tars)
    assert verify(str(shard_dir), executor, sample=0.5).tars == round(tars / 2)
    assert verify(str(shard_dir), executor, sample=1e-6).tars == 1


def test_verify_finds_what_was_wrong_before_the_sums_were_taken(small_set, executor, tmp_path):
    """Sums that fit do not make a camera or an image right: a set as a faulty packer would write it."""
    opened = shards.open(small_set)
    with tarfile.open(small_set / "test-000000.tar") as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    key = opened.key(2)
    meta = FrameMeta.from_json(members[f"{key}.json"])
    for change, problem in (
        ({"extrinsics": meta.extrinsics * 2}, "not a rotation"),
        ({"height": meta.height + 1}, "image is"),
    ):
        wrong = FrameMeta(**{**vars(meta), **change})
        out = tmp_path / problem.replace(" ", "-")
        out.mkdir()
        changed = members | {f"{key}.json": wrong.to_json()}
        samples = {}
        for name, data in changed.items():
            stem, _, extension = name.partition(".")
            samples.setdefault(stem, {"__key__": stem})[extension] = data
        write_tar(out / "test-000000.tar", samples.values())
        rebuild_index(out, executor)
        (found,) = verify(str(out), executor).problems
        assert f"frame {key}: " in found
        assert problem in found


def rewrite(path, *, dataset=None, **arrays):
    """Change index files of a set, with right sums: what a faulty packer would have written."""
    described = json.loads((path / "dataset.json").read_bytes())
    for name, change in arrays.items():
        rows = np.load(path / f"{name}.npy")
        change(rows)
        (path / f"{name}.npy").unlink()
        np.save(path / f"{name}.npy", rows)
        digest = hashlib.sha256((path / f"{name}.npy").read_bytes()).hexdigest()
        described["files"][f"{name}.npy"]["sha256"] = digest
    if dataset:
        dataset(described)
    described[SELF_CRC] = CRC_ZEROS
    described[SELF_CRC] = self_crc(json_bytes(described), CRC_ZEROS)
    (path / "dataset.json").unlink()
    (path / "dataset.json").write_bytes(json_bytes(described))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sequences": lambda rows: rows["first"].fill(0)}, "sequences do not lie end to end"),
        ({"sequences": lambda rows: rows["split"].fill(b"train")}, "its splits or categories are not those"),
        ({"dataset": lambda d: d["splits"]["test"].update(frames=7)}, "its splits or categories are not those"),
        ({"dataset": lambda d: d.update(categories=["tea"])}, "its splits or categories are not those"),
    ],
)
def test_verify_finds_an_index_that_says_something_else(shard_dir, executor, tmp_path, changes, problem):
    path = linked(shard_dir, tmp_path / "set", "report.json", None)
    rewrite(path, **changes)
    (found,) = verify(str(path), executor).problems
    assert problem in found


def test_verify_finds_the_same_frames_in_two_splits(shard_dir, executor, tmp_path):
    path = linked(shard_dir, tmp_path / "set", "dataset.json", None)
    shutil.copy(path / "train-000000.tar", path / "test-000001.tar")
    rebuild_index(path, executor)
    (found,) = verify(str(path), executor).problems
    assert "train-000000.tar, test-000001.tar hold the same frames" in found


def tree(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir()) if p.name != "report.json"}


def test_figures_of_a_damaged_index_are_not_shown(shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    rows = tmp_path / "set" / "frames.npy"
    data = bytearray(rows.read_bytes())
    data[-100] ^= 1
    rows.write_bytes(data)
    done = vggt_prep("info", tmp_path / "set")
    assert done.returncode == 1
    assert "frames.npy: not the one that dataset.json describes" in done.stderr


def test_an_index_rebuilt_from_the_tars_is_the_same(shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    for name in ("frames.npy", "sequences.npy"):
        (tmp_path / "set" / name).unlink()
    done = vggt_prep("index", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    assert "index of 192 frames written" in done.stdout
    assert tree(tmp_path / "set") == tree(shard_dir)


def test_a_tar_that_is_there_twice_is_not_indexed_twice(shard_dir, tmp_path, executor):
    shutil.copytree(shard_dir, tmp_path / "set")
    shutil.copy(tmp_path / "set" / "train-000000.tar", tmp_path / "set" / "train-000009.tar")
    (tmp_path / "set" / "dataset.json").unlink()
    with pytest.raises(ValueError, match=r"train-000000.tar and train-000009.tar both hold b\w+/scene_\d+; remove one"):
        rebuild_index(tmp_path / "set", executor)
    assert not (tmp_path / "set" / "dataset.json").exists()


@pytest.mark.parametrize("blocks", range(1, 45))
def test_a_tar_of_any_length_is_whole(tmp_path, blocks):
    """tar fills up its last record, and what ends an archive may need one more."""
    meta = frame_meta(jpg_crc=zlib.crc32(bytes(512 * blocks)))
    write_tar(tmp_path / "a.tar", [{"__key__": "a/b/c", "jpg": bytes(512 * blocks), "json": meta.to_json()}])
    assert index_tar(tmp_path / "a.tar")[0] == [("a", "b", 1)]


def test_an_index_is_not_made_without_a_tar_that_is_known_or_before_a_pack_is_finished(shard_dir, tmp_path, executor):
    path = linked(shard_dir, tmp_path / "set", "train-000001.tar", None)
    before = tree(path)
    with pytest.raises(ValueError, match=r"train-000001\.tar: missing; copy it again"):
        rebuild_index(path, executor)
    assert tree(path) == before
    (path / ".pack").mkdir()
    with pytest.raises(ValueError, match="its pack is not finished"):
        rebuild_index(path, executor)


def test_a_new_index_does_not_bless_a_changed_camera(small_set, executor, tmp_path):
    whole = (small_set / "test-000000.tar").read_bytes()
    place = whole.index(b".", whole.index(b'"extrinsics"')) + 1
    changed = whole[:place] + b"%d" % ((int(whole[place : place + 1]) + 1) % 10) + whole[place + 1 :]
    path = linked(small_set, tmp_path / "set", "test-000000.tar", changed)
    with pytest.raises(ValueError, match="does not match its own CRC"):
        rebuild_index(path, executor)
    padded = bytearray(whole)
    padded[300] ^= 1  # a field of a header that does not matter, but its checksum does
    path = linked(small_set, tmp_path / "other", "test-000000.tar", bytes(padded))
    with pytest.raises(ValueError, match=r"test-000000\.tar: "):
        rebuild_index(path, executor)


def test_an_index_rebuilt_without_its_description_reads_the_same_frames(small_set, executor, tmp_path):
    linked(small_set, tmp_path / "set", "dataset.json", None)
    rebuild_index(tmp_path / "set", executor)
    assert everything(tmp_path / "set") == everything(small_set)
    done = vggt_prep("info", tmp_path / "set")
    assert "unknown options" in done.stdout


def test_a_new_index_does_not_bless_damage(small_set, executor, tmp_path):
    whole = (small_set / "test-000000.tar").read_bytes()
    opened = shards.open(small_set)
    member = int(opened.frames[7]["depth_offset"])
    after_a_frame = int(opened.frames[7]["depth_offset"]) - 512  # where frame 7's first header begins
    flipped = bytearray(whole)
    flipped[member + 9] ^= 1
    header = bytearray(whole)
    header[after_a_frame + 130] ^= 1
    for number, data in enumerate((bytes(flipped), bytes(header), whole[:after_a_frame], whole[: member + 3])):
        path = linked(small_set, tmp_path / f"set-{number}", "test-000000.tar", data)
        before = tree(path)
        with pytest.raises(ValueError, match=r"test-000000\.tar: "):
            rebuild_index(path, executor)
        assert tree(path) == before
    with pytest.raises(ValueError, match="holds no tars like"):
        rebuild_index(tmp_path, executor)


# Parsers of what may be damaged raise ValueError and nothing else, for any bytes.


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_a_json_member_are_an_error(data):
    with pytest.raises(ValueError, match=r".+"):
        FrameMeta.from_json(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(["extrinsics", "intrinsics", "height", "depth_scale", "source", "crc32"]), JSON)
@settings(max_examples=300, deadline=None)
def test_any_value_in_a_json_member_is_taken_or_an_error(key, value):
    fields = json.loads(frame_meta().to_json()) | {key: value}
    meta, error = attempt(FrameMeta.from_json, json.dumps(fields).encode())
    assert str(error) if meta is None else meta.extrinsics.shape == (3, 4)


@given(st.binary(max_size=60), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_any_bytes_as_depth_are_an_error_or_depth(data, height, width):
    depth, error = attempt(decode_depth, data, height, width)
    assert "depth" in str(error) if depth is None else depth.shape == (height, width)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_depth_never_changes_its_size(data):
    good = bytearray(encode_depth(np.arange(30, dtype=np.float16).reshape(5, 6)))
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    depth, error = attempt(decode_depth, bytes(good), 5, 6)
    assert "depth" in str(error) if depth is None else depth.shape == (5, 6)


@pytest.fixture(scope="module")
def index_files(small_set):
    return (small_set / "frames.npy").read_bytes(), (small_set / "test-000000.tar").read_bytes()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_to_an_index_is_an_error_or_rows(index_files, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.npy"
    raw = bytearray(index_files[0])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    rows, error = attempt(map_rows, path, frame_dtype, "name")
    if rows is None:
        assert str(path) in str(error)
    else:
        assert rows.dtype == frame_dtype(rows.dtype["name"].itemsize)
        assert all(isinstance(row_crc(row), int) for row in rows)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_tar_is_an_error(index_files, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "test-000001.tar"
    whole = index_files[1]
    raw = bytearray(whole)
    header = data.draw(st.integers(0, len(raw) // 512 - 1)) * 512
    for _ in range(data.draw(st.integers(1, 4))):
        raw[header + data.draw(st.integers(0, 511))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    indexed, error = attempt(index_tar, path)
    if indexed is None:
        assert str(path) in str(error)
    else:  # padding, or a field of a header that does not matter
        sequences, rows = indexed
        assert sum(count for _, _, count in sequences) == len(rows) == 24


def test_an_index_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="its tars hold no frame"):
        write_index(tmp_path, [], source={}, options={})


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["tars"].append("../../evil.tar"),
        lambda d: d["files"]["frames.npy"].update(sha256="../../evil"),
        lambda d: d.pop("files"),
        lambda d: d.update(files=[1]),
    ],
)
def test_a_description_whose_names_lead_elsewhere_is_refused(small_set, tmp_path, change):
    """Also with a good CRC: it may come from someone else's server."""
    dataset = json.loads((small_set / "dataset.json").read_bytes())
    change(dataset)
    dataset[SELF_CRC] = CRC_ZEROS
    dataset[SELF_CRC] = self_crc(json_bytes(dataset), CRC_ZEROS)
    path = linked(small_set, tmp_path / "set", "dataset.json", json_bytes(dataset))
    with pytest.raises(ValueError, match=r"set/dataset\.json: "):
        shards.open(path)


def test_files_that_a_reader_does_not_know_are_ignored(small_set, tmp_path):
    """Later versions may add some to the index; whatever they are called, nothing looks for them."""
    dataset = json.loads((small_set / "dataset.json").read_bytes())
    dataset["files"] |= {"tracks.npy": {"size": 3, "sha256": "of later"}, "../../evil": {"size": 1}}
    dataset[SELF_CRC] = CRC_ZEROS
    dataset[SELF_CRC] = self_crc(json_bytes(dataset), CRC_ZEROS)
    opened = shards.open(linked(small_set, tmp_path / "set", "dataset.json", json_bytes(dataset)))
    assert opened.read(0)
    assert vggt_prep("verify", tmp_path / "set").returncode == 0


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "test-000000.tar", "w") as tar:
        link = tarfile.TarInfo("a/b/c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(ValueError, match="is not one of a frame"):
        index_tar(tmp_path / "test-000000.tar")


def test_a_tar_that_the_description_does_not_know_is_not_taken(shard_dir, executor, tmp_path):
    path = linked(shard_dir, tmp_path / "set", "report.json", None)
    shutil.copy(path / "train-000000.tar", path / "train-000009.tar")
    with pytest.raises(ValueError, match=r"train-000009\.tar: not the one that dataset\.json describes"):
        rebuild_index(path, executor)
