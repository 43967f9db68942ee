import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy_trainer.pairs import PairStrategy, build_pairs, soft_label

rewards = st.one_of(st.none(), st.integers(-3, 3).map(float), st.floats(-5, 5))
group = st.lists(st.tuples(st.sampled_from("abcde"), rewards), max_size=6)
groups = st.lists(group, max_size=5)
one_pair_strategies = st.sampled_from(["best_worst", "max_min", "random"])
strategies = st.one_of(one_pair_strategies, st.just("threshold"))


def build(
    data: list[list[tuple[str, float | None]]], strategy: PairStrategy = "best_worst", **options: float
):  # type: ignore[no-untyped-def]
    values = [[r for _, r in g] for g in data]
    return build_pairs([[c for c, _ in g] for g in data], values, values, strategy=strategy, **options)  # type: ignore[arg-type]


@given(data=groups, strategy=strategies, threshold=st.floats(0, 2))
def test_chosen_is_another_text_with_a_reward_higher_by_more_than_the_threshold(
    data: list[list[tuple[str, float | None]]], strategy: PairStrategy, threshold: float
) -> None:
    for pair in build(data, strategy, threshold=threshold).pairs:
        chosen_text, chosen = data[pair.group][pair.chosen]
        rejected_text, rejected = data[pair.group][pair.rejected]
        assert chosen_text != rejected_text
        assert chosen is not None and rejected is not None
        assert pair.margin == chosen - rejected > threshold
        assert 0.5 <= pair.chosen_prob <= 1


@given(data=groups, strategy=one_pair_strategies)
def test_every_group_has_one_pair_or_one_reason(
    data: list[list[tuple[str, float | None]]], strategy: PairStrategy
) -> None:
    built = build(data, strategy)
    assert len({pair.group for pair in built.pairs}) == len(built.pairs)
    assert len(built.pairs) + built.skipped.total() == len(data)


@given(data=groups, gap=st.floats(0, 2))
def test_threshold_makes_every_pair_there_is(data: list[list[tuple[str, float | None]]], gap: float) -> None:
    built = build(data, "threshold", threshold=gap)
    expected = {
        (g, i, j)
        for g, group in enumerate(data)
        for i, (text, reward) in enumerate(group)
        for j, (other_text, other) in enumerate(group)
        if reward is not None and other is not None and text != other_text and reward - other > gap
    }
    assert len(built.pairs) == len(expected)
    assert {(p.group, p.chosen, p.rejected) for p in built.pairs} == expected
    assert len({p.group for p in built.pairs}) + built.skipped.total() == len(data)


@given(data=groups, gap=st.floats(0, 2))
def test_max_min_is_best_worst_where_equal_texts_earn_equal_rewards(
    data: list[list[tuple[str, float | None]]], gap: float
) -> None:
    by_text = {"a": 0.0, "b": 1.5, "c": 1.5, "d": -2.0, "e": None}
    fair = [[(text, by_text[text]) for text, _ in group] for group in data]
    assert build(fair, "max_min", threshold=gap).pairs == build(fair, threshold=gap).pairs


def test_max_min_takes_the_extremes_and_makes_no_pair_of_one_text() -> None:
    assert [
        (p.chosen, p.rejected) for p in build([[("a", 1.0), ("b", 3.0), ("c", -2.0)]], "max_min").pairs
    ] == [(1, 2)]
    noisy = [[("a", 1.0), ("a", 0.0), ("b", 0.5)]]  # best_worst pairs the first with the last
    assert build(noisy, "max_min").skipped == {"identical": 1}
    assert build([[("a", 1.0), ("b", 1.0)]], "max_min").skipped == {"tie": 1}


@given(data=groups, other=group)
def test_a_random_pair_does_not_depend_on_other_groups(
    data: list[list[tuple[str, float | None]]], other: list[tuple[str, float | None]]
) -> None:
    assert build(data, "random").pairs == [
        p for p in build([*data, other], "random").pairs if p.group < len(data)
    ]


def test_best_and_worst_are_paired() -> None:
    built = build([[("a", 1.0), ("b", 3.0), ("c", -2.0), ("d", 0.0)]])
    assert [(p.chosen, p.rejected, p.margin) for p in built.pairs] == [(1, 2, 5.0)]


def test_worst_is_looked_for_among_other_texts_than_the_best() -> None:
    built = build([[("a", 1.0), ("a", 0.0), ("b", 0.5)]])
    assert [(p.chosen, p.rejected) for p in built.pairs] == [(0, 2)]


def test_missing_rewards_take_no_part() -> None:
    built = build([[("a", None), ("b", 3.0), ("c", 2.0)], [("a", None), ("b", 3.0)], []])
    assert [(p.group, p.chosen, p.rejected) for p in built.pairs] == [(0, 1, 2)]
    assert built.skipped == {"too_few_rewards": 2}


def test_ties_and_near_ties_are_dropped_and_counted() -> None:
    data = [[("a", 1.0), ("b", 1.0)], [("a", 1.0), ("b", 1.25)], [("a", 1.0), ("b", 1.5)]]
    assert [p.group for p in build(data).pairs] == [1, 2]
    built = build(data, threshold=0.25)
    assert [p.group for p in built.pairs] == [2]
    assert built.skipped == {"tie": 2}


def test_equal_texts_are_never_paired_even_if_their_rewards_differ() -> None:
    built = build([[("a", 1.0), ("a", 2.0)]])
    assert built.pairs == []
    assert built.skipped == {"identical": 1}


def test_soft_label_is_bradley_terry_on_raw_scores() -> None:
    # log-odds of 9:1 are log 9 = 2.1972246
    built = build_pairs([["a", "b"]], [[0.1, 0.2]], [[1.0, 3.1972246]], soft_labels=True)
    assert built.pairs[0].chosen_prob == pytest.approx(0.9, abs=1e-7)
    assert built.pairs[0].margin == pytest.approx(0.1)


def test_a_judge_declares_how_many_levels_make_a_logit() -> None:
    built = build_pairs([["a", "b"]], [[0.9, 0.1]], [[9.0, 3.0]], label_temperature=3.0)
    assert built.pairs[0].chosen_prob == pytest.approx(0.8807971, abs=1e-6)  # s(2)


def test_hard_labels_on_request() -> None:
    built = build_pairs([["a", "b"]], [[0.1, 0.2]], [[1.0, 1.5]], soft_labels=False)
    assert built.pairs[0].chosen_prob == 1.0


@given(a=st.floats(-1e4, 1e4), b=st.floats(-1e4, 1e4), temperature=st.floats(0.01, 100))
def test_soft_labels_of_a_pair_and_its_swap_are_complements(a: float, b: float, temperature: float) -> None:
    assert soft_label(a, b, temperature) + soft_label(b, a, temperature) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_label_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        soft_label(1.0, 0.0, temperature)
