"""The losses of PPO (Schulman et al., arXiv 1707.06347) as sums over response tokens.

Nothing here divides by a count. The loop divides once by the token count of the whole minibatch; so a gradient
does not depend on how the minibatch was cut into micro-batches, on padding, or on the order of rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy_trainer.config import ImportanceSamplingLevel, KLEstimator
from policy_trainer.kl import MAX_LOG_RATIO, kl_estimate


class PolicyLoss(NamedTuple):
    """Sums over the tokens that count; scalars. All but `loss` are without gradient.

    Attributes:
        loss: of -min(ratio * A, clip(ratio) * A), or of -ratio * A + beta * KL(old || new); weighted.
        clipped: number of tokens whose clipped term was the larger loss.
        approx_kl: of (log ratio)^2 / 2, the k2 estimate of KL(old || new).
        ratio: of rho, pi / pi_old.
        ratio_sq: of rho^2.
    """

    loss: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio: Tensor
    ratio_sq: Tensor


class ValueLoss(NamedTuple):
    """Sums over the tokens that count; scalars.

    Attributes:
        loss: of half the squared error, clipped.
        clipped: number of tokens whose clipped term was the larger loss; without gradient.
    """

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float,
    weights: Tensor | None = None,
    *,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    level: ImportanceSamplingLevel = "token",
) -> PolicyLoss:
    """The clipped surrogate objective (arXiv 1707.06347, equation 7), negated.

        rho_t = exp(log pi(y_t) - log pi_old(y_t))
        loss  = sum_t w_t max(-rho_t A_t, -clip(rho_t, 1 - eps, 1 + eps_high) A_t)

    Where A_t < 0 the first term has no bound; a dual clip (Ye et al., arXiv 1912.09729, equation 5) takes
    min(loss_t, -c A_t) there, so that a token which the policy has come to like too much has no gradient.

    Args:
        logprobs: (N, R), with gradient.
        old_logprobs: (N, R), of the policy that sampled.
        advantages: (N, R).
        response_mask: (N, R) bool.
        cliprange: eps, > 0.
        weights: (N, R), w of the loss alone (`importance.importance_weights`); 1 if None.
        cliprange_high: eps_high, > 0 (DAPO's clip-higher, arXiv 2503.14476, equation 10); eps if None.
        dual_clip: c, > 1; None sets no bound.
        level: `sequence` takes one rho for all tokens of a response, see `response_means`.
    """
    log_ratio = log_ratios(logprobs, old_logprobs, response_mask)
    by = response_means(log_ratio, response_mask) if level == "sequence" else log_ratio
    ratio = by.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    high = cliprange if cliprange_high is None else cliprange_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + high)
    losses, is_clipped = torch.maximum(plain, clipped), clipped > plain
    if dual_clip is not None:
        bound = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        losses, is_clipped = torch.minimum(losses, bound), is_clipped | (losses > bound)
    return _summed(losses, is_clipped, log_ratio, ratio, response_mask, weights)


def penalised_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    coef: float,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """The KL-penalised surrogate objective (arXiv 1707.06347, equation 8), negated.

        loss = sum_t w_t (-rho_t A_t + beta (rho_t - 1 - log rho_t))

    The second term is k3 of KL(old || new). Its samples are the old policy's and the gradient is the new one's, so
    value and gradient are both right in expectation. Nothing is clipped.

    Args:
        logprobs: (N, R), with gradient.
        old_logprobs: (N, R), of the policy that sampled.
        advantages: (N, R).
        response_mask: (N, R) bool.
        coef: beta, >= 0.
        weights: (N, R), w of the loss alone; 1 if None.
    """
    log_ratio = log_ratios(logprobs, old_logprobs, response_mask)
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = bounded.exp()
    losses = -advantages * ratio + coef * (ratio - 1 - bounded)
    return _summed(losses, torch.zeros_like(response_mask), log_ratio, ratio, response_mask, weights)


def log_ratios(logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """log(pi / pi_old) of each token, (N, R), with gradient in `logprobs`.

    Padding is 0 before any `exp`: whatever the models say there must not become inf * 0.
    """
    return torch.where(response_mask, logprobs - old_logprobs, torch.zeros_like(logprobs))


def response_means(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """The mean of each response's log-ratios, (N, 1): the ratio of GSPO (Zheng et al., arXiv 2507.18071, equation 7).

    At pi = pi_old the gradient of a sum over tokens with equal advantages is that of the tokens' own ratios.

    Args:
        log_ratio: (N, R), 0 at padding.
        response_mask: (N, R) bool; each row has a True.
    """
    return log_ratio.sum(dim=1, keepdim=True) / response_mask.sum(dim=1, keepdim=True)


def _summed(
    losses: Tensor,
    clipped: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    response_mask: Tensor,
    weights: Tensor | None,
) -> PolicyLoss:
    if weights is not None:
        losses = weights * losses
    seen = ratio.detach().expand_as(losses)[response_mask]
    return PolicyLoss(
        loss=losses[response_mask].sum(),
        clipped=clipped[response_mask].sum(),
        approx_kl=log_ratio.detach().square().sum() / 2,
        ratio=seen.sum(),
        ratio_sq=seen.square().sum(),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, cliprange_value: float
) -> ValueLoss:
    """Half the squared error of the critic, pessimistic about moves beyond the clip range.

        loss = 1/2 sum_t max((V_t - R_t)^2, (clip(V_t, V_old_t - eps, V_old_t + eps) - R_t)^2)

    (OpenAI baselines `ppo2`; "The N+ Implementation Details", arXiv 2403.17031.)

    Args:
        values: (N, R), with gradient.
        old_values: (N, R), of the critic when the batch was sampled.
        returns: (N, R).
        response_mask: (N, R) bool.
        cliprange_value: eps, > 0.
    """
    near = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
    plain = (values - returns).square()
    clipped = (near - returns).square()
    return ValueLoss(
        loss=torch.maximum(plain, clipped)[response_mask].sum() / 2,
        clipped=(clipped > plain)[response_mask].sum(),
    )


def kl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    estimator: KLEstimator,
) -> Tensor:
    """KL(pi || pi_ref) per token, summed over the tokens that count, with the gradient of the reverse KL.

    With d = log pi - log pi_ref, rho = pi / pi_old, and tokens sampled from pi_old:

        k1, k3:  sum_t rho_t k(d_t)            rho carries the part of the gradient that sampling hides
        k2, k3+: sum_t stop(rho_t) k(d_t)      whose gradient, rho d grad(log pi), is the right one as it is

    At the first update rho is 1 and these are the plain estimators in value, not in gradient: without rho, k1 has
    none in expectation and k3, GRPO's term (Shao et al., arXiv 2402.03300, equation 4), that of the forward KL.
    (Rho as in TRL's `use_bias_correction_kl`, after DeepSeek-V3.2, arXiv 2512.02556.)

    Args:
        logprobs: (N, R), with gradient.
        old_logprobs: (N, R), of the policy that sampled.
        ref_logprobs: (N, R).
        response_mask: (N, R) bool.
        estimator: see `kl.kl_estimate`.

    Returns:
        A scalar, in nats.
    """
    now, old, ref = (t[response_mask] for t in (logprobs, old_logprobs, ref_logprobs))
    ratio = (now - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = ratio.detach() if estimator in ("k2", "k3+") else ratio
    return (weight * kl_estimate(now, ref, estimator)).sum()
