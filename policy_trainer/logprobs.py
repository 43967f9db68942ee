"""Log-probabilities of response tokens at the sampling temperature, without ever holding a batch's logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
"""Config fields of architectures that change logits after the head: they need the model's own forward."""


class TokenLogprobs(NamedTuple):
    """What the model says of each response token.

    Attributes:
        logprobs: (N, R) float32, log pi(y_t | x, y_<t) at the sampling temperature; arbitrary at padding.
        entropy: (N, R) float32, entropy of each next-token distribution in nats, without gradient; None
            unless asked for.
    """

    logprobs: Tensor
    entropy: Tensor | None = None


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions counted from each row's first real token: `cumsum(mask) - mask`. (N, L) int64 -> (N, L)."""
    return attention_mask.cumsum(dim=1) - attention_mask


@cache
def _accepts_positions(forward: Callable[..., object]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters


def trunk_inputs(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Keyword arguments of a full forward of `trunk` (or of a whole model) over padded sequences."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if _accepts_positions(type(trunk).forward):
        inputs["position_ids"] = position_ids(attention_mask)
    return inputs


def response_hidden(trunk: nn.Module, input_ids: Tensor, attention_mask: Tensor, response_len: int) -> Tensor:
    """Hidden states from which each response token is predicted: positions P - 1 ... P + R - 2.

    Args:
        trunk: a transformer without head (`model.base_model`).
        input_ids: (N, P + R) int64.
        attention_mask: (N, P + R) int64.
        response_len: R.

    Returns:
        (N, R, H); arbitrary at padding.
    """
    # The trunk reads rows without their padding on the left: a batch is then as wide as its longest row, and not as its
    # longest prompt and its longest response together.
    padding = attention_mask.argmax(dim=1, keepdim=True)  # (N, 1), on the left
    length = attention_mask.sum(dim=1, keepdim=True)  # (N, 1)
    column = torch.arange(int(length.max()), device=input_ids.device)
    moved = (padding + column).clamp(max=input_ids.shape[1] - 1)
    mask = (column < length).to(attention_mask.dtype)
    hidden: Tensor = trunk(**trunk_inputs(trunk, input_ids.gather(1, moved), mask)).last_hidden_state
    first = input_ids.shape[1] - response_len - 1 - padding  # (N, 1), the last token of the prompt
    offset = torch.arange(response_len, device=input_ids.device)
    at = (first + offset).clamp(max=len(column) - 1)  # (N, R)
    return hidden.gather(1, at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def gather_logprobs(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-softmax: log softmax(logits / temperature) at `targets`, in float32. (..., V), (...) -> (...)."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy_of(logits: Tensor, temperature: float) -> Tensor:
    """Entropy of softmax(logits / temperature) in nats. (..., V) -> (...)."""
    scaled = logits.float() / temperature
    return scaled.logsumexp(-1) - (scaled.softmax(-1) * scaled).sum(-1)


def logprobs_from_hidden(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    temperature: float,
    *,
    chunk: int = 4096,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Apply the language-model head to `chunk` positions at a time.

    With gradients each chunk's logits are recomputed in the backward pass: at most (chunk, V) of them exist.

    Args:
        model: gives its output embedding.
        hidden: (N, R, H).
        targets: (N, R) int64.
        temperature: of sampling, > 0.
        chunk: positions per chunk.
        with_entropy: also return the entropy.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]

    def read(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(h)
        entropy = entropy_of(logits.detach(), temperature) if with_entropy else None
        return gather_logprobs(logits, y, temperature), entropy

    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    one_chunk = len(flat) <= chunk
    logprobs, entropies = [], []
    for h, y in zip(torch.split(rows, chunk), torch.split(flat, chunk), strict=True):
        if one_chunk or not torch.is_grad_enabled():
            logprob, entropy = read(h, y)
        else:
            logprob, entropy = checkpoint(read, h, y, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(logprob)
        if entropy is not None:
            entropies.append(entropy)
    return TokenLogprobs(
        torch.cat(logprobs).view(targets.shape),
        torch.cat(entropies).view(targets.shape) if with_entropy else None,
    )


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are exactly `output_embedding(hidden)`, with nothing done to them afterwards."""
    return not any(getattr(model.config, name, None) for name in _LOGIT_TRANSFORMS)


def token_logprobs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_len: int,
    temperature: float,
    *,
    chunk: int = 4096,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """Log-probability of each response token given all before it, at the sampling temperature.

    The ratio of PPO and every KL compare distributions that were sampled from, hence `logits / temperature`
    for policy, old policy and reference alike ("The N Implementation Details of RLHF with PPO", policy training
    detail 1).

    Args:
        model: a causal language model.
        input_ids: (N, P + R) int64, prompts left-padded, responses right-padded.
        attention_mask: (N, P + R) int64.
        response_len: R.
        temperature: of sampling, > 0.
        chunk: positions whose logits exist at once.
        with_entropy: also return the entropy of each position.
    """
    targets = input_ids[:, -response_len:]
    if has_plain_head(model):
        hidden = response_hidden(model.base_model, input_ids, attention_mask, response_len)
        return logprobs_from_hidden(
            model, hidden, targets, temperature, chunk=chunk, with_entropy=with_entropy
        )
    logits = model(**trunk_inputs(model, input_ids, attention_mask), logits_to_keep=response_len + 1).logits[
        :, :-1
    ]
    entropy = entropy_of(logits.detach(), temperature) if with_entropy else None
    return TokenLogprobs(gather_logprobs(logits, targets, temperature), entropy)
