"""Win rates and their intervals. Pure functions of arrays; numpy only.

A comparison is P(policy preferred) to the baseline, in [0, 1]; above one half it is won, at one half it is a tie and
counts half. What could not be had is left out before.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlaif.agreement import bootstrap_interval, estimate_mean, finite, mean

Floats = NDArray[np.float64]
Findings = dict[str, Any]

RIDGE = 0.01
"""Penalty of `length_controlled`: that of C = 100 in AlpacaEval's plain fit. It keeps a side that wins all finite."""
_NEWTON_STEPS = 50
_CONVERGED = 1e-9


def outcomes(p: ArrayLike) -> Floats:
    """(N,) 1 for a comparison that is won, 0 for one that is lost, 1/2 for a tie."""
    values = np.asarray(p, dtype=np.float64)
    return np.where(values == 0.5, 0.5, (values > 0.5).astype(np.float64))


def assess_wins(
    p: ArrayLike,
    length_differences: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 1000,
) -> Findings:
    """Everything that comparisons tell, with 95 % bootstrap intervals.

    Args:
        p: (N,) P(policy preferred).
        length_differences: (N,) characters of the policy's response less those of the baseline's.
        groups: (N,) the prompts, which are drawn whole; None draws single comparisons.
        resamples: of the intervals.
    """
    values, lengths = np.asarray(p, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    won = outcomes(values)
    table = np.column_stack([won, lengths])
    low, high = bootstrap_interval(
        table, lambda t: length_controlled(t[:, 0], t[:, 1]), groups=groups, resamples=resamples
    )
    decided = (won != 0.5) & (lengths != 0)
    longer = (won[decided] > 0.5) == (lengths[decided] > 0)
    return {
        "comparisons": len(won),
        "win_rate": estimate_mean(won, groups=groups, resamples=resamples),
        "length_controlled": {
            "value": finite(length_controlled(won, lengths)),
            "low": finite(low),
            "high": finite(high),
        },
        "mean_probability": estimate_mean(values, groups=groups, resamples=resamples),
        "ties": finite(mean((won == 0.5).astype(np.float64))),
        "longer_wins": finite(mean(longer.astype(np.float64))),
        "length_difference": finite(mean(lengths)),
    }


def length_controlled(won: ArrayLike, length_differences: ArrayLike) -> float:
    """The win rate that a logistic regression predicts for responses of equal length; NaN for no comparisons.

    AlpacaEval 2's model (Dubois et al., arXiv 2404.04475, equation 2) for one pair of policies:

        P(win) = sigmoid(theta + phi tanh(d / std(d)))

    with d the difference of lengths; the answer is sigmoid(theta). Its third term, how hard each instruction is, is
    fitted over a leaderboard of models and has no meaning for two. AlpacaEval chooses an L1 penalty by cross-validation
    and adds annotations of its own baseline; here a weak ridge penalty keeps the fit finite.

    Args:
        won: (N,) outcomes in [0, 1].
        length_differences: (N,) d, in characters.
    """
    y, d = np.asarray(won, dtype=np.float64), np.asarray(length_differences, dtype=np.float64)
    if len(y) == 0:
        return math.nan
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    x = np.tanh(d / spread) if spread > 0 else np.zeros_like(d)
    theta, _ = _fit(x, y)
    return 1 / (1 + math.exp(-theta))


def _fit(x: Floats, y: Floats) -> tuple[float, float]:
    """Newton's method on the penalised negative log-likelihood, which is convex; a step too far is halved."""
    theta = phi = 0.0
    loss = _loss(x, y, theta, phi)
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(theta + phi * x)))
        error, weight = p - y, p * (1 - p)
        g0, g1 = float(error.sum()) + RIDGE * theta, float(error @ x) + RIDGE * phi
        h00, h01, h11 = float(weight.sum()) + RIDGE, float(weight @ x), float(weight @ (x * x)) + RIDGE
        determinant = h00 * h11 - h01 * h01
        step = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        size = 1.0
        while (tried := _loss(x, y, theta - size * step[0], phi - size * step[1])) > loss and size > 1e-6:
            size /= 2
        theta, phi, loss = theta - size * step[0], phi - size * step[1], min(loss, tried)
        if max(map(abs, step)) < _CONVERGED:
            break
    return theta, phi


def _loss(x: Floats, y: Floats, theta: float, phi: float) -> float:
    eta = theta + phi * x
    likelihood = float((np.logaddexp(0, eta) - y * eta).sum())
    return likelihood + RIDGE / 2 * (theta * theta + phi * phi)
