"""What a person is shown: one prompt, its responses in an order that tells nothing, and what a judge said of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labeler.review.config import Mode
from labeler.review.suspicion import find
from labeler.validation import Finding, Row
from rlaif.errors import ConfigError, DataError
from rlaif.published import subset_of
from rlaif.records import Quarantine, read_labelled, read_rankings, read_rows, read_scored
from rlaif.types import CandidateSet, Message, Pair, PreferenceRow, ScoredRow, content_id

Shape = Literal["pairs", "rankings", "scores"]
MOST_RESPONSES = 9
"""More responses than that nobody ranks at once; InstructGPT's labelers had 4 to 9 (arXiv 2203.02155, section 3.5)."""


class Opinion(BaseModel):
    """What a judge said on one occasion: of a pair in one order, or of one response.

    Attributes:
        shown: indices of the responses in the order in which the judge saw them.
        order: the dataset's name of that order; empty for a single response.
        p_first: P(the first shown preferred); None for a single response.
        mass: probability of all labels together.
        rationale: what the judge wrote first.
    """

    model_config = ConfigDict(frozen=True)
    shown: tuple[int, ...]
    order: str = ""
    p_first: float | None = None
    mass: float | None = None
    rationale: str | None = None


class Label(BaseModel):
    """What the dataset says of the responses, in the item's order.

    Attributes:
        kind: what `values` are: P(preferred) of two, Bradley-Terry strengths in log-odds, or scores.
        values: one a response; None where there is none.
        people: P(first response preferred) by people, where the dataset holds that.
        votes: of a jury, (judge, P(first response preferred)).
    """

    model_config = ConfigDict(frozen=True)
    kind: Literal["preference", "strengths", "scores"]
    values: tuple[float | None, ...]
    opinions: tuple[Opinion, ...] = ()
    people: float | None = None
    votes: tuple[tuple[str, float | None], ...] = ()
    judge: str = ""
    source: str = ""
    principle: str | None = None

    def prefers(self, i: int, j: int) -> float | None:
        """P(response i over response j); None where the label does not say. Scores order responses: 1, 1/2 or 0."""
        a, b = self.values[i], self.values[j]
        if a is None or b is None:
            return None
        if self.kind == "preference":
            return a
        if self.kind == "strengths":
            return 1.0 / (1.0 + math.exp(min(b - a, 700.0)))
        return 0.5 + 0.5 * ((a > b) - (a < b))


class Item(BaseModel):
    """A row as it is reviewed.

    Attributes:
        row: its number in the dataset, from 1.
        key: content id of prompt and responses, whatever their order: marks belong to it, not to a row.
        prompt: the conversation to answer.
        responses: in an order drawn from the content, so that their places tell nothing of the label.
        label: None where nobody has judged.
        findings: what is suspicious of the label, worst first.
    """

    model_config = ConfigDict(frozen=True)
    row: int
    key: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    label: Label | None = None
    subset: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def text(self) -> str:
        """What a search looks at."""
        return "\n".join([*(m.content for m in self.prompt), *self.responses])


class Arranged(NamedTuple):
    """The order in which responses are shown."""

    key: str
    order: tuple[int, ...]


def arrange(prompt: Sequence[Message], responses: Sequence[str]) -> Arranged:
    """Key and order of responses: functions of the texts alone, the same however the dataset orders them."""
    key = content_id(prompt, sorted(responses))
    order = sorted(range(len(responses)), key=lambda i: sha256(f"{key}{responses[i]}".encode()).digest())
    return Arranged(key, tuple(order))


# ---- datasets ----


def shape_of(path: str, mode: Mode | None) -> tuple[Shape, str]:
    """What a dataset's rows are, and the file to read.

    Raises:
        DataError: the dataset is missing, or holds nothing that can be reviewed.
    """
    folder = Path(path)
    rankings = folder / "rankings.parquet"
    if rankings.is_file() and mode in ("ranking", "grades"):
        return "rankings", str(rankings)
    for _, row in read_rows(path, Quarantine(None)):
        if row.get("completions") is not None or row.get("responses") is not None or "ranking" in row:
            return "rankings", path
        return ("scores" if "score" in row else "pairs"), path
    raise DataError(f"{path} has no rows to review")


def mode_of(shape: Shape, wanted: Mode | None) -> Mode:
    """What people say of rows of a shape.

    Raises:
        ConfigError: `wanted` does not suit them.
    """
    suits: Mapping[Shape, tuple[Mode, ...]] = {
        "pairs": ("preference", "grades", "ranking"),
        "rankings": ("ranking", "grades"),
        "scores": ("grades",),
    }
    if wanted is None:
        return suits[shape][0]
    if wanted not in suits[shape]:
        raise ConfigError(f"--mode {wanted} does not suit {shape}; give {' or '.join(suits[shape])}")
    return wanted


def load_items(path: str, shape: Shape, quarantine: Quarantine) -> Iterator[Item]:
    """The rows of a dataset, in its order.

    Raises:
        DataError: the file is missing, unreadable, or has no usable row, or a column of ours holds something else.
    """
    number = 0
    if shape == "pairs":
        for number, pair in enumerate(read_labelled(path, quarantine), 1):
            yield _pair(number, pair)
    elif shape == "scores":
        for number, scored in enumerate(read_scored(path, quarantine), 1):
            yield _scored(number, scored)
    else:
        for candidates in read_rankings(path, quarantine):
            responses = dict.fromkeys(c.response for c in candidates.candidates)
            if not 1 < len(responses) <= MOST_RESPONSES:
                what = f"{len(responses)} different responses, not 2 to {MOST_RESPONSES}"
                quarantine.add(number + 1, what, "")
                continue
            number += 1
            yield _ranking(number, candidates)
        if not number:
            raise DataError(f"{path} has no row with 2 to {MOST_RESPONSES} different responses")


class Told(BaseModel):
    """Columns of our datasets that a label's row may have."""

    chosen_is_a: bool = True
    chosen_prob_first: float | None = None
    chosen_prob_second: float | None = None
    label_mass: float | None = None
    label_mass_ab: float | None = None
    label_mass_ba: float | None = None
    censored: bool | None = None
    truncated: bool | None = None
    rationale: str | None = None
    rationale_ab: str | None = None
    rationale_ba: str | None = None
    human_chosen_prob: float | None = Field(default=None, ge=0, le=1)
    votes: list[dict[str, Any]] | None = None
    judge: str | None = None
    source: str | None = None
    principle: str | None = None


def _told(extra: Mapping[str, Any], number: int) -> Told:
    """The columns of ours among all columns, if they are ours: other tools may mean something else by their names."""
    if "rubric_hash" not in extra:
        return Told()
    try:
        return Told.model_validate({k: v for k, v in extra.items() if k != "chosen_is_a" or v is not None})
    except ValidationError as err:
        first = err.errors()[0]
        raise DataError(f"row {number}: column {first['loc'][0]} holds {first['input']!r:.80}") from err


def _pair(number: int, row: PreferenceRow | Pair) -> Item:
    if isinstance(row, Pair):
        a, b, told, p = row.a, row.b, Told(), None
    else:
        a, b, told, p = row.chosen, row.rejected, _told(row.extra, number), row.chosen_prob
    key, order = arrange(row.prompt, (a, b))
    checked: Row = {**told.model_dump(), "prompt": "", "chosen": a, "rejected": b, "chosen_prob": p}
    return Item(
        row=number,
        key=key,
        prompt=row.prompt,
        responses=tuple((a, b)[i] for i in order),
        label=None if p is None else _preference(p, told, order),
        subset=subset_of(row.extra),
        findings=find(checked),
    )


def _preference(p: float, told: Told, order: tuple[int, ...]) -> Label:
    """The label in the order shown; 0 is the chosen response in `order`."""
    place = {index: shown for shown, index in enumerate(order)}
    chosen, rejected = place[0], place[1]
    first, second = (chosen, rejected) if told.chosen_is_a else (rejected, chosen)
    opinions = []
    for name, shown in (("ab", (first, second)), ("ba", (second, first))):
        told_first = told.chosen_prob_first if shown[0] == chosen else told.chosen_prob_second
        p_first = told_first if shown[0] == chosen or told_first is None else 1.0 - told_first
        mass: float | None = getattr(told, f"label_mass_{name}")
        rationale: str | None = getattr(told, f"rationale_{name}")
        if p_first is not None or mass is not None or rationale is not None:
            opinions.append(Opinion(shown=shown, order=name, p_first=p_first, mass=mass, rationale=rationale))

    def turned(value: float | None) -> float | None:
        return value if value is None or chosen == 0 else 1.0 - value

    return Label(
        kind="preference",
        values=(turned(p), turned(1.0 - p)),
        opinions=tuple(opinions),
        people=turned(told.human_chosen_prob),
        votes=tuple((str(v.get("judge")), turned(v.get("chosen_prob"))) for v in told.votes or ()),
        judge=told.judge or "",
        source=told.source or "",
        principle=told.principle,
    )


def _scored(number: int, row: ScoredRow) -> Item:
    told = _told(row.extra, number)
    key, _ = arrange(row.prompt, (row.response,))
    opinion = Opinion(shown=(0,), mass=told.label_mass, rationale=told.rationale)
    return Item(
        row=number,
        key=key,
        prompt=row.prompt,
        responses=(row.response,),
        label=Label(
            kind="scores",
            values=(row.score,),
            opinions=(opinion,) if told.label_mass is not None or told.rationale else (),
            judge=told.judge or "",
            source=told.source or "",
        ),
        subset=subset_of(row.extra),
        findings=find({**told.model_dump(), "label_mass_ab": told.label_mass}),
    )


def _ranking(number: int, row: CandidateSet) -> Item:
    """Responses with the strengths that a judge's comparisons gave them, where there are any.

    The best and the second best are checked as a pair: that is the comparison which matters most.
    """
    scores = {c.response: c.score for c in row.candidates}
    responses, strengths = list(scores), list(scores.values())
    key, order = arrange(row.prompt, responses)
    is_ranked = sum(s is not None for s in strengths) > 1
    kind: Literal["strengths", "scores"] = "strengths" if "comparisons" in row.extra else "scores"
    label = Label(kind=kind, values=tuple(strengths[i] for i in order)) if is_ranked else None
    found: tuple[Finding, ...] = ()
    if is_ranked:
        best, second = sorted(
            (i for i, s in enumerate(strengths) if s is not None), key=lambda i: -(strengths[i] or 0.0)
        )[:2]
        given = Label(kind=kind, values=tuple(strengths))
        found = find(
            {
                "chosen": responses[best],
                "rejected": responses[second],
                "chosen_prob": given.prefers(best, second),
            }
        )
    return Item(
        row=number,
        key=key,
        prompt=row.prompt,
        responses=tuple(responses[i] for i in order),
        label=label,
        subset=subset_of(row.extra),
        findings=found,
    )
