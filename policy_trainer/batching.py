"""Sequences as padded tensors, and the grouping of ragged sequences into batches of like length.

Notation used throughout `policy_trainer`: N sequences, P prompt positions, R response positions, L = P + R.
A prompt is padded on the left and a response on the right, so that position P - 1 is the last prompt token of
every row and the response starts at P.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAD_FILL = 0
"""The id at padded positions. Masks decide what counts, so any valid id will do; 0 always is one, while a
tokenizer's PAD may lie beyond the model's embedding."""

PADDING_WORTH_A_PASS = {"cpu": 128, "cuda": 4096}
"""Positions that take about as long as the fixed cost of one more forward and backward pass: much on a GPU, which waits
for its launches, little on a CPU."""


def data_id(rows: Iterable[Sequence[int]]) -> str:
    """An id of token ids in their order: a run that goes on must find the data that it began with."""
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(array("q", [len(row), *row]).tobytes())
    return digest.hexdigest()


class SequenceBatch(NamedTuple):
    """Prompts with their responses, padded.

    Attributes:
        input_ids: (N, P + R) int64.
        attention_mask: (N, P + R) int64; 1 = a real token.
        response_mask: (N, R) bool; True = a response token that counts, the EOS included.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor

    @property
    def response_len(self) -> int:
        """R, the padded response length."""
        return self.response_mask.shape[1]

    @property
    def response_ids(self) -> Tensor:
        """(N, R) int64, the response tokens; padding where `response_mask` is False."""
        return self.input_ids[:, -self.response_len :]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on another device."""
        return SequenceBatch(*(t.to(device) for t in self))


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> SequenceBatch:
    """Pad N prompts on the left and their N responses on the right.

    Raises:
        ValueError: the two differ in number, or a prompt or a response is empty (a sampled response holds at
            least its EOS; the first response token needs a token to be predicted from).
    """
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses")
    if not all(prompts) or not all(responses):
        raise ValueError("a prompt or a response has no token")
    n = len(prompts)
    p_len = max(map(len, prompts))
    r_len = max(map(len, responses))
    input_ids = torch.full((n, p_len + r_len), PAD_FILL, dtype=torch.long)
    attention_mask = torch.zeros((n, p_len + r_len), dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = p_len - len(prompt), p_len + len(response)
        input_ids[i, start:end] = torch.tensor([*prompt, *response])
        attention_mask[i, start:end] = 1
    return SequenceBatch(input_ids, attention_mask, attention_mask[:, p_len:].bool())


def pad_right(rows: Sequence[Tensor], length: int) -> Tensor:
    """Stack 1-D rows of differing length into (N, length), zeros on the right."""
    out = torch.zeros((len(rows), length), dtype=rows[0].dtype if rows else torch.float32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def length_buckets(
    lengths: Sequence[int],
    *,
    max_rows: int,
    max_tokens: int | None = None,
    max_padding: int | None = None,
    indices: Sequence[int] | None = None,
) -> list[list[int]]:
    """Group sequences of like length, so that little of a padded batch is padding.

    Args:
        lengths: tokens of each sequence.
        max_rows: most sequences in one batch.
        max_tokens: most tokens in one batch *after padding* (rows x longest row); None for no limit. A
            sequence that exceeds it alone forms a batch of its own.
        max_padding: most padded positions in one batch; None for no limit.
        indices: the sequences to group; all by default.

    Returns:
        Batches of indices into `lengths`, longest batch first (running out of memory shows at once). Equal
        lengths keep their order, so the grouping is a function of its arguments alone.
    """
    chosen = range(len(lengths)) if indices is None else indices
    batches: list[list[int]] = []
    tokens = 0
    for i in sorted(chosen, key=lambda i: -lengths[i]):
        if batches:
            # Sorted by falling length: the first row of a batch is its longest.
            batch, size = batches[-1], (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            if (
                len(batch) < max_rows
                and (max_tokens is None or size <= max_tokens)
                and (max_padding is None or size - tokens - lengths[i] <= max_padding)
            ):
                batch.append(i)
                tokens += lengths[i]
                continue
        batches.append([i])
        tokens = lengths[i]
    return batches


def forward_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    device: torch.device,
    indices: Sequence[int] | None = None,
) -> list[list[int]]:
    """`length_buckets` for forward passes: another one begins where padding would cost more than it does.

    Args:
        lengths: tokens of each sequence.
        max_tokens: most tokens in one pass after padding.
        device: where it runs.
        indices: the sequences to group; all by default.
    """
    worth = PADDING_WORTH_A_PASS.get(device.type, PADDING_WORTH_A_PASS["cuda"])
    return length_buckets(
        lengths, max_rows=len(lengths), max_tokens=max_tokens, max_padding=worth, indices=indices
    )
