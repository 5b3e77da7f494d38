"""Shard sets that join a run, leave it and come back: the others continue exactly where they were."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from conftest import vggt_prep
from runs import SCRATCH, checkpoint, run_trainer

import shards
from train.data.plan import DataConfig, ShardSource, TrainingPlan
from train.engine.streams import new_streams, saved_streams, state_of, streams_at


class Set:
    def __init__(self, digest):
        self.digest = digest


def plan_of(sets, streams):
    config = DataConfig(shards=tuple(ShardSource(path=s.digest) for s in sets), width=56, views=(2, 3))
    lengths = {"a": 7, "b": 5, "c": 11}
    return TrainingPlan(
        config=config,
        lengths=tuple(np.full(lengths[s.digest], 24) for s in sets),
        streams=tuple(number for number, _ in streams.values()),
        seed=3,
        max_img_per_gpu=12,
        world_size=2,
    )


def drawn(plan, state, steps):
    """The scenes of each set, in order, and the state after that."""
    scenes = {}
    for _ in range(steps):
        for rank in range(2):
            for scene in plan.step(state, rank).scenes:
                scenes.setdefault(scene.source, []).append((scene.sequence, scene.seed))
        state = plan.after(state)
    return scenes, state


def test_each_set_goes_through_its_own_stream_whatever_others_join_and_leave():
    a, b, c = map(Set, "abc")
    record, step, found = {}, 0, {name: [] for name in "abc"}
    for sets, steps in (((a, b), 9), ((c, a), 8), ((b, c), 7), ((a, b, c), 9)):
        streams = new_streams(sets, record)
        scenes, state = drawn(plan_of(sets, streams), state_of(step, streams), steps)
        for source, part in scenes.items():
            found[sets[source].digest] += part
        record, step = record | streams_at(state, sets, streams), state.step
    for one, number in ((a, 0), (b, 1), (c, 2)):
        plan = plan_of([one], {one.digest: [number, 0]})
        alone = [plan._scene(0, position, 2) for position in range(len(found[one.digest]))]
        assert [sequence for sequence, _ in found[one.digest]] == [scene.sequence for scene in alone]
        assert record[one.digest] == [number, len(found[one.digest])]


def test_a_set_given_twice_is_refused_and_an_older_checkpoint_is_understood():
    with pytest.raises(ValueError, match="is given twice; give it once, with the sum of the weights"):
        new_streams([Set("a"), Set("a")], {})
    assert saved_streams({"data": {"step": 4, "positions": [9, 2]}, "shards": ["a", "b"]}) == {"a": [0, 9], "b": [1, 2]}


def test_a_mixed_run_is_resumed_with_one_set_more_and_one_less(shard_dir, captures, tmp_path):
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    for name, size in (("b", 70), ("c", 90)):
        done = vggt_prep("pack", *source, "--out", tmp_path / name, "--split", "train", "--short-side", size)
        assert done.returncode == 0, done.stderr
    digests = {name: shards.open(tmp_path / name).digest for name in "bc"} | {"a": shards.open(shard_dir).digest}

    def train(steps, *sets):
        given = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in sets)
        done = run_trainer(
            f"[{given}]", tmp_path / "run", *SCRATCH, f"max_steps={steps}", "data.allow_shared_frames=true"
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, checkpoint(tmp_path / "run", steps)["data"]["streams"]

    _, before = train(2, (shard_dir, 1), (tmp_path / "b", 2))
    said, after = train(4, (tmp_path / "c", 1), (tmp_path / "b", 3))
    assert f"{tmp_path}/c joins the run" in said
    assert "1 of 2 sets left the run" in said
    assert f"{tmp_path}/b now has weight 3, not 2" in said
    assert after[digests["a"]] == before[digests["a"]]
    assert after[digests["b"]][1] > before[digests["b"]][1]
    assert [after[digests[name]][0] for name in "abc"] == [0, 1, 2]
    _, last = train(5, (shard_dir, 1))
    assert last[digests["a"]][1] > after[digests["a"]][1]
    assert last[digests["b"]] == after[digests["b"]]


def test_validations_of_other_sets_are_not_compared_and_sets_that_left_still_count(shard_dir, captures, tmp_path):
    """set1 -> set1 + set2 -> set2: the last is validated on what set1 was trained on."""
    source = ("--co3d-dir", captures / "co3d", "--annotation-dir", captures / "annotations")
    for name, split in (("one", "train"), ("two", "test")):
        done = vggt_prep("pack", *source, "--out", tmp_path / name, "--split", split, "--short-side", 80)
        assert done.returncode == 0, done.stderr
    swapped = tmp_path / "swapped"
    shutil.copytree(captures, swapped)
    for path in sorted((swapped / "annotations").glob("*_*.jgz")):
        other = {"train": "test", "test": "train"}[path.stem.rpartition("_")[2]]
        path.rename(path.with_name(f"{path.stem.rpartition('_')[0]}_{other}.new"))
    for path in (swapped / "annotations").glob("*.new"):
        path.rename(path.with_suffix(".jgz"))
    done = vggt_prep(
        *(
            "pack",
            "--co3d-dir",
            swapped / "co3d",
            "--annotation-dir",
            swapped / "annotations",
            "--out",
            tmp_path / "set3",
        )
    )
    assert done.returncode == 0, done.stderr

    def train(steps, *sets):
        given = ", ".join(f"{{path: {path}}}" for path in sets)
        return run_trainer(f"[{given}]", tmp_path / "run", *SCRATCH, f"max_steps={steps}", "val_every=1")

    assert train(1, shard_dir).returncode == 0
    done = train(2, shard_dir, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = train(3, tmp_path / "one", tmp_path / "set3")
    assert done.returncode == 1
    assert "frames to test on are the same as frames to train on" in done.stderr
    done = train(3, tmp_path / "one", shard_dir)
    assert done.returncode == 0, done.stderr
    assert "Done: 3 steps" in done.stdout
