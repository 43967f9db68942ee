"""How a model computes several sequences in one forward pass: padded in a batch, or one after another in a row."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reward_server.last_layer import LastLayer
from reward_server.padding_free import ATTENTION, bounds
from reward_server.plan import Ids, pooled
from reward_server.positions import forget_lengths


class Pass(Protocol):
    """How a model computes sequences in one forward pass.

    Attributes:
        module: what is compiled.
        forward: the module, or the same compiled.
        pads: whether all sequences of a pass are computed as if they were as long as the longest.
    """

    module: nn.Module
    forward: Callable[..., Any]
    pads: bool

    def keep(self, prefix: Ids) -> DynamicCache:
        """Keys and values of a prefix."""
        ...

    def logits(self, sequences: Sequence[Ids], kept: DynamicCache | None) -> Tensor:
        """Logits (N, 1) of what follows a prefix, if there is one."""
        ...


class Padded:
    """A row for each sequence, padded on the right. Any model can do it.

    Args:
        model: classifier with one output.
        separator: token after whose first the token types are 1; None leaves them to the model.
    """

    pads = True

    def __init__(self, model: PreTrainedModel, separator: int | None = None) -> None:
        self._model = model
        self._separator = separator
        self.module: nn.Module = model
        self.forward: Callable[..., Any] = model
        pad_id = model.config.get_text_config().pad_token_id
        self._pad_id = 0 if pad_id is None else pad_id
        self._no_cache = without_cache(model)
        self._device = model.device

    def keep(self, prefix: Ids) -> DynamicCache:
        """See `Pass`."""
        ids = torch.tensor([list(prefix)], device=self._device)
        output = self.forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        kept: DynamicCache = output.past_key_values
        return kept

    def logits(self, sequences: Sequence[Ids], kept: DynamicCache | None) -> Tensor:
        """See `Pass`."""
        forget_lengths(self._model)
        input_ids, mask = pad(sequences, self._pad_id)
        if kept is None:
            extra: dict[str, Any] = self._no_cache
        else:
            mask = torch.cat([mask.new_ones(len(sequences), kept.get_seq_length()), mask], dim=1)
            extra = {"past_key_values": _repeat(kept, len(sequences)), "use_cache": True}
        if self._separator is not None:
            extra = {**extra, "token_type_ids": token_types(input_ids, self._separator).to(self._device)}
        logits: Tensor = self.forward(
            input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device), **extra
        ).logits
        return logits


class PaddingFree:
    """All sequences in one row, each with its own positions and an attention that ends where it ends.

    For causal decoders on a CPU, where a token of padding costs as much as any other.
    """

    pads = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.last_layer = LastLayer(model)
        self.module: nn.Module = model.base_model
        self.forward: Callable[..., Any] = model.base_model
        assert isinstance(model.score, nn.Linear)
        self._head = model.score
        self._pad_id = model.config.get_text_config().pad_token_id

    def keep(self, prefix: Ids) -> DynamicCache:
        """See `Pass`."""
        kept: DynamicCache = self._row([prefix], None, use_cache=True).past_key_values
        return kept

    def logits(self, sequences: Sequence[Ids], kept: DynamicCache | None) -> Tensor:
        """See `Pass`."""
        past = None if kept is None else _repeat(kept, 1)
        # Nothing after the token that the head reads is of use to it.
        read = [ids[: pooled(ids, self._pad_id) + 1] for ids in sequences]
        hidden = self._row(read, past, use_cache=past is not None).last_hidden_state[0]
        logits: Tensor = self._head(hidden[[end - 1 for end in accumulate(map(len, read))]])
        return logits

    def _row(self, sequences: Sequence[Ids], past: DynamicCache | None, *, use_cache: bool) -> Any:
        lengths = [len(ids) for ids in sequences]
        first = 0 if past is None else past.get_seq_length()
        with self.last_layer.reading([end - 1 for end in accumulate(lengths)]):
            return self.forward(
                input_ids=torch.tensor([[i for ids in sequences for i in ids]]),
                position_ids=torch.cat([torch.arange(first, first + n) for n in lengths])[None],
                attention_mask=bounds(lengths),
                past_key_values=past,
                use_cache=use_cache,
            )


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded input_ids (N, T) and attention_mask (N, T), int64; mask 1 where there is a token."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask


def token_types(input_ids: Tensor, separator: int) -> Tensor:
    """(N, T) int64 to the same: 0 up to the first separator of a row, 1 after it."""
    separates = (input_ids == separator).long()
    return (separates.cumsum(1) - separates).clamp(max=1)


def without_cache(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that keep a causal model from collecting keys and values that nobody reads."""
    return {"use_cache": False} if "use_cache" in parameters(model) else {}


def may_be_padding_free(model: PreTrainedModel) -> bool:
    """Whether it is worth trying: on a GPU the attention would be many small kernels."""
    return (
        model.device.type == "cpu"
        and model.config._attn_implementation in ("sdpa", ATTENTION)
        and model._can_set_attn_implementation()
        and isinstance(getattr(model, "score", None), nn.Linear)
        and "position_ids" in parameters(model.base_model)
    )


def parameters(model: nn.Module) -> frozenset[str]:
    """What a model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def _repeat(kept: DynamicCache, rows: int) -> DynamicCache:
    """The same keys and values for every row, as views: they are copied once, when the rows' own are appended."""
    repeated = copy.copy(kept)
    repeated.layers = []
    for layer in kept.layers:
        assert isinstance(layer, DynamicLayer)  # no others are kept
        layer = copy.copy(layer)
        layer.keys, layer.values = (
            None if kv is None else kv.expand(rows, -1, -1, -1) for kv in (layer.keys, layer.values)
        )
        repeated.layers.append(layer)
    return repeated
