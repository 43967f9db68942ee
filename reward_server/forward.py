"""The forward passes of a reward model over a batch of token sequences, with a shared prefix computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from reward_server.company import close, holds, key_of, made_up, probe_length
from reward_server.compiled import TOLERANCE, pack_linear_layers, unpack_linear_layers
from reward_server.padding_free import ATTENTION
from reward_server.passes import (
    Padded,
    PaddingFree,
    Pass,
    may_be_padding_free,
    parameters,
)
from reward_server.plan import Costs, Group, Ids, Key, companies, plan
from rlaif.models import has_length_dependent_positions

_CPU_TOKENS = 1024
"""Of a pass, for each thread. With 14 M parameters on one core of an AMD EPYC, compiled: with twice as many tokens the
activations fall out of the caches, and a token takes 5 % longer, with four times as many 18 %; on two cores, with twice
as many, 4 %. A pass of one token takes as long as some 45 tokens of a larger one."""

_GPU = Costs(overhead=1024, best_tokens=1 << 30)
"""An estimate: launching the kernels of a pass takes 10 to 20 ms, in which a GPU computes 500 to 3,000 tokens of a
model of 8 B to 1 B parameters."""

_COMPILED = 256
"""Compiled versions of one function, over all loaded models: each takes some five. PyTorch's default is 8."""


def scores(model: PreTrainedModel, sequences: Sequence[Ids], key: Key | None = None) -> Tensor:
    """Raw scores of sequences, (N,), float32: the head's output on the last (or [CLS]) token. Gradients flow.

    Padding is on the right, so positions are those of the unpadded sequence.

    Args:
        model: classifier with one output.
        sequences: token ids, none empty.
        key: of `key_of`, which cuts them into passes; without one they are computed in one padded pass.
    """
    padded = Padded(model)
    passes = companies(sequences, range(len(sequences)), key)
    found = torch.cat([padded.logits([sequences[i] for i in rows], None) for rows in passes]).squeeze(-1)
    if len(passes) > 1:
        order = torch.tensor([i for rows in passes for i in rows], device=found.device)
        found = found[order.argsort()]
    return found.float()


class BatchedForward:
    """Scores of token sequences, equal to those of a forward pass of each alone up to rounding.

    Args:
        model: classifier with one output, dropout off.
        costs: of its device; by default those of a CPU core or a GPU.
        separator: token between prompt and response, where the model is told which of them a token is of.

    Attributes:
        shares_prefixes: whether a prefix of several sequences is computed once. Causal models with full attention in
            every layer do; what the model gives with a prefix in its cache is compared once with what it gives
            without.
        pads: whether the sequences of a pass are padded. Models that share prefixes are not on a CPU, if their
            attention is PyTorch's; what they give in one row is compared once with what they give in several.
    """

    def __init__(
        self, model: PreTrainedModel, costs: Costs | None = None, *, separator: int | None = None
    ) -> None:
        self._model = model
        self._pad_id = model.config.get_text_config().pad_token_id
        self._costs = costs or _costs(model.device)
        self._pass: Pass = Padded(model, separator)
        self._key = key_of(model)
        self._unit = probe_length(model)
        self.shares_prefixes = (
            self._key is None
            and _can_keep_a_prefix(model)
            and holds(model, self._keeps_a_prefix, "shares no prefixes")
        )
        if self.shares_prefixes and may_be_padding_free(model):
            self._try_padding_free()
        self.pads = self._pass.pads

    def plan(self, sequences: Sequence[Ids]) -> list[Group]:
        """How `scores` computes these sequences."""
        return plan(
            sequences,
            self._costs,
            share=self.shares_prefixes,
            pads=self.pads,
            pad_id=self._pad_id,
            key=self._key,
        )

    def tokens(self, sequences: Sequence[Ids]) -> int:
        """Tokens that `scores` computes for these sequences, padding included."""
        return sum(group.tokens(sequences) for group in self.plan(sequences))

    @torch.inference_mode()
    def scores(self, sequences: Sequence[Ids]) -> tuple[Tensor, list[int]]:
        """Raw scores, (N,), float32 on the CPU, and how many tokens of each were not computed for it."""
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
            with torch._dynamo.config.patch(recompile_limit=_COMPILED):
                apart = (self._try_out() - before).abs().max().item()
            if not apart <= TOLERANCE * max(1.0, before.abs().max().item()):
                raise RuntimeError(f"its scores are {apart:.1e} apart from those before")
        except Exception:
            unpack_linear_layers(self._pass.module)
            self._pass.forward = self._pass.module
            raise
        # What is compiled by now is used, and nothing more is compiled. The stance "eager_on_recompile" says the same,
        # but to all threads: a model that is compiled while this one scores would be left as it is.
        self._pass.forward = torch._dynamo.run(self._pass.module)

    @torch.inference_mode()
    def _try_out(self) -> Tensor:
        """Logits of made-up sequences, through every kind of pass."""
        unit = self._unit
        rows = made_up(self._model, [unit + 3 * unit // 8 * row for row in range(3)])
        batches: list[list[list[int]]] = [rows[:1], rows[1:2], rows[:2], rows]
        found = [self._pass.logits(batch, None) for batch in batches]
        if self.shares_prefixes:
            for length in (unit, 2 * unit + 1):
                (prefix,) = made_up(self._model, [length], start=5)
                kept = self._pass.keep(prefix)
                found += [self._pass.logits(batch, kept) for batch in batches]
        return torch.cat(found).float()

    @torch.inference_mode()
    def _keeps_a_prefix(self) -> bool:
        """Whether the scores after a kept prefix are those of the whole sequences."""
        half = self._unit // 2
        (ids,) = made_up(self._model, [self._unit])
        kept = self._pass.keep(ids[:half])
        # A subclass may keep more than is copied for each row; windows, states and the like forget what a later token
        # would have to see.
        if type(kept) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in kept.layers):
            return False
        sequences = [ids, ids[: self._unit - self._unit // 4]]
        whole = torch.cat([self._pass.logits([s], None) for s in sequences])
        after = self._pass.logits([s[half:] for s in sequences], kept)
        return close(self._model, whole, after)

    def _try_padding_free(self) -> None:
        """Leave padding away if the model then gives the same."""
        padded, expected = self._pass, self._try_out()
        attention = self._model.config._attn_implementation
        self._model.set_attn_implementation(ATTENTION)
        self._pass = PaddingFree(self._model)

        def gives_the_same() -> bool:
            return close(self._model, self._try_out(), expected)

        if not holds(self._model, gives_the_same, "pads its batches"):
            self._model.set_attn_implementation(attention)
            self._pass = padded


def _costs(device: torch.device) -> Costs:
    return Costs(48, _CPU_TOKENS * torch.get_num_threads()) if device.type == "cpu" else _GPU


def _can_keep_a_prefix(model: PreTrainedModel) -> bool:
    return (
        not model.config.get_text_config().is_encoder_decoder
        and {"past_key_values", "use_cache"} <= parameters(model)
        and not has_length_dependent_positions(model.config)
    )
