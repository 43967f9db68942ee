"""What people said of rows: a journal that only grows, what stands of it, and the datasets made of that.

A mark belongs to a prompt and its responses, not to a row, so it holds for every labeling of them. A record says who,
when, and whether the label had been seen: agreement is measured on marks made before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from labeler.review.config import Mode
from rlaif.errors import DataError, StorageError
from rlaif.storage import Journal, write_atomic
from rlaif.types import Message, to_dicts

JOURNAL_FILE = "marks.jsonl"
PAIRS_FILE = "human-pairs.jsonl"
BLIND_FILE = "human-pairs-blind.jsonl"
SCORES_FILE = "human-scores.jsonl"
BAD_FILE = "bad-rows.jsonl"
GRADES = (1, 2, 3, 4, 5, 6, 7)
"""InstructGPT's scale of overall quality (arXiv 2203.02155, section 3.5), 7 for the best."""


class Record(BaseModel):
    """A line of the journal."""

    model_config = ConfigDict(frozen=True)
    at: str
    by: str


class Opened(Record):
    """Somebody sat down."""

    event: Literal["opened"] = "opened"
    dataset: str
    mode: Mode
    blind: bool


class Mark(Record):
    """What somebody said of a row.

    Attributes:
        key: of the item.
        row: its number in the dataset that was open, from 1.
        prompt: the item's.
        responses: the item's, in the order in which `values` are.
        verdict: what `values` are: ranks (1 is best, equal ones are ties), grades, or nothing for a bad row.
        note: in the annotator's words.
        label_seen: whether the annotator had seen the dataset's label of this row.
        sample: whether the row came up in a random sample of the dataset.
    """

    event: Literal["mark"] = "mark"
    key: str
    row: int
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    verdict: Literal["ranks", "grades", "bad"]
    values: tuple[int, ...] = ()
    note: str = ""
    label_seen: bool
    sample: bool = False
    subset: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Mark:
        n = len(self.responses)
        if len(self.values) != (0 if self.verdict == "bad" else n):
            raise ValueError(f"{self.verdict} of {n} responses cannot be {list(self.values)}")
        allowed = GRADES if self.verdict == "grades" else range(1, n + 1)
        if not all(v in allowed for v in self.values):
            raise ValueError(
                f"{self.verdict} lie from {allowed[0]} to {allowed[-1]}, not {list(self.values)}"
            )
        return self

    def prefers(self, i: int, j: int) -> float:
        """1 where response i is better than response j, 0 where it is worse, 1/2 for a tie."""
        better = self.values[i] - self.values[j]
        if self.verdict == "ranks":
            better = -better
        return 0.5 + 0.5 * ((better > 0) - (better < 0))


class Withdrawn(Record):
    """A mark was taken back."""

    event: Literal["withdrawn"] = "withdrawn"
    key: str
    label_seen: bool


class Revealed(Record):
    """Somebody looked at a label before marking."""

    event: Literal["revealed"] = "revealed"
    key: str


AnyRecord = Annotated[Opened | Mark | Withdrawn | Revealed, Field(discriminator="event")]
_RECORD: TypeAdapter[AnyRecord] = TypeAdapter(AnyRecord)


def now() -> str:
    """The time as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Marks:
    """What stands of the records, by key and annotator.

    Attributes:
        standing: the last mark.
        blind: the last mark made before the label was seen; a later one, made after, leaves it alone, unless the
            row turned out to be bad.
        seen: who has seen which label, as far as records tell.
        latest: who marked what, in order; the last of it is what an undo takes back.
    """

    def __init__(self) -> None:
        self.standing: dict[tuple[str, str], Mark] = {}
        self.blind: dict[tuple[str, str], Mark] = {}
        self.seen: set[tuple[str, str]] = set()
        self.latest: dict[tuple[str, str], None] = {}

    def take(self, record: AnyRecord) -> None:
        """Count one more record."""
        if isinstance(record, Opened):
            return
        who = (record.key, record.by)
        if isinstance(record, Revealed) or record.label_seen:
            self.seen.add(who)
        if isinstance(record, Mark):
            self.standing[who] = record
            self.latest.pop(who, None)
            self.latest[who] = None
            if not record.label_seen:
                self.blind[who] = record
            elif record.verdict == "bad":
                self.blind.pop(who, None)
        elif isinstance(record, Withdrawn):
            for held in (self.standing, self.blind, self.latest):
                held.pop(who, None)

    def last(self, by: str) -> Mark | None:
        """The mark that somebody made last, of those that stand."""
        return next((self.standing[who] for who in reversed(self.latest) if who[1] == by), None)


class MarkBook:
    """The marks of a folder, open for writing by one process.

    Args:
        folder: made if it is not there.
        opened: who begins, and how.

    Raises:
        StorageError: the folder cannot be written, another process has it open, or it holds marks of another mode.
        DataError: the journal is damaged.
    """

    def __init__(self, folder: Path, opened: Opened) -> None:
        self.folder = folder
        self.marks = Marks()
        self.version = 0
        self._journal = Journal(folder / JOURNAL_FILE)
        for record in self._records():  # before anything is written: a folder of another mode stays as it is
            if isinstance(record, Opened) and record.mode != opened.mode:
                raise StorageError(
                    f"{folder} holds marks of --mode {record.mode}, this is {opened.mode}; choose another --output_dir"
                )
        self._append(opened)  # takes the lock
        for record in self._records():
            self.marks.take(record)

    def _records(self) -> Iterator[AnyRecord]:
        for number, line in enumerate(self._journal.records(), 1):
            try:
                yield _RECORD.validate_python(line)
            except ValidationError as err:
                raise DataError(
                    f"{self._journal.path} line {number} is no mark; remove that line and run again"
                ) from err

    def add(self, record: AnyRecord) -> None:
        """Keep a record: it is on the disk when this returns.

        Raises:
            StorageError: the disk is full; nothing has changed then.
        """
        self._append(record)
        self.marks.take(record)
        self.version += 1

    def _append(self, record: AnyRecord) -> None:
        self._journal.append(record.model_dump(mode="json"))

    def write_datasets(self) -> list[Path]:
        """Write what stands as datasets, whole files; those that would be empty are removed.

        Raises:
            StorageError: the disk is full.
        """
        rows: Mapping[str, Iterable[Mapping[str, Any]]] = {
            PAIRS_FILE: pair_rows(self.marks.standing.values()),
            BLIND_FILE: pair_rows(self.marks.blind.values()),
            SCORES_FILE: score_rows(self.marks.standing.values()),
            BAD_FILE: bad_rows(self.marks.standing.values()),
        }
        written = []
        for name, lines in rows.items():
            path = self.folder / name
            if text := "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines):
                write_atomic(path, text)
                written.append(path)
            else:
                path.unlink(missing_ok=True)
        return written

    def close(self) -> None:
        """Release the lock."""
        self._journal.close()


# ---- datasets: pure functions of marks ----


def by_item(marks: Iterable[Mark]) -> Iterator[list[Mark]]:
    """Marks of the same item together; bad rows are left out."""
    groups: dict[str, list[Mark]] = {}
    for mark in marks:
        if mark.verdict != "bad":
            groups.setdefault(mark.key, []).append(mark)
    yield from groups.values()


def people_prefer(marks: Sequence[Mark], i: int, j: int) -> float:
    """Share of annotators who prefer response i to response j, a tie counting half.

    Args:
        marks: of one item, by different annotators.
        i: index of a response.
        j: index of another.
    """
    return sum(mark.prefers(i, j) for mark in marks) / len(marks)


def pair_rows(marks: Iterable[Mark]) -> Iterator[dict[str, Any]]:
    """Pairs with human labels, as `rlaif.records.read_pairs` reads them: one for every two responses of an item.

    What single annotators said stands in PandaLM's columns `annotator1`, ...: 1 or 2 for a response, 0 for a tie. Who
    they are is in `annotators`.
    """
    marks = list(marks)
    number = {by: n for n, by in enumerate(sorted({mark.by for mark in marks}), 1)}
    said = {1.0: 1, 0.0: 2, 0.5: 0}
    for group in by_item(marks):
        for i, j in combinations(range(len(group[0].responses)), 2):
            yield {
                **_about(group),
                "response_a": group[0].responses[i],
                "response_b": group[0].responses[j],
                "human_p_a": people_prefer(group, i, j),
                **{f"annotator{number[mark.by]}": said[mark.prefers(i, j)] for mark in group},
            }


def score_rows(marks: Iterable[Mark]) -> Iterator[dict[str, Any]]:
    """Responses with the mean of their grades, as `rlaif.records.read_scored` reads them."""
    for group in by_item(mark for mark in marks if mark.verdict == "grades"):
        for i, response in enumerate(group[0].responses):
            score = sum(mark.values[i] for mark in group) / len(group)
            yield {**_about(group), "response": response, "score": score}


def bad_rows(marks: Iterable[Mark]) -> Iterator[dict[str, Any]]:
    """Rows that somebody called bad."""
    for mark in marks:
        if mark.verdict == "bad":
            yield {**_about([mark]), "responses": list(mark.responses)}


def _about(group: Sequence[Mark]) -> dict[str, Any]:
    first = group[0]
    return {
        "key": first.key,
        "row": first.row,
        **({"subset": first.subset} if first.subset else {}),
        "prompt": to_dicts(first.prompt),
        "annotators": [mark.by for mark in group],
        "label_seen": any(mark.label_seen for mark in group),
        "notes": [mark.note for mark in group if mark.note],
        "marked_at": max(mark.at for mark in group),
    }
