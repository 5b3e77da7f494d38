from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from train.evaluation.bootstrap import MIN_SCENES, _student_over_normal, estimate

RNG = np.random.default_rng(0)


def test_interval_equals_scipy():
    values = RNG.normal(3, 2, 40)
    ours = estimate(values.tolist())
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.05)
    assert ours.high == pytest.approx(theirs.high, abs=0.05)


@pytest.mark.parametrize("scenes", [MIN_SCENES, 10, 30])
def test_interval_covers_the_mean_as_often_as_it_says(scenes):
    covered = 0
    for _ in range(400):
        found = estimate(RNG.normal(1, 1, scenes).tolist())
        covered += found.low < 1 < found.high
    assert 0.91 < covered / 400 < 0.99


@pytest.mark.parametrize("freedom", [2, 3, 4, 9, 30, 1000])
def test_widening_for_few_scenes_is_students(freedom):
    exact = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    assert _student_over_normal(freedom) == pytest.approx(exact, rel=0.02)


def test_groups_weigh_the_same_whatever_their_size():
    values, groups = [1.0] * 8 + [5.0] * 2, ["a"] * 8 + ["b"] * 2
    assert estimate(values, groups).mean == 3
    assert estimate(values).mean == pytest.approx(1.8)


def test_paired_differences_show_what_single_means_do_not():
    scenes = RNG.normal(10, 5, 30)
    better = scenes - RNG.normal(0.5, 0.2, 30)
    one, other = estimate(scenes.tolist()), estimate(better.tolist())
    assert one.low < other.mean < one.high
    assert estimate((better - scenes).tolist()).sign == -1
    assert estimate(RNG.normal(0, 1, 30).tolist()).sign == 0


def test_too_few_scenes_have_no_interval():
    found = estimate([1.0] * (MIN_SCENES - 1))
    assert (found.mean, found.low, found.high, found.sign) == (1, None, None, 0)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_a_category_is_never_lost_and_the_interval_covers_the_mean_of_unequal_ones():
    groups = ["a"] * 3 + ["b"] * 8 + ["c"] * 20
    means, spread = {"a": 5.0, "b": 0.0, "c": -2.0}, {"a": 0.5, "b": 1.0, "c": 2.0}
    covered = 0
    for _ in range(400):
        found = estimate([RNG.normal(means[g], spread[g]) for g in groups], groups)
        covered += found.low < 1 < found.high
    assert 0.91 < covered / 400 < 0.99
    constant = estimate([means[g] for g in groups], groups)  # resampled over all, it would move with the categories
    assert (constant.low, constant.high) == (pytest.approx(1), pytest.approx(1))


def test_few_scenes_of_several_categories_have_a_wide_interval_that_covers_the_mean():
    """The demo's: five scenes of three categories, one of them alone in its own."""
    groups, covered = ["a", "a", "b", "b", "c"], 0
    for _ in range(400):
        found = estimate([RNG.normal(ord(g), 1) for g in groups], groups)
        covered += found.low < ord("b") < found.high
    assert covered / 400 > 0.88


def test_single_scenes_of_many_categories_have_no_interval():
    assert estimate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], list("abcdef")).low is None
