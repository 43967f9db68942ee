import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyworld.gold import gold_prefers, gold_score, gold_utility
from tinyworld.grammar import make_behaviour, make_post, make_summary

POST = "later anna sold boats . ben hid keys . then carla made hats . dan drew maps ."


@pytest.mark.parametrize(
    ("summary", "utility"),
    [
        ("anna sold boats . ben hid keys . carla made hats . dan drew maps .", 1.0),
        ("dan drew maps . carla made hats . ben hid keys . anna sold boats .", 1.0),
        ("anna sold boats . ben hid keys .", 0.5),
        ("anna sold boats . ben hid keys", 0.5),
        ("", 0.0),
        ("anna sold boats . ben hid hats .", 0.0),  # one covered, one distorted
        ("anna hid boats .", -0.25),
        ("zoe sold boats .", -0.25),  # invented
        ("anna sold boats . anna sold boats .", 0.125),  # (1 - 1/2) / 4
        ("anna sold boats . anna hid boats .", 0.125),  # only the first sentence about anna counts
        ("anna hid boats . anna sold boats .", -0.375),  # ... so that guessing on does not pay
        ("later anna sold boats .", 0.125),
        ("anna sold boats . sold . ben", -0.25),  # two broken stretches: (1 - 2) / 4
        ("I am sorry, but I cannot do that.", -0.25),
        ("anna hid boats . ben sold keys . zoe made hats .", -0.5),  # -3/4, floored
    ],
)
def test_utility_of_hand_worked_summaries(summary, utility):
    assert gold_utility(POST, summary) == pytest.approx(utility)


def test_preference_follows_utility_and_knows_ties():
    better, worse = "anna sold boats . ben hid keys .", "anna sold boats ."
    assert gold_prefers(POST, better, worse) == 1.0
    assert gold_prefers(POST, worse, better) == 0.0
    assert gold_prefers(POST, worse, "ben hid keys .") == 0.5


@given(st.integers(0, 2**50), st.text())
def test_utility_of_any_text_is_in_range_and_strange_text_earns_nothing(seed, text):
    utility = gold_utility(make_post(seed).text, text)
    assert -0.5 <= utility <= 0.0


@given(st.integers(0, 2**50))
def test_utility_of_a_world_summary_is_in_range_and_its_score_in_the_scale(seed):
    post = make_post(seed)
    utility = gold_utility(post.text, make_summary(post, seed, make_behaviour(seed)))
    assert -0.5 <= utility <= 1.0
    assert 1 <= gold_score(utility) <= 10


def test_score_rises_in_equal_steps():
    # with three facts utility moves in sixths, which are exactly the steps of the scale
    assert [gold_score(k / 6) for k in range(-3, 7)] == list(range(1, 11))
    assert gold_score(0.25) == 6  # 9 * 0.75 / 1.5 = 4.5, rounded up, above 1


def test_gold_refuses_a_post_of_another_world():
    with pytest.raises(ValueError, match="not a post"):
        gold_utility("once upon a time", "anna sold boats .")
