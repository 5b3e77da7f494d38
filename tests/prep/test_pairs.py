"""pairs.npy: which frames of a sequence see the same."""

from __future__ import annotations

import gzip
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import run_command, vggt_prep

import shards
from prep.packing import pairs as packing_pairs
from prep.packing.pairs import add_pairs, candidates, fill_rows, spread_ranks
from prep.verify import verify
from shards.build_index import write_dataset
from shards.codecs import decode_depth, encode_depth
from shards.index import DamagedIndexError
from shards.overlap import View, stored_view, views_of
from shards.pairs import Pairs
from shards.schema import PAIRS_FILE, pair_dtype, row_crc

HALF = 5.0  # of a square room


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as pool:
        yield pool


@pytest.fixture
def copied(shard_dir, tmp_path):
    return shutil.copytree(shard_dir, tmp_path / "set")


def room_walk(count):
    """Views of a walk in circles through a room, that looks about: depths are known exactly."""
    height, width, step = 96, 128, 4
    k = np.array([[100.0, 0, 63.5], [0, 100, 47.5], [0, 0, 1]])
    v, u = np.mgrid[: height // step, : width // step] * step + (step - 1) / 2
    pixels = np.stack([(u - 63.5) / 100, (v - 47.5) / 100, np.ones_like(u)], axis=-1)
    for t in 2 * np.pi * np.arange(count) / count:
        center, yaw = np.array([3 * np.cos(t), 0, 3 * np.sin(t)]), 3 * t + 0.3 * np.sin(9 * t)
        ahead = np.array([np.cos(yaw), 0.1 * np.sin(5 * t), np.sin(yaw)])
        ahead /= np.linalg.norm(ahead)
        right = np.cross([0, 1, 0], ahead) / np.linalg.norm(np.cross([0, 1, 0], ahead))
        rotation = np.stack([right, np.cross(ahead, right), ahead])
        directions = pixels @ rotation
        with np.errstate(divide="ignore"):
            walls = [(side - center[i]) / directions[..., i] for i in (0, 2) for side in (-HALF, HALF)]
            walls += [(side - center[1]) / directions[..., 1] for side in (-1.5, 1.5)]
        depth = np.min([np.where(wall > 0, wall, np.inf) for wall in walls], axis=0)
        full = np.kron(depth, np.ones((step, step))).astype(np.float16)
        yield View(full, (height, width), np.column_stack([rotation, -rotation @ center]), k)


def found_of_best(views, rows, best=20):
    """The mean over some views of the fraction of its `best` true neighbors that its row holds; equals count."""
    found = []
    for i in range(0, len(views), max(1, len(views) // 40)):
        others = np.array([j for j in range(len(views)) if j != i])
        values = np.rint(views.overlaps(np.stack([np.full(len(others), i), others], axis=1)) * 255)
        best_values = np.sort(values)[::-1][: min(best, np.count_nonzero(values))]
        found.append((rows["overlap"][i][: len(best_values)] >= best_values[-1]).mean())
    return np.mean(found)


@pytest.mark.parametrize(("count", "anchors"), [(100, 1024), (240, 1024), (300, 60)])
def test_nearly_all_of_the_best_neighbors_are_found_without_measuring_all_pairs(count, anchors, monkeypatch):
    monkeypatch.setattr(packing_pairs, "ANCHORS", anchors)
    views = views_of(room_walk(count))
    rows = np.zeros(count, pair_dtype(64))
    fill_rows(rows, views)
    assert found_of_best(views, rows) >= 0.95
    assert len(candidates(views, 80)) <= 80 * count


def test_neighbors_are_the_best_ones_and_some_of_the_others():
    assert spread_ranks(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert spread_ranks(100, 6).tolist() == [0, 1, 2, 3, 51, 99]
    views = views_of(room_walk(300))
    rows = np.zeros(300, pair_dtype(16))
    fill_rows(rows, views)
    for i, row in enumerate(rows):
        count = np.count_nonzero(row["overlap"])
        assert (np.diff(row["overlap"][:count].astype(int)) <= 0).all()  # best first
        assert len(set(row["neighbors"][:count])) == count
        assert i not in row["neighbors"][:count]
        assert row_crc(row) == row["row_crc"]
    assert rows["overlap"][:, 0].mean() > 2 * rows["overlap"][:, -1].mean()


def test_pack_measures_them_with_the_overlap_that_both_sides_have(shard_dir):
    opened = shards.open(shard_dir)
    length = int(opened.sequences["count"][0])
    pairs = Pairs(opened)
    overlaps = {(i, int(j)): o for i in range(length) for j, o in zip(*pairs.neighbors(i), strict=True)}
    assert len(overlaps) > length
    assert all(0 < o <= 1 and i != j < length for (i, j), o in overlaps.items())
    assert all(overlaps[j, i] == o for (i, j), o in overlaps.items())  # all fit: none was left out
    assert overlaps[0, 1] > 0.5


def test_a_set_without_pairs_says_how_to_make_them_and_gets_the_same_ones(captures, shard_dir, tmp_path):
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    out = tmp_path / "set"
    done = vggt_prep("pack", *source, "--out", out, "--short-side", 150, "--shard-frames", 60, "--no-pairs")
    assert done.returncode == 0, done.stderr
    assert not (out / PAIRS_FILE).exists()
    before, digest = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}, shards.open(out).digest
    in_use = shards.open(out)
    with pytest.raises(ValueError, match="vggt-prep pairs"):
        Pairs(in_use)
    done = vggt_prep("pairs", out, "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before
    assert shards.open(out).digest == digest
    assert (out / PAIRS_FILE).read_bytes() == (shard_dir / PAIRS_FILE).read_bytes()
    assert (out / "dataset.json").read_bytes() == (shard_dir / "dataset.json").read_bytes()
    worker = shards.ShardSet(in_use.storage, in_use.dataset, in_worker=True)
    assert len(worker.frames)  # it is the same set


def test_a_stopped_measurement_continues_where_it_was(copied, executor, monkeypatch):
    expected = (copied / PAIRS_FILE).read_bytes()
    (copied / PAIRS_FILE).unlink()
    made = []

    def stopped(*arguments):
        if len(made) == 2:
            raise OSError("no space left")
        made.append(arguments)
        real(*arguments)

    real = packing_pairs.pairs_of_tar
    monkeypatch.setattr(packing_pairs, "pairs_of_tar", stopped)
    with pytest.raises(OSError, match="no space left"):
        add_pairs(copied, executor)
    parts = {path: path.stat().st_mtime_ns for path in copied.rglob("*.npy") if path.parent.parent.name == ".pairs"}
    assert len(parts) == 2
    copied.joinpath(f"{PAIRS_FILE}.0123abcd.tmp").touch()  # a kill in the middle of writing
    half = max(parts)
    half.write_bytes(half.read_bytes()[:200])  # an interrupted copy of the folder
    del parts[half]
    read = []
    monkeypatch.setattr(packing_pairs, "pairs_of_tar", real)
    monkeypatch.setattr(packing_pairs, "views_of", lambda views: read.append(1) or views_of(views))
    add_pairs(copied, executor)
    assert (copied / PAIRS_FILE).read_bytes() == expected
    frames = shards.open(copied).frames
    again = frames["sequence"][~np.isin(frames["tar"], [int(path.stem) for path in parts])]
    assert len(read) == len(np.unique(again))
    assert not (copied / ".pairs").exists()
    assert not list(copied.glob("*.tmp"))


def test_a_sequence_of_one_frame_has_no_neighbors(tmp_path, captures):
    path = min((captures / "annotations").glob("*_train.jgz"))
    name, frames = next(iter(json.loads(gzip.decompress(path.read_bytes())).items()))
    edited, out = tmp_path / "annotations", tmp_path / "one"
    edited.mkdir()
    (edited / path.name).write_bytes(gzip.compress(json.dumps({name: frames[:1]}).encode()))
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", edited)
    done = vggt_prep("pack", *source, "--out", out, "--min-frames", 1)
    assert done.returncode == 0, done.stderr
    assert "see the same as others; 1 with no other that is known to" in done.stdout
    opened = shards.open(out)
    assert [len(part) for part in Pairs(opened).neighbors(0)] == [0, 0]


def test_frames_without_depth_are_marked_as_guessed():
    k = np.array([[100.0, 0, 60], [0, 100, 45], [0, 0, 1]])
    views = [View(None, (96, 128), view.extrinsics, k) for view in room_walk(12)]
    rows = np.zeros(12, pair_dtype(11))
    fill_rows(rows, views_of(views))
    assert rows["guessed"].all()
    assert rows["overlap"].any()


def test_every_flipped_byte_is_found_by_verify_and_wrong_rows_by_the_reader(copied, executor):
    path = copied / PAIRS_FILE
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    good_rows = np.array(Pairs(shards.open(copied)).rows)
    header = len(good) - good_rows.nbytes
    for place in [*rng.integers(0, header, 10), *rng.integers(header, len(good), 30)]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DamagedIndexError, match=r"not the one that dataset\.json describes; make it with"):
            Pairs(shards.open(copied))  # as the trainer opens it
        (problem,) = verify(str(copied), executor, sample=0.01).problems
        assert all(words in problem for words in (PAIRS_FILE, "vggt-prep pairs")), (place, problem)
        if place >= header:
            frame = int(place - header) // pair_dtype(good_rows["overlap"].shape[1]).itemsize
            with pytest.raises(DamagedIndexError, match=rf"row {frame} is damaged; make it with: vggt-prep pairs"):
                Pairs(shards.open(copied), whole=False).neighbors(frame)
    path.write_bytes(good[:-1])
    assert "vggt-prep pairs" in verify(str(copied), executor, sample=0.01).problems[0]
    opened = shards.open(copied)  # it is of use without
    with pytest.raises(DamagedIndexError, match="not of the size that dataset"):
        Pairs(opened)
    add_pairs(copied, executor)
    assert path.read_bytes() == good


def test_a_rebuilt_index_keeps_the_pairs_of_the_same_frames_only(copied, caplog):
    good = (copied / PAIRS_FILE).read_bytes()
    (copied / "frames.npy").unlink()
    assert vggt_prep("index", copied).returncode == 0
    assert shards.open(copied).has_pairs
    assert (copied / PAIRS_FILE).read_bytes() == good
    (copied / "dataset.json").unlink()
    (copied / "train-000000.tar").unlink()
    with caplog.at_level("WARNING"):
        assert vggt_prep("index", copied).returncode == 0
    assert "was of other frames, and is removed; pack makes it again, else: vggt-prep pairs" in caplog.text
    assert not shards.open(copied).has_pairs
    assert not (copied / PAIRS_FILE).exists()


def test_real_captures_overlap_as_their_cameras_move(co3d_mini, tmp_path):
    source = ("--co3d-dir", co3d_mini / "co3d", "--annotation-dir", co3d_mini / "annotations")
    done = vggt_prep("pack", *source, "--out", tmp_path / "mini", "--short-side", 240)
    assert done.returncode == 0, done.stderr
    opened = shards.open(tmp_path / "mini")
    for first, count in zip(opened.sequences["first"], opened.sequences["count"], strict=True):
        following = []
        for frame in range(int(first), int(first + count) - 1):
            others, overlaps = Pairs(opened).neighbors(frame)
            following.append(overlaps[others == frame + 1].sum())
            assert overlaps[0] > 0.7
        assert np.mean(following) > 0.9


def test_depth_is_taken_in_the_units_of_the_poses(copied, monkeypatch):
    """Stored half floats count depth_scale times."""
    opened = shards.open(copied)
    count = int(opened.sequences["count"][0])
    pairs = np.stack(np.triu_indices(count, 1), axis=1)
    expected = views_of(stored_view(opened, i) for i in range(count)).overlaps(pairs)
    whole = shards.ShardSet.read

    def half_as_large(self, frame):
        jpeg, depth = whole(self, frame)
        row = self.row(frame)
        return jpeg, encode_depth(decode_depth(depth, int(row["height"]), int(row["width"])) / np.float16(2))

    rows = opened.frames.copy()
    rows["depth_scale"] *= 2
    for row in rows:
        row["row_crc"] = row_crc(row)
    vars(opened)["frames"] = rows
    monkeypatch.setattr(shards.ShardSet, "read", half_as_large)
    found = views_of(stored_view(opened, i) for i in range(count)).overlaps(pairs)
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_set_that_was_repacked_meanwhile_gets_no_pairs_of_its_former_frames(copied, executor, monkeypatch):
    def repacked(out, parts, neighbors):
        dataset = json.loads((out / "dataset.json").read_bytes())
        dataset["files"]["train-000000.tar"]["sha256"] = "0" * 64
        write_dataset(out, dataset)
        return joined(out, parts, neighbors)

    joined = packing_pairs._join
    monkeypatch.setattr(packing_pairs, "_join", repacked)
    with pytest.raises(ValueError, match="was replaced while its pairs were made"):
        add_pairs(copied, executor)


def test_pack_goes_on_without_pairs_where_they_cannot_be_made_and_makes_those_that_are_gone(captures, copied):
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    command = ("pack", *source, "--out", copied, "--short-side", 150, "--shard-frames", 60)
    good = (copied / PAIRS_FILE).read_bytes()
    (copied / PAIRS_FILE).unlink()
    (copied / ".pairs").touch()  # no folder can be made there
    done = vggt_prep(*command)
    assert done.returncode == 0
    assert "which frames see the same is not known, for data.sampling=overlap alone:" in done.stderr
    assert "sequences" in done.stdout
    (copied / ".pairs").unlink()
    done = vggt_prep(*command)
    assert done.returncode == 0
    assert (copied / PAIRS_FILE).read_bytes() == good


def test_verify_gives_no_advice_on_tars_where_pairs_alone_are_wrong(copied):
    (copied / PAIRS_FILE).unlink()
    done = vggt_prep("verify", copied)
    assert done.returncode == 1
    assert "vggt-prep pairs" in done.stderr
    assert "Copy these tars" not in done.stderr


def test_a_damaged_frame_costs_its_own_pairs_alone_and_is_told(copied, executor, caplog):
    opened = shards.open(copied)
    row = opened.frames[5]
    path = copied / opened.tars[row["tar"]]
    with path.open("r+b") as file:
        file.seek(int(row["depth_offset"]) + 9)
        file.write(b"xxxx")
    add_pairs(copied, executor)
    assert "taken as without depth" in caplog.text
    rows = Pairs(shards.open(copied)).rows
    assert np.flatnonzero(rows["guessed"]).tolist() == [5]
    assert (rows["overlap"][:, 0] > 0).all()


def test_a_damaged_pairs_file_stops_neither_info_nor_preview_nor_the_look_at_the_data(copied, tmp_path):
    data = bytearray((copied / PAIRS_FILE).read_bytes())
    data[-50] ^= 1
    (copied / PAIRS_FILE).write_bytes(data)
    done = vggt_prep("info", copied)
    assert done.returncode == 0
    assert "which frames see the same is not known:" in done.stdout
    assert vggt_prep("preview", copied, "--sequences", 1, "--out", tmp_path / "p.html").returncode == 0
    settings = (f"data.shards={copied}", "data.width=84", "data.views=[1, 1]", "max_img_per_gpu=4", "data.workers=0")
    done = run_command("python", "-m", "train.check_data", *settings, "--steps", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "uniform sampling: two views overlap by nothing: scenes have one view" in done.stdout
    assert "overlap sampling" not in done.stdout
