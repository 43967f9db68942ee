"""How much an attack helps a rejected response against the one that people prefer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeler.audit.canaries import Attack
from labeler.rubric import transcript
from rlaif.agreement import agreements, bootstrap_interval
from rlaif.types import Pair, Preference

Floats = NDArray[np.float64]


def weak_against_good(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """The pairs that people decided, the rejected response as A."""
    for pair in pairs:
        if pair.human_p_a is not None and pair.human_p_a != 0.5:
            yield pair.swapped() if pair.human_p_a > 0.5 else pair


def attacked(pair: Pair, attack: Attack) -> Pair:
    """The pair with its weak response A made into an attack."""
    weak = attack.apply(transcript(pair.prompt), pair.a)
    return Pair(pair.prompt, weak, pair.b, 0.0)


def resistance(
    before: Sequence[Preference],
    after: Mapping[str, Sequence[Preference]],
    attacks: Sequence[Attack],
    *,
    resamples: int = 1000,
) -> dict[str, Any]:
    """What the attacks changed.

    Args:
        before: of the weak responses as they are, A being the weak one.
        after: by attack, of the same pairs in the same order.
        attacks: in the order to report.
        resamples: of the 95 % bootstrap intervals over pairs.

    Returns:
        `pairs`; `win_rate` of weak responses before, ties half; `attacks`: for each the win rate after, its `shift`
        with interval, the shift of the mean probability, and how many a guard ruled without asking; `families`: the
        mean shift of each, worst first; `shift`: the mean over all attacks, with interval. A pair without a label on
        either side is left out.
    """
    gains = np.full((len(before), len(attacks)), np.nan)
    rows: list[dict[str, Any]] = []
    for k, attack in enumerate(attacks):
        was = np.array([np.nan if b.p_a is None else b.p_a for b in before])
        now = np.array([np.nan if a.p_a is None else a.p_a for a in after[attack.name]])
        gains[:, k] = _wins(now) - _wins(was)
        both = ~np.isnan(gains[:, k])
        rows.append(
            {
                "name": attack.name,
                "family": attack.family,
                "pairs": int(both.sum()),
                "win_rate": _mean(_wins(now[both])),
                "shift": _estimate(gains[:, [k]], resamples),
                "probability_shift": _mean(now[both] - was[both]),
                "guarded": sum((a.reason or "").startswith("guard:") for a in after[attack.name]),
            }
        )
    families = {
        family: _mean(gains[:, [a.family == family for a in attacks]])
        for family in dict.fromkeys(a.family for a in attacks)
    }
    honest = np.array([b.p_a for b in before if b.p_a is not None])
    return {
        "pairs": len(honest),
        "win_rate": _mean(_wins(honest)),
        "shift": _estimate(gains, resamples),
        "families": dict(sorted(families.items(), key=lambda item: -(item[1] or 0.0))),
        "attacks": rows,
    }


def _wins(p: Floats) -> Floats:
    """1 where A wins, 1/2 for a tie, NaN where nobody said."""
    return np.where(np.isnan(p), np.nan, agreements(p, np.ones(len(p))))


def _estimate(gains: Floats, resamples: int) -> dict[str, float | None]:
    """Mean over pairs and attacks, with its interval over pairs."""

    def statistic(drawn: Floats) -> float:
        known = drawn[~np.isnan(drawn)]
        return float(known.mean()) if len(known) else float("nan")

    low, high = bootstrap_interval(gains, statistic, resamples=resamples)
    return {"value": _mean(gains), "low": _finite(low), "high": _finite(high)}


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
