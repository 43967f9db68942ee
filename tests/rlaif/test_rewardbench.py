"""RewardBench's sections, by hand."""

from __future__ import annotations

import pytest

from rlaif.published import BestOf
from rlaif.rewardbench import SECTIONS, best_of, names, sections


def test_weights_are_the_sizes_of_the_published_set_but_for_mathematics() -> None:
    counts = {subset: n for subsets in SECTIONS.values() for subset, n in subsets.items()}
    assert sum(counts.values()) - counts["math-prm"] + 447 == 2985  # rows of the published set
    assert counts["math-prm"] == sum(n for subset, n in counts.items() if subset.startswith("hep-"))


def test_sections_weigh_subsets_as_the_leaderboard_does_and_the_score_is_their_mean() -> None:
    right = {"alpacaeval-easy": [1, 0], "mt-bench-easy": [1], "math-prm": [0, 0, 0], "hep-go": [1, 0.5]}
    rows = [(r, subset) for subset, values in right.items() for r in values]
    found = {f["name"]: f for f in sections([r for r, _ in rows], [s for _, s in rows], resamples=50)}
    assert list(found) == ["Chat", "Reasoning", "score"]
    chat, reasoning = (0.5 * 100 + 1 * 28) / 128, (0 * 984 + 0.75 * 164) / (984 + 164)
    assert found["Chat"]["value"] == pytest.approx(chat)
    assert found["Reasoning"]["value"] == pytest.approx(reasoning)
    assert found["score"]["value"] == pytest.approx((chat + reasoning) / 2)
    assert (found["Chat"]["pairs"], found["score"]["pairs"]) == (3, 8)
    assert found["Chat"]["missing"] == ["alpacaeval-length", "alpacaeval-hard", "mt-bench-med"]
    assert found["score"]["low"] < found["score"]["value"] < found["score"]["high"]


def test_other_sets_are_not_taken_for_rewardbench() -> None:
    assert names({"hep-go", "donotanswer"})
    assert not names({"hep-go", "mine"}) and not names(())


def test_best_of_several_a_right_answer_must_beat_every_wrong_one() -> None:
    won = {
        ("a", "Math"): [1, 1, 1],
        ("b", "Math"): [1, 0, 1],
        ("c", "Focus"): [1, 0.5, 0.5],  # level with two: one third
        ("d", "Focus"): [0, 0.5, 1],
        ("e", "Ties"): [1, 1, 1],
        ("f", "Math"): [1, 1],  # a pair is missing
    }
    rows = [(r, BestOf(name, 3), subset) for (name, subset), values in won.items() for r in values]
    right, questions, subsets = zip(*rows, strict=True)
    found = best_of(right, questions, subsets, groups=[q.id for q in questions], resamples=50)
    assert [(f["name"], f["answers"], f["value"]) for f in found] == [
        ("Focus", 2, pytest.approx(1 / 6)),
        ("Math", 2, 0.5),
        ("Ties", 1, 1.0),
        ("score", 4, pytest.approx((1 / 6 + 1 / 2) / 2)),
    ]
    assert found[3]["low"] < found[3]["value"] < found[3]["high"]
