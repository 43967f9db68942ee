"""Options of `rlaif label`: rules over labels, juries, aspects, rankings, replies that are used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlaif.cli import main
from tests.labeler.commands import label, pair, preferences, replies, report, scripted, write_lines

LOCKED = [{"probs": [0.9, 0.1]}]
"""A judge that always prefers number 1."""


def a_or_b(p: float) -> list[dict[str, Any]]:
    """A judge that gives the good one this probability, in either order."""
    return [
        {"user": r"(?s)RESPONSE 1 >>>\ngood", "probs": [p, 1 - p]},
        {"probs": [1 - p, p]},
    ]


def judge(tmp_path: Path, name: str, rules: list[dict[str, Any]]) -> str:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return scripted(folder, rules)


@pytest.mark.parametrize(("rule", "labels"), [("keep", [0.5]), ("tie", [0.5]), ("drop", [])])
def test_pairs_of_which_both_orders_prefer_one_position(
    tmp_path: Path, rule: str, labels: list[float]
) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    flags = ("--no-cot", "--ties", "keep", "--on_inconsistent", rule)
    assert label(scripted(tmp_path, LOCKED), data, tmp_path / "out", *flags) == 0
    assert [r["chosen_prob"] for r in preferences(tmp_path / "out")] == pytest.approx(labels)
    found = report(tmp_path / "out")
    assert (found["unlabelled"], found["same_position_rate"]) == ({}, 1.0)
    assert found["dropped"] == ({"both orders prefer the same position": 1} if rule == "drop" else {})
    assert (tmp_path / "out" / "dropped.parquet").exists() == (rule == "drop")


def test_a_tie_in_both_orders_is_agreement_and_not_inconsistent(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    flags = ("--no-cot", "--ties", "keep", "--on_inconsistent", "drop")
    assert label(scripted(tmp_path, [{"probs": [0.5, 0.5]}]), data, tmp_path / "out", *flags) == 0
    assert [r["chosen_prob"] for r in preferences(tmp_path / "out")] == [0.5]
    found = report(tmp_path / "out")
    assert (found["order_agreement"], found["same_position_rate"], found["first_share"]) == (1.0, 0.0, None)


def test_rows_that_cannot_be_used_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair(0), {"prompt": "alone"}, {"prompt": "alone too"}]
    data = write_lines(tmp_path / "p.jsonl", rows)
    assert label(scripted(tmp_path, a_or_b(0.9)), data, tmp_path / "out", "--no-cot") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: 2 rows cannot be used") and line.endswith("quarantine.jsonl")


def test_clamped_labels_keep_what_the_judge_said_beside_them(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0), pair(1, "bad", "good")])
    assert (
        label(scripted(tmp_path, a_or_b(0.95)), data, tmp_path / "out", "--no-cot", "--clamp", "0.4", "0.6")
        == 0
    )
    for row in preferences(tmp_path / "out"):
        assert (row["chosen_prob"], row["chosen_prob_raw"]) == (0.6, pytest.approx(0.95))
        assert row["chosen"][0]["content"].startswith("good")


def test_another_rule_over_the_same_replies_asks_nothing(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(i) for i in range(3)])
    ref = scripted(tmp_path, a_or_b(0.9))
    assert label(ref, data, tmp_path / "out", "--no-cot") == 0
    assert (
        label(ref, data, tmp_path / "out", "--no-cot", "--combine", "mean_logit", "--clamp", "0.3", "0.7")
        == 0
    )
    assert replies(tmp_path / "out") == 6
    assert {r["chosen_prob"] for r in preferences(tmp_path / "out")} == {0.7}


def test_a_first_attempt_without_a_reply_does_not_claim_the_directory(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    ref = scripted(tmp_path, a_or_b(0.9))
    assert label(ref, tmp_path / "none.jsonl", tmp_path / "out", "--no-cot") == 3
    assert label("openai:x@http://127.0.0.1:9/v1", data, tmp_path / "out", "--max_retries", "0") == 5
    assert label(ref, data, tmp_path / "out", "--no-cot") == 0
    assert label(ref, data, tmp_path / "out") == 7, "from here on there is something to protect"


def test_labels_that_the_judge_hardly_gave_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    rules = [{"user": r"(?s)RESPONSE 1 >>>\ngood", "probs": [0.009, 0.001]}, {"probs": [0.001, 0.009]}]
    assert label(scripted(tmp_path, rules), data, tmp_path / "out", "--no-cot") == 0
    assert "hold 0.01 of the judge's probability" in capsys.readouterr().err


def test_replies_of_another_run_are_used_again(tmp_path: Path) -> None:
    ref = scripted(tmp_path, a_or_b(0.9))
    small = write_lines(tmp_path / "small.jsonl", [pair(i) for i in range(3)])
    large = write_lines(tmp_path / "large.jsonl", [pair(i) for i in range(5)])
    assert label(ref, small, tmp_path / "small", "--no-cot") == 0
    assert label(ref, large, tmp_path / "large", "--no-cot", "--reuse", str(tmp_path / "small")) == 0
    assert len(preferences(tmp_path / "large")) == 5
    assert replies(tmp_path / "large") == 2 * 2, "three pairs were known"


def test_a_jury_records_every_vote_and_withholds_the_missing_one(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    refs = [
        judge(tmp_path, "a", a_or_b(0.9)),
        judge(tmp_path, "b", a_or_b(0.6)),
        judge(tmp_path, "c", [{"fail": "down"}]),
    ]
    command = ["label", "pairs", "--judge", *refs, "--dataset", str(data), "--no-cot"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    (row,) = preferences(tmp_path / "out")
    assert row["chosen_prob"] == pytest.approx(0.75)
    assert [v["chosen_prob"] for v in row["votes"]] == [pytest.approx(0.9), pytest.approx(0.6), None]
    assert report(tmp_path / "out")["missing_votes"] == 1


def test_several_rubrics_are_aspects_and_the_score_is_their_mean(tmp_path: Path) -> None:
    rules = [
        {"user": "(?i)honest", "probs": [0.0, 0.0, 0.0, 1.0, 0.0]},
        {"probs": [0.0, 1.0, 0.0, 0.0, 0.0]},
    ]
    data = write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "response": "fine"}])
    flags = ("--rubric", "instruction-following-score", "honesty-score")
    assert label(scripted(tmp_path, rules), data, tmp_path / "out", *flags, kind="scores") == 0
    (row,) = pq.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert [(a["rubric"], a["score"]) for a in row["aspects"]] == [
        ("instruction-following-score", 2.0),
        ("honesty-score", 4.0),
    ]
    assert row["score"] == 3.0
    found = report(tmp_path / "out")
    assert found["aspect_means"] == {"instruction-following-score": 2.0, "honesty-score": 4.0}
    assert found["label_mass_mean"] == pytest.approx(1.0)


def test_a_missing_aspect_leaves_the_response_without_a_score(tmp_path: Path) -> None:
    rules = [{"user": "(?i)honest", "fail": "down"}, {"probs": [0.2] * 5}]
    data = write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "response": "fine"}])
    flags = ("--rubric", "instruction-following-score", "honesty-score", "--max_unlabelled", "1")
    assert label(scripted(tmp_path, rules), data, tmp_path / "out", *flags, kind="scores") == 0
    assert pq.read_table(tmp_path / "out" / "scores.parquet").num_rows == 0
    assert json.loads((tmp_path / "out" / "unlabelled.jsonl").read_text())["reason"] == "down"


GRADES = ["good", "fair", "poor"]


def ranking_judge(tmp_path: Path) -> str:
    rules = [
        {"user": f"(?s)RESPONSE 1 >>>\n{GRADES[i]}.*RESPONSE 2 >>>\n{GRADES[j]}", "probs": [p, 1 - p]}
        for i in range(3)
        for j in range(3)
        if i != j
        for p in [0.5 + 0.2 * (j - i)]
    ]
    return scripted(tmp_path, rules)


def test_ranking_orders_the_responses_and_the_models_that_wrote_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {
            "prompt": f"q{i}",
            "completions": [
                {"response": f"{grade} {i}", "model": f"hf:{grade}-model"}
                for grade in ("poor", "good", "fair")
            ],
        }
        for i in range(4)
    ]
    data = write_lines(tmp_path / "c.jsonl", rows)
    assert label(ranking_judge(tmp_path), data, tmp_path / "out", "--no-cot", kind="rank") == 0
    ranked = pq.read_table(tmp_path / "out" / "rankings.parquet").to_pylist()
    assert [[r["response"].split()[0] for r in row["ranking"]] for row in ranked] == [GRADES] * 4
    assert [r["rank"] for r in ranked[0]["ranking"]] == [1, 2, 3]
    assert len(preferences(tmp_path / "out")) == 4 * 3
    board = report(tmp_path / "out")["leaderboard"]
    assert [s["name"] for s in board] == ["hf:good-model", "hf:fair-model", "hf:poor-model"]
    # By hand: good beats fair at 0.7 and poor at 0.9, in four prompts.
    assert board[0]["win_rate"] == pytest.approx(0.8, abs=1e-6)
    assert "1. hf:good-model" in capsys.readouterr().out


def test_models_that_wrote_the_same_response_share_its_games_and_tie(tmp_path: Path) -> None:
    """One prompt: A and B wrote the good one, C the poor one, which loses at 0.9; another: all wrote the same."""
    said = {"A": "good", "B": "good", "C": "poor"}
    rows = [
        {"prompt": "q0", "completions": [{"response": text, "model": name} for name, text in said.items()]},
        {"prompt": "q1", "completions": [{"response": "fair", "model": name} for name in said]},
    ]
    data = write_lines(tmp_path / "c.jsonl", rows)
    assert label(ranking_judge(tmp_path), data, tmp_path / "out", "--no-cot", kind="rank") == 0
    board = {s["name"]: s for s in report(tmp_path / "out")["leaderboard"]}
    # A: ties with B twice and with C once, and beats C at 0.9. C: two ties and two losses at 0.1.
    assert (
        board["A"]["win_rate"]
        == board["B"]["win_rate"]
        == pytest.approx((0.5 + 0.5 + 0.5 + 0.9) / 4, abs=1e-6)
    )
    assert board["C"]["win_rate"] == pytest.approx((0.5 + 0.5 + 0.1 + 0.1) / 4, abs=1e-6)
    assert {s["comparisons"] for s in board.values()} == {4}
    (ranked,) = pq.read_table(tmp_path / "out" / "rankings.parquet").to_pylist()
    assert [entry["model"] for entry in ranked["ranking"]] == ["A + B", "C"]


def test_a_judge_of_the_policys_family_is_named_before_it_is_paid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "qwen3"
    folder.mkdir()
    judge_file = folder / "qwen3-judge.yaml"
    Path(scripted(tmp_path, a_or_b(0.9)).removeprefix("scripted:")).rename(judge_file)
    row = {
        "prompt": "q",
        "completions": [{"response": r, "model": "hf:Qwen/Qwen2.5-7B"} for r in ("good", "bad")],
    }
    data = write_lines(tmp_path / "c.jsonl", [row])
    assert label(f"scripted:{judge_file}", data, tmp_path / "out", "--no-cot") == 0
    assert "both of the Qwen family" in capsys.readouterr().err
    assert len(report(tmp_path / "out")["lineage"]) == 1


def test_ranking_needs_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    assert label(ranking_judge(tmp_path), data, tmp_path / "out", kind="rank") == 3
    assert "no candidates" in capsys.readouterr().err


def test_policies_take_turns(tmp_path: Path) -> None:
    policies = [judge(tmp_path, name, [{"text": f"by {name}"}]) for name in ("a", "b")]
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    command = ["sample", "--model_name_or_path", *policies, "--dataset", str(data)]
    assert main([*command, "--num_return_sequences", "4", "--output_dir", str(tmp_path / "out")]) == 0
    (row,) = pq.read_table(tmp_path / "out" / "candidates.parquet").to_pylist()
    assert [c["response"] for c in row["completions"]] == ["by a", "by b", "by a", "by b"]
    assert len({c["model"] for c in row["completions"]}) == 2


def test_fewer_responses_than_policies_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = [judge(tmp_path, name, [{"text": f"by {name}"}]) for name in ("a", "b")]
    data = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "q"}])
    command = ["sample", "--model_name_or_path", *policies, "--dataset", str(data)]
    assert main([*command, "--num_return_sequences", "1", "--output_dir", str(tmp_path / "out")]) == 2
    assert "one for each of 2" in capsys.readouterr().err


def test_aspects_on_different_scales_have_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "r.jsonl", [{"prompt": "q", "response": "fine"}])
    flags = ("--rubric", "helpfulness-score", "honesty-score")
    assert label(scripted(tmp_path), data, tmp_path / "out", *flags, kind="scores") == 2
    assert "a mean needs one scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--clamp", "0.4", "0.7"), "add up to 1"),
        (("--num_rationales", "4"), "--rationale_temperature"),
        (("--quorum", "2"), "there are 1 judges"),
        (("--rubric", "helpfulness-score"), "needs a pair rubric"),
        (("--preamble", "florid"), "no preamble 'florid'"),
    ],
    ids=["clamp", "rationales", "quorum", "rubric", "preamble"],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str
) -> None:
    data = write_lines(tmp_path / "p.jsonl", [pair(0)])
    assert label(scripted(tmp_path), data, tmp_path / "out", *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
