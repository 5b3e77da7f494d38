"""A shard set wherever it lies: the same bytes, in few requests, or a clear error."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil

import fsspec
import numpy as np
import pytest
from conftest import vggt_prep
from hypothesis import given
from hypothesis import strategies as st
from web import PlainHandler, served

import shards
from shards.reader import MAX_WASTE, merge_spans
from shards.storage import Span


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory_set(shard_dir):
    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(shard_dir), "/sets/mine", recursive=True)
    yield "memory://sets/mine"
    filesystem.rm("/sets", recursive=True)


def same_set(a, b):
    assert np.array_equal(a.frames, b.frames)
    assert np.array_equal(a.sequences, b.sequences)
    frames = [0, 1, 2, 30, 77, len(a.frames) - 1]
    assert a.read_many(frames) == b.read_many(frames) == [b.read(frame) for frame in frames]


def test_a_file_url_is_the_folder(shard_dir):
    same_set(shards.open(f"file://{shard_dir}"), shards.open(shard_dir))


def test_memory_holds_the_same_frames(memory_set, shard_dir):
    same_set(shards.open(memory_set), shards.open(shard_dir))


def test_http_gives_the_same_frames(shard_dir):
    with served(shard_dir.parent) as server:
        same_set(shards.open(f"{server.url}/{shard_dir.name}"), shards.open(shard_dir))
        same_set(shards.open(f"{server.url}/{shard_dir.name}/"), shards.open(shard_dir))


def test_the_index_of_a_remote_set_is_fetched_once(shard_dir, cache):
    with served(shard_dir) as server:
        shards.open(server.url).read(0)
        assert any(path == "/frames.npy" for method, path, _ in server.requests if method == "GET")
        server.requests.clear()
        opened = shards.open(server.url)
        opened.read(0)
        assert not any(path.endswith(".npy") for method, path, _ in server.requests if method == "GET")
    copies = list(cache.rglob("*.npy"))
    assert sorted(path.name for path in copies) == ["frames.npy", "sequences.npy"]
    assert {path.parent.name for path in copies} == {
        entry["sha256"] for name, entry in opened.dataset["files"].items() if name.endswith(".npy")
    }


def test_a_remote_frame_costs_one_request_and_hardly_more_than_its_bytes(shard_dir):
    """Frames that lie side by side come together, where the bytes between them are few."""
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        opened.read(0)
        server.requests.clear()
        jpeg, depth = opened.read(5)
        (request,) = server.requests
        start, end = map(int, request[2].removeprefix("bytes=").split("-"))
        assert end - start + 1 <= MAX_WASTE * (len(jpeg) + len(depth))
        server.requests.clear()
        opened.read_many([40, 7, 7, 100])
        assert len(server.requests) == 3


def test_a_server_without_ranges_is_refused_at_once(shard_dir):
    with served(shard_dir, PlainHandler) as server:
        with pytest.raises(shards.StorageError, match=r"dataset.json: .* ignores HTTP ranges"):
            shards.open(server.url)
        done = vggt_prep("info", server.url)
    assert done.returncode == 1
    assert "ignores HTTP ranges" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_remote_file_that_is_cut_off_or_missing_is_named(shard_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    shutil.copytree(shard_dir, tmp_path / "set")
    tar = tmp_path / "set" / "train-000001.tar"
    whole = tar.read_bytes()
    with served(tmp_path / "set") as server:
        tar.write_bytes(whole[:-512])
        with pytest.raises(ValueError, match=rf"train-000001.tar: has {len(whole) - 512} bytes, not {len(whole)}"):
            shards.open(server.url)
        tar.unlink()
        with pytest.raises(ValueError, match=r"train-000001.tar: is missing"):
            shards.open(server.url)
        tar.write_bytes(whole)
        opened = shards.open(server.url)
        tar.write_bytes(whole[: len(whole) // 2])
        last = int(np.flatnonzero(opened.frames["tar"] == opened.tars.index(tar.name))[-1])
        with pytest.raises(shards.DamagedMemberError, match=rf"{server.url}/{tar.name}: the .* is cut off"):
            opened.read(last)
        tar.unlink()
        with pytest.raises(shards.StorageError, match=rf"{server.url}/{tar.name}: not to be read in"):
            opened.read(last)
        (tmp_path / "set" / "dataset.json").unlink()
        with pytest.raises(ValueError, match=r"holds no dataset\.json"):
            shards.open(server.url)


def test_a_remote_index_of_another_pack_is_refused(shard_dir, tmp_path):
    shutil.copytree(shard_dir, tmp_path / "set")
    rows = np.load(tmp_path / "set" / "frames.npy")
    rows["height"] += 1
    np.save(tmp_path / "set" / "frames.npy", rows)
    with (
        served(tmp_path / "set") as server,
        pytest.raises(shards.StorageError, match=r"not the one that dataset\.json"),
    ):
        _ = shards.open(server.url).frames


def test_storage_that_fails_for_a_while_is_asked_again(shard_dir, monkeypatch, caplog):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01, 0.02, 0.04))
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        opened.read(0)
        expected = shards.open(shard_dir).read_many([1, 50, 90])
        server.failures = 5
        assert opened.read_many([1, 50, 90]) == expected
        assert "trying again" in caplog.text
        server.failures = 1000
        with pytest.raises(shards.StorageError, match=rf"{server.url}/.*\.tar: not to be read in 4 tries"):
            opened.read(1)
    with pytest.raises(shards.StorageError, match=server.url):
        opened.read(1)


def test_storage_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    with served("/") as server:
        url = server.url
    with pytest.raises(shards.StorageError, match=url):
        shards.open(url)
    with pytest.raises(ValueError, match=r"nowhere://bucket/set: cannot be opened: .*"):
        shards.open("nowhere://bucket/set")
    with pytest.raises(ValueError, match=r"s3://bucket/set: cannot be opened: Install s3fs"):
        shards.open("s3://bucket/set")


def read_in_child(opened, frame, queue):
    queue.put((os.getpid(), opened.read(frame)))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_read_over_http_however_they_start(shard_dir, method):
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        expected = opened.read(3)  # the parent has a session open
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        children = [context.Process(target=read_in_child, args=(opened, 3, queue)) for _ in range(2)]
        for child in children:
            child.start()
        assert [queue.get(timeout=60)[1] for _ in children] == [expected, expected]
        for child in children:
            child.join()


def test_an_opened_set_is_small_to_send(shard_dir):
    opened = shards.open(shard_dir)
    opened.read(0)
    assert len(pickle.dumps(opened)) < len(json.dumps(opened.dataset)) + 1000


def test_the_commands_take_urls(shard_dir, tmp_path):
    with served(shard_dir) as server:
        for command in (("info",), ("verify", "--sample", 0.3), ("preview", "--out", tmp_path / "p.html")):
            done = vggt_prep(command[0], server.url, *command[1:], XDG_CACHE_HOME=str(tmp_path))
            assert done.returncode == 0, done.stderr


SPANS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 300), st.integers(1, 90)), max_size=12)


@given(SPANS)
def test_merged_spans_hold_all_and_waste_little(places):
    members, end = [], {"a": 0, "b": 0}
    for file, gap, size in places:  # as in a tar: no two overlap
        members.append(Span(file, end[file] + gap, end[file] + gap + size))
        end[file] += gap + size
    merged = merge_spans(members[::-1])
    for member in members:
        assert sum(s.file == member.file and s.start <= member.start and member.end <= s.end for s in merged) == 1
    assert sum(s.end - s.start for s in merged) <= MAX_WASTE * sum(m.end - m.start for m in members)
    assert len(merged) <= len(members)
