"""The forward passes of a reward model over a batch of token sequences, with a shared prefix computed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reward_server.compiled import TOLERANCE, pack_linear_layers, unpack_linear_layers
from reward_server.padding_free import ATTENTION
from reward_server.passes import (
    Padded,
    PaddingFree,
    Pass,
    may_be_padding_free,
    pad,
    parameters,
    without_cache,
)
from reward_server.plan import Costs, Group, Ids, plan
from rlaif.models import has_length_dependent_positions

_LOG = logging.getLogger(__name__)

_CPU_TOKENS = 1024
"""Of a pass, for each thread. With 14 M parameters on one core of an AMD EPYC, compiled: with twice as many tokens the
activations fall out of the caches, and a token takes 5 % longer, with four times as many 18 %; on two cores, with twice
as many, 4 %. A pass of one token takes as long as some 45 tokens of a larger one."""

_GPU = Costs(overhead=1024, best_tokens=1 << 30)
"""An estimate: launching the kernels of a pass takes 10 to 20 ms, in which a GPU computes 500 to 3,000 tokens of a
model of 8 B to 1 B parameters."""

_PROBE = 24


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


class BatchedForward:
    """Scores of token sequences, equal to those of a forward pass of each alone up to rounding.

    Args:
        model: classifier with one output, dropout off.
        costs: of its device; by default those of a CPU core or a GPU.

    Attributes:
        shares_prefixes: whether a prefix of several sequences is computed once. Causal models with full attention in
            every layer do; what the model gives with a prefix in its cache is compared once with what it gives
            without.
        pads: whether the sequences of a pass are padded. Models that share prefixes are not on a CPU, if their
            attention is PyTorch's; what they give in one row is compared once with what they give in several.
    """

    def __init__(self, model: PreTrainedModel, costs: Costs | None = None) -> None:
        self._model = model
        self._pad_id = model.config.get_text_config().pad_token_id
        self._costs = costs or _costs(model.device)
        self._stance: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._pass: Pass = Padded(model)
        self.shares_prefixes = _can_keep_a_prefix(model) and self._probe()
        if self.shares_prefixes and may_be_padding_free(model):
            self._try_padding_free()
        self.pads = self._pass.pads

    def plan(self, sequences: Sequence[Ids]) -> list[Group]:
        """How `scores` computes these sequences."""
        return plan(sequences, self._costs, share=self.shares_prefixes, pads=self.pads, pad_id=self._pad_id)

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

    def _compute(self, sequences: Sequence[Ids], group: Group, raw: Tensor) -> None:
        start = group.prefix
        kept = self._pass.keep(sequences[group.passes[0][0]][:start]) if start else None
        for rows in group.passes:
            logits = self._pass.logits([sequences[i][start:] for i in rows], kept)
            raw[list(rows)] = logits.squeeze(-1).float().cpu()

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile the model for passes with and without a kept prefix, of one row and of several.

        Whatever would have to be compiled later is computed as before, so that no caller waits for it.

        Raises:
            RuntimeError: it cannot be compiled here, or then gives other scores; nothing has changed.
        """
        before = self._try_out()
        pack_linear_layers(self._pass.module)
        self._pass.forward = torch.compile(self._pass.module, dynamic=True)
        try:
            apart = (self._try_out() - before).abs().max().item()
            if not apart <= TOLERANCE * max(1.0, before.abs().max().item()):
                raise RuntimeError(f"its scores are {apart:.1e} apart from those before")
        except Exception:
            unpack_linear_layers(self._pass.module)
            self._pass.forward = self._pass.module
            raise
        self._stance = partial(torch.compiler.set_stance, "eager_on_recompile")

    @torch.inference_mode()
    def _try_out(self) -> Tensor:
        """Logits of made-up sequences, through every kind of pass."""
        ids = [[3 + (7 * i + row) % 50 for i in range(_PROBE + 9 * row)] for row in range(3)]
        batches: list[list[list[int]]] = [ids[:1], ids[1:2], ids[:2], ids]
        found = [self._pass.logits(batch, None) for batch in batches]
        if self.shares_prefixes:
            for length in (_PROBE, 2 * _PROBE + 1):
                kept = self._pass.keep([3 + i % 50 for i in range(length)])
                found += [self._pass.logits(batch, kept) for batch in batches]
        return torch.cat(found).float()

    @torch.inference_mode()
    def _probe(self) -> bool:
        """Whether the scores after a kept prefix are those of the whole sequences."""
        ids = [3 + (7 * i) % 50 for i in range(_PROBE)]  # any ids that all vocabularies have
        kept = self._pass.keep(ids[: _PROBE // 2])
        if not isinstance(kept, DynamicCache) or any(
            type(layer) is not DynamicLayer for layer in kept.layers
        ):
            return False  # windows, states and the like forget what a later token would have to see
        sequences = [ids, ids[:-5]]
        whole = torch.cat([self._pass.logits([s], None) for s in sequences]).float()
        after = self._pass.logits([s[_PROBE // 2 :] for s in sequences], kept).float()
        return self._close(whole, after)

    def _try_padding_free(self) -> None:
        """Leave padding away if the model then gives the same."""
        padded, expected = self._pass, self._try_out()
        attention = self._model.config._attn_implementation
        self._model.set_attn_implementation(ATTENTION)
        self._pass = PaddingFree(self._model)
        try:
            same = self._close(self._try_out(), expected)
        except Exception as err:  # whatever a model raises that cannot do it
            _LOG.info("%s pads its batches: %s: %s", type(self._model).__name__, type(err).__name__, err)
            same = False
        if not same:
            self._model.set_attn_implementation(attention)
            self._pass = padded

    def _close(self, a: Tensor, b: Tensor) -> bool:
        tolerance = 1e-4 if self._model.dtype == torch.float32 else 0.1
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def _costs(device: torch.device) -> Costs:
    return Costs(48, _CPU_TOKENS * torch.get_num_threads()) if device.type == "cpu" else _GPU


def _can_keep_a_prefix(model: PreTrainedModel) -> bool:
    return (
        not model.config.get_text_config().is_encoder_decoder
        and {"past_key_values", "use_cache"} <= parameters(model)
        and not has_length_dependent_positions(model.config)
    )
