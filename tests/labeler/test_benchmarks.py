"""Benchmarks of answers through the commands: XSTest's classes, MT-bench's grades, and answers to several turns."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif.cli import main
from tests.labeler.commands import label, replies, report, scripted, write_lines

REFUSES = [
    {"user": r"(?s)RESPONSE >>>\nNo\.", "probs": [0.8, 0.1, 0.1]},
    {"user": r"(?s)RESPONSE >>>\nHalf", "probs": [0.2, 0.7, 0.1]},
    {"user": r"(?s)RESPONSE >>>\nbroken", "fail": "the endpoint answered 500"},
    {"probs": [0.0, 0.1, 0.8]},
]


def tables(out: Path, column: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(t["model"], t["name"]): t for t in report(out)["tables"] if t["column"] == column}


def shares(entry: dict[str, Any]) -> dict[str, float]:
    return {name: found["value"] for name, found in entry["shares"].items()}


def test_xstest_refusal_rates_of_safe_and_unsafe_prompts_by_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        ("homonyms", "safe", "Sure."), ("homonyms", "safe", "No."), ("figurative_language", "safe", "Half."),
        ("figurative_language", "safe", ""), ("contrast_homonyms", "unsafe", "No."),
        ("contrast_homonyms", "unsafe", "Sure."), ("contrast_homonyms", "unsafe", "broken"),
    ]  # fmt: skip
    with (tmp_path / "xstest_prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "type", "label"])
        writer.writerows([i, f"question {i}", kind, safe] for i, (kind, safe, _) in enumerate(asked))
    answers = write_lines(
        tmp_path / "answers.jsonl",
        [{"prompt": f"question {i}", "completion": said} for i, (_, _, said) in enumerate(asked)],
    )
    flags = (
        "--rubric",
        "refusal",
        "--questions",
        str(tmp_path / "xstest_prompts.csv"),
        "--max_unlabelled",
        "0.5",
    )
    out = tmp_path / "out"
    assert label(scripted(tmp_path, REFUSES), answers, out, *flags, kind="scores") == 0
    safe, unsafe = (tables(out, "label")["", name] for name in ("safe", "unsafe"))
    # An answer that says nothing is a full refusal, without a question.
    assert shares(safe) == {"full refusal": 0.5, "partial refusal": 0.25, "full compliance": 0.25}
    assert shares(unsafe) == {"full refusal": 0.5, "partial refusal": 0.0, "full compliance": 0.5}
    assert (unsafe["answers"], unsafe["unscored"]) == (3, 1)  # what was not judged is in no rate
    assert safe["shares"]["full refusal"]["low"] < 0.5 < safe["shares"]["full refusal"]["high"]
    # Expected levels 0.1 + 0.05, 0.1 + 0.35 and (0.8 + 0.05) / 0.9 of 0, 1/2, 1.
    level = {"Sure.": 0.85 / 0.9, "No.": 0.15, "Half.": 0.45, "": 0.0}
    assert safe["score"]["value"] == pytest.approx(sum(level.values()) / 4)
    assert {name for _, name in tables(out, "type")} == {
        "homonyms",
        "figurative_language",
        "contrast_homonyms",
    }
    assert "## By label" in capsys.readouterr().out
    assert "| unsafe | 3       | 1 " in (out / "report.md").read_text()


def test_xstests_completions_stand_beside_what_people_said_of_them(tmp_path: Path) -> None:
    path = tmp_path / "xstest_v2_completions_gpt4.csv"
    people = {"Sure.": "1_full_compliance", "No.": "2_full_refusal", "Half.": "2_full_refusal"}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["id", "type", "prompt", "completion", "annotation_1", "annotation_2", "agreement", "final_label"]
        )
        writer.writerows(
            [f"v2-{i}", "homonyms", f"q{i}", said, "", "", "TRUE", by]
            for i, (said, by) in enumerate(people.items())
        )
    assert (
        label(scripted(tmp_path, REFUSES), path, tmp_path / "out", "--rubric", "refusal", kind="scores") == 0
    )
    refused = tables(tmp_path / "out", "final_label")["", "2_full_refusal"]
    assert shares(refused) == {"full refusal": 0.5, "partial refusal": 0.5, "full compliance": 0.0}


def test_harmless_rate_counts_an_answer_that_says_nothing_as_harmless(tmp_path: Path) -> None:
    rules = [{"user": r"(?s)RESPONSE >>>\nDo it", "probs": [0.1, 0.9]}, {"probs": [0.9, 0.1]}]
    rows = [{"prompt": f"q{i}", "response": said} for i, said in enumerate(("Do it.", "I would not.", ""))]
    data, out = write_lines(tmp_path / "answers.jsonl", rows), tmp_path / "out"
    assert label(scripted(tmp_path, rules), data, out, "--rubric", "harmfulness", kind="scores") == 0
    (every,) = report(out)["tables"]
    assert shares(every) == {"harmless": pytest.approx(2 / 3), "harmful": pytest.approx(1 / 3)}


def test_a_jurys_class_is_the_one_nearest_its_score(tmp_path: Path) -> None:
    data, out = write_lines(tmp_path / "a.jsonl", [{"prompt": "q", "response": "No."}]), tmp_path / "out"
    (tmp_path / "other").mkdir()
    says = [
        scripted(tmp_path, [{"probs": [0.9, 0.1, 0.0]}]),
        scripted(tmp_path / "other", [{"probs": [0.0, 0.3, 0.7]}]),
    ]
    flags = ["--dataset", str(data), "--output_dir", str(out), "--rubric", "refusal", "--judge", *says]
    assert main(["label", "scores", *flags]) == 0
    (every,) = report(out)["tables"]
    assert every["score"]["value"] == pytest.approx((0.05 + 0.85) / 2)
    assert shares(every)["partial refusal"] == 1.0


def test_mt_bench_from_a_policy_to_grades_by_category_turn_and_model(tmp_path: Path) -> None:
    questions = write_lines(
        tmp_path / "question.jsonl",
        [
            {
                "question_id": 111,
                "category": "math",
                "turns": ["2 + 2?", "Plus one?"],
                "reference": ["4", "5"],
            },
            {"question_id": 81, "category": "writing", "turns": ["A poem.", "Shorter."]},
        ],
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        yaml.safe_dump({"rules": [{"user": "Plus one|Shorter", "text": "second"}, {"text": "first"}]})
    )
    sample = ["sample", "--model_name_or_path", f"scripted:{policy}", "--dataset", str(questions), "--all_turns",
              "--num_return_sequences", "1", "--output_dir", str(tmp_path / "answers")]  # fmt: skip
    assert main(sample) == 0 and replies(tmp_path / "answers") == 4
    assert main(sample) == 0 and replies(tmp_path / "answers") == 4  # nothing is asked again
    answers = tmp_path / "answers" / "answers.jsonl"
    written = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(row["question_id"], row["choices"]) for row in written] == [
        (number, [{"index": 0, "turns": ["first", "second"]}]) for number in (111, 81)
    ]
    other = [{**row, "model_id": "other"} for row in written]
    other[0]["choices"] = [{"index": 0, "turns": ["wrong", "wrong too"]}]
    folder = tmp_path / "model_answer"
    folder.mkdir()
    write_lines(folder / "mine.jsonl", written)
    write_lines(folder / "other.jsonl", other)
    scale = [[float(i == level) for i in range(1, 11)] for level in range(11)]
    rules = [
        {"user": r"(?s)REFERENCE ANSWER >>>\n[45]\n<<< RESPONSE >>>\nwrong", "probs": scale[1]},
        {"user": r"(?s)Assistant: first.*REFERENCE ANSWER >>>\n5\n", "probs": scale[8]},
        {"user": r"REFERENCE ANSWER >>>\n4\n", "probs": scale[6]},
        {"user": "User: Shorter", "probs": scale[3]},
        {"probs": scale[5]},
    ]
    out = tmp_path / "grades"
    flags = ("--questions", str(questions), "--rubric", "mt-bench-score")
    assert label(scripted(tmp_path, rules), folder, out, *flags, kind="scores") == 0
    assert {t["column"] for t in report(out)["tables"]} == {"category", "turn", ""}
    name = written[0]["model_id"]
    means = {key: entry["score"]["value"] for key, entry in tables(out, "category").items()}
    assert means == {
        (name, "math"): 7.0,
        (name, "writing"): 4.0,
        ("other", "math"): 1.0,
        ("other", "writing"): 4.0,
    }
    math = tables(out, "category")[name, "math"]["score"]
    assert math["low"] == math["high"] == 7.0  # two turns of one question are drawn together
    assert tables(out, "turn")[name, "2"]["score"]["value"] == (8 + 3) / 2
    every = tables(out, "")[name, ""]
    assert (every["answers"], every["score"]["value"]) == (4, (6 + 8 + 5 + 3) / 4)


def test_scores_of_rows_of_which_nothing_is_known_have_no_tables(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "in.jsonl", [{"prompt": "q", "response": "good"}])
    rules = [{"probs": [0.1] * 10}]
    assert label(scripted(tmp_path, rules), data, tmp_path / "out", kind="scores") == 0
    assert "tables" not in report(tmp_path / "out") and not (tmp_path / "out" / "report.md").exists()


def test_a_real_policy_answers_the_second_turn_with_the_first_before_it(
    tmp_path: Path, shared_data: Path
) -> None:
    def sample(dataset: Path, out: Path, *flags: str) -> Path:
        model = f"hf:{shared_data / 'models' / 'stories260K'}"
        base = ["sample", "--model_name_or_path", model, "--dataset", str(dataset), "--output_dir", str(out)]
        assert main([*base, "--max_new_tokens", "6", *flags]) == 0
        return out

    questions = shared_data / "mt_bench_questions.jsonl"
    flags = ("--limit", "2", "--num_return_sequences", "2", "--all_turns")
    out = sample(questions, tmp_path / "out", *flags)
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == ["mtbench-81", "mtbench-82"]
    turns = [choice["turns"] for row in rows for choice in row["choices"]]
    assert [len(said) for said in turns] == [2, 2, 2, 2] and len({tuple(said) for said in turns}) == 4
    # The same conversations, asked one by one, have as many tokens.
    asked = [json.loads(line)["turns"] for line in questions.read_text().splitlines()[:2]]
    alone = []
    for (first, second), row in zip(asked, rows, strict=True):
        for choice in row["choices"]:
            said = [first, choice["turns"][0], second]
            whole = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
            alone += [{"prompt": first}, {"messages": whole}]
    again = sample(
        write_lines(tmp_path / "alone.jsonl", alone), tmp_path / "again", "--num_return_sequences", "1"
    )
    assert report(again)["prompt_tokens"] == report(out)["prompt_tokens"]
