"""Preference losses on sequence log-probabilities: DPO, cDPO, robust DPO, IPO, hinge, KTO; one soft label per pair.

Notation: B pairs; p in [0, 1] is P(chosen preferred) of each pair: a hard label is p = 1, a tie p = 0.5.
Every loss is the expectation of the hard-label loss under p. DPO, IPO and hinge compare: p loss(delta) +
(1-p) loss(-delta), where delta is the difference of the two log-ratios. KTO takes each response for itself: it is
desirable with probability p (chosen) or 1-p (rejected). cDPO and robust DPO are DPO with another p (`smoothed`,
`denoised`). Losses come back per pair, unreduced, so that the caller divides once by the pairs of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LossType = Literal["sigmoid", "robust", "ipo", "hinge", "kto"]


@dataclass(frozen=True, slots=True)
class PreferenceObjective:
    """Which loss, and its constants.

    Attributes:
        loss_type: `sigmoid` (DPO; with label smoothing, cDPO), `robust`, `ipo`, `hinge` or `kto`.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: eps in [0, 0.5), the share of labels taken to be flipped: `robust` undoes such flips
            (`denoised`), every other loss expects them (`smoothed`).
        desirable_weight: lambda_D of `kto`, > 0.
        undesirable_weight: lambda_U of `kto`, > 0.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


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


def smoothed(p: Tensor, eps: float) -> Tensor:
    """The label if it is flipped with probability eps: p (1-eps) + (1-p) eps. (B,) -> (B,).

    DPO with a smoothed label is conservative DPO (Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    return p * (1.0 - eps) + (1.0 - p) * eps


def denoised(p: Tensor, eps: float) -> Tensor:
    """The inverse of `smoothed`: (p - eps) / (1 - 2 eps), outside of [0, 1] where p is surer than eps allows.

    DPO with a denoised label is robust DPO (arXiv 2403.00409): for p = 1, ((1-eps) loss(delta) - eps loss(-delta)) /
    (1 - 2 eps). Its expectation over labels that are flipped with probability eps is DPO with the true labels.
    One of the weights may be negative, so the loss of a pair has no lower bound.

    Args:
        p: (B,) labels, in [0, 1].
        eps: in [0, 0.5).
    """
    return (p - eps) / (1.0 - 2.0 * eps)


def sigmoid_loss(delta: Tensor, p: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, equation 7) with a soft label: -[p log s(h) + (1-p) log s(-h)], h = beta delta.

    p = 1 is DPO.
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


def kto_loss(
    log_ratio: Tensor,
    desirable_prob: Tensor,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306) of single responses, with a soft label.

    lambda_D (1 - s(h)) for a desirable response, lambda_U (1 - s(-h)) for an undesirable one, where
    h = beta (log_ratio - kl); here the expectation of the two.

    Args:
        log_ratio: (B,) of each response, in nats.
        desirable_prob: (B,) probability that the response is desirable.
        kl: the paper's z0, the KL between policy and reference, >= 0, in nats; no gradient goes through it. It is
            estimated from responses to *other* prompts: max(0, mean of log pi(y'|x) - log pi_ref(y'|x)).
        beta: how fast the loss levels off on either side of kl, > 0.
        desirable_weight: lambda_D.
        undesirable_weight: lambda_U.
    """
    h = beta * (log_ratio - kl)
    return desirable_prob * desirable_weight * torch.sigmoid(-h) + (
        1.0 - desirable_prob
    ) * undesirable_weight * torch.sigmoid(h)


def preference_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    chosen_prob: Tensor,
    objective: PreferenceObjective,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    kl: float | None = None,
) -> PreferenceLoss:
    """Loss and implicit rewards of B pairs.

    Args:
        policy_chosen: (B,) log-probability of the chosen response under the policy, summed over its tokens
            including EOS, in nats; differentiable.
        policy_rejected: (B,) the same of the rejected response.
        reference_chosen: (B,) the same under the reference.
        reference_rejected: (B,) the same under the reference.
        chosen_prob: (B,) P(chosen preferred), in [0, 1].
        objective: the loss and its constants.
        chosen_lengths: (B,) response tokens including EOS; needed by `ipo` alone, which averages over them.
        rejected_lengths: (B,) the same of the rejected response.
        kl: z0 of `kto_loss`; needed by `kto` alone, whose loss of a pair is the mean of its two responses.

    Raises:
        ValueError: `ipo` without lengths, `kto` without kl, or shapes that differ.
    """
    ratio_chosen = policy_chosen - reference_chosen  # (B,)
    ratio_rejected = policy_rejected - reference_rejected  # (B,)
    if not ratio_chosen.shape == ratio_rejected.shape == chosen_prob.shape:
        raise ValueError(
            f"shapes differ: chosen {tuple(ratio_chosen.shape)}, rejected {tuple(ratio_rejected.shape)}, "
            f"chosen_prob {tuple(chosen_prob.shape)}"
        )
    loss_type, beta = objective.loss_type, objective.beta
    relabel = denoised if loss_type == "robust" else smoothed
    p = relabel(chosen_prob, objective.label_smoothing)
    delta = ratio_chosen - ratio_rejected
    if loss_type == "ipo":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError("ipo averages over tokens: give chosen_lengths and rejected_lengths")
        losses = ipo_loss(ratio_chosen / chosen_lengths - ratio_rejected / rejected_lengths, p, beta)
    elif loss_type == "kto":
        if kl is None:
            raise ValueError("kto compares with the KL to the reference: give kl")
        weights = (objective.desirable_weight, objective.undesirable_weight)
        of_chosen = kto_loss(ratio_chosen, p, kl, beta, *weights)
        of_rejected = kto_loss(ratio_rejected, 1.0 - p, kl, beta, *weights)
        losses = (of_chosen + of_rejected) / 2.0
    elif loss_type == "hinge":
        losses = hinge_loss(delta, p, beta)
    else:
        losses = sigmoid_loss(delta, p, beta)
    return PreferenceLoss(losses, beta * ratio_chosen.detach(), beta * ratio_rejected.detach())
