from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.plan import DataConfig, DataState, ShardSource, TrainingPlan, image_height, validation_plan

LENGTHS = np.array([30, 24, 100, 5, 202, 60, 25, 31, 48, 77, 90])


MIXED = DataConfig(shards=(ShardSource(path="a", weight=3), ShardSource(path="b", weight=1)))


def make_plan(config, *, lengths=(LENGTHS,), seed=3, max_img=48, world_size=1):
    return TrainingPlan(config=config, lengths=lengths, seed=seed, max_img_per_gpu=max_img, world_size=world_size)


def walk(config, steps, *, rank=0, state=None, **options):
    plan = make_plan(config, **options)
    state = state or plan.start()
    out = []
    for _ in range(steps):
        step = plan.step(state, rank)
        assert step.after == plan.after(state)
        out.append(step)
        state = step.after
    return out


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_are_disjoint_and_complete_and_of_one_shape(world_size):
    ranks = [walk(DataConfig(), 20, rank=r, world_size=world_size) for r in range(world_size)]
    for steps in zip(*ranks, strict=True):
        assert len({step.shape for step in steps}) == 1
        assert len({len(step.scenes) for step in steps}) == 1
        assert len({step.after for step in steps}) == 1
    stream = [scene.sequence for steps in zip(*ranks, strict=True) for step in steps for scene in step.scenes]
    n = len(LENGTHS)
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))  # exactly once a pass


def test_the_stream_is_the_same_for_any_world_that_takes_as_many_scenes():
    config = DataConfig(views=(4, 4))
    one = walk(config, 10, max_img=32)
    four = [walk(config, 10, rank=r, world_size=4, max_img=8) for r in range(4)]
    assert [s.scenes for s in one] == [tuple(x for r in four for x in r[i].scenes) for i in range(10)]


@pytest.mark.parametrize("sequences", [1, 3, 11])
def test_each_pass_has_each_sequence_once_also_when_a_step_needs_more_than_there_are(sequences):
    config = DataConfig(views=(2, 2))  # 24 scenes a rank
    steps = [walk(config, 6, rank=r, world_size=2, lengths=(LENGTHS[:sequences],)) for r in range(2)]
    stream = [scene.sequence for both in zip(*steps, strict=True) for step in both for scene in step.scenes]
    for start in range(0, len(stream) - sequences + 1, sequences):
        assert sorted(stream[start : start + sequences]) == list(range(sequences))


@pytest.mark.parametrize("changes", [(1, 2, 1), (1, 4, 2), (3, 1, 8)])
def test_a_run_that_changes_its_ranks_loses_and_repeats_nothing(changes):
    state, stream = None, []
    for world_size in changes:
        ranks = [walk(DataConfig(), 7, rank=r, world_size=world_size, state=state) for r in range(world_size)]
        stream += [s.sequence for steps in zip(*ranks, strict=True) for step in steps for s in step.scenes]
        state = ranks[0][-1].after
    assert state.positions == (len(stream),)
    n = len(LENGTHS)
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))


def test_shard_sets_are_mixed_by_weight_and_each_passes_evenly():
    lengths = (LENGTHS, LENGTHS[:4])
    ranks = [walk(MIXED, 150, rank=r, world_size=2, lengths=lengths) for r in range(2)]
    scenes = [scene for both in zip(*ranks, strict=True) for step in both for scene in step.scenes]
    fraction = np.mean([scene.source == 0 for scene in scenes])
    assert 0.72 < fraction < 0.78
    for source, n in enumerate(map(len, lengths)):
        stream = [scene.sequence for scene in scenes if scene.source == source]
        for start in range(0, len(stream) - n + 1, n):
            assert sorted(stream[start : start + n]) == list(range(n))
    assert ranks[0][-1].after.positions == tuple(sum(s.source == i for s in scenes) for i in range(2))


@given(st.integers(0, 60))
@settings(max_examples=30, deadline=None)
def test_any_position_restores_at_once(stop):
    lengths = (LENGTHS, LENGTHS[:4])
    steps = walk(MIXED, 61, lengths=lengths)
    state = make_plan(MIXED, lengths=lengths).start() if stop == 0 else steps[stop - 1].after
    kept = json.loads(json.dumps(vars(state)))  # as a checkpoint keeps it
    assert (
        walk(MIXED, 61 - stop, lengths=lengths, state=DataState(kept["step"], tuple(kept["positions"]))) == steps[stop:]
    )


@pytest.mark.parametrize("sampling", ["uniform", "nearby"])
def test_no_view_repeats_while_the_sequence_has_enough(sampling):
    for step in walk(DataConfig(sampling=sampling), 200):
        for scene in step.scenes:
            length = LENGTHS[scene.sequence]
            assert len(scene.frames) == step.shape.views
            assert all(0 <= frame < length for frame in scene.frames)
            assert len(set(scene.frames)) == min(length, step.shape.views)


def test_nearby_views_lie_in_a_window_around_the_first():
    spans = {name: [] for name in ("uniform", "nearby")}
    for sampling, found in spans.items():
        for step in walk(DataConfig(sampling=sampling, views=(4, 4)), 100):
            for scene in step.scenes:
                if LENGTHS[scene.sequence] > 50:
                    found.append(max(scene.frames) - min(scene.frames))
                    if sampling == "nearby":
                        assert max(abs(f - scene.frames[0]) for f in scene.frames) < 8
    assert np.mean(spans["uniform"]) > 4 * np.mean(spans["nearby"])


def test_steps_vary_in_shape_and_stay_within_the_budget():
    config = DataConfig()
    shapes = [make_plan(config).shape(i) for i in range(500)]
    assert set(Counter(s.views for s in shapes)) == set(range(2, 25))
    assert {s.width for s in shapes} == {518}
    assert all(s.height % 14 == 0 and 0.33 * 518 - 14 < s.height <= 518 for s in shapes)
    for step in walk(config, 100):
        assert len(step.scenes) == max(1, 48 // step.shape.views)


def test_seeds_and_positions_change_what_is_drawn():
    a, b = walk(DataConfig(), 5, seed=1), walk(DataConfig(), 5, seed=2)
    assert a != b
    seeds = [scene.seed for step in a for scene in step.scenes]
    assert len(set(seeds)) == len(seeds)
    assert {scene.seed for step in walk(DataConfig(augment=False), 2) for scene in step.scenes} == {None}


def test_validation_is_always_the_same_and_shared_out_among_ranks():
    config = DataConfig(val_scenes=7, val_views=4)
    whole, counted = validation_plan(config, (LENGTHS,), 0, 1)
    assert (whole, counted) == validation_plan(config, (LENGTHS,), 0, 1)
    assert counted == len(whole)
    assert len({step.scenes[0].sequence for step in whole}) == 7
    parts = [validation_plan(config, (LENGTHS,), rank, 3) for rank in range(3)]
    counted_ones = [step for steps, counted in parts for step in steps[:counted]]
    assert sorted(s.scenes[0].sequence for s in counted_ones) == sorted(s.scenes[0].sequence for s in whole)
    assert {len(steps) for steps, _ in parts} == {3}  # as many on each rank, though seven are not three times as many
    assert [len(validation_plan(config, (LENGTHS,), rank, 16)[0]) for rank in range(16)] == [1] * 16
    both, _ = validation_plan(config, (LENGTHS, LENGTHS[:4]), 0, 1)
    assert {step.scenes[0].source for step in both} == {0, 1}
    (short,), _ = validation_plan(config, (np.array([3]),), 0, 1)  # has no four: none of it is there twice
    assert (short.shape.views, short.scenes[0].frames) == (3, (0, 1, 2))
    for step in whole:
        assert step.scenes[0].seed is None
        assert len(set(step.scenes[0].frames)) == 4


@pytest.mark.parametrize(
    ("width", "aspect", "height"), [(518, 1.0, 518), (518, 0.33, 168), (518, 0.5, 252), (14, 0.1, 14)]
)
def test_heights_are_multiples_of_the_patch(width, aspect, height):
    assert image_height(width, aspect) == height
