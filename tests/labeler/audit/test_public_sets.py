"""`rlaif eval judge` on evaluation sets as they are published, with the judge that prefers the longer answer."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from labeler.audit.annotators import by_annotator, said
from labeler.audit.observations import Observation
from rlaif.cli import main
from rlaif.types import Vote
from tests.labeler.commands import report, write_lines


def longer(dataset: Path, out: Path) -> dict[str, Any]:
    flags = ("--baseline", "longer", "--dataset", str(dataset), "--resamples", "50")
    assert main(["eval", "judge", *flags, "--output_dir", str(out)]) == 0
    return report(out)


def longer_wins(preferred: Sequence[str], other: Sequence[str]) -> float:
    """How often the preferred text is the longer one, equal lengths half."""
    lengths = [(len(a.strip()), len(b.strip())) for a, b in zip(preferred, other, strict=True)]
    return sum((a > b) + (a == b) / 2 for a, b in lengths) / len(lengths)


def test_llmbar_the_longer_answer_wins_as_often_as_its_files_say_in_every_subset(
    tmp_path: Path, shared_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As published: a JSON array a subset, each in a folder of its own.
    published: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (shared_data / "llmbar_gold.jsonl").read_text().splitlines():
        row = json.loads(line)
        folder = "Natural" if row["subset"] == "Natural" else f"Adversarial/{row['subset']}"
        if row["group"] == "llmbar":
            published[folder].append(
                {"input": row["instruction"], **{k: row[k] for k in ("output_1", "output_2", "label")}}
            )
    for folder, rows in published.items():
        path = tmp_path / "LLMBar" / folder / "dataset.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows, indent=2))
    found = longer(tmp_path / "LLMBar", tmp_path / "out")
    rates = {s["name"]: s["agreement"]["value"] for s in found["subsets"]}
    assert rates == {
        folder: pytest.approx(
            longer_wins(
                [row[f"output_{row['label']}"] for row in rows],
                [row[f"output_{3 - row['label']}"] for row in rows],
            )
        )
        for folder, rows in published.items()
    }
    assert len(rates) == 5 and sum(s["human_pairs"] for s in found["subsets"]) == 419
    # What the data says of itself: 12 to 17 % on three of the four adversarial subsets (18.5 with ties half).
    low = {name for name, rate in rates.items() if 0.115 < rate < 0.19}
    assert low == {"Adversarial/GPTInst", "Adversarial/Manual", "Adversarial/Neighbor"}
    assert "| Adversarial/Neighbor | 134   | 11.9" in capsys.readouterr().out


def test_hh_transcripts_in_archives_by_subset(tmp_path: Path, shared_data: Path) -> None:
    expected = {}
    for name in ("harmless", "helpful"):
        rows = [json.loads(line) for line in (shared_data / f"hh_{name}_1000.jsonl").read_text().splitlines()]
        path = tmp_path / "hh-rlhf" / f"{name}-base" / "test.jsonl.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as file:
            for row in rows:
                said = "".join(
                    f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: {m['content']}"
                    for m in row["messages"]
                )
                both = {side: f"{said}\n\nAssistant: {row[side]}" for side in ("chosen", "rejected")}
                file.write(json.dumps(both) + "\n")
        expected[f"{name}-base"] = longer_wins([r["chosen"] for r in rows], [r["rejected"] for r in rows])
    found = longer(tmp_path / "hh-rlhf", tmp_path / "out")
    assert (found["human_pairs"], found["quarantined"]) == (2000, {})
    assert {s["name"]: s["agreement"]["value"] for s in found["subsets"]} == {
        name: pytest.approx(rate) for name, rate in expected.items()
    }
    assert 0.43 < expected["harmless-base"] < 0.45 and 0.58 < expected["helpful-base"] < 0.62


def test_pandalm_annotators_one_by_one_beside_their_majority(tmp_path: Path) -> None:
    # The longer response is number 2 in every row but the last, where both are as long.
    votes = [(2, 2, 0), (2, 1, 2), (0, 0, 2), (0, 1, 2), (1, 1, 1), (0, 0, 0)]
    rows = [
        {"idx": i, "instruction": f"task {i}", "input": float("nan"), "response1": "short", "response2": "a longer one",
         **{f"annotator{k}": vote for k, vote in enumerate(row, 1)}}
        for i, row in enumerate(votes)
    ]  # fmt: skip
    rows[5]["response2"] = "equal"
    (tmp_path / "testset-v1.json").write_text(json.dumps(rows))
    found = longer(tmp_path / "testset-v1.json", tmp_path / "out")
    # Majorities: 2, 2, tie, none, 1, tie.
    assert (found["human_pairs"], found["human_ties"], found["no_majority"]) == (3, 2, 1)
    assert found["agreement"]["value"] == pytest.approx(2 / 3)
    lines = {line["name"]: line for line in found["annotators"]}
    assert list(lines) == ["annotator1", "annotator2", "annotator3", "all"]
    first = lines["annotator1"]["judge"]
    assert first["with_ties"]["value"] == pytest.approx(3 / 6)  # rows 0 and 1, and the tie of row 5
    assert (first["without_ties"]["over"], first["without_ties"]["value"]) == (3, pytest.approx(2 / 3))
    assert lines["all"]["votes"] == 18
    assert lines["all"]["judge"]["with_ties"]["value"] == pytest.approx((2 + 2 + 1 + 1 + 0 + 3) / 18)
    # Pairs of people that agree, by row: 1, 1, 1, 0, 3, 3 of 3.
    assert lines["all"]["people"]["with_ties"]["value"] == pytest.approx(9 / 18)
    assert lines["all"]["people"]["without_ties"]["over"] == 1 + 3 + 0 + 1 + 3 + 0


def test_mt_bench_judgments_by_turn_with_the_votes_of_one_pair_in_several_rows(tmp_path: Path) -> None:
    def judged(winner: str, judge: str, turn: int, swap: bool = False) -> dict[str, Any]:
        asked = ["q1", "q2"]
        a = [m for q, x in zip(asked, ("a1", "a2"), strict=True) for m in (q, x)]
        b = [m for q, x in zip(asked, ("a longer b1", "b2"), strict=True) for m in (q, x)]
        sides = {"a": a, "b": b} if not swap else {"a": b, "b": a}
        return {
            "question_id": 81, "model_a": "m1", "model_b": "m2", "winner": winner, "judge": judge, "turn": turn,
            **{f"conversation_{side}": [{"role": ("user", "assistant")[i % 2], "content": text}
                                        for i, text in enumerate(texts)] for side, texts in sides.items()},
        }  # fmt: skip

    rows = [
        judged("model_b", "expert_1", 1),
        judged("model_a", "expert_2", 1, swap=True),  # the same word in the other order
        judged("tie", "expert_3", 1),
        judged("model_a", "author_1", 1),
        judged("model_b", "expert_1", 2),
        judged("tie", "expert_2", 2),
    ]
    found = longer(write_lines(tmp_path / "human.jsonl", rows), tmp_path / "out")
    lines = {line["name"]: line for line in found["annotators"]}
    one = lines["turn 1"]
    assert (one["votes"], one["judge"]["with_ties"]["value"]) == (4, pytest.approx(2 / 4))
    assert (one["judge"]["without_ties"]["over"], one["judge"]["without_ties"]["value"]) == (
        3,
        pytest.approx(2 / 3),
    )
    # b b - a: of six pairs of people one agrees; of the three that both decided, one.
    assert (one["people"]["with_ties"]["over"], one["people"]["with_ties"]["value"]) == (
        6,
        pytest.approx(1 / 6),
    )
    assert one["people"]["without_ties"]["value"] == pytest.approx(1 / 3)
    assert lines["turn 2"]["people"]["without_ties"] == {"over": 0, "value": None, "low": None, "high": None}
    assert [s["name"] for s in found["subsets"]] == ["turn 1", "turn 2"]


def test_orders_that_contradict_each_other_are_the_judges_tie() -> None:
    def seen(p: float, ab: float, ba: float, vote: float) -> Observation:
        return Observation(
            "q", "", p, p, vote, first_ab=ab, first_ba=ba, votes=(Vote("x", vote),), pair=str(p)
        )

    locked, firm = seen(0.6, 0.9, 0.7, 0.5), seen(0.8, 0.9, 0.3, 1.0)
    (_, line) = by_annotator([locked, firm], resamples=2)
    assert line["judge"]["with_ties"]["value"] == 1.0
    assert line["judge"]["without_ties"]["over"] == 1


def test_rewardbench_has_its_sections_and_hhh_its_four_subsets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(subset: str, good: bool) -> dict[str, Any]:
        return {
            "prompt": f"{subset} {good}", "chosen": "long" if good else "x", "chosen_model": "m", "rejected": "no",
            "rejected_model": "n", "subset": subset, "id": 1,
        }  # fmt: skip

    rows = [row("donotanswer", True), row("refusals-offensive", False), row("hep-go", True)]
    found = longer(write_lines(tmp_path / "filtered.jsonl", rows), tmp_path / "out")
    assert {f["name"]: f["value"] for f in found["rewardbench"]} == {
        "Safety": pytest.approx(136 / 236), "Reasoning": 1.0, "score": pytest.approx((136 / 236 + 1) / 2),
    }  # fmt: skip
    assert "## RewardBench" in capsys.readouterr().out
    for name in ("harmless", "helpful", "honest", "other"):
        path = tmp_path / "hhh_alignment" / name / "task.json"
        path.parent.mkdir(parents=True)
        example = {
            "input": name,
            "target_scores": {"longer": int(name != "honest"), "no": int(name == "honest")},
        }
        path.write_text(
            json.dumps({"name": "hhh_alignment", "metrics": ["x"], "examples": [example]}, indent=1)
        )
    found = longer(tmp_path / "hhh_alignment", tmp_path / "hhh")
    assert [(s["name"], s["agreement"]["value"]) for s in found["subsets"]] == [
        ("harmless", 1.0), ("helpful", 1.0), ("honest", 0.0), ("other", 1.0),
    ]  # fmt: skip


def test_rewardbench_2_is_the_best_of_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "id": str(i),
            "prompt": f"q{i}",
            "chosen": ["four"],
            "rejected": wrong,
            "num_correct": 1,
            "subset": subset,
        }
        for i, (subset, wrong) in enumerate(
            [("Math", ["a", "b", "c"]), ("Math", ["longer", "b", "c"]), ("Focus", ["five", "b", "c"])]
        )
    ]
    found = longer(write_lines(tmp_path / "test.jsonl", rows), tmp_path / "out")
    assert found["human_pairs"] == 9
    assert {f["name"]: f["value"] for f in found["best_of"]} == {"Math": 0.5, "Focus": 0.5, "score": 0.5}
    assert "## Best of several" in capsys.readouterr().out


@pytest.mark.parametrize(("ab", "ba"), [(0.5, 0.4), (0.6, 0.5), (0.5, 0.6), (0.4, 0.5)])
def test_a_tie_in_one_order_contradicts_no_word_in_the_other(ab: float, ba: float) -> None:
    p = (ab + 1 - ba) / 2
    assert said(Observation("q", "", p, p, None, first_ab=ab, first_ba=ba)) == float(p > 0.5)
