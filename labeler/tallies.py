"""Scores by who answered and by what was asked: tables of means, and of how often each class was given."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from labeler.rubric import Rubric
from rlaif.agreement import estimate_mean
from rlaif.answers import ABOUT_COLUMNS, Answer, topic
from rlaif.tables import interval, percent_interval, table
from rlaif.types import content_id

COLUMNS = (*ABOUT_COLUMNS, "turn")
"""What tables are made by, in their order."""

_MOST = 50
"""Columns with more values than this are no classes."""


class Tallies:
    """Collects scores, a few bytes each, and makes the tables.

    Args:
        rubric: whose `names` classes are counted under; None for several aspects, which have means alone.
    """

    def __init__(self, rubric: Rubric | None) -> None:
        self._rubric = rubric
        self._names = () if rubric is None else rubric.file.names
        self._kinds: dict[tuple[tuple[str, str], ...], int] = {}  # what is known of an answer, numbered
        self._kind, self._question = array("L"), array("Q")
        self._score, self._class = array("d"), array("b")  # NaN and -1 where there is none

    def add(self, answer: Answer, row: Mapping[str, Any] | None) -> None:
        """Count an answer with its row of `scores.parquet`; None where it has no score."""
        known = tuple(sorted(answer.about.items()))
        self._kind.append(self._kinds.setdefault(known, len(self._kinds)))
        self._question.append(int(content_id(topic(answer.prompt)), 16))
        self._score.append(math.nan if row is None else row["score"])
        self._class.append(-1 if row is None or not self._names else self._class_of(row))

    def _class_of(self, row: Mapping[str, Any]) -> int:
        """Place of the likeliest label; where a guard or a jury gave the score alone, of the level nearest to it."""
        assert self._rubric is not None
        places = range(len(self._names))
        if row["probs"] is not None:
            return max(places, key=row["probs"].__getitem__)
        levels = self._rubric.levels
        return min(places, key=lambda i: abs(levels[i] - row["score"]))

    def tables(self, resamples: int = 1000) -> list[dict[str, Any]]:
        """One entry for each model and each value of each column, and one for all answers of a model.

        Args:
            resamples: of the 95 % bootstrap intervals; whole questions are drawn, with all their turns.

        Returns:
            `column` (empty for all), `model`, `name`, `answers`, `unscored`, the estimate `score`, and `shares`: for
            each name of the rubric, the estimated share of the answers it was given to. Empty where the rubric has no
            names and nothing is known of the answers.
        """
        kinds = [dict(known) for known in self._kinds]
        models = _values(kinds, "model")
        columns = [
            name
            for name in COLUMNS
            if 1 < len(_values(kinds, name)) <= _MOST and not _is_model(kinds, name, models)
        ]
        if not columns and len(models) < 2 and not self._names:
            return []
        found = []
        for column in (*columns, ""):
            for model in models if 1 < len(models) <= _MOST else [""]:
                of_model = [k for k, kind in enumerate(kinds) if not model or kind.get("model") == model]
                for value in _values([kinds[k] for k in of_model], column) if column else [""]:
                    chosen = [k for k in of_model if not column or kinds[k].get(column) == value]
                    found.append(
                        {"column": column, "model": model, "name": value, **self._entry(chosen, resamples)}
                    )
        return found

    def _entry(self, kinds: Sequence[int], resamples: int) -> dict[str, Any]:
        """The answers of these kinds together."""
        inside = np.isin(np.asarray(self._kind), kinds)
        score, given = np.asarray(self._score)[inside], np.asarray(self._class)[inside]
        questions = np.asarray(self._question)[inside]
        scored = ~np.isnan(score)
        groups = questions[scored].tolist()

        def estimate(values: ArrayLike) -> dict[str, float | None]:
            return estimate_mean(values, groups=groups, resamples=resamples)

        return {
            "answers": int(inside.sum()),
            "unscored": int((~scored).sum()),
            "score": estimate(score[scored]),
            "shares": {name: estimate(given[scored] == place) for place, name in enumerate(self._names)},
        }


def _values(kinds: Sequence[Mapping[str, str]], column: str) -> list[str]:
    return sorted({kind[column] for kind in kinds if column in kind})


def _is_model(kinds: Sequence[Mapping[str, str]], column: str, models: Sequence[str]) -> bool:
    """Whether a column tells the models apart and nothing else, as the names of their files do."""
    met = {(kind.get("model"), kind.get(column)) for kind in kinds}
    return len(met) == len(models) == len(_values(kinds, column))


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
