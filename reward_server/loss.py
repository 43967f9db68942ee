"""The loss of a reward model on soft preferences, and the figures that say how good its probabilities are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def preference_loss(chosen: Tensor, rejected: Tensor, chosen_prob: Tensor) -> Tensor:
    """Cross-entropy between soft labels and the Bradley-Terry model (RLAIF, arXiv 2309.00267, section 2.2.1).

    L = -[p log sigmoid(d) + (1 - p) log sigmoid(-d)],  d = r(x, chosen) - r(x, rejected).
    At p = 1 it is the pairwise loss of InstructGPT (arXiv 2203.02155, equation 1).

    Args:
        chosen: scores of the chosen responses, (B,), float.
        rejected: scores of the rejected responses, (B,), float.
        chosen_prob: P(chosen preferred), (B,), in [0, 1].

    Returns:
        The loss of each pair in nats, (B,), not reduced: the caller divides by the pairs of the whole batch.
    """
    difference = chosen - rejected
    return binary_cross_entropy_with_logits(difference, chosen_prob.to(difference.dtype), reduction="none")


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Pairs on which the model was about equally sure.

    Attributes:
        low: lower edge of the confidence, in [0.5, 1).
        high: upper edge.
        count: pairs in the bin.
        confidence: mean probability that the model gave to the response it prefers.
        accuracy: mean label probability of that response; equals `confidence` for a calibrated model.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class PreferenceMetrics:
    """How well scores predict held-out preferences.

    Attributes:
        pairs: pairs measured.
        accuracy: share of pairs with a preferred side whose order the scores have right; equal scores count half;
            None if every label is a tie.
        labelled: pairs with a preferred side (label other than 0.5).
        log_loss: mean cross-entropy against the soft labels, in nats; `log(2)` is what an undecided model gets.
        label_entropy: the lowest log loss that these labels allow.
        brier: mean squared distance between probability and label.
        ece: expected calibration error over `bins`, weighted by count.
        bins: the reliability table over the confidence in the preferred response (Guo et al., arXiv 1706.04599).
    """

    pairs: int
    accuracy: float | None
    labelled: int
    log_loss: float
    label_entropy: float
    brier: float
    ece: float
    bins: tuple[CalibrationBin, ...]


def preference_metrics(
    differences: Sequence[float], chosen_prob: Sequence[float], num_bins: int = 5
) -> PreferenceMetrics:
    """Accuracy, log loss and calibration of score differences (chosen minus rejected) against soft labels.

    Confidence is that in the preferred response, in [0.5, 1], since the order of "chosen" and "rejected" carries
    the label itself and a table over P(chosen) would show nothing.

    Raises:
        ValueError: no pairs, or lengths differ.
    """
    if not differences:
        raise ValueError("no pairs to measure")
    d = torch.tensor(list(differences), dtype=torch.float64)
    y = torch.tensor(list(chosen_prob), dtype=torch.float64)
    if d.shape != y.shape:
        raise ValueError(f"{len(d)} differences but {len(y)} labels")
    p = torch.sigmoid(d)
    confidence = torch.maximum(p, 1 - p)
    target = torch.where(d >= 0, y, 1 - y)
    index = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    bins = []
    ece = 0.0
    for i in range(num_bins):
        inside = index == i
        count = int(inside.sum())
        mean_confidence = float(confidence[inside].mean()) if count else None
        mean_target = float(target[inside].mean()) if count else None
        if mean_confidence is not None and mean_target is not None:
            ece += count / len(d) * abs(mean_confidence - mean_target)
        edges = (0.5 + 0.5 * i / num_bins, 0.5 + 0.5 * (i + 1) / num_bins)
        bins.append(CalibrationBin(*edges, count, mean_confidence, mean_target))
    losses = preference_loss(d, torch.zeros_like(d), y)
    return PreferenceMetrics(
        pairs=len(d),
        accuracy=accuracy(differences, chosen_prob),
        labelled=int((y != 0.5).sum()),
        log_loss=float(losses.mean()),
        label_entropy=math.fsum(_entropy(float(v)) for v in y) / len(y),
        brier=float(((p - y) ** 2).mean()),
        ece=ece,
        bins=tuple(bins),
    )


def accuracy(differences: Sequence[float], chosen_prob: Sequence[float]) -> float | None:
    """Share of non-tied labels whose side the sign of the difference predicts; a difference of 0 counts half."""
    points = [
        0.5 if d == 0 else float((d > 0) == (y > 0.5))
        for d, y in zip(differences, chosen_prob, strict=True)
        if y != 0.5
    ]
    return math.fsum(points) / len(points) if points else None


def _entropy(p: float) -> float:
    return -math.fsum(q * math.log(q) for q in (p, 1 - p) if q > 0)
