import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyworld.gold import review
from tinyworld.grammar import (
    FAITHFUL,
    SO_SO,
    WORDS,
    Behaviour,
    Fact,
    make_behaviour,
    make_post,
    make_summary,
    make_variant,
    parse,
    parse_post,
)

seeds = st.integers(min_value=0, max_value=2**60)


@given(seeds)
def test_a_post_is_a_function_of_its_seed_and_states_three_to_five_facts_about_different_people(seed):
    post = make_post(seed)
    assert make_post(seed) == post
    assert list(parse_post(post.text).values()) == list(post.facts)
    assert 3 <= len({f.name for f in post.facts}) == len(post.facts) <= 5


def test_posts_of_different_seeds_differ():
    assert len({make_post(seed).text for seed in range(500)}) == 500


@given(seeds, seeds)
def test_summaries_are_functions_of_their_seed_and_made_of_the_worlds_words(post_seed, seed):
    post, behaviour = make_post(post_seed), make_behaviour(seed)
    summary = make_summary(post, seed, behaviour)
    assert make_summary(post, seed, behaviour) == summary
    assert make_variant(post, summary, seed) == make_variant(post, summary, seed)
    assert set(summary.split()) <= set(WORDS)
    assert summary == " ".join(summary.split())


@given(seeds, seeds)
def test_a_faithful_summary_is_the_post_without_its_filler_words(post_seed, seed):
    post = make_post(post_seed)
    assert make_summary(post, seed, FAITHFUL) == " ".join(f.text for f in post.facts)


@pytest.mark.parametrize(
    ("behaviour", "verdict"),
    [
        (Behaviour(distortion=1.0), "distorted"),
        (Behaviour(invention=1.0), "invented"),
        (Behaviour(repetition=1.0), "repeated"),
        (Behaviour(padding=1.0), "filler"),
    ],
)
def test_each_flaw_of_a_behaviour_shows_up_as_its_own_finding(behaviour, verdict):
    for seed in range(50):
        post = make_post(seed)
        found = {f.verdict for f in review(post.text, make_summary(post, seed, behaviour))}
        assert verdict in found
        assert found <= {verdict, "covered"}


def test_damage_breaks_the_grammar_of_most_summaries():
    texts = [make_summary(make_post(s), s, Behaviour(damage=1.0)) for s in range(200)]
    assert sum(any(x.fact is None for x in parse(t)) for t in texts) > 100


def test_the_so_so_behaviour_is_fluent():
    for seed in range(100):
        assert all(s.fact and s.closed for s in parse(make_summary(make_post(seed), seed, SO_SO)))


def test_parse_separates_filler_facts_fragments_and_an_unclosed_end():
    first, second, third = parse("later then anna sold boats . boats sold anna . ben hid keys")
    assert (first.padding, first.fact, first.closed) == (
        ("later", "then"),
        Fact("anna", "sold", "boats"),
        True,
    )
    assert (second.padding, second.fact, second.closed) == ((), None, True)
    assert (third.fact, third.closed) == (Fact("ben", "hid", "keys"), False)


@given(st.text())
def test_parse_takes_any_text(text):
    assert all(s.fact is None or s.fact.name in WORDS for s in parse(text))


@pytest.mark.parametrize(
    "text", ["", "hello", "anna sold boats . anna hid keys .", "anna sold boats . then ."]
)
def test_parse_post_refuses_what_is_no_post(text):
    with pytest.raises(ValueError, match="not a post"):
        parse_post(text)


@given(st.randoms(use_true_random=False))
def test_shuffled_words_never_raise(rng: random.Random):
    words = [rng.choice(WORDS) for _ in range(rng.randint(0, 40))]
    list(review(make_post(rng.getrandbits(40)).text, " ".join(words)))
