"""The forward passes of a reward model over a batch of token sequences, with a shared prefix computed once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reward_server.compiled import TOLERANCE, pack_linear_layers, unpack_linear_layers
from reward_server.plan import Costs, Group, Ids, plan
from rlaif.models import has_length_dependent_positions

_CPU = Costs(overhead=48, best_tokens=2048)
"""Measured on one core with 14 M parameters: a pass of one token takes as long as 45 tokens of a larger one, and
from some 1,000 to 2,000 tokens on the activations fall out of the caches: 8,192 tokens take 15 % longer each."""

_GPU = Costs(overhead=1024, best_tokens=1 << 30)
"""An estimate: launching the kernels of a pass takes 10 to 20 ms, in which a GPU computes 500 to 3,000 tokens of a
model of 8 B to 1 B parameters."""

_PROBE = 24


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded input_ids (N, T) and attention_mask (N, T), int64; mask 1 where there is a token."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask


def scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Raw scores of sequences from one padded pass, (N,), float32: the head's output on the last (or [CLS]) token.

    Padding is on the right, so positions are those of the unpadded sequence. Gradients flow.
    """
    pad_id = model.config.get_text_config().pad_token_id
    input_ids, attention_mask = pad(sequences, 0 if pad_id is None else pad_id)
    output = model(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        **without_cache(model),
    )
    logits: Tensor = output.logits
    return logits.squeeze(-1).float()


def without_cache(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that keep a causal model from collecting keys and values that nobody reads."""
    return {"use_cache": False} if "use_cache" in _parameters(model) else {}


class BatchedForward:
    """Scores of token sequences, equal to those of a forward pass of each alone up to rounding.

    Args:
        model: classifier with one output, dropout off.
        costs: of its device; by default those of a CPU core or a GPU.

    Attributes:
        shares_prefixes: whether a prefix of several sequences is computed once. Causal models with full attention in
            every layer do; what the model gives with a prefix in its cache is compared once with what it gives
            without.
    """

    def __init__(self, model: PreTrainedModel, costs: Costs | None = None) -> None:
        self._model = model
        self._pad_id = model.config.get_text_config().pad_token_id
        self._costs = costs or (_CPU if model.device.type == "cpu" else _GPU)
        self._no_cache = without_cache(model)
        self._forward: Callable[..., Any] = model
        self._stance: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.shares_prefixes = _can_keep_a_prefix(model) and self._probe()

    def plan(self, sequences: Sequence[Ids]) -> list[Group]:
        """How `scores` computes these sequences."""
        return plan(sequences, self._costs, share=self.shares_prefixes, pad_id=self._pad_id)

    def tokens(self, sequences: Sequence[Ids]) -> int:
        """Tokens that `scores` computes for these sequences, padding included."""
        return sum(group.tokens(sequences) for group in self.plan(sequences))

    @torch.inference_mode()
    def scores(self, sequences: Sequence[Ids]) -> tuple[Tensor, list[int]]:
        """Raw scores, (N,), float32 on the CPU, and how many tokens of each were not computed for it."""
        with self._stance():
            return self._scores(sequences)

    def _scores(self, sequences: Sequence[Ids]) -> tuple[Tensor, list[int]]:
        raw = torch.empty(len(sequences), dtype=torch.float32)
        cached = [0] * len(sequences)
        for group in self.plan(sequences):
            for rows in group.passes:
                for i in rows:
                    cached[i] = group.prefix
            cached[group.passes[0][0]] = 0  # for one of them it was
            self._compute(sequences, group, raw)
        return raw, cached

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile the model for passes with and without a kept prefix, of one row and of several.

        Whatever would have to be compiled later is computed as before, so that no caller waits for it.

        Raises:
            RuntimeError: it cannot be compiled here, or then gives other scores; nothing has changed.
        """
        before = self._try_out()
        pack_linear_layers(self._model)
        self._forward = torch.compile(self._model, dynamic=True)
        try:
            apart = (self._try_out() - before).abs().max().item()
            if not apart <= TOLERANCE * max(1.0, before.abs().max().item()):
                raise RuntimeError(f"its scores are {apart:.1e} apart from those before")
        except Exception:
            unpack_linear_layers(self._model)
            self._forward = self._model
            raise
        self._stance = partial(torch.compiler.set_stance, "eager_on_recompile")

    def _try_out(self) -> Tensor:
        """Scores of made-up sequences, through every kind of pass."""
        ids = [[3 + (7 * i + row) % 50 for i in range(_PROBE + 9 * row)] for row in range(3)]
        batches: list[list[list[int]]] = [ids[:1], ids[1:2], ids[:2], ids]
        found = [self._logits(batch, None) for batch in batches]
        if self.shares_prefixes:
            for length in (_PROBE, 2 * _PROBE + 1):
                kept = self._keep([3 + i % 50 for i in range(length)])
                found += [self._logits(batch, kept) for batch in batches]
        return torch.cat(found).float()

    def _compute(self, sequences: Sequence[Ids], group: Group, raw: Tensor) -> None:
        start = group.prefix
        kept = self._keep(sequences[group.passes[0][0]][:start]) if start else None
        for rows in group.passes:
            logits = self._logits([sequences[i][start:] for i in rows], kept)
            raw[list(rows)] = logits.squeeze(-1).float().cpu()

    def _keep(self, prefix: Ids) -> DynamicCache:
        """Keys and values of a prefix."""
        ids = torch.tensor([list(prefix)], device=self._model.device)
        output = self._forward(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        kept: DynamicCache = output.past_key_values
        return kept

    def _logits(self, sequences: Sequence[Ids], kept: DynamicCache | None) -> Tensor:
        """Logits (N, 1) of one padded pass over what follows the prefix, if there is one."""
        input_ids, mask = pad(sequences, 0 if self._pad_id is None else self._pad_id)
        if kept is None:
            extra: dict[str, Any] = self._no_cache
        else:
            mask = torch.cat([mask.new_ones(len(sequences), kept.get_seq_length()), mask], dim=1)
            extra = {"past_key_values": _repeat(kept, len(sequences)), "use_cache": True}
        device = self._model.device
        logits: Tensor = self._forward(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), **extra
        ).logits
        return logits

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Whether the scores after a kept prefix are those of the whole sequences."""
        ids = [3 + (7 * i) % 50 for i in range(_PROBE)]  # any ids that all vocabularies have
        kept = self._keep(ids[: _PROBE // 2])
        if not isinstance(kept, DynamicCache) or any(
            type(layer) is not DynamicLayer for layer in kept.layers
        ):
            return False  # windows, states and the like forget what a later token would have to see
        sequences = [ids, ids[:-5]]
        whole = torch.cat([self._logits([s], None) for s in sequences]).float()
        after = self._logits([s[_PROBE // 2 :] for s in sequences], kept).float()
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 0.1
        return torch.allclose(whole, after, rtol=tolerance, atol=tolerance)


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


def _parameters(model: PreTrainedModel) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _can_keep_a_prefix(model: PreTrainedModel) -> bool:
    return (
        not model.config.get_text_config().is_encoder_decoder
        and {"past_key_values", "use_cache"} <= _parameters(model)
        and not has_length_dependent_positions(model.config)
    )
