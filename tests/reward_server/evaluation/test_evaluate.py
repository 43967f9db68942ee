"""`rlaif eval rm` from files to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from reward_server.evaluation.evaluate import measure, score
from reward_server.scorers.base import Failure, Prepared, Scored
from rlaif.cli import main
from rlaif.errors import QualityError
from rlaif.types import PreferenceRow, user_prompt, with_response
from tests.reward_server import tiny
from tests.reward_server.fakes import LengthScorer
from tests.reward_server.training.test_train import polite_rows, write


def evaluate(*arguments: object) -> int:
    return main(["eval", "rm", *map(str, arguments)])


def test_a_model_of_somebody_else_is_measured_by_subset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save_classifier(tmp_path / "model")
    rows = [{**row, "source": "odd" if i % 2 else "even"} for i, row in enumerate(polite_rows(30))]
    dataset = write(tmp_path / "pairs.jsonl", rows)
    out = tmp_path / "out"
    flags = ("--model", model, "--dataset", dataset, "--output_dir", out)
    assert evaluate(*flags, "--subset_column", "source") == 0
    found = json.loads((out / "metrics.json").read_text())
    assert [(s["name"], s["pairs"]) for s in found["subsets"]] == [("even", 15), ("odd", 15)]
    assert 0 <= found["accuracy"]["low"] <= found["accuracy"]["value"] <= found["accuracy"]["high"] <= 1
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert evaluate(*flags, "--subset_column", "nowhere") == 3
    assert "no row of" in capsys.readouterr().err
    assert evaluate("--model", tmp_path / "none", "--dataset", dataset, "--output_dir", tmp_path / "o2") == 4


def test_responses_with_scores_are_measured_too(tmp_path: Path) -> None:
    model = tiny.save_classifier(tmp_path / "model")
    rows = [{"prompt": f"p{i % 5}", "response": "r" * i, "score": float(i)} for i in range(1, 20)]
    out = tmp_path / "out"
    dataset = write(tmp_path / "scores.jsonl", rows)
    assert evaluate("--model", model, "--dataset", dataset, "--output_dir", out) == 0
    found = json.loads((out / "metrics.json").read_text())
    assert found["scores"]["answers"] == 19
    assert found["scores"]["rmse"] is None  # not trained on this scale


def test_a_response_without_a_score_leaves_its_row_out_and_is_counted() -> None:
    rows = [PreferenceRow(user_prompt(p), "a", "b") for p in ("one", "two")]
    outcomes = {with_response(r.prompt, t): Scored(1.0 if t == "a" else 0.0, 3) for r in rows for t in "ab"}
    outcomes |= {with_response(rows[0].prompt, "b"): Failure("too_long", "too many tokens")}  # type: ignore[dict-item]
    found = measure(rows, outcomes)
    assert found["without_score"] == {"too many tokens": 1}
    assert (found["pairs"], found["accuracy"]["value"]) == (1, 1.0)
    with pytest.raises(QualityError, match="too many tokens"):
        measure(rows[:1], outcomes)


def test_an_evaluation_whose_batches_cannot_be_computed_ends_with_the_reason() -> None:
    class Unplannable(LengthScorer):
        def cost(self, batch: Sequence[Prepared]) -> int:
            raise ValueError("this batch has no plan")

    wanted = [with_response(user_prompt("q"), text) for text in ("a", "b")]
    with pytest.raises(ValueError, match="no plan"):
        score(Unplannable(), wanted, 100)
