"""Bradley-Terry and Elo against hand-computed cases and against scikit-learn's logistic regression."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.ranking import bradley_terry, components, elo, leaderboard

Comparison = tuple[int, int, float]


def comparisons(n: int = 4) -> st.SearchStrategy[list[Comparison]]:
    row = st.tuples(
        st.integers(0, n - 1), st.integers(0, n - 1), st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
    )
    return st.lists(row.filter(lambda r: r[0] != r[1]), min_size=1, max_size=12)


def test_one_soft_comparison_gives_its_log_odds() -> None:
    a, b = bradley_terry(2, [(0, 1, 0.8)], ridge=1e-9)
    assert a - b == pytest.approx(math.log(0.8 / 0.2), abs=1e-6)
    assert a + b == pytest.approx(0.0, abs=1e-6)


def test_three_items_with_consistent_odds_are_recovered_exactly() -> None:
    # Odds 2:1 and 3:1 along the chain multiply to 6:1, so the strengths differ by ln 2 and ln 3.
    found = bradley_terry(3, [(0, 1, 2 / 3), (1, 2, 3 / 4), (2, 0, 1 / 7)], ridge=1e-9)
    assert found[0] - found[1] == pytest.approx(math.log(2), abs=1e-6)
    assert found[1] - found[2] == pytest.approx(math.log(3), abs=1e-6)


def test_a_cycle_ties_everyone() -> None:
    assert bradley_terry(3, [(0, 1, 0.9), (1, 2, 0.9), (2, 0, 0.9)]) == pytest.approx([0, 0, 0], abs=1e-9)


def test_an_undefeated_item_satisfies_the_penalised_optimum() -> None:
    # Two items, one sure win: theta_0 = t = -theta_1 with 1 - sigmoid(2t) = ridge t; both sides by hand at the root.
    a, b = bradley_terry(2, [(0, 1, 1.0)], ridge=0.1)
    assert a == pytest.approx(-b)
    assert 1 / (1 + math.exp(2 * a)) == pytest.approx(0.1 * a, abs=1e-9)


def test_scikit_learn_fits_the_same_strengths() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    rows = [(i, j, float(rng.uniform())) for i in range(5) for j in range(i + 1, 5) for _ in range(3)]
    weights = rng.uniform(0.5, 2.0, len(rows))
    design = np.zeros((2 * len(rows), 5))
    for number, (i, j, _) in enumerate(rows):
        design[number, i] = design[len(rows) + number, i] = 1
        design[number, j] = design[len(rows) + number, j] = -1
    p = np.array([r[2] for r in rows])
    outcome, share = np.repeat([1, 0], len(rows)), np.concatenate([p, 1 - p]) * np.tile(weights, 2)
    model = linear.LogisticRegression(C=1 / 0.05, fit_intercept=False, tol=1e-10, max_iter=10_000)
    model.fit(design, outcome, sample_weight=share)
    assert bradley_terry(5, rows, weights=weights, ridge=0.05) == pytest.approx(model.coef_[0], abs=1e-4)


def test_hard_lopsided_data_converge() -> None:
    found = bradley_terry(3, [(0, 1, 1.0)] * 10_000 + [(1, 2, 1.0)], ridge=1e-6)
    assert np.isfinite(found).all() and found[0] > found[1] > found[2]


@given(comparisons(), st.randoms(use_true_random=False))
def test_order_and_direction_of_comparisons_do_not_matter(
    rows: list[Comparison], chance: random.Random
) -> None:
    turned = [(j, i, 1 - p) if chance.random() < 0.5 else (i, j, p) for i, j, p in rows]
    chance.shuffle(turned)
    assert bradley_terry(4, turned) == pytest.approx(bradley_terry(4, rows), abs=1e-8, nan_ok=True)
    assert elo(4, turned) == pytest.approx(elo(4, rows), abs=1e-8, nan_ok=True)


@given(comparisons())
def test_complementary_labels_negate_strengths(rows: list[Comparison]) -> None:
    flipped = [(i, j, 1 - p) for i, j, p in rows]
    assert bradley_terry(4, flipped) == pytest.approx(-bradley_terry(4, rows), abs=1e-7, nan_ok=True)


def test_a_weight_of_two_is_a_comparison_twice() -> None:
    once = bradley_terry(3, [(0, 1, 0.9), (1, 2, 0.4)], weights=[2, 1])
    assert once == pytest.approx(bradley_terry(3, [(0, 1, 0.9), (0, 1, 0.9), (1, 2, 0.4)]))


def test_an_item_without_a_comparison_has_no_rating() -> None:
    assert np.isnan(bradley_terry(3, [(0, 1, 0.7)])[2])
    assert np.isnan(elo(3, [(0, 1, 0.7)])[2])


def test_elo_of_one_game_by_hand() -> None:
    # Expected 1/2 at equal ratings: the winner of a sure game takes half of k, a 3:1 label a quarter.
    assert elo(2, [(0, 1, 1.0)], k=32) == pytest.approx([1016, 984])
    assert elo(2, [(0, 1, 0.75)], k=32) == pytest.approx([1008, 992])


def test_elo_of_two_games_by_hand() -> None:
    # After the first win the favourite is expected at 1 / (1 + 10^(-32/400)) and gains k times the rest.
    gain = 32 * (1 - 1 / (1 + 10 ** (-32 / 400)))
    assert elo(2, [(0, 1, 1.0)] * 2, k=32) == pytest.approx([1016 + gain, 984 - gain])


def test_elo_conserves_points() -> None:
    assert elo(3, [(0, 1, 1.0), (1, 2, 0.2), (0, 2, 0.6)]).mean() == pytest.approx(1000)


def test_components_follow_chains() -> None:
    assert components(6, [(4, 5, 0.5), (0, 2, 1.0), (2, 1, 0.3)]).tolist() == [0, 0, 0, 1, 2, 2]
    assert components(5, [(i, i + 1, 0.5) for i in range(4)]).tolist() == [0] * 5


def test_intervals_hold_the_estimate_and_shrink_with_data() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (30, 3000):
        rows = [(0, 1, float(x)) for x in rng.uniform(0, 1, count) < 0.7]
        first, _ = leaderboard(["good", "bad"], rows, resamples=200)
        assert first.name == "good" and first.comparisons == count
        assert first.strength_95[0] < first.strength < first.strength_95[1]
        assert first.elo_95[0] < first.elo < first.elo_95[1]
        widths.append(first.strength_95[1] - first.strength_95[0])
    assert widths[1] < widths[0] / 5


def test_comparisons_of_one_prompt_are_drawn_together() -> None:
    # Copies of a comparison add no information: grouped by prompt, the interval is that of the originals.
    rng = np.random.default_rng(1)
    rows = [(0, 1, float(p)) for p in rng.uniform(0, 1, 40)]
    copies = [row for row in rows for _ in range(9)]
    prompts = [k for k in range(40) for _ in range(9)]
    alone = leaderboard("ab", rows, ridge=1e-6, resamples=500)[0]
    grouped = leaderboard("ab", copies, ridge=1e-6, groups=prompts, resamples=500)[0]
    ungrouped = leaderboard("ab", copies, ridge=1e-6, resamples=500)[0]

    def width(interval: tuple[float, float]) -> float:
        return interval[1] - interval[0]

    assert width(grouped.strength_95) == pytest.approx(width(alone.strength_95), rel=0.15)
    assert width(ungrouped.strength_95) < 0.5 * width(alone.strength_95)


def test_a_leaderboard_is_a_function_of_the_set_of_comparisons() -> None:
    rows = [(0, 1, 0.9), (1, 2, 0.6), (2, 0, 0.2), (0, 1, 0.7)]
    assert leaderboard("abc", rows, resamples=50) == leaderboard("abc", rows[::-1], resamples=50)


def test_items_never_compared_come_last_without_numbers() -> None:
    last = leaderboard("abc", [(2, 1, 0.9)], resamples=20)[-1]
    assert last.name == "a" and last.comparisons == 0
    assert all(
        math.isnan(x) for x in (last.strength, last.elo, last.win_rate, *last.strength_95, *last.elo_95)
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((0, 0, 0.5), "two different items"),
        ((0, 3, 0.5), "two different items"),
        ((-1, 1, 0.5), "two different items"),
        ((0, 1, 1.5), "probability"),
        ((0, 1, float("nan")), "probability"),
    ],
    ids=["itself", "unknown", "negative", "above-one", "nan"],
)
def test_what_is_no_comparison_is_refused(row: Comparison, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bradley_terry(3, [row])


def test_weights_must_fit_the_comparisons() -> None:
    with pytest.raises(ValueError, match="2 finite numbers"):
        bradley_terry(2, [(0, 1, 0.5), (0, 1, 0.5)], weights=[1.0])
