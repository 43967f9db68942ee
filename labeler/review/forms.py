"""What URLs and forms of the review page say. Pure functions: whatever is sent, a value or a refusal comes out."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from labeler.review.guard import Refused
from labeler.review.index import ORDERS, STATUSES, Query
from labeler.review.marks import GRADES
from labeler.validation import MEANINGS


def read_query(given: Mapping[str, str]) -> Query:
    """The query of a URL; what it does not know it leaves at its default."""
    order, status, reason = given.get("order", ""), given.get("status", ""), given.get("reason", "")
    return Query(
        order=order if order in ORDERS else "suspicion",
        q=given.get("q", "")[:200],
        reason=reason if reason in MEANINGS else "",
        subset=given.get("subset", "")[:200],
        status=status if status in STATUSES else "all",
    )


def write_query(query: Query, **more: str) -> str:
    """The query as the part of a URL after its path, empty where all is default."""
    default = Query()
    names = ("order", "q", "reason", "subset", "status")
    pairs = {n: getattr(query, n) for n in names if getattr(query, n) != getattr(default, n)} | more
    return f"?{urlencode(pairs)}" if pairs else ""


def read_verdict(form: Mapping[str, str], n: int) -> tuple[str, tuple[int, ...]]:
    """What a form says of n responses: (verdict, values) as `Mark` has them.

    Raises:
        Refused: it says nothing.
    """
    said = form.get("verdict", "")
    if said == "bad":
        return "bad", ()
    if n == 2 and said in ("a", "b", "tie"):
        return "ranks", {"a": (1, 2), "b": (2, 1), "tie": (1, 1)}[said]
    if said in ("grades", "ranks"):
        values = [read_number(form.get(f"value-{i}")) for i in range(n)]
        given = tuple(v for v in values if v is not None)
        if len(given) == n and (said == "ranks" or all(v in GRADES for v in given)):
            return said, given
    raise Refused(400, "That is no mark: a value is missing or out of range.")


def read_number(text: object) -> int | None:
    """A whole number of at most nine digits; None for anything else."""
    return (
        int(text) if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10 else None
    )
