"""How far the policy is from the reference: estimators of KL(pi || pi_ref), and what sets the KL coefficient.

With samples y ~ pi and d = log pi(y) - log pi_ref(y), Schulman ("Approximating KL Divergence", 2020) names

    k1 = d               unbiased, high variance, may be negative
    k2 = d^2 / 2         biased, low variance
    k3 = exp(-d) - 1 + d unbiased, low variance, never negative

That is about *values*. As a term of a loss, the gradient of E[k1] with fixed samples is zero in expectation, that
of k2 is the gradient of the reverse KL, and that of k3 the gradient of the *forward* KL. k1 therefore belongs
in the reward, where no gradient flows through it; `ppo_losses.kl_loss` mends the gradients for the loss. A fourth,
verl's `k3+`, has the value of k3 and, straight through it, the gradient of k2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from policy_trainer.config import KLEstimator

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this size before `exp`: e^20 is far outside any trust region and still finite."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) in nats, for tokens sampled from pi.

    Args:
        logprobs: log pi of the sampled tokens, any shape.
        ref_logprobs: log pi_ref of the same tokens, same shape.
        estimator: see the module's docstring.

    Returns:
        Same shape; differentiable in `logprobs`.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    k2 = d.square() / 2
    if estimator == "k2":
        return k2
    k3 = torch.exp((-d).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) - 1 + d
    if estimator == "k3":
        return k3
    return k3.detach() + (k2 - k2.detach())


@dataclass(frozen=True, slots=True)
class KLController:
    """The KL coefficient beta: fixed, or steered towards a target (Ziegler et al., arXiv 1909.08593, section 2.2).

        beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon)

    Attributes:
        coef: beta, >= 0.
        target: wished-for KL per response in nats; None keeps beta fixed.
        horizon: episodes over which an error of 20 % or more changes beta by a factor of about e^0.2.
    """

    coef: float
    target: float | None = None
    horizon: float = 10_000.0

    def updated(self, kl: float, episodes: int) -> KLController:
        """The controller after `episodes` responses whose mean KL (summed over tokens, in nats) was `kl`."""
        if self.target is None:
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * episodes / self.horizon))


@dataclass(frozen=True, slots=True)
class PenaltyController:
    """The weight beta of KL(old || new) in PPO-penalty (Schulman et al., arXiv 1707.06347, section 4).

        d < target / 1.5  ->  beta / 2          d > 1.5 * target  ->  2 * beta

    Attributes:
        coef: beta, > 0.
        target: wished-for KL(old || new) of one step's update, in nats per token.
    """

    coef: float
    target: float

    def updated(self, kl: float) -> PenaltyController:
        """The controller after an update that moved the policy by `kl`, in nats per token."""
        if kl < self.target / 1.5:
            return replace(self, coef=self.coef / 2)
        if kl > self.target * 1.5:
            return replace(self, coef=self.coef * 2)
        return self
