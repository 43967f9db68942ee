"""What stands of marks, what is made of it, and what it says: by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from labeler.review.items import Label
from labeler.review.marks import (
    Mark,
    MarkBook,
    Marks,
    Opened,
    Revealed,
    Withdrawn,
    bad_rows,
    pair_rows,
    score_rows,
)
from labeler.review.summary import correlation, summarise, verdict_on
from rlaif.errors import DataError, StorageError
from rlaif.records import Quarantine, read_pairs, read_scored
from rlaif.types import Message, Vote
from tests.labeler.commands import write_lines

A, B, TIE = (1, 2), (2, 1), (1, 1)


def mark(key: int, values: tuple[int, ...] = A, by: str = "ann", seen: bool = False, **more: Any) -> Mark:
    return Mark(
        **{
            "at": "2026-01-01T00:00:00+00:00",
            "by": by,
            "key": f"{key:016x}",
            "row": key,
            "prompt": (Message("user", f"question {key}"),),
            "responses": tuple("ABCDEFG"[: len(values)] or "AB"),
            "verdict": "ranks",
            "values": values,
            "label_seen": seen,
            **more,
        }
    )


def bad(key: int, **more: Any) -> Mark:
    return mark(key, (), verdict="bad", **more)


def stands(*records: Any) -> Marks:
    marks = Marks()
    for record in records:
        marks.take(record)
    return marks


def prefers(p: float) -> Label:
    return Label(kind="preference", values=(p, 1 - p))


def withdrawn(key: int, seen: bool = False) -> Withdrawn:
    return Withdrawn(at="t", by="ann", key=f"{key:016x}", label_seen=seen)


def test_a_mark_that_is_none_is_refused() -> None:
    for values, verdict in (
        ((0, 1), "ranks"),
        ((1, 3), "ranks"),
        ((1,), "ranks"),
        ((8, 1), "grades"),
        ((1, 2), "bad"),
    ):
        with pytest.raises(ValidationError):
            mark(1, responses=("A", "B"), values=values, verdict=verdict)


def test_the_last_mark_stands_and_the_last_blind_one_is_kept_beside_it() -> None:
    marks = stands(mark(1, A), mark(1, B), mark(1, A, seen=True))
    ((who, standing),) = marks.standing.items()
    assert who == ("0000000000000001", "ann") and standing.values == A
    assert marks.blind[who].values == B
    assert who in marks.seen


def test_a_mark_taken_back_counts_nowhere_and_what_was_seen_stays_seen() -> None:
    marks = stands(mark(1), mark(2), withdrawn(2, seen=True))
    assert [m.row for m in marks.standing.values()] == [1] and len(marks.blind) == 1
    assert marks.seen == {("0000000000000002", "ann")}
    assert marks.last("ann") == marks.standing["0000000000000001", "ann"] and marks.last("bob") is None
    assert stands(Revealed(at="t", by="ann", key="0" * 16)).seen == {("0" * 16, "ann")}


def test_a_row_that_turns_out_bad_leaves_the_agreement() -> None:
    assert stands(mark(1), bad(1, seen=True)).blind == {}


def test_marks_become_pairs_that_the_readers_read(tmp_path: Path) -> None:
    rows = list(
        pair_rows(
            [
                mark(1, A),
                mark(1, TIE, by="bob"),
                mark(2, (1, 3, 1)),
                bad(3),
                mark(4, (2, 6), verdict="grades"),
            ]
        )
    )
    read = list(read_pairs(write_lines(tmp_path / "p.jsonl", rows), Quarantine(None)))
    # (1 + 1/2) / 2; A over B, A ties C, C over B; B has the higher grade
    assert [(p.a, p.b, p.human_p_a) for p in read] == [
        ("A", "B", 0.75), ("A", "B", 1.0), ("A", "C", 0.5), ("B", "C", 0.0), ("A", "B", 0.0),
    ]  # fmt: skip
    assert rows[0]["annotators"] == ["ann", "bob"]
    assert read[0].human_votes == (Vote("ann", 1.0), Vote("bob", 0.5))


def test_grades_become_scores_that_the_readers_read(tmp_path: Path) -> None:
    rows = list(
        score_rows([mark(1, (2,), verdict="grades"), mark(1, (5,), verdict="grades", by="bob"), mark(2)])
    )
    (read,) = read_scored(write_lines(tmp_path / "s.jsonl", rows), Quarantine(None))
    assert (read.response, read.score) == ("A", 3.5)
    assert [row["row"] for row in bad_rows([mark(1), bad(7)])] == [7]


def test_agreement_counts_blind_marks_and_random_samples_apart() -> None:
    labels = {f"{k:016x}": prefers(0.8) for k in range(1, 7)} | {f"{7:016x}": None}
    marks = stands(
        mark(1, A), mark(2, A, sample=True), mark(3, B, sample=True), mark(4, TIE), mark(5, A, seen=True), bad(6),
        mark(7, A),  # without a label
        mark(99, A),  # of another dataset
    )  # fmt: skip
    found = summarise(marks, labels, resamples=20)
    assert (found["marked"], found["bad"], found["label_seen"]) == (8, 1, 1)
    blind, sample, every = (found["agreement"][name] for name in ("blind", "sample", "all"))
    assert (blind["human_pairs"], blind["human_ties"]) == (3, 1)
    assert blind["agreement"]["value"] == pytest.approx(2 / 3)
    assert blind["kappa"]["value"] == pytest.approx(1 / 3)
    assert (sample["human_pairs"], sample["agreement"]["value"]) == (2, 0.5)
    assert (every["human_pairs"], every["agreement"]["value"]) == (4, 0.75)


def test_annotators_are_compared_where_both_marked() -> None:
    marks = stands(mark(1, A), mark(1, A, by="bob"), mark(2, A), mark(2, TIE, by="bob"), mark(3, A))
    found = summarise(marks, {f"{k:016x}": prefers(0.8) for k in range(1, 4)}, resamples=20)["people"]
    assert (found["over"], found["value"]) == (2, 0.5)


def test_grades_are_correlated_with_scores() -> None:
    labels = {
        f"{k:016x}": Label(kind="scores", values=(score,)) for k, score in enumerate([3.0, 1.0, 2.0, 9.0])
    }
    graded = [mark(k, (grade,), verdict="grades") for k, grade in enumerate([4, 2, 3, 7])]
    found = correlation(graded, labels, resamples=20)
    assert (found["responses"], found["value"]) == (4, pytest.approx(1.0))
    assert correlation([], labels)["value"] is None


def test_a_tie_neither_agrees_nor_differs() -> None:
    assert [verdict_on(mark(1, v), prefers(0.8)) for v in (A, B, TIE)] == ["agrees", "differs", None]
    assert verdict_on(mark(1, A), None) is None and verdict_on(bad(1), prefers(0.8)) is None


# ---- the journal ----


def opened(**more: Any) -> Opened:
    return Opened(**{"at": "t", "by": "ann", "dataset": "d", "mode": "preference", "blind": True, **more})


def test_a_book_is_what_its_journal_says(tmp_path: Path) -> None:
    book = MarkBook(tmp_path, opened())
    for record in (mark(1, A), bad(2), mark(3, B, seen=True), mark(4), withdrawn(4)):
        book.add(record)
    book.write_datasets()
    with pytest.raises(StorageError, match="written by another process"):
        MarkBook(tmp_path, opened(by="bob"))
    book.close()
    with (tmp_path / "marks.jsonl").open("a") as file:
        file.write('{"event": "mark", "torn')  # what a kill in the middle of a write leaves
    again = MarkBook(tmp_path, opened())
    assert again.marks.standing == book.marks.standing and again.marks.blind == book.marks.blind
    lines = {
        name: (tmp_path / name).read_text().splitlines()
        for name in ("human-pairs.jsonl", "human-pairs-blind.jsonl")
    }
    assert [json.loads(line)["row"] for line in lines["human-pairs.jsonl"]] == [1, 3]
    assert [json.loads(line)["row"] for line in lines["human-pairs-blind.jsonl"]] == [1]
    again.add(Withdrawn(at="t", by="ann", key=f"{1:016x}", label_seen=False))
    again.write_datasets()
    assert not (tmp_path / "human-pairs-blind.jsonl").exists()
    again.close()
    with pytest.raises(StorageError, match="holds marks of --mode preference"):
        MarkBook(tmp_path, opened(mode="ranking"))


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "marks.jsonl", [{"event": "mark", "by": "ann"}])
    with pytest.raises(DataError, match="line 1 is no mark"):
        MarkBook(tmp_path, opened())
