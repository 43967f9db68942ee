"""Preference losses on sequence log-probabilities: DPO, IPO and hinge, with one soft label per pair.

Notation: B pairs; p in [0, 1] is P(chosen preferred) of each pair: a hard label is p = 1, a tie p = 0.5.
Every loss is the expectation of the hard-label loss under p, p loss(delta) + (1-p) loss(-delta), where delta
is the difference of the two log-ratios. Losses come back per pair, unreduced, so that the caller divides once by
the pair count of the whole batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["sigmoid", "ipo", "hinge"]


class PreferenceLoss(NamedTuple):
    """What `preference_loss` gives, each of shape (B,).

    Attributes:
        losses: differentiable, unreduced.
        rewards_chosen: beta * (log pi - log pi_ref) of the chosen response, detached (DPO's implicit reward).
        rewards_rejected: the same of the rejected response.
    """

    losses: Tensor
    rewards_chosen: Tensor
    rewards_rejected: Tensor

    @property
    def margins(self) -> Tensor:
        """Implicit reward of chosen minus rejected, (B,)."""
        return self.rewards_chosen - self.rewards_rejected

    @property
    def accuracies(self) -> Tensor:
        """1.0 where the implicit reward prefers the chosen response, else 0.0 (also for a tie), (B,)."""
        return (self.rewards_chosen > self.rewards_rejected).float()


def sigmoid_loss(delta: Tensor, p: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7) with a soft label: -[p log s(h) + (1-p) log s(-h)], h = beta delta.

    p = 1 is DPO; a constant p = 1 - eps is conservative DPO (cDPO, label smoothing eps).
    At its minimum s(h) = p: the policy's implicit preference equals the label.

    Args:
        delta: (B,) log-ratio of chosen minus log-ratio of rejected, in nats.
        p: (B,) probability that chosen is preferred.
        beta: inverse scale of the implicit reward, > 0.
    """
    h = beta * delta
    return -(p * F.logsigmoid(h) + (1.0 - p) * F.logsigmoid(-h))


def ipo_loss(delta: Tensor, p: Tensor, beta: float) -> Tensor:
    """IPO (arXiv 2310.12036, equation 17) with a soft label: p (d-c)^2 + (1-p) (d+c)^2, c = 1 / (2 beta).

    Up to a constant this is (d - (2p - 1) c)^2.

    Args:
        delta: (B,) difference of the *per-token mean* log-ratios: the authors confirmed the length
            normalisation to TRL, whose `loss_type="ipo"` averages as well.
        p: (B,) probability that chosen is preferred.
        beta: the paper's tau, > 0.
    """
    target = 1.0 / (2.0 * beta)
    return p * (delta - target) ** 2 + (1.0 - p) * (delta + target) ** 2


def hinge_loss(delta: Tensor, p: Tensor, beta: float) -> Tensor:
    """Hinge loss of SLiC (arXiv 2305.10425) on the DPO margin, with a soft label.

    p max(0, 1 - h) + (1-p) max(0, 1 + h), h = beta * delta; arguments as in `sigmoid_loss`.
    """
    h = beta * delta
    return p * torch.relu(1.0 - h) + (1.0 - p) * torch.relu(1.0 + h)


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    chosen_prob: Tensor,
    beta: float,
    loss_type: LossType = "sigmoid",
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> PreferenceLoss:
    """Loss and implicit rewards of B pairs.

    Args:
        policy_chosen: (B,) log-probability of the chosen response under the policy, summed over its tokens
            including EOS, in nats; differentiable.
        policy_rejected: (B,) the same of the rejected response.
        reference_chosen: (B,) the same under the reference.
        reference_rejected: (B,) the same under the reference.
        chosen_prob: (B,) P(chosen preferred), in [0, 1].
        beta: strength of the pull towards the reference, > 0.
        loss_type: `sigmoid` (DPO), `ipo` or `hinge`.
        chosen_lengths: (B,) response tokens including EOS; needed by `ipo` alone, which averages over them.
        rejected_lengths: (B,) the same of the rejected response.

    Raises:
        ValueError: `ipo` without lengths, or shapes that differ.
    """
    ratio_chosen = policy_chosen - reference_chosen  # (B,)
    ratio_rejected = policy_rejected - reference_rejected  # (B,)
    if not ratio_chosen.shape == ratio_rejected.shape == chosen_prob.shape:
        raise ValueError(
            f"shapes differ: chosen {tuple(ratio_chosen.shape)}, rejected {tuple(ratio_rejected.shape)}, "
            f"chosen_prob {tuple(chosen_prob.shape)}"
        )
    if loss_type == "ipo":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("ipo averages over tokens: give chosen_lengths and rejected_lengths")
        delta = ratio_chosen / chosen_lengths - ratio_rejected / rejected_lengths
        losses = ipo_loss(delta, chosen_prob, beta)
    elif loss_type == "hinge":
        losses = hinge_loss(ratio_chosen - ratio_rejected, chosen_prob, beta)
    else:
        losses = sigmoid_loss(ratio_chosen - ratio_rejected, chosen_prob, beta)
    return PreferenceLoss(losses, beta * ratio_chosen.detach(), beta * ratio_rejected.detach())
