"""The guard: harm beyond the noise is told from chance, and the best checkpoint does none."""

from __future__ import annotations

import numpy as np
import pytest

from train.evaluation.guard import changes, is_better, is_harmful
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
    assert is_harmful(lines)
    assert not is_harmful(lines[:2])
    assert not is_harmful([*lines[:2], validation(2, seed=seed)])
    assert not is_harmful([*lines[:2], validation(2, seed=seed, auc_30=-0.1)])  # another metric


def test_chance_is_called_harm_no_more_often_than_intervals_of_95_percent_allow():
    """Three metrics, each worse by chance in 2.5% of 200 draws; twice in a row in hardly any."""
    draws = [[validation(0), validation(1, seed=seed), validation(2, seed=seed)] for seed in range(200)]
    once = sum(any(change.gain < 0 for change in changes(lines).values()) for lines in draws)
    assert 3 <= once <= 30
    assert sum(is_harmful(lines) for lines in draws) <= 3


def test_better_is_what_gains_in_the_mean_and_harms_no_headline_metric():
    start, metrics = validation(0), ("auc_30", "depth_abs_rel")
    assert is_better(start, validation(1, auc_30=0.1), metrics)
    assert not is_better(start, validation(1, auc_30=-0.1), metrics)
    assert not is_better(start, validation(1, auc_30=0.1, rotation_deg=1), metrics)  # which is not listed
    assert is_better(start, validation(1, auc_30=0.2, depth_abs_rel=0.0005), metrics)
    broken = validation(1, auc_30=0.1)
    broken["scenes"][0]["auc_30"] = None
    assert not is_better(start, broken, metrics)
    assert not is_better(start, validation(1, auc_30=0.1), ("auc_30", "points_chamfer"))  # not measured


def test_the_best_of_several_metrics_is_found_along_the_run(tmp_path):
    history, metrics = ValidationHistory(tmp_path), ("auc_30", "depth_abs_rel")
    best = []
    for step, shifts in enumerate(({}, {"auc_30": 0.1}, {"auc_30": 0.3, "rotation_deg": 3}, {"auc_30": 0.2})):
        append_line(tmp_path / VALIDATION_FILE, validation(step, **shifts))
        best.append(history.best_step(metrics, {best[-1], step} if best else {0}))
    assert best == [0, 1, 1, 3]
