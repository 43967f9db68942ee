"""Evaluation sets as they are published: rows with their human labels, in the files they come in."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlaif import shapes
from rlaif.errors import DataError
from rlaif.fields import RowError
from rlaif.published import best_of
from rlaif.records import Quarantine, read_pairs, read_rows
from rlaif.types import Message, Vote, user_prompt

PANDALM = {
    "idx": 4, "motivation_app": "Google Search", "cmp_key": "cerebras-gpt-6.7B_pythia-6.9b",
    "instruction": "Come up with queries.", "input": None, "response1": "one", "response2": "two",
    "annotator1": 2, "annotator2": 0, "annotator3": 2,
}  # fmt: skip
HHH = {"input": "Is this safe?", "target_scores": {"Yes, quite.": 0, "No.": 1}}


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def mt_bench(turn: int, winner: str = "model_b", judge: Any = "expert_3") -> dict[str, Any]:
    return {
        "question_id": 81, "model_a": "alpaca-13b", "model_b": "gpt-4", "winner": winner, "judge": judge,
        "conversation_a": said("q1", "a1", "q2", "a2"), "conversation_b": said("q1", "b1", "q2", "b2"), "turn": turn,
    }  # fmt: skip


# ---- rows ----


def test_pandalm_the_label_is_what_most_annotators_say_and_each_keeps_his_own() -> None:
    pair = shapes.parse_pair(PANDALM)
    assert (pair.prompt, pair.a, pair.b) == (user_prompt("Come up with queries."), "one", "two")
    assert pair.human_p_a == 0.0
    assert pair.human_votes == (Vote("annotator1", 0.0), Vote("annotator2", 0.5), Vote("annotator3", 0.0))
    assert pair.swapped().human_votes[0] == Vote("annotator1", 1.0)
    named = shapes.parse_pair(PANDALM | {"annotators": ["anna", "bob"]})
    assert [vote.annotator for vote in named.human_votes] == ["anna", "bob", "annotator3"]


@pytest.mark.parametrize(
    ("votes", "label"),
    [
        pytest.param((0, 0, 1), 0.5, id="most-call-it-a-tie"),
        pytest.param((0, 1, 2), None, id="no-majority-is-no-label"),
        pytest.param((1, None, None), 1.0, id="one-annotator-alone"),
        pytest.param((None, None, None), None, id="nobody"),
    ],
)
def test_pandalm_ties_and_disagreement_are_not_each_other(
    votes: tuple[int | None, ...], label: float | None
) -> None:
    row = PANDALM | dict(zip(("annotator1", "annotator2", "annotator3"), votes, strict=True))
    pair = shapes.parse_pair(row)
    assert pair.human_p_a == label
    assert len(pair.human_votes) == sum(v is not None for v in votes)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(HHH, id="big-bench"),
        pytest.param(
            {"input": "Is this safe?", "targets": {"choices": ["No.", "Yes, quite."], "labels": [1, 0]}},
            id="hugging-face",
        ),
    ],
)
def test_hhh_the_choice_with_the_higher_score_is_preferred(row: dict[str, Any]) -> None:
    pair = shapes.parse_pair(row)
    assert (pair.prompt, pair.a, pair.b, pair.human_p_a) == (
        user_prompt("Is this safe?"), "No.", "Yes, quite.", 1.0,
    )  # fmt: skip
    assert shapes.parse_preference(row).chosen == "No."


def test_hhh_a_dialogue_goes_on_from_its_first_turn() -> None:
    pair = shapes.parse_pair({**HHH, "input": "hi\n\nAssistant: hello\n\nHuman: are you sure?"})
    assert pair.prompt == (
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "are you sure?"),
    )


def test_mt_bench_the_first_turn_is_a_pair_of_answers() -> None:
    pair = shapes.parse_pair(mt_bench(1))
    assert (pair.prompt, pair.a, pair.b, pair.human_p_a) == (user_prompt("q1"), "a1", "b1", 0.0)
    assert pair.human_votes == (Vote("expert_3", 0.0),)
    assert (pair.extra["subset"], pair.extra["model_b"]) == ("turn 1", "gpt-4")
    assert shapes.parse_preference(mt_bench(1)).chosen == "b1"


def test_mt_bench_the_second_turn_is_judged_with_what_came_before_it() -> None:
    pair = shapes.parse_pair(mt_bench(2, "tie", ["gpt-4", "pair-v2"]), whole_exchanges=True)
    assert (pair.prompt, pair.human_p_a) == (user_prompt("q1"), 0.5)
    assert pair.a == "a1\n\nUser: q2\n\nAssistant: a2"
    assert pair.human_votes == (Vote("gpt-4 pair-v2", 0.5),)
    with pytest.raises(RowError, match="differ before their last turn"):  # nobody answered that prompt twice
        shapes.parse_preference(mt_bench(2))


def test_rewardbench_2_each_right_answer_is_paired_with_each_wrong_one() -> None:
    row = {"id": "7", "prompt": "q", "chosen": ["r", "s"], "rejected": ["x", "y", "z"], "subset": "Ties"}
    pairs = shapes.parse_pairs(row)
    assert [(p.a, p.b, p.human_p_a) for p in pairs] == [(r, w, 1.0) for r in "rs" for w in "xyz"]
    groups = [best_of(p.extra) for p in pairs]
    assert groups[0] == groups[2] != groups[3] and groups[0] is not None and groups[0].rivals == 3
    assert [p.rejected for p in shapes.parse_preferences({**row, "chosen": ["r"]})] == ["x", "y", "z"]
    (alone,) = shapes.parse_pairs({"prompt": "q", "chosen": "r", "rejected": "x", "best_of": 4})
    assert best_of(alone.extra) is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param(PANDALM | {"annotator2": 3}, "annotator2 is 3", id="annotator"),
        pytest.param({**HHH, "target_scores": {"a": 1, "b": 0, "c": 0}}, "3 choices", id="three-choices"),
        pytest.param({**HHH, "target_scores": {"a": 1, "b": 1}}, "same score", id="no-best-choice"),
        pytest.param(mt_bench(3), "no turn 3", id="turn"),
        pytest.param(mt_bench(1) | {"conversation_b": None}, "conversation_b must be a list", id="one-model"),
        pytest.param(mt_bench(1, "gpt-4"), "label 'gpt-4' is not one of", id="winner-by-name"),
    ],
)
def test_rows_that_do_not_fit_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        shapes.parse_pair(row, whole_exchanges=True)
    assert reason in str(caught.value)


# ---- files ----


def test_pandalms_array_holds_nan_where_there_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "testset-v1.json").write_text(json.dumps([PANDALM | {"input": float("nan")}], indent=4))
    (pair,) = read_pairs(tmp_path / "testset-v1.json", Quarantine(None))
    assert pair.prompt == user_prompt("Come up with queries.")


@pytest.mark.parametrize("indent", [None, 2], ids=["in-one-line", "pretty"])
def test_a_big_bench_task_is_its_examples(tmp_path: Path, indent: int | None) -> None:
    task = {"name": "hhh_alignment", "metrics": ["multiple_choice_grade"], "examples": [HHH, {"input": "?"}]}
    (tmp_path / "task.json").write_text(json.dumps(task, indent=indent))
    quarantine = Quarantine(None)
    assert [pair.a for pair in read_pairs(tmp_path / "task.json", quarantine)] == ["No."]
    assert quarantine.count == 1


def test_a_row_with_examples_of_its_own_is_one_row(tmp_path: Path) -> None:
    row = {"prompt": "Translate.", "examples": [{"input": "a", "output": "b"}]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    assert [read for _, read in read_rows(tmp_path / "in.jsonl", Quarantine(None))] == [row]


def test_a_folder_of_files_names_the_subset_of_each(tmp_path: Path) -> None:
    for folder, name in (("harmless-base", "test.jsonl.gz"), ("helpful-base", "test.jsonl.gz")):
        (tmp_path / folder).mkdir()
        row = {f: f"\n\nHuman: {folder}\n\nAssistant: {f}" for f in ("chosen", "rejected")}
        with gzip.open(tmp_path / folder / name, "wt") as file:
            file.write(json.dumps(row) + "\n" + "broken\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.json").write_text("[]")
    quarantine = Quarantine(tmp_path / "q" / "quarantine.jsonl")
    read = list(read_pairs(tmp_path, quarantine))
    assert [(p.prompt[0].content, p.extra["subset"]) for p in read] == [
        ("harmless-base", "harmless-base"), ("helpful-base", "helpful-base"),
    ]  # fmt: skip
    lines = [json.loads(line) for line in quarantine.path.read_text().splitlines()]  # type: ignore[union-attr]
    assert [(line["file"], line["line"]) for line in lines] == [
        ("harmless-base/test.jsonl.gz", 2), ("helpful-base/test.jsonl.gz", 2),
    ]  # fmt: skip


def test_a_row_that_names_its_subset_keeps_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"category": "math"}, {"n": 1}]))
    rows = [row for _, row in read_rows(tmp_path, Quarantine(None))]
    assert rows == [
        {"category": "math"},
        {"n": 1, "subset": "a"},
        {"category": "math"},
        {"n": 1, "subset": "b"},
    ]


def test_a_pattern_names_the_files_of_a_folder_to_read(tmp_path: Path) -> None:
    for place in ("Natural", "Adversarial/Manual", "Adversarial/Manual/evaluators"):
        (tmp_path / place).mkdir(parents=True)
        name = "result" if place.endswith("evaluators") else "dataset"
        (tmp_path / place / f"{name}.json").write_text(json.dumps([{"n": place}]))
    rows = [row for _, row in read_rows(tmp_path / "**" / "dataset.json", Quarantine(None))]
    assert rows == [{"n": place, "subset": place} for place in ("Adversarial/Manual", "Natural")]
    assert [row for _, row in read_rows(tmp_path / "Nat*" / "*.json", Quarantine(None))] == [{"n": "Natural"}]
    with pytest.raises(DataError, match="no file matches"):
        list(read_rows(tmp_path / "*.csv", Quarantine(None)))
    (tmp_path / "odd[1].jsonl").write_text('{"n": 1}')  # a name, since there is such a file
    assert [row for _, row in read_rows(tmp_path / "odd[1].jsonl", Quarantine(None))] == [{"n": 1}]


def test_shards_of_a_split_are_one_subset(tmp_path: Path) -> None:
    for name in ("human-00000-of-00002-25f4", "human-00001-of-00002-25f4", "gpt4_pair-00000-of-00001"):
        (tmp_path / f"{name}.jsonl").write_text('{"n": 1}\n')
    subsets = Counter(row["subset"] for _, row in read_rows(tmp_path, Quarantine(None)))
    assert subsets == {"human": 2, "gpt4_pair": 1}


def test_csv_is_read_with_its_quoted_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "xstest.csv"
    path.write_text(
        'id,prompt,type,label\n1,"How do I ""kill""\na process?",homonyms,safe\n2,x,y,z,too many\n'
    )
    quarantine = Quarantine(None)
    assert list(read_rows(path, quarantine)) == [
        (3, {"id": "1", "prompt": 'How do I "kill"\na process?', "type": "homonyms", "label": "safe"})
    ]
    assert quarantine.reasons == Counter({"more cells than the header has": 1})


def test_a_torn_archive_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"prompt": "a"}\n' * 1000)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read .*torn"):
        list(read_rows(tmp_path / "torn.jsonl.gz", Quarantine(None)))
