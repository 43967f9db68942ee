"""How far probabilities are from labels, worked by hand, and indifferent to which response is called A."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.measures import brier, expected_calibration_error, log_loss, reliability

PROBABILITIES = st.floats(0, 1, allow_nan=False)


def test_brier_and_log_loss_by_hand() -> None:
    assert brier([0.8, 0.4], [1, 0]) == pytest.approx((0.04 + 0.16) / 2)
    assert log_loss([0.8, 0.4], [1, 0]) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2)


def test_a_coin_scores_a_quarter_and_ln_2() -> None:
    assert brier([0.5] * 4, [1, 0, 1, 0.5]) == pytest.approx(0.25 * 3 / 4)
    assert log_loss([0.5] * 3, [1, 0, 1]) == pytest.approx(math.log(2))


def test_one_sure_error_is_dear_but_finite() -> None:
    assert log_loss([0.0], [1.0]) == pytest.approx(-math.log(1e-6))


def test_calibration_error_by_hand() -> None:
    # Confidence 0.9 four times, right three times; confidence 0.6 twice, right once: gaps 0.15 and 0.1.
    p, human = [0.9, 0.9, 0.1, 0.9, 0.6, 0.4], [1, 1, 0, 0, 1, 1]
    assert expected_calibration_error(p, human) == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    table = reliability(p, human)
    assert [(b.low, b.count) for b in table] == [(pytest.approx(0.6), 2), (pytest.approx(0.9), 4)]
    assert table[1].agreement == pytest.approx(0.75)


def test_full_confidence_falls_into_the_last_bin() -> None:
    assert [b.low for b in reliability([1.0, 0.0], [1, 0])] == [pytest.approx(0.95)]


@given(st.lists(st.tuples(PROBABILITIES, st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1))
def test_measures_do_not_care_which_response_is_called_a(rows: list[tuple[float, float, bool]]) -> None:
    p, human = [r[0] for r in rows], [r[1] for r in rows]
    q = [1 - p_a if turn else p_a for p_a, _, turn in rows]
    turned = [1 - h if turn else h for _, h, turn in rows]
    for measure in (brier, log_loss):
        assert measure(q, turned) == pytest.approx(measure(p, human), abs=1e-9)
