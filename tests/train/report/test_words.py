"""What numbers are said to mean."""

from __future__ import annotations

import pytest

from train.report.words import run_verdict


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([None, None], "cannot be told: validate on at least 5 scenes"),
        ([0, None], "Nothing changed beyond the noise"),
        ([1, 0], "It got better, on scenes that were never trained on"),
        ([-1, 0], "It got worse"),
        ([-1, 1, 1], "2 of these metrics got better, 1 got worse"),
    ],
)
def test_the_verdict_of_a_run_follows_from_its_gains_and_needs_enough_scenes(gains, words):
    assert words in run_verdict(gains, seen=False)
