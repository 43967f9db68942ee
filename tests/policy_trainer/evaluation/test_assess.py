"""Win rates: ties count half, and what a win rate would be at equal length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_trainer.evaluation.assess import assess_wins, length_controlled


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_tie_counts_half_and_a_probability_counts_as_won_or_lost() -> None:
    found = assess_wins([0.9, 0.51, 0.5, 0.1], [0, 0, 0, 0])
    assert found["win_rate"]["value"] == (1 + 1 + 0.5 + 0) / 4
    assert found["mean_probability"]["value"] == pytest.approx((0.9 + 0.51 + 0.5 + 0.1) / 4)
    assert found["ties"] == 0.25
    assert found["win_rate"]["low"] < 0.625 < found["win_rate"]["high"]


def test_the_longer_one_wins_is_counted_over_decided_pairs_of_different_length() -> None:
    found = assess_wins([1, 1, 0, 0.5, 1], [10, -10, -5, 7, 0])
    assert found["longer_wins"] == 2 / 3


def test_length_control_halves_the_logits_of_two_equally_strong_lengths() -> None:
    """Two lengths make the regression saturated: sigmoid(theta + phi t) = 0.8, sigmoid(theta - phi t) = 0.3.

    So theta is the mean of the two logits, whatever the scale of the lengths.
    """
    won = [1.0] * 800 + [0.0] * 200 + [1.0] * 300 + [0.0] * 700
    longer = [70.0] * 1000 + [-70.0] * 1000
    expected = sigmoid((logit(0.8) + logit(0.3)) / 2)
    assert length_controlled(won, longer) == pytest.approx(expected, abs=1e-4)
    assert abs(np.mean(won) - expected) > 0.01


def test_a_side_that_wins_by_length_alone_is_no_better_at_equal_length() -> None:
    """Longer in 90 % of the pairs; the longer one wins 80 % of the time, whoever wrote it."""
    won = [1.0] * 720 + [0.0] * 180 + [1.0] * 20 + [0.0] * 80
    assert np.mean(won) == 0.74
    longer = [100.0] * 900 + [-100.0] * 100
    assert length_controlled(won, longer) == pytest.approx(0.5, abs=1e-3)


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    assert length_controlled([1.0] * 60 + [0.0] * 30 + [0.5] * 10, [0.0] * 100) == pytest.approx(
        0.65, abs=1e-3
    )


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-1000, 1000)), min_size=1, max_size=30)
)
def test_the_other_side_has_what_is_left_and_a_clean_sweep_stays_finite(
    rows: list[tuple[float, int]],
) -> None:
    won, d = np.array([w for w, _ in rows]), np.array([x for _, x in rows], dtype=float)
    ours = length_controlled(won, d)
    assert 0 < ours < 1
    assert ours + length_controlled(1 - won, -d) == pytest.approx(1, abs=1e-6)


def test_nothing_compared_has_no_win_rate() -> None:
    found = assess_wins([], [])
    assert found["win_rate"] == {"value": None, "low": None, "high": None} == found["length_controlled"]
