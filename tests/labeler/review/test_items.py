"""A row as it is reviewed: its order tells nothing, its label is turned with it, its suspicions are validated ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labeler.review.index import Index, Query
from labeler.review.items import Item, load_items, mode_of, shape_of
from labeler.review.suspicion import find
from labeler.validation import Validation
from rlaif.errors import ConfigError, DataError
from rlaif.records import Quarantine
from tests.labeler.commands import write_lines


def loaded(tmp_path: Path, *rows: dict[str, Any]) -> list[Item]:
    path = str(write_lines(tmp_path / "rows.jsonl", list(rows)))
    return list(load_items(path, shape_of(path, None)[0], Quarantine(None)))


def ours(prompt: str = "p", chosen: str = "yes", rejected: str = "no", **more: Any) -> dict[str, Any]:
    """A row of `rlaif label pairs`, whose input had the rejected response first."""
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_prob": 0.7,
        "chosen_is_a": False,
        "chosen_prob_first": 0.9,
        "chosen_prob_second": 0.4,
        "label_mass_ab": 0.95,
        "label_mass_ba": 0.25,
        "rationale_ab": "Response 2 is better.",
        "rationale_ba": "Both are fine.",
        "human_chosen_prob": 1.0,
        "judge": "j",
        "rubric_hash": "h",
        "votes": [],
        **more,
    }


def test_a_label_is_turned_with_its_responses(tmp_path: Path) -> None:
    for i in range(8):  # by chance, some have the chosen response first
        (item,) = loaded(tmp_path, ours(f"question {i}"))
        chosen = item.responses.index("yes")
        assert item.label is not None
        assert item.label.prefers(chosen, 1 - chosen) == pytest.approx(0.7)
        assert item.label.prefers(1 - chosen, chosen) == pytest.approx(0.3)
        assert item.label.people == (1.0 if chosen == 0 else 0.0)
        ab, ba = item.label.opinions
        # The input's first response was the rejected one, so order ab showed it as number 1.
        assert (ab.order, ab.shown, ab.rationale) == ("ab", (1 - chosen, chosen), "Response 2 is better.")
        assert (ab.p_first, ab.mass) == (pytest.approx(0.6), 0.95)  # P(chosen) shown second is 0.4
        assert (ba.order, ba.shown, ba.p_first, ba.mass) == ("ba", (chosen, 1 - chosen), 0.9, 0.25)


def test_places_come_from_the_texts_and_not_from_the_label(tmp_path: Path) -> None:
    rows = [ours(f"question {i}") for i in range(200)]
    swapped = [ours(f"question {i}", "no", "yes") for i in range(200)]
    one, other = loaded(tmp_path, *rows), loaded(tmp_path, *swapped)
    assert [(i.key, i.responses) for i in one] == [(i.key, i.responses) for i in other]
    first = sum(item.responses[0] == "yes" for item in one)
    assert 70 < first < 130  # a coin's 200 throws, 4 standard deviations


def test_suspicion_is_that_of_the_validation_report(tmp_path: Path) -> None:
    row = ours(
        chosen="long " * 100, chosen_prob=0.95, chosen_prob_second=0.1, chosen_prob_first=0.99, truncated=True
    )
    (item,) = loaded(tmp_path, row)
    with Validation() as validation:
        suspect = validation.add(row)
    assert suspect is not None
    assert item.findings == suspect.findings and len(item.findings) == 5
    assert Index([item]).suspicion[0] == pytest.approx(suspect.suspicion)


def test_labels_of_other_tools_and_pairs_without_a_label_are_reviewed_too(tmp_path: Path) -> None:
    gold, bare = loaded(
        tmp_path,
        {"instruction": "q", "output_1": "a", "output_2": "b", "label": 2, "subset": "Manual"},
        {"prompt": "q", "response_a": "same words here", "response_b": "same words  here"},
    )
    assert gold.label is not None and gold.label.values[gold.responses.index("b")] == 1.0
    assert gold.subset == "Manual"
    assert bare.label is None and [f.check for f in bare.findings] == ["near_identical"]


def test_a_column_of_ours_with_another_content_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: column label_mass_ab holds 'much'"):
        loaded(tmp_path, ours(label_mass_ab="much"))
    (item,) = loaded(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b", "label_mass_ab": "much"})
    assert item.label is not None and item.label.opinions == ()


def test_rankings_scores_and_candidates_have_their_modes(tmp_path: Path) -> None:
    ranked = {
        "prompt": "q",
        "comparisons": 3,
        "ranking": [
            {"response": r, "model": "m", "rank": i, "strength": s}
            for i, (r, s) in enumerate([("best", 1.0), ("mid", 0.0), ("worst", None)], 1)
        ],
    }
    (item,) = loaded(tmp_path, ranked)
    best, mid, worst = (item.responses.index(r) for r in ("best", "mid", "worst"))
    assert item.label is not None
    assert item.label.prefers(best, mid) == pytest.approx(0.7310585786)  # the logistic function at 1
    assert item.label.prefers(best, worst) is None
    assert mode_of("rankings", None) == "ranking"

    (scored,) = loaded(tmp_path, {"prompt": "q", "response": "r", "score": 7.5, "label_mass": 0.1})
    assert scored.label is not None and scored.label.values == (7.5,)
    assert mode_of("scores", None) == "grades"
    with pytest.raises(ConfigError, match="does not suit scores"):
        mode_of("scores", "preference")

    (bare,) = loaded(
        tmp_path, {"prompt": "q", "responses": ["a", "b", "a"]}, {"prompt": "q", "responses": ["a"]}
    )
    assert sorted(bare.responses) == ["a", "b"] and bare.label is None


def test_low_mass_of_a_score_is_suspicious() -> None:
    assert [f.check for f in find({"label_mass_ab": 0.1, "truncated": True})] == [
        "low_label_mass",
        "truncated",
    ]


def test_rows_are_ordered_and_found(tmp_path: Path) -> None:
    rows = [
        ours("Plain"),
        ours("STRASSE of the first", chosen_prob=0.52, subset="Manual"),
        ours("contradiction", chosen_prob_second=0.05),
        ours("Plain"),
    ]
    index = Index(loaded(tmp_path, *rows))

    everything = np.ones(4, dtype=np.bool_)

    def positions(**asked: Any) -> list[int]:
        return index.select(Query(**asked), everything, None).tolist()

    assert positions(order="dataset") == [0, 1, 2, 3]
    assert positions()[0] == 2  # 0.85 apart, beside the low mass that all have
    assert positions(order="unsure")[0] == 1
    assert positions(q="straße FIRST") == [1]  # without regard to case
    assert positions(q="first plain") == positions(q="f_rst") == positions(q="%") == []
    assert positions(reason="duplicate") == [3]
    assert positions(subset="Manual") == [1] and positions(subset="none") == []
    assert sorted(positions(order="random")) == [0, 1, 2, 3]
    chosen = index.select(Query(order="dataset", q="plain"), everything, None)
    assert [index.following(Query(order="dataset"), chosen, at, 1) for at in range(4)] == [3, 3, 3, None]
    assert [index.following(Query(order="dataset"), chosen, at, -1) for at in range(4)] == [None, 0, 0, 0]
