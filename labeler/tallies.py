"""Scores by who answered and by what was asked: tables of means, and of how often each class was given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labeler.rubric import Rubric
from rlaif.agreement import estimate_mean
from rlaif.answers import ABOUT_COLUMNS, Answer, topic
from rlaif.tables import interval, percent_interval, table
from rlaif.types import content_id

COLUMNS = (*ABOUT_COLUMNS, "turn")
"""What tables are made by, in their order."""

_MOST = 50
"""Columns with more values than this are no classes."""


@dataclass(frozen=True, slots=True)
class _Scored:
    question: str
    about: Mapping[str, str]
    score: float | None
    named: str | None


class Tallies:
    """Collects scores, and makes the tables.

    Args:
        rubric: whose `names` classes are counted under; None for several aspects, which have means alone.
    """

    def __init__(self, rubric: Rubric | None) -> None:
        self._rubric = rubric
        self._names = () if rubric is None else rubric.file.names
        self._rows: list[_Scored] = []

    def add(self, answer: Answer, row: Mapping[str, Any] | None) -> None:
        """Count an answer with its row of `scores.parquet`; None where it has no score."""
        score = None if row is None else row["score"]
        named = None if row is None else self._class(row)
        self._rows.append(_Scored(content_id(topic(answer.prompt)), answer.about, score, named))

    def _class(self, row: Mapping[str, Any]) -> str | None:
        """The name of the likeliest label; where a guard or a jury gave the score alone, of the level nearest to it."""
        if self._rubric is None or not self._names:
            return None
        places = range(len(self._names))
        if row["probs"] is not None:
            return self._names[max(places, key=row["probs"].__getitem__)]
        levels = self._rubric.levels
        return self._names[min(places, key=lambda i: abs(levels[i] - row["score"]))]

    def tables(self, resamples: int = 1000) -> list[dict[str, Any]]:
        """One entry for each model and each value of each column, and one for all answers of a model.

        Args:
            resamples: of the 95 % bootstrap intervals; whole questions are drawn, with all their turns.

        Returns:
            `column` (empty for all), `model`, `name`, `answers`, `unscored`, the estimate `score`, and `shares`: for
            each name of the rubric, the estimated share of the answers it was given to. Empty where the rubric has no
            names and nothing is known of the answers.
        """
        columns = [
            name for name in COLUMNS if 1 < len(self._values(name)) <= _MOST and not self._is_model(name)
        ]
        models = sorted(self._values("model"))
        if not columns and len(models) < 2 and not self._names:
            return []
        many = models if 1 < len(models) <= _MOST else [""]
        found = []
        for column in (*columns, ""):
            for model in many:
                rows = [row for row in self._rows if not model or row.about.get("model") == model]
                values = sorted({row.about.get(column, "") for row in rows} - {""}) if column else [""]
                for value in values:
                    chosen = [row for row in rows if not column or row.about.get(column) == value]
                    found.append(
                        {"column": column, "model": model, "name": value} | self._entry(chosen, resamples)
                    )
        return found

    def _is_model(self, column: str) -> bool:
        """Whether a column tells the models apart and nothing else, as the names of their files do."""
        met = {(row.about.get("model"), row.about.get(column)) for row in self._rows}
        return len(met) == len(self._values("model")) == len(self._values(column))

    def _values(self, column: str) -> Counter[str]:
        return Counter(row.about[column] for row in self._rows if column in row.about)

    def _entry(self, rows: Sequence[_Scored], resamples: int) -> dict[str, Any]:
        scored = [row for row in rows if row.score is not None]
        classed = [row for row in scored if row.named is not None]
        return {
            "answers": len(rows),
            "unscored": len(rows) - len(scored),
            "score": estimate_mean(
                [row.score for row in scored if row.score is not None],
                groups=[row.question for row in scored],
                resamples=resamples,
            ),
            "shares": {
                name: estimate_mean(
                    [float(row.named == name) for row in classed],
                    groups=[row.question for row in classed],
                    resamples=resamples,
                )
                for name in self._names
            },
        }


def render(entries: Sequence[Mapping[str, Any]], title: str) -> str:
    """The tables as Markdown, one for each column."""
    parts = [f"# {title}\n\n95 % intervals over questions."]
    for column in dict.fromkeys(entry["column"] for entry in entries):
        rows = [entry for entry in entries if entry["column"] == column]
        names = list(rows[0]["shares"])
        by_model, unscored = any(e["model"] for e in rows), any(e["unscored"] for e in rows)
        heads = [
            *(["model"] if by_model else []), *([column] if column else []), "answers",
            *(["unscored"] if unscored else []), *(f"{name}, %" for name in names), "mean score",
        ]  # fmt: skip
        lines = [
            [
                *([e["model"]] if by_model else []), *([e["name"]] if column else []), e["answers"],
                *([e["unscored"]] if unscored else []), *(percent_interval(e["shares"][name]) for name in names),
                interval(e["score"]),
            ]
            for e in rows
        ]  # fmt: skip
        parts.append(f"## {f'By {column}' if column else 'All'}\n\n{table(heads, lines)}")
    return "\n\n".join(parts) + "\n"
