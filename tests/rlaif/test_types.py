"""Properties of the nouns: swapping is an involution, a label's complement is exact, a missing label stays missing."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif.types import (
    Judgment,
    LabelDistribution,
    Message,
    Pair,
    Preference,
    content_id,
    expectation,
    to_dicts,
    user_prompt,
    with_response,
)

texts = st.text(max_size=20)
# Multiples of 2^-20: their complements are exact, so swapping twice gives back the very same number.
probabilities = st.integers(0, 2**20).map(lambda n: n / 2**20)
maybe_probabilities = st.none() | probabilities
distributions = st.lists(st.floats(-50, 0), min_size=2, max_size=10).map(
    lambda x: LabelDistribution(tuple(x), 1.0)
)
judgments = st.none() | st.builds(Judgment, labels=st.none() | distributions)
pairs = st.builds(Pair, prompt=texts.map(user_prompt), a=texts, b=texts, human_p_a=maybe_probabilities)
preferences = st.builds(Preference, pair=pairs, p_a=maybe_probabilities, ab=judgments, ba=judgments)


@given(pairs)
def test_swapping_a_pair_twice_changes_nothing(pair: Pair) -> None:
    assert pair.swapped().swapped() == pair


@given(pairs)
def test_a_swapped_pair_shows_the_same_text_in_the_other_order(pair: Pair) -> None:
    assert pair.swapped().shown("ab") == pair.shown("ba") == (pair.b, pair.a)


@given(preferences)
def test_a_swapped_preference_is_the_complement_and_missing_stays_missing(preference: Preference) -> None:
    swapped = preference.swapped()
    if preference.p_a is None:
        assert swapped.p_a is None
    else:
        assert swapped.p_a == 1.0 - preference.p_a
    assert swapped.swapped() == preference
    assert swapped.same_position == preference.same_position


def test_a_human_label_swaps_with_its_pair_and_a_tie_stays_a_tie() -> None:
    pair = Pair(user_prompt("q"), "x", "y", human_p_a=0.75)
    assert (pair.swapped().a, pair.swapped().human_p_a) == ("y", 0.25)
    assert Pair(user_prompt("q"), "x", "y", human_p_a=0.5).swapped().human_p_a == 0.5


@pytest.mark.parametrize(
    ("ab", "ba", "same"),
    [((-0.1, -2.0), (-0.1, -2.0), True), ((-0.1, -2.0), (-2.0, -0.1), False)],
    ids=["first-wins-twice", "one-response-wins-twice"],
)
def test_same_position_means_that_both_orders_liked_the_same_place(
    ab: tuple[float, float], ba: tuple[float, float], same: bool
) -> None:
    first, second = (
        Judgment(d, p_first=d.probs[0]) for d in (LabelDistribution(ab, 1.0), LabelDistribution(ba, 1.0))
    )
    preference = Preference(Pair(user_prompt("q"), "x", "y"), 0.5, ab=first, ba=second)
    assert preference.same_position is same


@given(distributions)
def test_label_probabilities_sum_to_one_and_keep_their_ratios(labels: LabelDistribution) -> None:
    probs = labels.probs
    assert math.isclose(math.fsum(probs), 1.0, rel_tol=1e-12)
    assert math.isclose(math.log(probs[0] / probs[1]), labels.logprobs[0] - labels.logprobs[1], abs_tol=1e-9)


def test_label_probabilities_by_hand() -> None:
    # Mass outside the labels is ignored: 0.6 and 0.2 of the vocabulary are 3/4 and 1/4 of the labels.
    labels = LabelDistribution((math.log(0.6), math.log(0.2)), mass=0.8)
    assert labels.probs == pytest.approx((0.75, 0.25), abs=1e-12)


def test_the_expected_score_by_hand() -> None:
    assert expectation((0.5, 0.25, 0.25), (1.0, 4.0, 10.0)) == 4.0
    with pytest.raises(ValueError, match="zip"):
        expectation((1.0,), (1.0, 2.0))


def test_a_content_id_is_the_same_in_another_process_and_follows_content() -> None:
    code = (
        "from rlaif.types import *; print(Pair(user_prompt('ü'), 'a', 'b').id, content_id({'b': 1, 'a': 2}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7"},
    ).stdout.split()
    assert out == [Pair(user_prompt("ü"), "a", "b").id, content_id({"a": 2, "b": 1})]
    assert Pair(user_prompt("ü"), "b", "a").id != out[0]


def test_a_content_id_tells_where_one_part_ends() -> None:
    assert content_id("ab", "c") != content_id("a", "bc")
    with pytest.raises(TypeError, match="cannot hash a set"):
        content_id({1})


def test_a_response_is_added_as_an_assistant_turn() -> None:
    assert to_dicts(with_response((Message("system", "s"), *user_prompt("q")), "r")) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
    ]
