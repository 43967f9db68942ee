"""Values as a page writes them. What could not be had is None, which the page calls missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.runs import short

Found = Mapping[str, Any]
"""An estimate: `value`, `low`, `high`, each of them None where it could not be had."""


def rate(value: float | None) -> str | None:
    """A rate in percent."""
    return None if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str | None:
    """A difference of rates, in points of percent, with its sign."""
    return None if value is None else f"{100 * value:+.1f}"


def decimal(value: float | None) -> str | None:
    """A number with three decimals."""
    return None if value is None else f"{value:.3f}"


def figure(value: float | None) -> str | None:
    """A number of any size, to four figures."""
    return None if value is None else f"{value:.4g}"


def whole(value: float | None) -> str | None:
    """A count."""
    return None if value is None else f"{value:,.0f}"


def tokens(value: float | None) -> str | None:
    """A count of tokens, such as 1.23M."""
    return None if value is None else short(value)


def usd(value: float | None) -> str | None:
    """An amount of money."""
    return None if value is None else f"${value:,.4g}"


def rate_range(found: Found | None) -> str:
    """The interval of an estimated rate in percent; empty where there is none."""
    if found is None or found.get("low") is None or found.get("high") is None:
        return ""
    return f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"


def points_range(found: Found | None) -> str:
    """The interval of an estimated difference of rates, in points of percent; empty where there is none."""
    if found is None or found.get("low") is None or found.get("high") is None:
        return ""
    return f"{100 * found['low']:+.1f} to {100 * found['high']:+.1f}"


def range_of(found: Found | None) -> str:
    """The interval of an estimate; empty where there is none."""
    if found is None or found.get("low") is None or found.get("high") is None:
        return ""
    return f"{found['low']:.3f} to {found['high']:.3f}"


def rate_estimate(found: Found | None) -> str | None:
    """An estimated rate with its interval, in percent: `81.7 [76.2, 86.6]`."""
    if found is None or found.get("value") is None:
        return None
    if found.get("low") is None:
        return f"{100 * found['value']:.1f}"
    return f"{100 * found['value']:.1f} [{100 * found['low']:.1f}, {100 * found['high']:.1f}]"


def points_estimate(found: Found | None) -> str | None:
    """An estimated difference of rates with its interval, in points of percent."""
    if found is None or found.get("value") is None:
        return None
    if found.get("low") is None:
        return f"{100 * found['value']:+.1f}"
    return f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def estimate(found: Found | None) -> str | None:
    """An estimate with its interval: `0.817 [0.762, 0.866]`."""
    if found is None or found.get("value") is None:
        return None
    if found.get("low") is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def count_rows(
    counts: Mapping[str, int] | None, total: int | None = None
) -> list[tuple[str, str, str | None]]:
    """Rows of a table of reasons: what, how many, and the share of `total`."""
    return [
        (name, f"{count:,}", None if not total else f"{100 * count / total:.2f} %")
        for name, count in (counts or {}).items()
    ]


def text_of(value: Any) -> str:
    """The text of a column that holds messages, or text: turns apart from each other, named where there are several."""
    if value is None or isinstance(value, str):
        return value or ""
    messages: Sequence[Mapping[str, Any]] = value
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
