"""Views that see the same: what `overlap` draws, and what it needs."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest
from conftest import vggt_prep
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import checkpoint, run_trainer

import shards
from shards.build_index import write_dataset
from shards.index import DamagedIndexError
from shards.pairs import Pairs
from shards.schema import PAIRS_FILE
from train.data.batches import TrainingSteps
from train.data.plan import DataConfig, ShardSource, TrainingPlan, validation_plan
from train.data.split import Split, lonely_frames, stored_neighbors
from train.data.views import draw_overlapping


def in_a_row(reach, length=60):
    """Neighbors of frames in a row: those up to `reach` away, with an overlap that falls with the distance."""

    def neighbors(frame):
        others = np.array([j for j in range(length) if 0 < abs(j - frame) <= reach])
        overlaps = 1 - np.abs(others - frame) / (reach + 1)
        order = np.argsort(-overlaps, kind="stable")
        return others[order], overlaps[order]

    return neighbors


def overlap_of(neighbors, a, b):
    others, overlaps = neighbors(a)
    return float(overlaps[others == b].sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 24), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_view_overlaps_in_the_range_with_one_drawn_before_and_none_comes_twice(seed, views, spread):
    neighbors = in_a_row(9)
    frames = draw_overlapping(np.random.default_rng(seed), neighbors, 60, views, (0.3, 0.8), spread)
    assert frames == draw_overlapping(np.random.default_rng(seed), neighbors, 60, views, (0.3, 0.8), spread)
    assert len(set(frames)) == views
    for i in range(1, views):
        assert any(0.3 <= overlap_of(neighbors, frame, frames[i]) <= 0.8 for frame in frames[:i])


def test_a_larger_spread_and_more_views_reach_farther():
    def reach(views, spread):
        draws = [
            draw_overlapping(np.random.default_rng(seed), in_a_row(5, 2000), 2000, views, (0.1, 0.9), spread)
            for seed in range(200)
        ]
        return np.mean([np.ptp(frames) for frames in draws])

    assert reach(4, 0.5) < reach(8, 0.5) < reach(16, 0.5)
    assert reach(16, 0.0) < 0.9 * reach(16, 1.0)


def test_where_nothing_fits_the_range_the_nearest_is_taken_and_where_nothing_overlaps_any():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        frames = draw_overlapping(rng, in_a_row(4), 60, 2, (0.9, 1.0), 0.5)  # 0.8 is the most there is
        assert abs(frames[0] - frames[1]) == 1
        alone = draw_overlapping(rng, lambda _: (np.array([], int), np.array([])), 10, 10, (0.1, 0.9), 0.5)
        assert sorted(alone) == list(range(10))
        short = draw_overlapping(rng, in_a_row(9, 3), 3, 8, (0.1, 0.9), 0.5)
        assert [set(short[:3]), set(short), len(short)] == [{0, 1, 2}, {0, 1, 2}, 8]


def overlap_plan(shard_dir, world_size=1, max_img=8, **data):
    split = Split([shards.open(shard_dir)], "train")
    config = DataConfig(shards=str(shard_dir), width=56, views=(2, 4), sampling="overlap", **data)
    plan = TrainingPlan(
        config=config,
        lengths=split.lengths,
        neighbors=stored_neighbors(split, config.samplings),
        seed=1,
        max_img_per_gpu=max_img,
        world_size=world_size,
    )
    return split, plan


def test_a_plan_by_overlap_draws_from_the_stored_pairs_and_survives_being_sent(shard_dir):
    _, plan = overlap_plan(shard_dir, overlap=(0.3, 0.9))
    sent = pickle.loads(pickle.dumps(plan))  # to a worker
    state, outside = plan.start(), 0
    for _ in range(12):
        step = plan.step(state, 0)
        assert step == sent.step(state, 0)
        for scene in step.scenes:
            values = [
                max(overlap_of(partial(plan.neighbors[0], scene.sequence), a, b) for a in scene.frames[:i])
                for i, b in enumerate(scene.frames)
                if i
            ]
            outside += sum(value < 0.3 for value in values)
        state = step.after
    assert outside == 0


def test_a_plan_by_overlap_is_the_same_for_any_number_of_ranks(shard_dir):
    _, one = overlap_plan(shard_dir, max_img=16)
    _, two = overlap_plan(shard_dir, world_size=2, max_img=8)
    state = one.start()
    for _ in range(6):
        if one.shape(state.step).views == 4:  # else the one rank has another number of scenes
            parts = [two.step(state, rank).scenes for rank in range(2)]
            assert one.step(state, 0).scenes == (*parts[0], *parts[1])
        state = one.after(state)


def test_each_set_of_a_mix_may_be_sampled_in_its_own_way(shard_dir):
    opened = shards.open(shard_dir)
    sources = (ShardSource(path="a", sampling="overlap"), ShardSource(path="b"))
    config = DataConfig(shards=sources, sampling="nearby")
    assert config.samplings == ("overlap", "nearby")
    split = Split([opened, opened], "train")
    first, second = stored_neighbors(split, config.samplings)
    assert first is not None
    assert second is None
    assert lonely_frames(split, (first, second), (0.1, 0.9)) == (0, 0)
    outside, alone = lonely_frames(split, (first, second), (0.9999, 1.0))
    assert outside > 0.9
    assert alone == 0
    assert lonely_frames(split, (None, None), (0.1, 0.9)) == (0, 0)


def test_views_to_validate_on_see_the_same_where_training_draws_such(shard_dir):
    split, plan = overlap_plan(shard_dir, overlap=(0.3, 0.9), val_views=4)
    steps, _ = validation_plan(plan.config, split.lengths, 0, 1, plan.neighbors)
    assert steps == validation_plan(plan.config, split.lengths, 0, 1, plan.neighbors)[0]
    for step in steps:
        (scene,) = step.scenes
        assert len(set(scene.frames)) == 4
        for i in range(1, 4):
            near = partial(plan.neighbors[0], scene.sequence)
            assert max(overlap_of(near, a, scene.frames[i]) for a in scene.frames[:i]) >= 0.3
    evenly, _ = validation_plan(plan.config, split.lengths, 0, 1)
    assert [step.scenes[0].frames for step in evenly] == [(0, 6, 12, 18)] * len(evenly)


def test_a_set_without_pairs_is_refused_with_the_command_that_makes_them(captures, tmp_path):
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    vggt_prep("pack", *source, "--out", tmp_path / "set", "--short-side", 48, "--no-pairs")
    with pytest.raises(ValueError, match=f"{tmp_path / 'set'}: has no pairs.npy; make it with: vggt-prep pairs"):
        overlap_plan(tmp_path / "set")


def with_damaged_rows(folder, rows):
    """The set with pairs.npy whose rows do not match their CRC, though the file is as dataset.json says."""
    data = bytearray((folder / PAIRS_FILE).read_bytes())
    stored = Pairs(shards.open(folder)).rows
    for row in rows:
        data[len(data) - stored.nbytes + row * stored.itemsize] ^= 1
    (folder / PAIRS_FILE).write_bytes(data)
    dataset = json.loads((folder / "dataset.json").read_bytes())
    dataset["files"][PAIRS_FILE]["sha256"] = hashlib.sha256(data).hexdigest()
    write_dataset(folder, dataset)
    return folder


def test_a_damaged_row_ends_the_data_with_one_line(shard_dir, tmp_path):
    copy = with_damaged_rows(shutil.copytree(shard_dir, tmp_path / "set"), range(len(shards.open(shard_dir).frames)))
    split, plan = overlap_plan(copy)
    (batch,) = TrainingSteps(split, plan, 0, plan.start(), 3)
    assert "is damaged; make it with: vggt-prep pairs" in batch["error"]
    with pytest.raises(DamagedIndexError):
        plan.step(plan.start(), 0)


@pytest.mark.slow
@pytest.mark.dist
def test_a_damaged_row_that_one_rank_meets_saves_what_all_have_trained(shard_dir, tmp_path):
    copy = with_damaged_rows(shutil.copytree(shard_dir, tmp_path / "set"), [0])
    settings = ("model.freeze=[]", "data.sampling=overlap", "max_steps=200", "checkpoint.every=1000")
    done = run_trainer(copy, tmp_path / "run", *settings, processes=2)
    assert done.returncode != 0
    found = re.search(r"row 0 is damaged.*; what was trained is saved at step (\d+)", done.stdout + done.stderr)
    assert found, done.stderr
    assert checkpoint(tmp_path / "run", int(found[1]))


def test_pairs_of_another_set_are_refused(shard_dir, tmp_path):
    copy = shutil.copytree(shard_dir, tmp_path / "set")
    data = bytearray((copy / PAIRS_FILE).read_bytes())
    rows = np.frombuffer(
        data, Pairs(shards.open(copy)).rows.dtype, offset=len(data) - Pairs(shards.open(copy)).rows.nbytes
    )
    rows[:] = rows[::-1].copy()  # each row is whole
    (copy / PAIRS_FILE).write_bytes(data)
    with pytest.raises(DamagedIndexError, match=r"not the one that dataset\.json describes"):
        overlap_plan(copy)


def test_view_weights_are_fractions_of_the_steps_on_all_ranks():
    config = DataConfig(views=(1, 5), view_weights={1: 0.1, 3: 0.5})
    assert config.view_fractions == pytest.approx([0.1, 0.4 / 3, 0.5, 0.4 / 3, 0.4 / 3])
    plan = TrainingPlan(config=config, lengths=(np.full(9, 30),), seed=2, max_img_per_gpu=8, world_size=2)
    counts = Counter(plan.shape(step).views for step in range(3000))
    for views, fraction in zip(range(1, 6), config.view_fractions, strict=True):
        assert counts[views] / 3000 == pytest.approx(fraction, abs=0.04)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({6: 0.1}, "numbers of views from 1 to 5"),
        ({1: 0.7, 2: 0.4}, "at most 1 in sum"),
        ({1: -0.1}, "at most 1 in sum"),
        ({1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 5: 0.1}, "1 in sum"),
    ],
)
def test_view_weights_that_make_no_sense_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(views=(1, 5), view_weights=weights)


@pytest.mark.parametrize("values", [{"overlap": (0.9, 0.1)}, {"overlap": (0.1, 1.5)}, {"spread": 1.5}])
def test_ranges_that_make_no_sense_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        DataConfig(**values)
