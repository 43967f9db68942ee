"""From comparisons to a ranking: Bradley-Terry and Elo from soft labels, with bootstrap intervals. Numpy only.

A comparison is a row (i, j, p): items i and j met, and i was preferred with probability p. Soft labels enter as they
are, so a coin flip (p = 1/2) moves nobody and a sure label counts as a whole win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RIDGE = 0.01
"""Default penalty of Bradley-Terry: small beside one comparison, whose Fisher information is at most 1/4."""

_TOLERANCE = 1e-10
_MAX_STEPS = 200
_BLOCK = 4_000_000
"""Comparisons times resamples held at a time."""


def bradley_terry(
    n: int, pairs: ArrayLike, *, weights: ArrayLike | None = None, ridge: float = RIDGE
) -> Floats:
    r"""Strengths theta that best explain the comparisons: P(i over j) = sigmoid(theta_i - theta_j).

    Bradley and Terry (1952), penalised so that an undefeated item stays finite: the maximum of
    `sum w (p log s + (1 - p) log(1 - s)) - ridge/2 sum theta^2` with `s = sigmoid(theta_i - theta_j)`, by Newton's
    method with the step length that makes it converge from anywhere (Sun and Tran-Dinh 2019, theorem 2, nu = 2).
    The order of the comparisons does not matter, nor whether one is given as (i, j, p) or (j, i, 1 - p).

    Args:
        n: number of items.
        pairs: (M, 3) rows (i, j, p); items 0..n-1, i != j, p in [0, 1].
        weights: (M,) how much each comparison counts, >= 0; None for 1.
        ridge: weight of the penalty, > 0. As logistic regression it is 1/C of scikit-learn.

    Returns:
        (n,) strengths in log-odds. Those of items linked by comparisons have mean 0; strengths of items that no
        chain of comparisons links do not compare (`components`). NaN for an item without a comparison.

    Raises:
        ValueError: a row that is no comparison.
    """
    games = _checked(n, pairs, weights)
    return _fit(_wins(n, games, games.w), ridge)


def elo(
    n: int,
    pairs: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    k: float = 4.0,
    initial: float = 1000.0,
    shuffles: int = 100,
    seed: int = 0,
) -> Floats:
    """Elo ratings (Elo 1978): each comparison moves both by k (p - expected), expected on the 400-point scale.

    Elo depends on the order of the games, which comparisons by a judge do not have. So the rating is the mean over
    `shuffles` orders drawn from `seed` after sorting: a function of the set of comparisons alone.

    Args:
        n: number of items.
        pairs: (M, 3) rows (i, j, p), as for `bradley_terry`.
        weights: (M,) factors of k, >= 0; None for 1.
        k: points at stake in one comparison.
        initial: rating before the first comparison.
        shuffles: number of orders averaged.
        seed: of the orders.

    Returns:
        (n,) ratings; NaN for an item without a comparison.

    Raises:
        ValueError: a row that is no comparison.
    """
    games = _checked(n, pairs, weights)
    games = games.take(np.lexsort(games[::-1]))
    orders = _orders(len(games.p), shuffles, np.random.default_rng(seed))
    ratings = _play(n, games, np.broadcast_to(games.w, orders.shape), orders, k, initial).mean(axis=0)
    return np.where(_met(n, games) > 0, ratings, np.nan)


@dataclass(frozen=True, slots=True)
class Standing:
    """One line of a leaderboard.

    Attributes:
        name: the item.
        strength: Bradley-Terry strength in log-odds, mean 0 within a component.
        strength_95: its bootstrap interval.
        elo: Elo rating.
        elo_95: its bootstrap interval.
        win_rate: mean probability of being preferred in its comparisons.
        comparisons: number of its comparisons.
        component: items of different components were never compared, not even by a chain; numbered from 0.
    """

    name: str
    strength: float
    strength_95: tuple[float, float]
    elo: float
    elo_95: tuple[float, float]
    win_rate: float
    comparisons: int
    component: int


def leaderboard(
    names: Sequence[str],
    pairs: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    ridge: float = RIDGE,
    k: float = 4.0,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Standing]:
    """All items by descending Bradley-Terry strength, with percentile bootstrap intervals (Efron 1979).

    Args:
        names: of items 0..n-1.
        pairs: (M, 3) rows (i, j, p), as for `bradley_terry`.
        weights: (M,) how much each comparison counts; None for 1.
        groups: (M,) what is resampled together, such as the prompt, since comparisons of one prompt are not
            independent; None resamples single comparisons.
        ridge: of `bradley_terry`.
        k: of `elo`.
        resamples: number of resamples; 0 gives NaN intervals.
        level: share of resamples inside an interval.
        seed: of the resamples and of Elo's orders.

    Returns:
        One standing per name; items without a comparison come last, with NaN.

    Raises:
        ValueError: a row that is no comparison.
    """
    n = len(names)
    games = _checked(n, pairs, weights)
    count = len(games.p)
    group = np.zeros(count, np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.lexsort((group, *games[::-1]))
    games, group = games.take(order), np.arange(count) if groups is None else group[order]
    table = np.column_stack(games[:3])
    strengths = bradley_terry(n, table, weights=games.w, ridge=ridge)
    ratings = elo(n, table, weights=games.w, k=k, seed=seed)
    bt_drawn, elo_drawn = _bootstrap(n, games, group, ridge, k, resamples, seed)
    bt_low, bt_high = _interval(bt_drawn, level)
    elo_low, elo_high = _interval(elo_drawn, level)
    met = _met(n, games)
    won = np.bincount(games.i, games.p, n) + np.bincount(games.j, 1 - games.p, n)
    part = components(n, table)
    ranked = sorted(range(n), key=lambda x: (np.isnan(strengths[x]), -strengths[x], x))
    return [
        Standing(
            names[x],
            float(strengths[x]),
            (float(bt_low[x]), float(bt_high[x])),
            float(ratings[x]),
            (float(elo_low[x]), float(elo_high[x])),
            float(won[x] / met[x]) if met[x] else float("nan"),
            int(met[x]),
            int(part[x]),
        )
        for x in ranked
    ]


def components(n: int, pairs: ArrayLike) -> Ints:
    """Which items a chain of comparisons links.

    Args:
        n: number of items.
        pairs: (M, 3) rows (i, j, p), as for `bradley_terry`.

    Returns:
        (n,) number of each item's component, counted from 0 in item order.

    Raises:
        ValueError: a row that is no comparison.
    """
    i, j, _, _ = _checked(n, pairs, None)
    label = np.arange(n)
    while True:
        lowest = label.copy()
        np.minimum.at(lowest, i, label[j])
        np.minimum.at(lowest, j, label[i])
        lowest = lowest[lowest]
        if (lowest == label).all():
            return np.unique(label, return_inverse=True)[1].astype(np.int64)
        label = lowest


class _Games(NamedTuple):
    """Comparisons as columns, i < j."""

    i: Ints
    j: Ints
    p: Floats
    w: Floats

    def take(self, order: Ints) -> _Games:
        return _Games(self.i[order], self.j[order], self.p[order], self.w[order])


def _checked(n: int, pairs: ArrayLike, weights: ArrayLike | None) -> _Games:
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 3)
    w = np.ones(len(table)) if weights is None else np.asarray(weights, dtype=np.float64)
    i, j, p = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]
    low, high = np.minimum(i, j), np.maximum(i, j)
    if w.shape != p.shape or not (np.isfinite(w) & (w >= 0)).all():
        raise ValueError(f"weights must be {len(p)} finite numbers >= 0")
    if not ((low >= 0) & (low < high) & (high < n)).all():
        raise ValueError(f"a comparison needs two different items from 0 to {n - 1}")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("a comparison needs a probability in [0, 1]")
    return _Games(low, high, np.where(i < j, p, 1 - p), w)


def _met(n: int, games: _Games) -> Ints:
    """(n,) number of each item's comparisons."""
    return np.bincount(games.i, minlength=n) + np.bincount(games.j, minlength=n)


def _wins(n: int, games: _Games, w: Floats) -> Floats:
    """(n, n): weight with which the row's item was preferred to the column's; all that the likelihood needs."""
    wins = np.zeros((n, n))
    np.add.at(wins, (games.i, games.j), w * games.p)
    np.add.at(wins, (games.j, games.i), w * (1 - games.p))
    return wins


def _fit(wins: Floats, ridge: float) -> Floats:
    """The penalised maximum; NaN for items without a comparison."""
    n = len(wins)
    met = wins + wins.T
    theta = np.zeros(n)
    for _ in range(_MAX_STEPS):
        s = 1.0 / (1.0 + np.exp(np.clip(theta[None, :] - theta[:, None], -700, 700)))
        gradient = (wins - met * s).sum(axis=1) - ridge * theta
        curvature = met * s * (1 - s)
        hessian = np.diag(curvature.sum(axis=1) + ridge) - curvature
        step = np.linalg.solve(hessian, gradient)
        reach = float(np.ptp(step)) if n else 0.0
        if reach < _TOLERANCE:
            break
        theta = theta + step * (np.log1p(reach) / reach)
    theta[met.sum(axis=1) == 0] = np.nan
    return theta


def _orders(count: int, shuffles: int, generator: np.random.Generator) -> Ints:
    """(S, M) random orders of all comparisons."""
    return generator.permuted(np.tile(np.arange(count), (shuffles, 1)), axis=1)


def _play(n: int, games: _Games, w: Floats, orders: Ints, k: float, initial: float) -> Floats:
    """(S, n) ratings after all games, for S orders side by side; w is (S, M)."""
    ratings = np.full((len(orders), n), initial)
    rows = np.arange(len(orders))
    for game in orders.T:
        a, b = games.i[game], games.j[game]
        expected = 1.0 / (1.0 + 10.0 ** ((ratings[rows, b] - ratings[rows, a]) / 400.0))
        moved = k * w[rows, game] * (games.p[game] - expected)
        ratings[rows, a] += moved
        ratings[rows, b] -= moved
    return ratings


def _bootstrap(
    n: int, games: _Games, group: Ints, ridge: float, k: float, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """(R, n) strengths and (R, n) ratings of data in which whole groups were drawn with replacement.

    A comparison drawn twice weighs twice, which for Elo is one game for twice the points.
    """
    generator = np.random.default_rng(seed)
    groups = int(group.max(initial=-1)) + 1
    strengths, ratings = np.full((resamples, n), np.nan), np.full((resamples, n), np.nan)
    block = max(1, _BLOCK // max(1, len(group)))
    for start in range(0, resamples if groups else 0, block):
        size = min(block, resamples - start)
        drawn = generator.integers(0, groups, (size, groups))
        w = np.array([np.bincount(d, minlength=groups)[group] for d in drawn]) * games.w
        done = slice(start, start + size)
        strengths[done] = [_fit(_wins(n, games, row), ridge) for row in w]
        ratings[done] = _play(n, games, w, _orders(len(group), size, generator), k, 1000.0)
    ratings[np.isnan(strengths)] = np.nan
    return strengths, ratings


def _interval(drawn: Floats, level: float) -> tuple[Floats, Floats]:
    """Percentile interval per column, leaving out NaN; NaN for a column without a number."""
    ends = np.full((2, drawn.shape[1]), np.nan)
    some = ~np.isnan(drawn).all(axis=0)
    ends[:, some] = np.nanquantile(drawn[:, some], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends[0], ends[1]
