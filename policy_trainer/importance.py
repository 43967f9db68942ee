"""How far the sampling engine is from the trainer, and the correction for it.

An engine of its own (other kernels, another number format, another batch) samples from a distribution mu that is
not quite the trainer's pi_old, though both have the same weights. The surrogate objective assumes samples of pi_old;
weighting a token's loss by pi_old / mu mends that, and a bound on the weight keeps its variance finite: truncated
importance sampling (Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; TRL's
`vllm_importance_sampling_correction`, verl's `rollout_is`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from policy_trainer.batching import collate, forward_batches
from policy_trainer.config import ImportanceSamplingMode
from policy_trainer.kl import MAX_LOG_RATIO
from policy_trainer.logprobs import token_logprobs
from policy_trainer.rollout import Sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBED_RESPONSES = 8
"""How many of a step's responses, at least, are read where not all are, to see how far engine and trainer are apart."""


def importance_weights(
    logprobs: Tensor,
    engine_logprobs: Tensor,
    response_mask: Tensor,
    *,
    mode: ImportanceSamplingMode,
    clip_max: float,
) -> Tensor:
    """Weights of the policy loss: pi_old / mu, bounded; exactly 1 where the two agree to the last bit.

        token_truncate     min(rho_t, C)
        token_mask         rho_t where rho_t <= C, else 0
        sequence_truncate  min(prod_t rho_t, C) for every token of the response
        sequence_mask      prod_t rho_t where that is <= C, else 0

    Args:
        logprobs: (N, R), log pi_old, by the trainer's own forward.
        engine_logprobs: (N, R), log mu, as the engine reported them.
        response_mask: (N, R) bool.
        mode: which of the four. A product over a response varies with its length.
        clip_max: C, > 0.

    Returns:
        (N, R), without gradient; 1 at padding in the token modes.
    """
    log_ratio = torch.where(response_mask, logprobs.detach() - engine_logprobs, torch.zeros_like(logprobs))
    if mode in ("sequence_truncate", "sequence_mask"):
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if mode in ("token_mask", "sequence_mask"):
        return ratio.masked_fill(ratio > clip_max, 0.0)
    return ratio.clamp(max=clip_max)


class Difference(NamedTuple):
    """Mean and maximum of |log pi_old - log mu| over tokens, in nats."""

    mean: float
    max: float

    def metrics(self) -> dict[str, float]:
        """By TRL's names."""
        return {
            "sampling/sampling_logp_difference/mean": self.mean,
            "sampling/sampling_logp_difference/max": self.max,
        }


def difference(logprobs: Tensor, engine_logprobs: Tensor, response_mask: Tensor) -> Difference:
    """How far the engine's log-probabilities are from the trainer's.

    Args:
        logprobs: (N, R) or of any one shape, by the trainer's own forward.
        engine_logprobs: as `logprobs`, as the engine reported them.
        response_mask: as `logprobs`, bool, True for the tokens that count; there must be one.
    """
    apart = (logprobs - engine_logprobs)[response_mask].abs()
    return Difference(float(apart.mean()), float(apart.max()))


@torch.no_grad()
def probed_difference(
    policy: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    sampled: Sequence[Sampled],
    temperature: float,
    micro_batch_tokens: int,
) -> Difference:
    """`difference` over a few of the responses, spread evenly over them.

    Args:
        policy: that sampled them.
        prompt_ids: of each response's prompt.
        sampled: N responses, with what the engine said of each token.
        temperature: of sampling.
        micro_batch_tokens: padded tokens in one forward pass.
    """
    probed = range(0, len(sampled), max(1, len(sampled) // PROBED_RESPONSES))
    lengths = [len(ids) + len(s.response_ids) for ids, s in zip(prompt_ids, sampled, strict=True)]
    of_trainer, of_engine = [], []
    for rows in forward_batches(lengths, max_tokens=micro_batch_tokens, device=policy.device, indices=probed):
        batch = collate([prompt_ids[i] for i in rows], [sampled[i].response_ids for i in rows])
        read = token_logprobs(
            policy,
            batch.input_ids.to(policy.device),
            batch.attention_mask.to(policy.device),
            batch.response_len,
            temperature,
        ).logprobs
        of_trainer.append(read.cpu()[batch.response_mask])
        of_engine += [torch.tensor(sampled[i].logprobs) for i in rows]
    tokens = torch.cat(of_trainer)
    return difference(tokens, torch.cat(of_engine), torch.ones_like(tokens, dtype=torch.bool))


def weight_metrics(weights: Tensor, response_mask: Tensor) -> dict[str, float]:
    """Minimum, mean and maximum of `importance_weights` over the tokens that count, by TRL's names."""
    seen = weights[response_mask]
    return {
        "sampling/importance_sampling_ratio/min": float(seen.min()),
        "sampling/importance_sampling_ratio/mean": float(seen.mean()),
        "sampling/importance_sampling_ratio/max": float(seen.max()),
    }
