"""From a response's score to a reward per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy_trainer.advantages import Moments
from policy_trainer.kl import kl_estimate


class TokenRewards(NamedTuple):
    """Rewards per token and their parts.

    Attributes:
        rewards: (N, R), 0 where the mask is False.
        kl: (N,), the k1 estimate of KL(pi || pi_ref) summed over the response, in nats.
        non_score: (N,), -kl_coef * kl, what the KL penalty adds to the score over a response.
    """

    rewards: Tensor
    kl: Tensor
    non_score: Tensor


def adjust_scores(
    scores: Tensor,
    finished: Tensor,
    lengths: Tensor,
    *,
    over: Moments | None = None,
    clip: float | None = None,
    length_penalty_coef: float = 0.0,
    length_budget: int = 0,
    missing_eos_penalty: float = 0.0,
    missing_eos_reward: float | None = None,
) -> Tensor:
    """From served scores to what a response earned: normalise, clip, then the penalties for length and for no EOS.

        s <- clip((s - mean) / std) - c max(0, |y| - L) - [no EOS] penalty

    The penalties come after the clip, so they are felt at either end of the range, and are in the units that
    normalisation leaves. With c = 1/b and L = max_new_tokens - b the second is DAPO's soft overlong punishment over
    the last b tokens (arXiv 2503.14476, equation 13). A missing EOS is subtracted for as in TRL's PPO, or the
    score is replaced as in the N+ implementation, there by -1.

    Args:
        scores: (N,), scores as the reward server sent them.
        finished: (N,) bool, True = the response ends with an EOS.
        lengths: (N,), tokens of the response.
        over: moments that scores are normalised by; None leaves them as they are.
        clip: scores are limited to [-clip, clip]; None for no limit.
        length_penalty_coef: c, per token, >= 0.
        length_budget: L, tokens that cost nothing.
        missing_eos_penalty: in units of the score, >= 0.
        missing_eos_reward: what a response without EOS earns, whatever its score; None leaves it its score.
    """
    if over is not None:
        scores = (scores - over.mean) * (over.variance + 1e-8) ** -0.5
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    if length_penalty_coef:
        scores = scores - length_penalty_coef * (lengths - length_budget).clamp(min=0)
    if missing_eos_reward is not None:
        return torch.where(finished, scores, missing_eos_reward)
    return scores - missing_eos_penalty * (~finished).to(scores.dtype)


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> TokenRewards:
    """Reward of each token: the KL penalty everywhere, the score on the last token that counts (T).

        r_t = -beta * (log pi(y_t) - log pi_ref(y_t)) + [t = T] * score

    T is the EOS where there is one. (Ziegler et al., arXiv 1909.08593, equation 2, spread over tokens. TRL and N+
    put the score one position later, on the first padding token; OpenRLHF, verl and trlX on T, as here: no value
    of a padding position is ever needed.)

    Args:
        scores: (N,).
        logprobs: (N, R), of the policy that sampled.
        ref_logprobs: (N, R).
        response_mask: (N, R) bool; each row is True, then False, and starts with True.
        kl_coef: beta, >= 0.
    """
    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    per_token_kl = torch.where(response_mask, kl_estimate(logprobs, ref_logprobs, "k1"), zero)
    rewards = -kl_coef * per_token_kl
    last = response_mask.sum(dim=1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores.to(rewards.dtype)
    kl = per_token_kl.sum(dim=1)
    return TokenRewards(rewards, kl, -kl_coef * kl)
