"""Several responses to one prompt in one row of a forward pass, so that the prompt is read once.

A row holds the prompt and then the responses one after another, each at the positions that follow the prompt. A
response sees the prompt and itself, and not the responses before it; so its log-probabilities are, up to rounding,
those of a row of its own. DPO reads two responses to every prompt, and its reference as many as were sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from policy_trainer.batching import PAD_FILL, collate, forward_batches
from policy_trainer.logprobs import has_plain_head, logprobs_from_hidden, token_logprobs
from policy_trainer.parallel import ALONE, World
from rlaif.models import has_length_dependent_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONGEST_ROW = 8192
"""Tokens of a row with branches, at most: its mask takes four bytes for every pair of them."""

_PROBED_PROMPT = 300
"""Tokens of the prompt that models are tried out with: more than the windows of models that do not tell of them."""

_PAD = -1


class Answered(NamedTuple):
    """A prompt and responses to it, as token ids; none is empty."""

    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]


class BranchBatch(NamedTuple):
    """N rows with branches, padded on the right, and M responses in them, in order.

    Attributes:
        input_ids: (N, L) int64.
        position_ids: (N, L) int64; a response goes on from its prompt.
        branch: (N, L) int64; 0 = prompt, k = k-th response, -1 = padding.
        row: (M, 1) int64, where each response is.
        read_at: (M, R) int64, the column from which each of its tokens is predicted.
        targets: (M, R) int64, its tokens.
        response_mask: (M, R) bool; True = a token of the response.
    """

    input_ids: Tensor
    position_ids: Tensor
    branch: Tensor
    row: Tensor
    read_at: Tensor
    targets: Tensor
    response_mask: Tensor

    def to(self, device: torch.device | str) -> BranchBatch:
        """The same batch on another device."""
        return BranchBatch(*(t.to(device) for t in self))

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What each position does not see, as the lowest number of `dtype`; the others are 0. (N, 1, L, L)."""
        query, key = self.branch.unsqueeze(2), self.branch.unsqueeze(1)
        n = self.branch.shape[1]
        before = torch.ones(n, n, dtype=torch.bool, device=self.branch.device).tril()
        # Padding sees what is before it, so that no row of a softmax is empty.
        seen = before & ((key == 0) | (key == query))
        hidden = torch.zeros(seen.shape, dtype=dtype, device=self.branch.device)
        return hidden.masked_fill_(~seen, torch.finfo(dtype).min).unsqueeze(1)


def collate_branches(rows: Sequence[Answered]) -> BranchBatch:
    """Lay out prompts and their responses in rows."""
    width = max(len(r.prompt_ids) + sum(map(len, r.responses)) for r in rows)
    longest = max(len(response) for r in rows for response in r.responses)
    m = sum(len(r.responses) for r in rows)
    input_ids = torch.full((len(rows), width), PAD_FILL, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    branch = torch.full_like(input_ids, _PAD)
    row = torch.zeros((m, 1), dtype=torch.long)
    read_at = torch.zeros((m, longest), dtype=torch.long)
    targets = torch.full((m, longest), PAD_FILL, dtype=torch.long)
    response_mask = torch.zeros((m, longest), dtype=torch.bool)
    j = 0
    for i, (prompt, responses) in enumerate(rows):
        start = len(prompt)
        input_ids[i, :start] = torch.tensor(list(prompt))
        position_ids[i, :start] = torch.arange(start)
        branch[i, :start] = 0
        for k, response in enumerate(responses, 1):
            n, end = len(response), start + len(response)
            input_ids[i, start:end] = targets[j, :n] = torch.tensor(list(response))
            position_ids[i, start:end] = len(prompt) + torch.arange(n)
            branch[i, start:end] = k
            row[j] = i
            read_at[j, :n] = torch.arange(start - 1, end - 1)
            read_at[j, 0] = len(prompt) - 1
            response_mask[j, :n] = True
            start, j = end, j + 1
    return BranchBatch(input_ids, position_ids, branch, row, read_at, targets, response_mask)


def branch_logprobs(model: PreTrainedModel, batch: BranchBatch, temperature: float) -> Tensor:
    """Log-probability of each response token given its prompt and the response before it: (M, R) float32.

    Arbitrary at padding. See `token_logprobs`.
    """
    hidden = model.base_model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask(model.dtype),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return logprobs_from_hidden(model, hidden[batch.row, batch.read_at], batch.targets, temperature).logprobs


def pays(prompt_len: int, response_lens: Sequence[int], width: int) -> bool:
    """Whether reading the prompt once takes less work than reading it before each response.

    A layer takes about 12 w^2 multiplications for a token, w being its width, and 2 w for every key that a query is
    compared with: all L of a row with branches, whose mask is dense, but L / 2 on average where the mask is causal. In
    units of 12 w^2, that is L + L^2 / 6w against L + L^2 / 12w.
    """
    together = prompt_len + sum(response_lens)
    apart = [prompt_len + n for n in response_lens]
    dense, causal = together**2 / (6 * width), sum(n**2 for n in apart) / (12 * width)
    return len(apart) > 1 and together <= LONGEST_ROW and together + dense < sum(apart) + causal


def reads_once(model: PreTrainedModel, answered: Answered) -> bool:
    """Whether `summed_logprobs` reads the prompt once for all its responses."""
    lengths = [len(response) for response in answered.responses]
    width = int(model.config.get_text_config().hidden_size)
    return pays(len(answered.prompt_ids), lengths, width) and has_branches(model)


def forward_passes(
    model: PreTrainedModel, rows: Sequence[Answered], micro_batch_tokens: int
) -> list[list[int]]:
    """Indices of the rows of each forward pass: of like length, and read in the same way.

    Args:
        model: reads them.
        rows: what it reads.
        micro_batch_tokens: most padded tokens in one pass; a row that exceeds it is a pass of its own.
    """
    once = [reads_once(model, row) for row in rows]
    lengths = [
        len(row.prompt_ids) + sum(map(len, row.responses))
        if shared
        else len(row.responses) * (len(row.prompt_ids) + max(map(len, row.responses)))
        for row, shared in zip(rows, once, strict=True)
    ]
    passes = []
    for kind in (True, False):
        indices = [i for i, shared in enumerate(once) if shared is kind]
        passes += forward_batches(
            lengths, max_tokens=micro_batch_tokens, device=model.device, indices=indices
        )
    return passes


def summed_logprobs(model: PreTrainedModel, rows: Sequence[Answered], temperature: float) -> Tensor:
    """Log-probability of every response, summed over its tokens including its EOS, in nats: (M,) float32.

    One forward pass over all rows; responses in their order. Gradients flow.

    Args:
        model: a causal language model, without dropout.
        rows: one pass of `forward_passes`.
        temperature: of sampling, > 0.
    """
    if all(reads_once(model, row) for row in rows):
        branches = collate_branches(rows).to(model.device)
        logprobs, mask = branch_logprobs(model, branches, temperature), branches.response_mask
    else:
        flat = [(row.prompt_ids, response) for row in rows for response in row.responses]
        batch = collate([prompt for prompt, _ in flat], [response for _, response in flat]).to(model.device)
        logprobs = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.response_len, temperature
        ).logprobs
        mask = batch.response_mask
    return logprobs.masked_fill(~mask, 0.0).sum(dim=1)


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float,
    micro_batch_tokens: int,
    world: World = ALONE,
) -> list[float]:
    """Log-probability of each (prompt ids, response ids), summed over the response including its EOS, in nats.

    Neighbours with the same prompt are read in one row as far as that pays.
    """
    rows = rows_of_neighbours(model, pairs, micro_batch_tokens)
    first = [0]
    for row in rows:
        first.append(first[-1] + len(row.responses))
    sums = torch.zeros(len(pairs), dtype=torch.float64)
    for indices in world.share(forward_passes(model, rows, micro_batch_tokens)):
        read = summed_logprobs(model, [rows[i] for i in indices], temperature)
        sums[[n for i in indices for n in range(first[i], first[i + 1])]] = read.double().cpu()
    found: list[float] = world.add(sums).tolist()
    return found


def rows_of_neighbours(
    model: PreTrainedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], micro_batch_tokens: int
) -> list[Answered]:
    """(prompt ids, response ids) in order, neighbours with the same prompt together while a row pays and fits."""
    rows: list[tuple[Sequence[int], list[Sequence[int]]]] = []
    for prompt, response in pairs:
        if rows:
            last_prompt, responses = rows[-1]
            longer = Answered(prompt, [*responses, response])
            fits = len(prompt) + sum(map(len, longer.responses)) <= micro_batch_tokens
            if fits and list(prompt) == list(last_prompt) and reads_once(model, longer):
                responses.append(response)
                continue
        rows.append((prompt, [response]))
    return [Answered(prompt, responses) for prompt, responses in rows]


_probed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def has_branches(model: PreTrainedModel) -> bool:
    """Whether the model takes a mask and positions of its caller's; tried out once for each model.

    Those with an attention that a mask does not reach (windows, states, flash attention), with positions that are not
    the caller's to give, or whose rotation depends on the length of a row, read every response in a row of its own.
    """
    if model not in _probed:
        _probed[model] = _may_have_branches(model) and _probe(model)
    return _probed[model]


def _may_have_branches(model: PreTrainedModel) -> bool:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.config).layers  # one for each layer, by the kind of its attention
    return (
        has_plain_head(model)
        and model.config._attn_implementation in ("sdpa", "eager")
        and "position_ids" in inspect.signature(type(model.base_model).forward).parameters
        and not has_length_dependent_positions(model.config)
        and all(type(layer) is DynamicLayer for layer in layers)
    )


@torch.no_grad()
def _probe(model: PreTrainedModel) -> bool:
    """Whether two responses read in one row have the log-probabilities that they have in two."""
    text = model.config.get_text_config()
    prompt_len = min(_PROBED_PROMPT, getattr(text, "max_position_embeddings", _PROBED_PROMPT) // 2)
    ids = [(3 + 7 * i) % text.vocab_size for i in range(prompt_len + 12)]
    row = Answered(ids[:prompt_len], (ids[prompt_len : prompt_len + 5], ids[prompt_len + 5 :]))
    together = branch_logprobs(model, collate_branches([row]).to(model.device), 1.0)
    batch = collate([row.prompt_ids] * 2, row.responses).to(model.device)
    apart = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_len, 1.0).logprobs
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.1
    close = torch.isclose(together, apart, rtol=tolerance, atol=tolerance)
    return bool((close | ~batch.response_mask).all())
