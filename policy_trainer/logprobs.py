"""Log-probabilities of response tokens at the sampling temperature, without ever holding a batch's logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    rows = _without_left_padding(input_ids, attention_mask, response_len)
    hidden: Tensor = trunk(**trunk_inputs(trunk, rows.input_ids, rows.attention_mask)).last_hidden_state
    return hidden.gather(1, rows.read_at.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


class _Rows(NamedTuple):
    """Rows that begin with their first token, padded on the right to L, the length of the longest.

    Attributes:
        input_ids: (N, L) int64.
        attention_mask: (N, L) int64.
        read_at: (N, R) int64, the column from which each response token is predicted; any column at padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    read_at: Tensor


def _without_left_padding(input_ids: Tensor, attention_mask: Tensor, response_len: int) -> _Rows:
    """The rows of a batch as a model reads them.

    It is then as wide as its longest row, and not as its longest prompt and its longest response together; and no state
    of a recurrent layer has seen padding.
    """
    padding = attention_mask.argmax(dim=1, keepdim=True)  # (N, 1), on the left
    length = attention_mask.sum(dim=1, keepdim=True)  # (N, 1)
    column = torch.arange(int(length.max()), device=input_ids.device)
    moved = (padding + column).clamp(max=input_ids.shape[1] - 1)
    mask = (column < length).to(attention_mask.dtype)
    first = input_ids.shape[1] - response_len - 1 - padding  # (N, 1), the last token of the prompt
    offset = torch.arange(response_len, device=input_ids.device)
    at = (first + offset).clamp(max=len(column) - 1)
    return _Rows(input_ids.gather(1, moved), mask, at)


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


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether logits are exactly what the output embedding says of the trunk's output; tried out once for each model.

    Architectures cap, scale, shift or mask logits, or change what the head reads, under config fields of many names or
    of none. Such a model has to be read through its own forward.
    """
    if model not in _plain:
        _plain[model] = _try_head(model)
    return _plain[model]


@torch.no_grad()
def _try_head(model: PreTrainedModel) -> bool:
    """Whether the head gets the trunk's output and the caller the head's, on a few tokens."""
    trunk: nn.Module = model.base_model
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or trunk is model:
        return False
    calls: list[tuple[Tensor, Tensor]] = []
    hook = head.register_forward_hook(lambda _, given, output: calls.append((given[0], output)))
    ids = torch.tensor([[0, 1, 2, 3]], device=model.device)  # any will do
    inputs = trunk_inputs(model, ids, torch.ones_like(ids))
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    if len(calls) != 1:
        return False
    ((given, output),) = calls
    hidden = trunk(**trunk_inputs(trunk, ids, torch.ones_like(ids))).last_hidden_state
    # Two forwards may round differently on a GPU; a norm, a projection or a scale before the head changes more.
    if given.shape != hidden.shape or not torch.allclose(given.float(), hidden.float(), rtol=0.02, atol=0.02):
        return False
    return torch.equal(logits.float(), output.float())


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
    rows = _without_left_padding(input_ids, attention_mask, response_len)
    inputs = trunk_inputs(model, rows.input_ids, rows.attention_mask)
    keep = rows.input_ids.shape[1] - int(rows.read_at.min())
    # Cut once more: not every architecture knows `logits_to_keep`, and some take any argument.
    logits = model(**inputs, logits_to_keep=keep).logits[:, -keep:-1]
    at = (rows.read_at - rows.input_ids.shape[1] + keep).clamp(max=keep - 2)
    logprobs = gather_logprobs(logits, rows.input_ids[:, 1 - keep :], temperature).gather(1, at)
    entropy = entropy_of(logits.detach(), temperature).gather(1, at) if with_entropy else None
    return TokenLogprobs(logprobs, entropy)
