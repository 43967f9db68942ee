"""The pages as HTML. Whatever a dataset holds is a value for a template, which escapes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from labeler.review.desk import Desk, Seen
from labeler.review.forms import write_query
from labeler.review.index import Query
from labeler.review.marks import GRADES, Mark
from rlaif.report.page import environment, shown
from rlaif.tables import interval, percent_interval

LETTERS = "ABCDEFGHI"
ORDER_NAMES = {
    "suspicion": "most suspicious first",
    "random": "random",
    "unsure": "least sure first",
    "dataset": "as in the dataset",
}
STATUS_NAMES = {
    "all": "all rows",
    "unmarked": "not marked",
    "marked": "marked",
    "bad": "bad rows",
    "differs": "I disagree with the label",
}
_EXCERPT = 220


class Pages:
    """Templates filled with what a desk shows.

    Args:
        desk: whose rows these are.
        title: the dataset's name.
    """

    def __init__(self, desk: Desk, title: str) -> None:
        self._desk = desk
        self._templates = environment(Path(__file__).parent / "templates")
        self._templates.filters |= {
            "visible": visible, "excerpt": excerpt, "said": said, "reason": reason, "words": count_words,
            "percent": percent_interval, "interval": interval,
        }  # fmt: skip
        self._templates.globals |= {
            "title": title, "desk": desk, "letters": LETTERS, "grades": GRADES, "orders": ORDER_NAMES,
            "statuses": STATUS_NAMES,
        }  # fmt: skip

    def list(
        self, query: Query, rows: Sequence[Seen], *, total: int, page: int, last_page: int, done: bool
    ) -> str:
        """A window of a query's rows, what can be asked for, and how far the work is; `done` if nothing of it waits."""
        return self._render(
            "list.html.jinja",
            query,
            rows=rows,
            total=total,
            page=page,
            last_page=last_page,
            done=done,
            found=self._desk.summary(),
            reasons=self._desk.reasons(),
            subsets=sorted(filter(None, self._desk.index.subsets)),
        )

    def row(self, query: Query, position: int, saved: int | None) -> str:
        """One row; `saved` is the number of the row that was marked just before."""
        desk = self._desk
        before = desk.index.item(saved - 1) if saved and saved <= len(desk.index) else None
        return self._render(
            "row.html.jinja",
            query,
            seen=desk.see(position),
            earlier=desk.neighbour(query, position, -1),
            later=desk.neighbour(query, position, 1),
            saved=before,
            saved_mark=None if before is None else desk.mark_on(before),
            last_mark=desk.last_mark(),
        )

    def refusal(self, message: str) -> str:
        """Why there is nothing to see."""
        return self._templates.get_template("refusal.html.jinja").render(message=message)

    def _render(self, name: str, query: Query, **values: Any) -> str:
        link = partial(write_query, query)
        return self._templates.get_template(name).render(
            query=query, link=link, counts=self._desk.counts(), **values
        )


def visible(text: str) -> str:
    """The whole text, its control characters replaced."""
    return shown(text.replace("\r\n", "\n"), len(text))


def excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    text = " ".join(visible(text).split())
    return text if len(text) <= _EXCERPT else f"{text[:_EXCERPT]}…"


def count_words(text: str) -> str:
    """How long a response is."""
    words = len(text.split())
    return f"{words:,} word{'' if words == 1 else 's'}, {len(text):,} characters"


def reason(check: str) -> str:
    """A finding's name as people read it."""
    return check.replace("_", " ")


def said(mark: Mark) -> str:
    """A mark in a few characters: `A`, `tie`, `A 6 · B 2`, `B > A = C`, `bad row`."""
    if mark.verdict == "bad":
        return "bad row"
    letters = dict(zip(LETTERS, mark.values, strict=False))
    if mark.verdict == "grades":
        if len(letters) == 1:
            return str(mark.values[0])
        return " · ".join(f"{letter} {grade}" for letter, grade in letters.items())
    ordered = sorted(letters, key=letters.__getitem__)
    groups = [list(group) for _, group in groupby(ordered, key=letters.__getitem__)]
    if len(letters) == 2:
        return "tie" if len(groups) == 1 else groups[0][0]
    return " > ".join(" = ".join(group) for group in groups)
