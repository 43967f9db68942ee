"""What scorers of reward models share, whatever computes the scores: tasks to token ids, and raw scores to outcomes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from reward_server.scorers.base import (
    Compared,
    CompareTask,
    DecisionTask,
    Outcome,
    Prepared,
    Scored,
    ScoreTask,
    SequenceTask,
    Task,
    TaskError,
    preference,
)
from rlaif.chat import encode_conversation
from rlaif.errors import ContextTooLong, DataError
from rlaif.types import Conversation, Message, with_response

WARM_UP = (Message("user", "Hello"), Message("assistant", "Hello."))
"""A conversation to compute before the first request."""


class Reader:
    """Tokenises tasks as the model was trained to read them.

    Args:
        tokenizer: with the model's chat template.
        max_tokens: longest sequence in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def prepare(self, task: Task) -> Prepared:
        """Apply the model's chat template and tokenise.

        Raises:
            TaskError: the task cannot be done.
        """
        if isinstance(task, DecisionTask):
            raise TaskError("unsupported", "a reward model answers no questions: serve a --judge")
        if isinstance(task, SequenceTask):
            return self._prepare_sequence(task)
        if isinstance(task, ScoreTask):
            conversations: tuple[Conversation, ...] = (task.conversation,)
        else:
            pair = task.pair
            conversations = (with_response(pair.prompt, pair.a), with_response(pair.prompt, pair.b))
        sequences = []
        truncated = False
        for conversation in conversations:
            try:
                encoded = encode_conversation(
                    self._tokenizer,
                    conversation,
                    max_length=self._max_tokens,
                    truncation=task.truncation,
                )
            except ContextTooLong as err:
                raise TaskError("too_long", str(err)) from err
            except DataError as err:
                raise TaskError("invalid", str(err)) from err
            if not encoded.ids:
                raise TaskError("invalid", "the conversation has no text")
            sequences.append(tuple(encoded.ids))
            truncated = truncated or encoded.truncated
        lengths = [len(s) for s in sequences]
        return Prepared(
            task,
            tuple(sequences),
            tokens=sum(lengths),
            width=max(lengths),
            truncated=truncated,
            fingerprint=fingerprint(sequences[0]),
        )

    def _prepare_sequence(self, task: SequenceTask) -> Prepared:
        ids = task.sequence
        if isinstance(ids, str):
            ids = tuple(
                self._tokenizer(ids, add_special_tokens=task.add_special_tokens, verbose=False)["input_ids"]
            )
        elif ids and (min(ids) < 0 or max(ids) >= len(self._tokenizer)):
            raise TaskError("invalid", f"token ids must be between 0 and {len(self._tokenizer) - 1}")
        limit = self._max_tokens
        keep = limit if task.keep_tokens == -1 else task.keep_tokens
        truncated = keep is not None and len(ids) > keep
        if keep is not None and truncated:
            side = task.keep or ("last" if self._tokenizer.truncation_side == "left" else "first")
            ids = ids[:keep] if side == "first" else ids[len(ids) - keep :]
        if not ids:
            raise TaskError("invalid", "the sequence has no tokens")
        if len(ids) > limit:
            raise TaskError(
                "too_long", f"the sequence has {len(ids)} tokens, more than the limit of {limit}; shorten it"
            )
        return Prepared(task, (ids,), len(ids), len(ids), truncated, fingerprint(ids))


def outcomes(batch: Sequence[Prepared], raw: Sequence[float], cached: Sequence[int]) -> list[Outcome]:
    """One outcome per item: a score, or P(A preferred) by the sigmoid of the difference (Bradley-Terry).

    Args:
        batch: N sequences altogether.
        raw: their scores, (N,).
        cached: how many tokens of each were not computed for it, (N,).
    """
    found: list[Outcome] = []
    row = 0
    for item in batch:
        own = raw[row : row + item.rows]
        saved = sum(cached[row : row + item.rows])
        row += item.rows
        if isinstance(item.task, CompareTask):
            p_a = preference(own[0] - own[1])
            found.append(Compared(p_a, tokens=item.tokens, truncated=item.truncated, cached=saved))
        else:
            found.append(
                Scored(
                    own[0],
                    tokens=item.tokens,
                    truncated=item.truncated,
                    cached=saved,
                    fingerprint=item.fingerprint,
                )
            )
    return found


def fingerprint(ids: Sequence[int]) -> bytes:
    """First 8 bytes of the SHA-256 over token ids, each as 4 bytes little endian."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).digest()[:8]
