"""Labels of several tokens: exact probabilities of whole spellings, and nothing counted twice."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.backends.labels import FLOOR, Tokens, find_spellings, label_distribution, label_reads
from labeler.llm import RequestFailed
from rlaif.errors import ModelError


def by_characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_a_label_is_spelled_directly_and_after_a_space() -> None:
    ids = {"x:": [5], "x:1": [5, 11], "x: 1": [5, 12]}
    assert find_spellings(ids.__getitem__, "x:", "1", "m") == ((11,), (12,))


def test_a_label_that_the_tokenizer_splits_is_spelled_by_its_parts() -> None:
    one, zero, space = map(ord, "10 ")
    assert find_spellings(by_characters, "score:", "10", "m") == ((one, zero), (space, one, zero))


def test_after_white_space_no_second_space_is_expected() -> None:
    assert find_spellings(by_characters, "score: ", "9", "m") == ((ord("9"),),)


def test_a_label_that_melts_into_the_text_before_it_is_refused() -> None:
    def encode(text: str) -> list[int]:
        return [7] if text == "score:" else [8, 9]

    with pytest.raises(ModelError, match="melts into"):
        find_spellings(encode, "score:", "1", "m")


def test_one_reading_is_enough_where_every_label_is_one_token() -> None:
    assert label_reads([[(7,), (3,)], [(5,)]]) == {(): (3, 5, 7)}


def test_a_scale_of_ten_on_split_digits_by_hand() -> None:
    # "1" = 1 or space 1, "10" = 1 0 or space 1 0.
    spellings: list[list[Tokens]] = [[(1,), (9, 1)], [(1, 0), (9, 1, 0)]]
    assert label_reads(spellings) == {(): (1, 9), (1,): (0,), (9,): (1,), (9, 1): (0,)}
    given_probs = {(): {1: 0.5, 9: 0.2}, (1,): {0: 0.25}, (9,): {1: 0.5}, (9, 1): {0: 0.1}}
    readings = {after: {t: math.log(p) for t, p in row.items()} for after, row in given_probs.items()}
    read = label_distribution(spellings, readings)
    # P("1") = 0.5 (1 - 0.25) + 0.2 x 0.5 (1 - 0.1); P("10") = 0.5 x 0.25 + 0.2 x 0.5 x 0.1
    assert [math.exp(x) for x in read.logprobs] == pytest.approx([0.465, 0.135])
    assert read.mass == pytest.approx(0.6)
    assert not read.censored


def test_labels_that_are_the_same_token_are_refused() -> None:
    """A, B and C are all the unknown word to a small tokenizer; a label of two spellings of one token is none."""
    unknown = 3
    with pytest.raises(ModelError, match="cannot tell them apart"):
        label_reads([[(unknown,)], [(unknown,)], [(7,)]])
    assert label_reads([[(5,), (5,)], [(7,)]]) == {(): (5, 7)}


def test_a_label_that_the_model_rules_out_stays_finite() -> None:
    read = label_distribution([[(1,)], [(1, 0)], [(2,)]], {(): {1: -0.5, 2: -math.inf}, (1,): {0: 0.0}})
    assert read.logprobs == (FLOOR, -0.5, FLOOR)


def test_a_reading_that_is_no_number_fails_its_row() -> None:
    with pytest.raises(RequestFailed, match="NaN"):
        label_distribution([[(1,)], [(2,)]], {(): {1: -0.5, 2: math.nan}})


VOCABULARY, LENGTH = (0, 1, 2), 4


@st.composite
def models_and_spellings(draw: st.DrawFn) -> tuple[int, list[list[Tokens]]]:
    tokens = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=3).map(tuple)
    distinct = draw(st.lists(tokens, min_size=2, max_size=7, unique=True))
    cut = draw(st.integers(1, len(distinct) - 1))
    return draw(st.integers(0, 1000)), [distinct[:cut], distinct[cut:]]


def next_probs(seed: int, after: Sequence[int]) -> list[float]:
    weights = [random.Random(f"{seed} {list(after)} {t}").random() for t in VOCABULARY]
    return [w / sum(weights) for w in weights]


@given(models_and_spellings())
def test_every_text_counts_for_the_longest_label_it_begins_with(
    case: tuple[int, list[list[Tokens]]],
) -> None:
    """The oracle enumerates every text of four tokens and asks which spelling it begins with."""
    seed, spellings = case
    expected = [0.0, 0.0]
    for text in itertools.product(VOCABULARY, repeat=LENGTH):
        p = math.prod(next_probs(seed, text[:i])[t] for i, t in enumerate(text))
        begun = [(len(s), i) for i, group in enumerate(spellings) for s in group if text[: len(s)] == s]
        if begun:
            expected[max(begun)[1]] += p
    readings = {
        after: {t: math.log(next_probs(seed, after)[t]) for t in ids}
        for after, ids in label_reads(spellings).items()
    }
    read = label_distribution(spellings, readings)
    got = [math.exp(x) for x in read.logprobs]
    assert got == pytest.approx(expected, abs=1e-9)
    assert read.mass == pytest.approx(sum(expected))
