"""What transformers' own forward says of labels: the full softmax at every token of every spelling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rlaif.types import Conversation, Message, to_dicts


def prompt_ids(tokenizer: Any, messages: Conversation, prefix: str) -> list[int]:
    turns = to_dicts((*messages, Message("assistant", prefix)))
    ids: list[int] = tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
    return ids


def label_probs(model: Any, tokenizer: Any, ids: Sequence[int], labels: Sequence[str]) -> list[float]:
    """P(label) after `ids`, written directly or after a space, and not as the beginning of another label.

    For byte-level tokenizers in which a label has no one-token alias.
    """
    spelled = {
        label: [tokenizer(gap + label, add_special_tokens=False)["input_ids"] for gap in ("", " ")]
        for label in labels
    }
    p = {tuple(tokens): _sequence_prob(model, ids, tokens) for both in spelled.values() for tokens in both}
    probs = []
    for both in spelled.values():
        total = 0.0
        for tokens in map(tuple, both):
            longer = [p[t] for t in p if len(t) > len(tokens) and t[: len(tokens)] == tokens]
            total += p[tokens] - sum(longer)
        probs.append(total)
    return probs


def _sequence_prob(model: Any, ids: Sequence[int], tokens: Sequence[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *tokens]])).logits[0, len(ids) - 1 : -1].double()
    picked = logits.log_softmax(-1)[range(len(tokens)), list(tokens)]
    return math.exp(float(picked.sum()))
