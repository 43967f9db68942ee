"""Batched decoding of a causal LM: left-padded rows, rows leave the batch as they finish.

`transformers.generate` keeps finished rows in the batch and has one seed for all rows; rationales differ in
length, and a sample must depend on its own request alone, not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from labeler.backends.local import Decoded, Request, text_after
from labeler.llm import RequestFailed

_ROOM = 64
"""Tokens of free room in a key-value buffer when it is made."""


class _RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer with free room at its end: a step writes one column where `DynamicLayer` copies them all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        buffers = self._buffers
        if buffers is None or buffers[0].shape[0] != key_states.shape[0] or buffers[0].shape[-2] < total:
            buffers = (_with_room(self.keys, past, key_states), _with_room(self.values, past, value_states))
            self._buffers = buffers
        buffers[0][..., past:total, :] = key_states
        buffers[1][..., past:total, :] = value_states
        self.keys, self.values = buffers[0][..., :total, :], buffers[1][..., :total, :]
        return self.keys, self.values


def _with_room(stored: Tensor | None, past: int, states: Tensor) -> Tensor:
    *shape, new, dim = states.shape
    buffer = states.new_empty(*shape, past + new + _ROOM, dim)
    if past and stored is not None:
        buffer[..., :past, :] = stored
    return buffer


def _roomy_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids (B, T) padded on the left with `pad`, and the attention mask (B, T): 1 = token."""
    width = max(len(r) for r in rows)
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.inference_mode()
def next_token_logprobs(
    model: PreTrainedModel, requests: Sequence[Request], pad: int, positions: int = 1
) -> Tensor:
    """Natural-log probabilities of the token after each of the last `positions` tokens of every row.

    Returns:
        Over the full vocabulary: fp32 (B, positions, V), on the CPU.
    """
    ids, mask = pad_left([r.ids for r in requests], pad, model.device)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=_positions(mask),
        use_cache=False,
        logits_to_keep=positions,
    )
    return torch.log_softmax(out.logits.float(), dim=-1).cpu()


@torch.inference_mode()
def decode_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    eos: Sequence[int],
) -> list[Decoded | RequestFailed]:
    """Continue every request, greedily or by sampling; results in request order.

    Each row samples with its own generator, so its tokens do not depend on the rest of the batch. A row whose logits
    become NaN has failed: which token is drawn from them means nothing.
    """
    rows = [_Row(r, tokenizer) for r in requests]
    pad = eos[0] if eos else 0
    ids, mask = pad_left([r.ids for r in requests], pad, model.device)
    positions = _positions(mask)
    cache = _roomy_cache(model)
    ends = frozenset(eos)
    live = rows
    inputs = ids
    while True:
        out = model(
            input_ids=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = out.logits[:, -1].float()
        chosen = _choose(logits, live)
        # `argmax` takes NaN for the largest number, so what it picked tells whether there is any.
        broken = logits.gather(1, chosen[:, None])[:, 0].isnan().tolist()
        for row, token, is_nan in zip(live, chosen.tolist(), broken, strict=True):
            if is_nan:
                row.fail()
            row.take(token, ends)
        if all(row.done for row in live):
            break
        keep = [i for i, row in enumerate(live) if not row.done]
        # Dropping rows copies the cache, so it waits until an eighth of the rows can go.
        if len(keep) <= len(live) * 7 // 8:
            index = torch.tensor(keep, device=mask.device)
            cache.batch_select_indices(index)
            chosen, mask, positions = chosen[index], mask[index], positions[index]
            live = [live[i] for i in keep]
        inputs = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [row.result() for row in rows]


def _choose(logits: Tensor, rows: Sequence[_Row]) -> Tensor:
    """Next ids (B,) from logits (B, V): argmax, or the Gumbel-max draw of a row's own generator."""
    if all(row.generator is None for row in rows):
        return logits.argmax(-1)
    scores = logits.clone()
    for i, row in enumerate(rows):
        if row.generator is not None and not row.done:
            noise = torch.empty(logits.shape[-1]).exponential_(generator=row.generator).log().neg()
            scores[i] = logits[i] / row.request.temperature + noise.to(logits.device)
    return scores.argmax(-1)


class _Row:
    """The state of one request while its batch decodes."""

    __slots__ = ("_cut", "_failed", "_last", "_tokenizer", "done", "generator", "ids", "reason", "request")

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
        self.request = request
        self.generator = torch.Generator().manual_seed(request.seed) if request.temperature > 0 else None
        self.ids: list[int] = []
        self.done = False
        self.reason = "length"
        self._cut: str | None = None
        self._failed = False
        self._tokenizer = tokenizer
        self._last = frozenset(s.rstrip()[-1:] for s in request.stop)

    def fail(self) -> None:
        """Note that there is no next token, unless the row has ended."""
        if not self.done:
            self.done, self._failed = True, True

    def text(self) -> str:
        return text_after(self._tokenizer, self.request.ids, self.ids)

    def take(self, token: int, eos: frozenset[int]) -> None:
        """Note the next token unless the row has ended."""
        if self.done:
            return
        if token in eos:
            self.done, self.reason = True, "stop"
            self.ids.append(token)
            return
        self.ids.append(token)
        if self._last and self._may_stop(token):
            text = self.text()
            found = [at for s in self.request.stop if (at := text.find(s)) >= 0]
            if found:
                self._cut = text[: min(found)]
                self.done, self.reason = True, "stop"
        if len(self.ids) >= self.request.max_new_tokens and not self.done:
            self.done = True

    def _may_stop(self, token: int) -> bool:
        """Cheap test before the text is decoded: the token holds the last character of a stop string."""
        piece = self._tokenizer.decode([token])
        assert isinstance(piece, str)
        return any(end in piece for end in self._last)

    def result(self) -> Decoded | RequestFailed:
        if self._failed:
            return RequestFailed("the model computed NaN in place of its next token's probabilities")
        text = self.text() if self._cut is None else self._cut
        return Decoded(text, tuple(self.ids), self.reason)
