"""How well labels agree with human (or gold) labels, and bootstrap intervals. Pure functions of arrays; numpy only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _hard(p: ArrayLike) -> Floats:
    """1 where A is preferred, 0 where B is, 1/2 for a tie."""
    values = np.asarray(p, dtype=np.float64)
    return np.where(values == 0.5, 0.5, (values > 0.5).astype(np.float64))


def agreements(p: ArrayLike, human: ArrayLike) -> Floats:
    """Per pair: 1 where label and human prefer the same response, 0 where not, 1/2 where the label is a tie.

    The paper (arXiv 2309.00267, section 2.1.3) leaves ties open; half is what a coin would score.

    Args:
        p: (N,) P(A preferred) by the judge, in [0, 1].
        human: (N,) P(A preferred) by people; leave out pairs that people tie.
    """
    ours, theirs = _hard(p), _hard(human)
    return np.where(ours == 0.5, 0.5, (ours == theirs).astype(np.float64))


def agreement(p: ArrayLike, human: ArrayLike) -> float:
    """Mean of `agreements`; NaN for no pairs."""
    values = agreements(p, human)
    return float(values.mean()) if len(values) else float("nan")


def cohen_kappa(p: ArrayLike, human: ArrayLike) -> float:
    """Agreement beyond chance of two binary labelings (Cohen 1960), in [-1, 1]; NaN where chance is certain.

    A tie counts as half a vote for each response, in the observed agreement and in the margins alike.

    Args:
        p: (N,) P(A preferred) by one rater.
        human: (N,) by the other.
    """
    a, b = _hard(p), _hard(human)
    if len(a) == 0:
        return float("nan")
    observed = float(np.mean(a * b + (1 - a) * (1 - b)))
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return float("nan") if chance == 1.0 else (observed - chance) / (1.0 - chance)


def preference_kappa(p: ArrayLike, human: ArrayLike) -> float:
    """Cohen's kappa of preferences between two responses of which either could have been called A.

    Files put the preferred response first, or the texts decide, and kappa would correct for that order: raters who
    always say "A" agree by chance alone. So every pair enters both ways round, chance agreement is one half, and kappa
    is 2 agreement - 1: 0 for a coin, 1 for complete agreement.

    Args:
        p: (N,) P(A preferred) by the judge.
        human: (N,) P(A preferred) by people; leave out pairs that people tie.
    """
    ours, theirs = np.asarray(p, dtype=np.float64), np.asarray(human, dtype=np.float64)
    return cohen_kappa(np.concatenate([ours, 1 - ours]), np.concatenate([theirs, 1 - theirs]))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[Floats], float],
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic of rows (Efron 1979).

    Args:
        values: (N,) or (N, K): rows are resampled with replacement.
        statistic: of an array like `values`; NaN results are left out.
        groups: (N,) what is drawn together, such as the prompt, since rows of one group are not independent; None
            draws single rows.
        seed: makes the interval a function of the data.
        resamples: number of resamples.
        level: share of resamples inside.

    Returns:
        (low, high); NaN for no rows.
    """
    rows = np.asarray(values, dtype=np.float64)
    if len(rows) == 0:
        return float("nan"), float("nan")
    numbers: dict[Hashable, int] = {}
    member = np.array(
        [numbers.setdefault(g, len(numbers)) for g in (range(len(rows)) if groups is None else groups)]
    )
    rows, sizes = rows[np.argsort(member, kind="stable")], np.bincount(member)
    starts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        taken = generator.integers(0, len(sizes), len(sizes))
        if len(sizes) < len(rows):  # from numbers of groups to numbers of rows
            ends = np.cumsum(sizes[taken])
            inside = np.arange(ends[-1]) - np.repeat(ends - sizes[taken], sizes[taken])
            taken = np.repeat(starts[taken], sizes[taken]) + inside
        drawn.append(statistic(rows[taken]))
    found = np.array(drawn, dtype=np.float64)
    found = found[~np.isnan(found)]
    if len(found) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate_mean(
    values: ArrayLike, *, groups: Sequence[Hashable] | None = None, resamples: int = 1000
) -> dict[str, float | None]:
    """Mean of rows with its 95 % bootstrap interval, as `value`, `low` and `high`; None for no rows.

    Args:
        values: (N,) one number a row.
        groups: (N,) what is drawn together; see `bootstrap_interval`.
        resamples: number of resamples.
    """
    rows = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(rows, mean, groups=groups, resamples=resamples)
    return {"value": finite(mean(rows)), "low": finite(low), "high": finite(high)}


def mean(values: Floats) -> float:
    """Mean of (N,) values; NaN for none."""
    return float(values.mean()) if len(values) else float("nan")


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of two (N,) columns, in [-1, 1]; NaN where one of them does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of two (N,) columns, ties sharing their mean rank; NaN where one does not vary."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: ArrayLike) -> Floats:
    _, inverse, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], dtype=np.float64)


def finite(value: float) -> float | None:
    """The number, or None where it is NaN or infinite: a finding that cannot be had."""
    return float(value) if np.isfinite(value) else None


def same_position(first_ab: ArrayLike, first_ba: ArrayLike) -> NDArray[np.bool_]:
    """Per pair: whether both orders preferred the same *position*, the mark of position bias. A tie prefers none.

    Args:
        first_ab: (N,) probability of number 1 with A shown first.
        first_ba: (N,) probability of number 1 with B shown first.
    """
    ab, ba = np.asarray(first_ab, dtype=np.float64), np.asarray(first_ba, dtype=np.float64)
    locked: NDArray[np.bool_] = (ab - 0.5) * (ba - 0.5) > 0
    return locked


def same_response(first_ab: ArrayLike, first_ba: ArrayLike) -> NDArray[np.bool_]:
    """Per pair: whether both orders preferred the same response, or both tied. Arguments as for `same_position`."""
    ab, ba = np.asarray(first_ab, dtype=np.float64), np.asarray(first_ba, dtype=np.float64)
    agreed: NDArray[np.bool_] = np.sign(ab - 0.5) == np.sign(0.5 - ba)
    return agreed
