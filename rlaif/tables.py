"""Findings as Markdown: tables, and numbers with their intervals. A finding that could not be had is a dash."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
"""An estimate: `value`, `low`, `high`, each of them None where it could not be had."""


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [tuple(map(str, row)) for row in rows]
    widths = [max(len(line[k]) for line in (heads, *cells)) for k in range(len(heads))]

    def line(values: Sequence[str]) -> str:
        return (
            "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"
        )

    return "\n".join((line(heads), line(["-" * width for width in widths]), *map(line, cells)))


def section_scores(found: Sequence[Found]) -> str:
    """RewardBench's sections, as `rlaif.rewardbench.sections` gives them."""
    rows = [
        (f"**{f['name']}**" if f["name"] == "score" else f["name"], f["pairs"], percent_interval(f))
        for f in found
    ]
    missing: list[str] = next((f["missing"] for f in found if f["name"] == "score"), [])
    left_out = f" Without pairs, and so left out: {', '.join(missing)}." if missing else ""
    return (
        "## RewardBench\n\nSubsets weigh as on its leaderboard; the score is the mean of the sections."
        f"{left_out}\n\n{table(('section', 'pairs', '%'), rows)}"
    )


def best_of_scores(found: Sequence[Found]) -> str:
    """RewardBench 2's subsets, as `rlaif.rewardbench.best_of` gives them."""
    rows = [
        (
            f"**{f['name']}**" if f["name"] == "score" else f["name"] or "all",
            f["answers"],
            percent_interval(f),
        )
        for f in found
    ]
    return (
        "## Best of several\n\nA right answer counts if it is preferred to every wrong one beside it; among three, "
        "chance is 25 %. The score is the mean of the subsets but Ties.\n\n"
        f"{table(('subset', 'right answers', '%'), rows)}"
    )


def percent(value: float | None, *, sign: bool = False) -> str:
    """A rate in percent with one decimal; `sign` writes a plus where it belongs."""
    return "-" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"


def number(value: float | None) -> str:
    """A number with three decimals."""
    return "-" if value is None else f"{value:.3f}"


def interval(found: Found) -> str:
    """An estimate as `0.500 [0.400, 0.600]`."""
    if found["value"] is None:
        return "-"
    return f"{found['value']:.3f} [{number(found['low'])}, {number(found['high'])}]"


def percent_interval(found: Found, *, sign: bool = False) -> str:
    """An estimated rate as `50.0 [40.0, 60.0]`, in percent."""
    if found["value"] is None:
        return "-"
    low, high = (percent(found[end], sign=sign) for end in ("low", "high"))
    return f"{percent(found['value'], sign=sign)} [{low}, {high}]"
