"""How far predicted preferences are from labels: Brier score, log loss, reliability. Pure functions; numpy only.

All are symmetric: exchanging A and B in any row changes nothing, since which response is called A says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LOG_LOSS_FLOOR = 1e-6
"""Probabilities nearer to 0 or 1 than this count as this near in `log_loss`, as one sure error is else infinite."""

ECE_BINS = 10
"""Bins of `reliability` and `expected_calibration_error` unless told: width 0.05 from 0.5 to 1."""


def brier(p: ArrayLike, label: ArrayLike) -> float:
    """Mean squared distance of predictions to labels (Brier 1950), in [0, 1]; NaN for no pairs.

    A coin has 1/4 where all labels are 0 or 1, and less where they are not: compare with `brier(1/2, label)`.

    Args:
        p: (N,) P(A preferred) as predicted, by a judge or a reward model.
        label: (N,) P(A preferred) by people, or whoever labelled: 1, 0, 1/2 for a tie, or a share of raters.
    """
    ours, theirs = _columns(p, label)
    return float(np.mean((ours - theirs) ** 2)) if len(ours) else float("nan")


def log_loss(p: ArrayLike, label: ArrayLike) -> float:
    """Mean cross-entropy of predictions under labels, in nats; ln 2 for a coin; NaN for no pairs.

    Args:
        p: (N,) P(A preferred) as predicted, moved inside [`LOG_LOSS_FLOOR`, 1 - `LOG_LOSS_FLOOR`].
        label: (N,) P(A preferred) by whoever labelled.
    """
    ours, theirs = _columns(p, label)
    inside = np.clip(ours, LOG_LOSS_FLOOR, 1 - LOG_LOSS_FLOOR)
    losses = -(theirs * np.log(inside) + (1 - theirs) * np.log(1 - inside))
    return float(losses.mean()) if len(ours) else float("nan")


@dataclass(frozen=True, slots=True)
class Bin:
    """One line of a reliability table.

    Attributes:
        low: least confidence in the bin.
        high: where the next bin begins; the last one includes it.
        count: pairs in the bin.
        confidence: mean of max(p, 1 - p).
        agreement: how often the labels prefer what is predicted.
    """

    low: float
    high: float
    count: int
    confidence: float
    agreement: float


def reliability(p: ArrayLike, label: ArrayLike, bins: int = ECE_BINS) -> list[Bin]:
    """Confidence beside agreement, in bins of equal width over confidence 0.5 to 1; empty bins are left out.

    Args:
        p: (N,) P(A preferred) as predicted, by a judge or a reward model.
        label: (N,) P(A preferred) by whoever labelled.
        bins: number of bins.
    """
    ours, theirs = _columns(p, label)
    confidence = np.maximum(ours, 1 - ours)
    right = np.where(ours > 0.5, theirs, np.where(ours < 0.5, 1 - theirs, 0.5))
    # A confidence of 0.6 begins its bin, although 2 (0.6 - 0.5) 10 rounds to just below 2.
    where = np.minimum((2 * (confidence - 0.5) * bins + 1e-9).astype(np.int64), bins - 1)
    return [
        Bin(
            0.5 + k / (2 * bins),
            0.5 + (k + 1) / (2 * bins),
            int((where == k).sum()),
            float(confidence[where == k].mean()),
            float(right[where == k].mean()),
        )
        for k in map(int, np.unique(where))
    ]


def expected_calibration_error(p: ArrayLike, label: ArrayLike, bins: int = ECE_BINS) -> float:
    """Mean distance of confidence and agreement over the bins of `reliability` (Guo et al. 2017, section 2).

    Args:
        p: (N,) P(A preferred) as predicted, by a judge or a reward model.
        label: (N,) P(A preferred) by whoever labelled.
        bins: number of bins of equal width over confidence 0.5 to 1.

    Returns:
        A number in [0, 1]; NaN for no pairs.
    """
    table = reliability(p, label, bins)
    total = sum(b.count for b in table)
    gap = sum(b.count * abs(b.agreement - b.confidence) for b in table)
    return gap / total if total else float("nan")


def _columns(p: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    ours, theirs = np.asarray(p, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"predictions {ours.shape} and labels {theirs.shape} must be columns of one length")
    return ours, theirs
