"""The guard: harm beyond the noise is told from chance, and the best checkpoint does none."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.guard import broken, changes, harmed, score, worse
from train.evaluation.history import VALIDATION_FILE, ValidationHistory
from train.runtime.jsonl import append_line

SCENES = 30


def validation(step, *, seed=0, **shifts):
    """Scenes that differ a lot, measured with a little noise; shifts: a metric's change, on each scene."""
    scenes, rng = np.random.default_rng(7), np.random.default_rng((seed, step))
    values = {"auc_30": scenes.uniform(0.2, 0.9, SCENES), "depth_abs_rel": scenes.uniform(0.02, 0.3, SCENES)}
    values |= {"rotation_deg": scenes.uniform(2, 20, SCENES)}
    rows = {n: v * (1 + rng.normal(0, 0.03, SCENES) * (step > 0)) + shifts.get(n, 0) for n, v in values.items()}
    listed = [{"scene": str(i)} | {name: float(row[i]) for name, row in rows.items()} for i in range(SCENES)]
    return {"step": step, "plan": {}, "scenes": listed}


@pytest.mark.parametrize("seed", range(5))
def test_a_metric_that_is_worse_twice_in_a_row_is_harm(seed):
    worse = {"rotation_deg": 1.0}
    lines = [validation(0), validation(1, seed=seed, **worse), validation(2, seed=seed, **worse)]
    assert changes(lines)["rotation_deg"].gain == -1
    assert changes(lines)["rotation_deg"].change.mean == pytest.approx(1, abs=0.4)
    assert harmed(lines) == ["rotation_deg"]
    assert not harmed(lines[:2])
    assert not harmed([*lines[:2], validation(2, seed=seed)])
    assert not harmed([*lines[:2], validation(2, seed=seed, auc_30=-0.1)])  # another metric


def test_chance_is_called_harm_no_more_often_than_intervals_of_95_percent_allow():
    """Three metrics, each worse by chance in 2.5% of 200 draws; twice in a row in hardly any."""
    draws = [[validation(0), validation(1, seed=seed), validation(2, seed=seed)] for seed in range(200)]
    once = sum(any(change.gain < 0 for change in changes(lines).values()) for lines in draws)
    assert 3 <= once <= 30
    assert sum(bool(harmed(lines)) for lines in draws) <= 3


def test_a_prediction_that_is_not_finite_any_more_is_worse_than_any_other():
    lines = [validation(0), validation(1), validation(2)]
    for line in lines[1:]:
        line["scenes"][4]["depth_abs_rel"] = None
    assert broken(lines) == worse(lines) == harmed(lines) == ["depth_abs_rel"]
    lines[0]["scenes"][4]["depth_abs_rel"] = None  # it was so at first
    assert broken(lines) == []


def scored(shifts, metrics=("auc_30", "depth_abs_rel"), first=None):
    return score([first or validation(0), validation(1, **shifts)], 1, metrics)


def test_the_score_is_the_mean_gain_over_the_first_and_none_where_a_headline_metric_got_worse():
    assert scored({"auc_30": 0.1}) > 0.05
    assert scored({"auc_30": 0.2, "depth_abs_rel": -0.05}) > scored({"auc_30": 0.2}) > scored({"auc_30": 0.1})
    assert scored({"auc_30": -0.1}) is None
    assert scored({"auc_30": 0.1, "rotation_deg": 1}) is None  # which is not listed
    assert scored({"auc_30": 0.1}, ("auc_30", "points_chamfer")) == scored({"auc_30": 0.1}, ("auc_30",))  # not measured
    start, broken = validation(0), validation(1, auc_30=0.1)
    broken["scenes"][0]["auc_30"] = None
    assert score([start, broken], 1, ("auc_30",)) is None
    start["scenes"][0]["auc_30"] = None  # it was so at first
    assert score([start, broken], 1, ("auc_30",)) > 0.05


def test_the_best_does_no_harm_against_the_first_whatever_was_best_between_and_whatever_was_dropped(tmp_path):
    """A drift that is within the noise from one validation to the next is not from the first to the last."""
    history, metrics = ValidationHistory(tmp_path), ("auc_30", "depth_abs_rel")
    drift = ({}, {"auc_30": 0.05, "rotation_deg": 0.02}, {"auc_30": 0.1, "rotation_deg": 0.6}, {"auc_30": 0.03})
    for step, shifts in enumerate(drift):
        append_line(tmp_path / VALIDATION_FILE, validation(step, **shifts))
    for saved in ({1, 2, 3}, {1, 3}, {0, 1}, None):
        assert history.best_step(metrics, saved) == 1
    assert history.best_step(metrics, {2, 3}) == 3
    assert history.best_step(metrics, {2}) == 0
