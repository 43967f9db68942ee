"""A learned reward model as a scorer: tokenises, runs the forward in its own thread, one batch at a time."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from reward_server.forward import BatchedForward
from reward_server.model import RewardModel
from reward_server.scorers.base import (
    Compared,
    CompareTask,
    DecisionTask,
    Kind,
    Outcome,
    OutOfMemory,
    Prepared,
    Scored,
    ScoreTask,
    SequenceTask,
    Task,
    TaskError,
)
from rlaif.chat import encode_conversation
from rlaif.errors import ContextTooLong, DataError
from rlaif.types import Conversation, Message, with_response

_WARM_UP = (Message("user", "Hello"), Message("assistant", "Hello."))


class LearnedScorer:
    """Scores with a `RewardModel`; compares by the sigmoid of the difference (Bradley-Terry)."""

    kind: Kind = "reward_model"
    parallel_batches = 1  # one device
    max_batch_items = 0

    def __init__(self, name: str, reward_model: RewardModel) -> None:
        self.name = name
        self.version = reward_model.version
        self.normalization = reward_model.normalization
        self.max_tokens_per_item = reward_model.max_length
        self._forward = BatchedForward(reward_model.model)
        self.shares_prefixes = self._forward.shares_prefixes
        self._tokenizer = reward_model.tokenizer
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-forward")

    def prepare(self, task: Task) -> Prepared:
        """Apply the model's chat template and tokenise."""
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
                    max_length=self.max_tokens_per_item,
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
        limit = self.max_tokens_per_item
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

    def cost(self, batch: Sequence[Prepared]) -> int:
        """Tokens that the device computes, as planned."""
        return self._forward.tokens([s for item in batch for s in item.sequences])

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        """As few and as little padded forward passes as pay over all sequences of the batch."""
        return await asyncio.get_running_loop().run_in_executor(self._device_thread, self._compute, batch)

    async def warm_up(self) -> None:
        """Run the model once."""
        await self.score([self.prepare(ScoreTask(_WARM_UP, "left"))])

    async def close(self) -> None:
        """End the forward thread."""
        self._device_thread.shutdown(wait=False, cancel_futures=True)

    def _compute(self, batch: Sequence[Prepared]) -> list[Outcome]:
        try:
            raw, not_computed = self._forward.scores([s for item in batch for s in item.sequences])
        except torch.OutOfMemoryError as err:
            torch.cuda.empty_cache()
            raise OutOfMemory(str(err)) from err
        outcomes: list[Outcome] = []
        row = 0
        for item in batch:
            own = raw[row : row + item.rows].double()
            cached = sum(not_computed[row : row + item.rows])
            row += item.rows
            if isinstance(item.task, CompareTask):
                p_a = torch.sigmoid(own[0] - own[1]).item()
                outcomes.append(Compared(p_a, tokens=item.tokens, truncated=item.truncated, cached=cached))
            else:
                outcomes.append(
                    Scored(
                        own[0].item(),
                        tokens=item.tokens,
                        truncated=item.truncated,
                        cached=cached,
                        fingerprint=item.fingerprint,
                    )
                )
        return outcomes


def fingerprint(ids: Sequence[int]) -> bytes:
    """First 8 bytes of the SHA-256 over token ids, each as 4 bytes little endian."""
    return hashlib.sha256(np.asarray(ids, dtype="<u4").tobytes()).digest()[:8]
