"""Attention over sequences that lie one after another in a row, so that none of them is padded.

A model of transformers asks for its attention by name and hands on a mask of four dimensions as it is
(https://huggingface.co/docs/transformers/attention_interface). Here such a mask of integers says where each sequence
begins and ends; with any other mask, the attention is that of PyTorch, as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reward_server.last_layer import reads_ends_alone

ATTENTION = "rlaif_padding_free"

_BLOCK = 64
"""Queries that are computed at a time: those of a block are compared with all keys up to its end. On one core of an AMD
EPYC 250 tokens take 1.0 ms so, and 1.3 ms at once; larger blocks take longer."""

_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What some models add to the attention that is not computed here."""


def bounds(lengths: Sequence[int]) -> Tensor:
    """Where sequences of these lengths begin and end in their row: (1, 1, 1, N + 1) int64."""
    return torch.tensor([0, *accumulate(lengths)]).view(1, 1, 1, -1)


@lru_cache(maxsize=4)
def _unseen(reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(_BLOCK, 2 * reach): 0 in the first reach + i + 1 columns of row i, and minus infinity in the others."""
    return torch.full((_BLOCK, 2 * reach), -torch.inf, dtype=dtype, device=device).triu(reach + 1)


@torch.library.custom_op("rlaif::padding_free_attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, edges: Tensor, scale: float, last_only: bool
) -> Tensor:
    kept = key.shape[2] - query.shape[2]
    reach = max(_BLOCK, 1 << key.shape[2].bit_length())
    unseen = _unseen(reach, query.dtype, query.device)
    made = query.new_zeros if last_only else query.new_empty
    found = made(1, query.shape[2], query.shape[1], value.shape[3])
    for start, end in pairwise(edges.flatten().tolist()):
        keys, values = (x[:, :, kept + start : kept + end] for x in (key, value))
        if kept:
            keys = torch.cat([key[:, :, :kept], keys], dim=2)
            values = torch.cat([value[:, :, :kept], values], dim=2)
        for first in (end - 1,) if last_only else range(start, end, _BLOCK):
            after = min(end, first + _BLOCK)
            before, sees = kept + first - start, kept + after - start
            found[:, first:after] = scaled_dot_product_attention(
                query[:, :, first:after],
                keys[:, :, :sees],
                values[:, :, :sees],
                attn_mask=unseen[: after - first, reach - before : reach - before + sees],
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            ).transpose(1, 2)
    return found


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, scale: float, last_only: bool) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each sequence of a row to what is kept before the row, and to itself up to each of its tokens.

    Args:
        module: the layer.
        query: (1, H, T, D).
        key: (1, G, K + T, D); the first K are of an earlier pass, and every sequence sees them.
        value: as `key`.
        attention_mask: of `bounds`, or any other.
        scaling: of the logits; D ** -0.5 by default.
        kwargs: what else transformers hands on.

    Returns:
        (1, T, H, D), and no weights. In a last layer that is computed for the ends of the sequences alone, the others
        are 0.

    Raises:
        NotImplementedError: the model has an attention of another kind.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return found
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"no padding-free attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _attention(query, key, value, attention_mask, scale, reads_ends_alone(module)), None


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
