"""A learned reward model as a scorer: tokenises, runs the forward in its own thread, one batch at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from reward_server.forward import BatchedForward
from reward_server.model import RewardModel
from reward_server.scorers.base import Kind, Outcome, OutOfMemory, Prepared, ScoreTask, Task
from reward_server.scorers.reader import WARM_UP, Reader, outcomes

_LOG = logging.getLogger(__name__)


class LearnedScorer:
    """Scores with a `RewardModel`; compares by the sigmoid of the difference (Bradley-Terry).

    Args:
        name: the model as the server was told.
        reward_model: the model.
        torch_compile: whether it is compiled while it warms up.
    """

    kind: Kind = "reward_model"
    parallel_batches = 1  # one device
    max_batch_items = 0

    def __init__(self, name: str, reward_model: RewardModel, *, torch_compile: bool = False) -> None:
        self.name = name
        self.version = reward_model.version
        self.normalization = reward_model.normalization
        self.max_tokens_per_item = reward_model.max_length
        self._forward = BatchedForward(reward_model.model, separator=reward_model.separator)
        self._torch_compile = torch_compile
        self.shares_prefixes = self._forward.shares_prefixes
        self._reader = Reader(reward_model.tokenizer, reward_model.max_length)
        self._device_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-forward")

    def prepare(self, task: Task) -> Prepared:
        """Apply the model's chat template and tokenise."""
        return self._reader.prepare(task)

    def cost(self, batch: Sequence[Prepared]) -> int:
        """Tokens that the device computes, as planned."""
        return self._forward.tokens([s for item in batch for s in item.sequences])

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        """As few and as little padded forward passes as pay over all sequences of the batch."""
        return await asyncio.get_running_loop().run_in_executor(self._device_thread, self._compute, batch)

    async def warm_up(self) -> None:
        """Run the model once, compiled if it is to be."""
        if self._torch_compile:
            await asyncio.get_running_loop().run_in_executor(self._device_thread, self._compile)
        await self.score([self.prepare(ScoreTask(WARM_UP, "left"))])

    async def close(self) -> None:
        """End the forward thread."""
        self._device_thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self) -> None:
        try:
            self._forward.compile()
        except Exception as err:  # whatever it is that a compiler raises, the model works without
            reason = " ".join(str(err).split())[:200]
            _LOG.warning("%s is served without being compiled: %s: %s", self.name, type(err).__name__, reason)

    def _compute(self, batch: Sequence[Prepared]) -> list[Outcome]:
        try:
            raw, not_computed = self._forward.scores([s for item in batch for s in item.sequences])
        except torch.OutOfMemoryError as err:
            torch.cuda.empty_cache()
            raise OutOfMemory(str(err)) from err
        return outcomes(batch, raw.tolist(), not_computed)
