"""A server with both doors open, and a scorer with a rule that reads what HTTP callers send."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from reward_server.config import ServeConfig
from reward_server.scorers.base import (
    DecisionTask,
    Outcome,
    Prepared,
    Scored,
    Scorer,
    SequenceTask,
    Task,
    TaskError,
)
from reward_server.server import RewardServer
from tests.reward_server.fakes import LengthScorer


class SequenceScorer(LengthScorer):
    """`LengthScorer` that also reads sequences: one character or id is one token, and a special one comes first.

    Text that contains `poison` raises, text that contains `nan` scores NaN.
    """

    def prepare(self, task: Task) -> Prepared:
        if isinstance(task, DecisionTask):
            raise TaskError("unsupported", "no questions")
        if not isinstance(task, SequenceTask):
            return super().prepare(task)
        tokens = len(task.sequence) + (task.add_special_tokens and isinstance(task.sequence, str))
        if tokens > self.max_tokens_per_item:
            raise TaskError("too_long", f"{tokens} tokens are more than {self.max_tokens_per_item}")
        return Prepared(task, ((0,) * tokens,), tokens=tokens, width=tokens)

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        if not all(isinstance(item.task, SequenceTask) for item in batch):
            return await super().score(batch)
        self.started.set()
        await self.gate.wait()
        texts = [str(item.task.sequence) for item in batch if isinstance(item.task, SequenceTask)]
        self.batches.append(texts)
        if any("poison" in text for text in texts):
            raise RuntimeError("CUDA error on " + texts[0])
        return [
            Scored(math.nan if "nan" in text else float(item.tokens), tokens=item.tokens)
            for text, item in zip(texts, batch, strict=True)
        ]


@dataclass(frozen=True)
class Doors:
    """A running server: its gRPC address, its HTTP base URL, and an HTTP session."""

    server: RewardServer
    address: str
    url: str
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and JSON of the reply."""
        async with self.session.post(self.url + path, json=body, **options) as response:
            assert response.content_type == "application/json"
            return response.status, json.loads(await response.text(), parse_constant=_refuse)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of the reply."""
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} was sent")


@asynccontextmanager
async def doors(scorer: Scorer | None, **flags: Any) -> AsyncIterator[Doors]:
    """A server on free loopback ports; without a scorer it is still warming up."""
    name = "length" if scorer is None else scorer.name
    server = RewardServer(ServeConfig(model=name, port=0, http_port=0, **flags))
    address = await server.start()
    if scorer is not None:
        await server.open(scorer)
    assert server.http_address is not None
    async with aiohttp.ClientSession() as session:
        try:
            yield Doors(server, address, server.http_address, session)
        finally:
            await server.drain()


async def until(condition: Any) -> None:
    """Return when the condition holds; other tasks run meanwhile."""
    while not condition():
        await asyncio.sleep(0.002)
