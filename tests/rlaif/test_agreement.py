"""Agreement, kappa and bootstrap intervals against hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlaif.agreement import (
    agreement,
    bootstrap_interval,
    cohen_kappa,
    preference_kappa,
    same_position,
    same_response,
    spearman,
)


def mean(values: np.ndarray) -> float:
    return float(values.mean())


def test_agreement_counts_a_tied_label_as_half() -> None:
    assert agreement([0.9, 0.2, 0.5, 0.6], [1, 0, 1, 0]) == pytest.approx((1 + 1 + 0.5 + 0) / 4)


def test_kappa_of_a_textbook_table() -> None:
    # Cohen's example shape: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, chance 0.5, kappa 0.4.
    ours = [1.0] * 25 + [0.0] * 25
    theirs = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert cohen_kappa(ours, theirs) == pytest.approx(0.4)


def test_kappa_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 2, 200), rng.integers(0, 2, 200)
    assert cohen_kappa(ours, theirs) == pytest.approx(metrics.cohen_kappa_score(ours, theirs))


def test_kappa_of_raters_who_always_say_the_same_is_undefined() -> None:
    assert math.isnan(cohen_kappa([0.9, 0.8], [1, 1]))


def test_kappa_of_preferences_does_not_depend_on_which_response_is_called_a() -> None:
    # Three of four right: 2 * 0.75 - 1. In the file's order people always say A, and plain kappa would be 0.
    p, human = np.array([0.9, 0.8, 0.7, 0.1]), np.ones(4)
    turn = np.array([True, False, True, False])
    assert cohen_kappa(p, human) == 0.0
    assert preference_kappa(p, human) == pytest.approx(0.5)
    turned = preference_kappa(np.where(turn, 1 - p, p), np.where(turn, 1 - human, human))
    assert turned == pytest.approx(0.5)


def test_kappa_of_preferences_counts_a_tied_label_as_half() -> None:
    assert preference_kappa([0.9, 0.5], [1, 1]) == pytest.approx(2 * 0.75 - 1)


def test_interval_of_a_mean_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values, mean)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < values.mean() < high


def test_rows_of_one_group_are_drawn_together() -> None:
    values = np.random.default_rng(2).normal(size=100)
    groups = [f"prompt {k}" for k in range(100)] * 4
    copied = bootstrap_interval(np.tile(values, 4), mean, groups=groups)
    assert copied == pytest.approx(bootstrap_interval(values, mean))
    apart = bootstrap_interval(np.tile(values, 4), mean)
    assert apart[1] - apart[0] < 0.6 * (copied[1] - copied[0])


def test_groups_of_different_sizes_keep_their_rows_whole() -> None:
    values = np.array([1.0, 2.0, 2.0, 3.0, 3.0, 3.0])
    seen: list[tuple[float, ...]] = []

    def note(drawn: np.ndarray) -> float:
        seen.append(tuple(drawn))
        return mean(drawn)

    bootstrap_interval(values, note, groups=["a", "b", "b", "c", "c", "c"], resamples=50)
    for drawn in seen:
        assert drawn.count(2.0) % 2 == 0 and drawn.count(3.0) % 3 == 0
    assert len({len(drawn) for drawn in seen}) > 1


def test_no_rows_have_no_interval() -> None:
    assert all(map(math.isnan, bootstrap_interval([], mean)))


def test_undefined_resamples_are_left_out() -> None:
    low, high = bootstrap_interval([0.0, 1.0], lambda v: float("nan") if v[0] else mean(v))
    assert (low, high) == (0.0, 0.5)


def test_same_position_means_that_swapping_changed_nothing() -> None:
    assert same_position([0.9, 0.9, 0.2], [0.8, 0.1, 0.3]).tolist() == [True, False, True]


def test_a_tie_is_no_position_and_two_ties_agree() -> None:
    first_ab, first_ba = [0.5, 0.5, 0.25, 0.9, 0.9], [0.5, 0.25, 0.5, 0.8, 0.1]
    assert same_position(first_ab, first_ba).tolist() == [False, False, False, True, False]
    assert same_response(first_ab, first_ba).tolist() == [True, False, False, False, True]


def test_spearman_of_a_hand_worked_sample_with_ties() -> None:
    # ranks of x: 1, 2.5, 2.5, 4; of y: 2, 1, 3, 4. Pearson of the ranks: 3 / sqrt(4.5 * 5)
    assert spearman([1, 2, 2, 3], [20, 10, 30, 40]) == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert np.isnan(spearman([1, 2], [3, 3]))
