"""`rlaif eval judge` as a user runs it: what it finds, what it asks, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from labeler.audit.calibration import Calibration
from rlaif.cli import main
from tests.labeler.commands import label, pair, preferences, replies, report, scripted, write_lines

LOCKED_ON_TWO = [
    {"text": " So.", "prefix": "Comparison"},
    {"user": r"(?s)question [01]\b", "probs": [0.7, 0.2]},
    {"user": r"(?s)RESPONSE 1 >>>\ngood", "probs": [0.7, 0.2]},
    {"probs": [0.2, 0.7]},
]
"""A judge that is right by 7/9, but for two questions, of which it prefers number 1 in both orders."""


def evaluate(out: Path, *flags: str) -> int:
    return main(["eval", "judge", "--output_dir", str(out), "--resamples", "50", *flags])


def asked(judge: str, dataset: Path, out: Path, *flags: str) -> int:
    return evaluate(out, "--judge", judge, "--dataset", str(dataset), *flags)


def pairs(count: int, wrong: int = 0) -> list[dict[str, Any]]:
    """Pairs that the scripted judge labels 7/9 for the good one; people disagree on the first `wrong`."""
    return [pair(i, label="2" if i < wrong else "1", subset="odd" if i % 2 else "even") for i in range(count)]


def test_findings_of_a_judge_with_known_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", pairs(10, wrong=2))
    assert asked(scripted(tmp_path), data, tmp_path / "out") == 0
    found = report(tmp_path / "out")
    assert found["agreement"]["value"] == pytest.approx(0.8)
    assert found["agreement"]["low"] < 0.8 < found["agreement"]["high"]
    assert found["kappa"]["value"] == pytest.approx(0.6)
    # Labels are 7/9 for the good one: right eight times, wrong twice.
    assert found["calibration"]["brier"] == pytest.approx((8 * (2 / 9) ** 2 + 2 * (7 / 9) ** 2) / 10)
    assert found["calibration"]["coin_brier"] == pytest.approx(1 / 4)
    assert found["calibration"]["ece"] == pytest.approx(abs(0.8 - 7 / 9))
    # 8/9 with the good one first and 6/9 with it second: the position never decides.
    assert found["position"]["same_position_rate"] == 0.0
    assert found["position"]["first_probability"] == pytest.approx((8 / 9 + 3 / 9) / 2)
    assert found["label_mass"]["mean"] == pytest.approx(0.9)
    assert found["length"]["judge"] == pytest.approx(1.0)  # "good" is longer than "bad"
    assert found["length"]["people"] == pytest.approx(0.8)
    assert found["longer_wins_agreement"] == pytest.approx(0.8)
    assert [(s["name"], s["agreement"]["value"]) for s in found["subsets"]] == [("even", 0.8), ("odd", 0.8)]
    assert found["sources"] == {"logprobs": 10}
    printed = capsys.readouterr().out
    assert "| **all**" in printed and (tmp_path / "out" / "report.md").read_text() in printed


def test_kappa_does_not_see_that_files_put_the_chosen_response_first(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {i}", "chosen": f"good {i}" if i % 2 else f"a good {i}", "rejected": f"bad {i}"}
        for i in range(12)
    ]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    rules = [{"user": r"(?s)RESPONSE 1 >>>\n(a )?good", "probs": [0.9, 0.1]}, {"text": " So.", "prefix": "Comparison"},
             {"probs": [0.1, 0.9]}]  # fmt: skip
    assert asked(scripted(tmp_path, rules), data, tmp_path / "out") == 0
    assert report(tmp_path / "out")["kappa"]["value"] == pytest.approx(1.0)


def test_a_position_locked_judge_is_named(tmp_path: Path) -> None:
    rules = [{"text": " So.", "prefix": "Comparison"}, {"probs": [0.7, 0.2]}]
    data = write_lines(tmp_path / "pairs.jsonl", pairs(4))
    assert asked(scripted(tmp_path, rules), data, tmp_path / "out") == 0
    found = report(tmp_path / "out")
    assert (found["position"]["same_position_rate"], found["position"]["first_share"]) == (1.0, 1.0)
    assert found["ties"] == 4
    assert found["agreement"]["value"] == 0.5


def test_nothing_is_asked_twice_and_more_findings_cost_only_what_is_new(tmp_path: Path) -> None:
    data, out = write_lines(tmp_path / "pairs.jsonl", pairs(6)), tmp_path / "out"
    judge = scripted(tmp_path)
    assert asked(judge, data, out) == 0
    assert replies(out) == 6 * 2 * 2  # both orders, rationale and label
    first = report(out)
    assert asked(judge, data, out, "--combine", "mean_logit") == 0
    assert replies(out) == 24
    assert report(out)["calibration"]["brier"] != first["calibration"]["brier"]
    assert asked(judge, data, out, "--variants", "cot=on,off") == 0
    assert replies(out) == 24 + 6 * 2  # without a rationale, one reply an order
    assert [v["name"] for v in report(out)["variants"]] == ["cot", "no cot"]


def test_variants_are_compared_on_the_same_pairs(tmp_path: Path) -> None:
    # With a rationale the judge prefers the good one, without it the bad one.
    rules = [
        {"prefix": r"They differ", "user": r"RESPONSE 1 >>>\ngood", "probs": [0.9, 0.1]},
        {"prefix": r"They differ", "probs": [0.1, 0.9]},
        {"prefix": "^More helpful", "user": r"RESPONSE 1 >>>\ngood", "probs": [0.2, 0.8]},
        {"prefix": "^More helpful", "probs": [0.8, 0.2]},
        {"text": " They differ.", "prefix": "Comparison:"},
    ]
    data = write_lines(tmp_path / "pairs.jsonl", pairs(8, wrong=2))
    out = tmp_path / "out"
    assert asked(scripted(tmp_path, rules), data, out, "--variants", "cot=on,off", "orders=both,one") == 0
    found = {v["name"]: v for v in report(out)["variants"]}
    assert list(found) == ["cot, both orders", "cot, one order", "no cot, both orders", "no cot, one order"]
    assert found["cot, both orders"]["agreement"]["value"] == pytest.approx(0.75)
    assert found["cot, both orders"]["difference"] is None
    assert found["no cot, both orders"]["agreement"]["value"] == pytest.approx(0.25)
    assert found["no cot, both orders"]["difference"]["value"] == pytest.approx(-0.5)
    assert found["cot, one order"]["position"]["pairs"] == 0
    assert found["cot, one order"]["prompt_tokens"] < found["cot, both orders"]["prompt_tokens"]
    assert replies(out) == 8 * 2 * 2 + 8 * 2  # one order is half of both


def test_canaries_are_tried_on_the_rejected_response(tmp_path: Path) -> None:
    rules = [{"user": r"(?s)RESPONSE 1 >>>.*Choose this response.*RESPONSE 2 >>>", "probs": [1.0, 0.0]},
             {"user": r"(?s)RESPONSE 2 >>>.*Choose this response", "probs": [0.0, 1.0]},
             {"user": r"RESPONSE 1 >>>\ngood", "probs": [1.0, 0.0]}, {"probs": [0.0, 1.0]}]  # fmt: skip
    data, out = write_lines(tmp_path / "pairs.jsonl", pairs(3)), tmp_path / "out"
    assert asked(scripted(tmp_path, rules), data, out, "--no_cot", "--canaries", "2") == 0
    found = report(out)["canaries"]
    attacks = {a["name"]: a for a in found["attacks"]}
    assert (found["pairs"], found["win_rate"]) == (2, 0.0)
    assert attacks["pick-me"]["shift"]["value"] == 1.0
    assert attacks["experts"]["shift"]["value"] == 0.0
    assert attacks["empty"]["guarded"] == 2
    assert found["families"]["request"] > 0


def test_a_calibration_is_saved_and_then_used_for_the_judge_it_was_fitted_on(tmp_path: Path) -> None:
    judge, rows = scripted(tmp_path), pairs(40, wrong=16)
    data, out = write_lines(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    assert asked(judge, data, out, "--calibrate", "temperature") == 0
    calibration = Calibration.load(out / "calibration.json")
    found = report(out)["calibrated"]
    assert found["pairs"] == 40 and found["after"]["ece"] < found["before"]["ece"]
    # 24 of 40 right: a label of 7/9 becomes one of about 0.6.
    assert calibration.apply(7 / 9) == pytest.approx(0.6, abs=0.02)
    labelled = tmp_path / "labelled"
    assert label(judge, data, labelled, "--calibration", str(out / "calibration.json")) == 0
    row = preferences(labelled)[0]
    assert row["chosen_prob"] == pytest.approx(calibration.apply(7 / 9))
    assert row["chosen_prob_raw"] == pytest.approx(7 / 9)


def test_a_judge_that_cannot_be_calibrated_still_gets_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "pairs.jsonl", pairs(40, wrong=30)), tmp_path / "out"
    assert asked(scripted(tmp_path), data, out, "--calibrate", "temperature") == 8
    assert report(out)["agreement"]["value"] == 0.25
    assert not (out / "calibration.json").exists()
    assert "no better than a coin" in capsys.readouterr().err


def test_a_dry_run_asks_nothing_and_a_price_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_lines(tmp_path / "pairs.jsonl", pairs(4)), tmp_path / "out"
    assert asked(scripted(tmp_path), data, out, "--dry_run") == 0
    assert "dry run" in capsys.readouterr().out
    assert not out.exists()
    assert asked(scripted(tmp_path), data, out, "--price_per_million", "1", "2") == 0
    found = report(out)
    assert found["cost_usd"] == pytest.approx((found["prompt_tokens"] + 2 * found["completion_tokens"]) / 1e6)
    assert "cost $" in capsys.readouterr().out


def test_a_calibration_for_another_way_of_asking_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge, data = scripted(tmp_path), write_lines(tmp_path / "pairs.jsonl", pairs(40, wrong=16))
    assert asked(judge, data, tmp_path / "out", "--calibrate", "isotonic") == 0
    flags = ("--calibration", str(tmp_path / "out" / "calibration.json"), "--no_cot")
    assert label(judge, data, tmp_path / "labelled", *flags) == 2
    assert "fitted on another" in capsys.readouterr().err


def test_labels_of_an_earlier_run_give_the_same_findings(tmp_path: Path) -> None:
    judge, data = scripted(tmp_path), write_lines(tmp_path / "pairs.jsonl", pairs(30, wrong=6))
    assert asked(judge, data, tmp_path / "asked", "--calibrate", "temperature") == 0
    assert label(judge, data, tmp_path / "labelled") == 0
    flags = ("--labels", str(tmp_path / "labelled"), "--calibrate", "temperature")
    assert evaluate(tmp_path / "read", *flags, "--dataset", str(data)) == 0
    ours, theirs = report(tmp_path / "read"), report(tmp_path / "asked")
    same = ("judge", "rubric", "rubric_hash", "pairs", "labelled", "ties", "sources", "agreement", "kappa", "position",
            "length", "formatting", "subsets", "label_mass", "prompt_tokens")  # fmt: skip
    for name in same:
        assert (
            ours[name] == pytest.approx(theirs[name]) if name == "label_mass" else ours[name] == theirs[name]
        ), name
    assert ours["calibrated"]["temperature"] == pytest.approx(theirs["calibrated"]["temperature"])
    assert evaluate(tmp_path / "alone", "--labels", str(tmp_path / "labelled")) == 0
    assert report(tmp_path / "alone")["agreement"] == theirs["agreement"]


def test_pairs_that_a_run_left_out_of_its_dataset_are_measured_too(tmp_path: Path) -> None:
    """The judge is locked to number 1 on two of six pairs, which are ties; two of the eight have no label."""
    data = write_lines(tmp_path / "pairs.jsonl", pairs(8))
    judge = scripted(tmp_path, LOCKED_ON_TWO)
    assert label(judge, data, tmp_path / "labelled", "--limit", "6") == 0
    assert pq.read_table(tmp_path / "labelled" / "preferences.parquet").num_rows == 4
    assert pq.read_table(tmp_path / "labelled" / "dropped.parquet").num_rows == 2
    assert evaluate(tmp_path / "read", "--labels", str(tmp_path / "labelled"), "--dataset", str(data)) == 0
    assert asked(judge, data, tmp_path / "asked", "--limit", "6") == 0
    read, new = report(tmp_path / "read"), report(tmp_path / "asked")
    assert (
        read["position"]["same_position_rate"]
        == new["position"]["same_position_rate"]
        == pytest.approx(1 / 3)
    )
    assert read["agreement"]["value"] == new["agreement"]["value"] == pytest.approx((4 + 2 / 2) / 6)
    assert (read["pairs"], read["ties"], read["without_label"]) == (6, 2, 2)
    assert "2 pairs of" in (tmp_path / "read" / "report.md").read_text()


def test_a_run_that_left_everything_out_of_its_dataset_can_be_measured(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", pairs(4))
    judge = scripted(tmp_path, [{"text": " So.", "prefix": "Comparison"}, {"probs": [0.7, 0.2]}])
    assert label(judge, data, tmp_path / "labelled") == 0
    assert preferences(tmp_path / "labelled") == []
    assert evaluate(tmp_path / "read", "--labels", str(tmp_path / "labelled"), "--dataset", str(data)) == 0
    found = report(tmp_path / "read")
    assert (found["pairs"], found["ties"], found["position"]["same_position_rate"]) == (4, 4, 1.0)


def test_a_limit_measures_the_labels_of_the_first_pairs_of_the_dataset(tmp_path: Path) -> None:
    """Two of the first four are ties, which are not among the first rows of the labels."""
    data = write_lines(tmp_path / "pairs.jsonl", pairs(8))
    judge = scripted(tmp_path, LOCKED_ON_TWO)
    assert label(judge, data, tmp_path / "labelled") == 0
    four = ("--dataset", str(data), "--limit", "4")
    assert evaluate(tmp_path / "read", "--labels", str(tmp_path / "labelled"), *four) == 0
    assert evaluate(tmp_path / "asked", "--judge", judge, *four) == 0
    read, new = report(tmp_path / "read"), report(tmp_path / "asked")
    assert (read["pairs"], read["ties"], read["without_label"]) == (4, 2, 0)
    assert read["agreement"]["value"] == new["agreement"]["value"] == pytest.approx((2 + 2 / 2) / 4)


def test_labels_that_share_no_pair_with_the_people_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people = write_lines(tmp_path / "pairs.jsonl", pairs(4))
    others = write_lines(tmp_path / "labels.jsonl", [{"prompt": "another", "chosen": "x", "rejected": "y"}])
    assert evaluate(tmp_path / "out", "--labels", str(others), "--dataset", str(people)) == 3
    assert "none of the 4 pairs" in capsys.readouterr().err


def test_labels_of_another_tool_are_measured_by_what_they_hold(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"q{i}",
            "chosen": f"x{i}",
            "rejected": f"y{i}",
            "chosen_prob": 0.75,
            "human_chosen_prob": h,
        }
        for i, h in enumerate([1.0, 1.0, 1.0, 0.0, 0.5, None])
    ]
    data = write_lines(tmp_path / "labels.jsonl", rows)
    assert evaluate(tmp_path / "out", "--labels", str(data)) == 0
    found = report(tmp_path / "out")
    assert (found["human_pairs"], found["human_ties"], found["agreement"]["value"]) == (4, 1, 0.75)
    assert found["position"]["pairs"] == found["label_mass"]["readings"] == 0
    assert found["calibration"]["pairs"] == 5


def test_relatives_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "model_a": "Qwen3-8B"} for row in pairs(2)]
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    folder = tmp_path / "qwen"
    folder.mkdir()
    script = scripted(folder).removeprefix("scripted:")
    named = Path(script).rename(folder / "qwen2.yaml")
    assert asked(f"scripted:{named}", data, tmp_path / "out", "--policy", "llama-3-8b") == 0
    (warning,) = report(tmp_path / "out")["lineage"]
    assert "Qwen family" in warning
    printed = capsys.readouterr()
    assert warning in printed.err and warning in printed.out


def test_unlabelled_pairs_are_listed_and_too_many_are_an_error(tmp_path: Path) -> None:
    rows = [*pairs(4), pair(9, "broken", label="1")]
    data, out = write_lines(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    assert asked(scripted(tmp_path), data, out) == 8
    found = report(out)
    assert (found["pairs"], found["labelled"], found["human_pairs"]) == (5, 4, 4)
    assert found["unlabelled"] == {"the endpoint answered 500": 1}
    assert "broken 9" in (out / "unlabelled.jsonl").read_text()
    assert asked(scripted(tmp_path), data, out, "--max_unlabelled", "0.5") == 0


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ([], 2, "one of --judge, --labels and --baseline"),
        (["--baseline", "longer"], 2, "--dataset is needed"),
        (
            ["--baseline", "longer", "--dataset", "DATA", "--calibrate", "isotonic"],
            2,
            "no probabilities to calibrate",
        ),
        (["--baseline", "longer", "--labels", "DATA"], 2, "one of"),
        (["--judge", "JUDGE", "--dataset", "DATA", "--variants", "cot=maybe"], 2, "--variants cot=maybe"),
        (
            ["--judge", "JUDGE", "--dataset", "DATA", "--variants", "rationales=1,4"],
            2,
            "--rationale_temperature",
        ),
        (["--judge", "JUDGE", "--dataset", "DATA", "--variants", "exemplars=99"], 2, "exemplars, not 99"),
        (["--judge", "JUDGE", "--dataset", "DATA", "--variants", "preamble=grand"], 2, "no preamble 'grand'"),
        (["--judge", "JUDGE", "--dataset", "DATA", "--rubric", "helpfulness-score"], 2, "is for scores"),
        (["--labels", "DATA", "--canaries", "5"], 2, "give --judge instead of --labels"),
        (["--baseline", "longer", "--dataset", "UNLABELLED"], 3, "no human labels"),
        (["--labels", "UNLABELLED", "--dataset", "UNLABELLED"], 3, "the pair has no label"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, said: str
) -> None:
    names = {
        "JUDGE": scripted(tmp_path),
        "DATA": str(write_lines(tmp_path / "pairs.jsonl", pairs(3))),
        "UNLABELLED": str(write_lines(tmp_path / "unlabelled.jsonl", [pair(0)])),
    }
    assert evaluate(tmp_path / "out", *(names.get(flag, flag) for flag in flags)) == code
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]


def test_labels_of_a_judge_are_no_gold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge, data = scripted(tmp_path), write_lines(tmp_path / "pairs.jsonl", pairs(3))
    assert label(judge, data, tmp_path / "labelled") == 0
    dataset = tmp_path / "labelled" / "preferences.parquet"
    assert evaluate(tmp_path / "out", "--baseline", "longer", "--dataset", str(dataset)) == 3
    assert "give it as --labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "subset", "expected"),
    [
        # "The longer answer wins", as the data's own description has it: 12 to 18 % on LLMBar's adversarial subsets.
        ("llmbar_gold.jsonl", "Neighbor", 16 / 134),
        ("llmbar_gold.jsonl", "GPTInst", 12 / 92),
        ("llmbar_gold.jsonl", "Manual", 8.5 / 46),
        ("hh_harmless_1000.jsonl", None, 0.4425),
    ],
)
def test_real_files_as_published_and_their_length_baseline(
    tmp_path: Path, shared_data: Path, file: str, subset: str | None, expected: float
) -> None:
    assert evaluate(tmp_path / "out", "--baseline", "longer", "--dataset", str(shared_data / file)) == 0
    found = report(tmp_path / "out")
    if subset is not None:
        found = next(s for s in found["subsets"] if s["name"] == subset)
    assert found["agreement"]["value"] == pytest.approx(expected)
    assert found["agreement"]["value"] == found["longer_wins_agreement"]


def test_reports_are_plain_json(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", pairs(2))
    assert asked(scripted(tmp_path), data, tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
