"""A shard set wherever it lies: the same bytes, in few requests, or a clear error."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import time
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import numpy as np
import pytest
from conftest import BIN, frame_meta, vggt_prep
from hypothesis import given
from hypothesis import strategies as st
from web import PlainHandler, served

import shards
from shards.pairs import Pairs
from shards.reader import MAX_WASTE, merge_spans
from shards.storage import Span
from shards.writer import write_tar


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
        for _ in range(2):  # what is not needed comes when it is
            others, overlaps = Pairs(shards.open(server.url)).neighbors(0)
            assert len(others) == len(overlaps) > 0
        copy = next(cache.rglob("pairs.npy"))
        good = copy.read_bytes()
        copy.write_bytes(good[:-3] + b"xyz")
        assert len(Pairs(shards.open(server.url)).rows) == len(opened.frames)
        assert copy.read_bytes() == good
        fetched = [path for method, path, _ in server.requests if method == "GET" and path == "/pairs.npy"]
        assert len(fetched) == 2  # the second time as the copy was damaged
    copies = list(cache.rglob("*.npy"))
    assert {path.parent.name for path in copies} == {
        entry["sha256"] for name, entry in opened.dataset["files"].items() if name.endswith(".npy")
    }


def test_a_remote_frame_costs_one_request_and_hardly_more_than_its_bytes(shard_dir):
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


def test_frames_that_lie_side_by_side_come_in_one_request(tmp_path):
    """Where the bytes between them are few: these are as large as photographs."""
    data = np.random.default_rng(0).bytes(100_000)
    meta = frame_meta(jpg_crc=zlib.crc32(data)).to_json()
    samples = [{"__key__": f"a/b/frame{i:02d}", "jpg": data, "json": meta} for i in range(12)]
    write_tar(tmp_path / "train-000000.tar", samples)
    assert vggt_prep("index", tmp_path).returncode == 0
    with served(tmp_path) as server:
        opened = shards.open(server.url)
        server.requests.clear()
        assert opened.read_many(range(10)) == 10 * [(data, None)]
        assert len(server.requests) == 1


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
    monkeypatch.setattr(shards.storage, "OUTAGE_PATIENCE", 0)
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
    monkeypatch.setattr(shards.storage, "OUTAGE_PATIENCE", 0)
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


def test_a_page_or_a_whole_file_in_place_of_a_range_is_asked_for_again(shard_dir, monkeypatch, caplog):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01, 0.02, 0.04))
    monkeypatch.setattr(shards.storage, "OUTAGE_PAUSE", 0.01)
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        expected = shards.open(shard_dir).read(1)
        for wrong in (b"", b"<html>sign in</html>", b"<html>" + b"x" * 1_000_000):
            server.misread = 9 * [wrong]
            assert opened.read(1) == expected
            assert not server.misread
        assert "asked for" in caplog.text
        server.misread = 9 * [b"<html>sign in</html>"]
        monkeypatch.setattr(opened.storage, "_size", lambda name: (_ for _ in ()).throw(shards.StorageError("503")))
        assert opened.read(1) == expected
        server.misread = 100 * [b""]
        monkeypatch.setattr(shards.storage, "OUTAGE_PATIENCE", 0)
        with pytest.raises(shards.StorageError, match=r"not to be read in 4 tries: .*asked for \d+ bytes, got \d+"):
            opened.read(1)


def test_a_damaged_copy_of_a_remote_index_is_fetched_again(shard_dir, cache):
    with served(shard_dir) as server:
        expected = shards.open(server.url).read(3)
        for copy in cache.rglob("*.npy"):
            damaged = bytearray(copy.read_bytes())
            damaged[-5] ^= 1
            copy.write_bytes(damaged)
        assert shards.open(server.url).read(3) == expected


def test_a_set_that_took_the_place_of_another_is_read_anew(shard_dir, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(shard_dir, out)
    shards.open(out).read(0)
    shutil.rmtree(out)
    parts = [path.read_bytes() for path in sorted(shard_dir.glob("train-*.tar"))]
    out.mkdir()
    (out / "train-000000.tar").write_bytes(parts[1])
    assert vggt_prep("index", out).returncode == 0
    opened = shards.open(out)
    assert opened.read(0) != shards.open(shard_dir).read(0)


@pytest.mark.parametrize(("how", "limit"), [("stalled", "HTTP_PATIENCE"), ("trickling", "PATIENCE")])
def test_a_server_that_falls_silent_or_trickles_is_an_error_that_names_it(shard_dir, monkeypatch, how, limit):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    monkeypatch.setattr(shards.storage, "OUTAGE_PATIENCE", 0)
    monkeypatch.setattr(shards.storage, limit, 0.3)
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        setattr(server, how, ".tar")
        with pytest.raises(shards.StorageError, match=rf"{server.url}/.*\.tar: not to be read in 2 tries"):
            opened.read(0)
        setattr(server, how, "dataset.json")
        with pytest.raises(shards.StorageError, match=rf"{server.url}/dataset.json: "):
            shards.open(server.url)


def test_files_whose_size_a_server_does_not_give_are_not_called_missing(shard_dir, monkeypatch):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    with served(shard_dir) as server:
        storage = shards.storage.storage_at(server.url)
        assert storage.sizes(["train-000000.tar", "no.tar"]) == [(shard_dir / "train-000000.tar").stat().st_size, None]
        server.failures = 1000
        with pytest.raises(shards.StorageError, match="503"):
            storage.sizes(["train-000000.tar"])
    with pytest.raises(shards.StorageError, match="Connect"):
        storage.sizes(["train-000000.tar"])


def test_a_fork_while_another_thread_reads_does_not_hang(shard_dir):
    opened = shards.open(shard_dir)
    expected = opened.read(3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with shards.open_files._lock:  # as that thread holds it
        child = context.Process(target=read_in_child, args=(opened, 3, queue))
        child.start()
    assert queue.get(timeout=60)[1] == expected
    child.join()


def test_storage_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(shards.storage, "RETRY_PAUSES", (0.01,))
    monkeypatch.setattr(shards.storage, "OUTAGE_PATIENCE", 0)
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


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow), "forkserver"])
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


def test_verify_transfers_a_remote_tar_once(shard_dir, tmp_path):
    with served(shard_dir) as server:
        assert vggt_prep("verify", server.url, XDG_CACHE_HOME=str(tmp_path)).returncode == 0
    tars = sorted(path for method, path, _ in server.requests if method == "GET" and path.endswith(".tar"))
    assert tars == sorted(f"/{path.name}" for path in shard_dir.glob("*.tar"))


def open_files():
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def test_copies_of_remote_tars_free_their_disk(shard_dir):
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        with opened.storage.local_copy("train-000000.tar") as path:
            opened.with_tars_at(shards.storage.LocalStorage(path.parent)).read(0)
            assert str(path) in open_files()
    assert not [name for name in open_files() if name.startswith(str(path))]


def test_a_forked_child_leaves_the_connections_of_its_parent_alone(shard_dir):
    with served(shard_dir) as server:
        opened = shards.open(server.url)
        expected = opened.read(3)
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join()
        began = time.monotonic()
        assert opened.read(3) == expected
        assert time.monotonic() - began < 10  # a connection that the child closed is waited for in vain


@pytest.fixture
def scratch():
    """A folder of a short name: sockets of multiprocessing lie in it."""
    with TemporaryDirectory() as name:
        yield Path(name)


def test_a_stopped_verify_leaves_no_tar_behind(shard_dir, scratch):
    with served(shard_dir) as server:
        shards.open(server.url)
        server.latency = 0.5
        environment = os.environ | {"TMPDIR": str(scratch)}
        command = [BIN / "vggt-prep", "verify", server.url, "--workers", "2"]
        process = subprocess.Popen(
            command,
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        while not list(scratch.glob("tmp*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "stopped\n"
    assert not list(scratch.glob("tmp*"))


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
