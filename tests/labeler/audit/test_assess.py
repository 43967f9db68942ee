"""Findings from observations, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.audit.assess import assess, difference
from labeler.audit.observations import Observation, observe
from rlaif.agreement import preference_kappa
from rlaif.types import Judgment, LabelDistribution, Pair, Preference, user_prompt


def seen(p: float | None, human: float | None = 1.0, **more: object) -> Observation:
    return Observation("prompt", "", p, p, human, **more)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0])), min_size=1, max_size=20))
def test_kappa_is_that_of_pairs_taken_both_ways_round(rows: list[tuple[float, float]]) -> None:
    found = assess([seen(p, human) for p, human in rows], resamples=2)
    assert found["kappa"]["value"] == pytest.approx(preference_kappa(*np.array(rows).T))


def test_position_bias_by_hand() -> None:
    # Number 1 preferred in both orders, number 2 in both, and a pair on which the position has no say.
    rows = [(0.9, 0.8), (0.2, 0.1), (0.9, 0.1)]
    found = assess([seen(0.5, first_ab=ab, first_ba=ba) for ab, ba in rows], resamples=2)["position"]
    assert found["pairs"] == 3
    assert found["same_position_rate"] == pytest.approx(2 / 3)
    assert found["first_share"] == 0.5
    assert found["first_probability"] == pytest.approx((0.9 + 0.8 + 0.2 + 0.1 + 0.9 + 0.1) / 6)


def test_what_averaging_the_orders_gains_by_hand() -> None:
    # Right in both orders; locked on number 1, more so where that is A; locked on number 2, less so where that is B;
    # locked on number 1, more so where that is B, which people prefer here.
    rows = [(0.9, 0.2, 1.0), (0.9, 0.6, 1.0), (0.3, 0.2, 1.0), (0.6, 0.9, 0.0)]
    observed = [seen((ab + 1 - ba) / 2, human, first_ab=ab, first_ba=ba) for ab, ba, human in rows]
    found = assess([*observed, seen(0.9), seen(0.9, 0.5, first_ab=0.9, first_ba=0.1)], resamples=2)["orders"]
    assert found["pairs"] == 4  # asked in both orders, and decided by people
    assert found["both"]["value"] == 1.0
    assert found["preferred_first"]["value"] == 3 / 4  # number 1 was right in the first, second and last
    assert found["preferred_second"]["value"] == 2 / 4
    assert found["one"]["value"] == 5 / 8
    assert found["same_position"]["value"] == 3 / 4 and found["locked_pairs"] == 3
    assert found["locked"]["value"] == 1.0


def test_missing_labels_are_counted_by_reason_and_enter_nothing() -> None:
    found = assess([seen(0.9), seen(None, reason="timeout"), seen(None, reason="timeout")], resamples=2)
    assert (found["pairs"], found["labelled"], found["human_pairs"]) == (3, 1, 1)
    assert found["unlabelled"] == {"timeout": 2}
    assert found["agreement"]["value"] == 1.0


def test_nothing_is_claimed_of_no_pairs() -> None:
    found = assess([], resamples=2)
    assert found["agreement"] == found["kappa"] == {"value": None, "low": None, "high": None}
    assert found["calibration"]["brier"] is None and found["position"]["same_position_rate"] is None
    assert found["label_mass"]["mean"] is found["label_mass"]["min"] is None


def test_differences_are_over_pairs_that_both_labelled() -> None:
    ours = [seen(0.9), seen(0.9), seen(None), seen(0.9, 0.5)]
    base = [seen(0.1), seen(0.8), seen(0.8), seen(0.1, 0.5)]
    assert difference(ours, base, 2)["value"] == pytest.approx(0.5)


def test_an_observation_does_not_depend_on_the_order_of_the_file() -> None:
    def judgment(first: float) -> Judgment:
        return Judgment(LabelDistribution((0.0, -1.0), 0.9), prompt_tokens=7, p_first=first)

    pair = Pair(user_prompt("?"), "short", "a longer one", 1.0, {"subset": "x"})
    preference = Preference(pair, 0.7, None, judgment(0.8), judgment(0.4))
    found = observe(preference)
    assert found == observe(preference.swapped())
    assert (found.p, found.human, found.longer) == (pytest.approx(0.3), 0.0, 12 - 5)
    assert (found.first_ab, found.first_ba, found.subset, found.prompt_tokens) == (0.4, 0.8, "x", 14)
