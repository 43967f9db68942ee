"""An ordinary scorer with a rule for a model, and a reward server around it, for tests."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.config import ServeConfig
from reward_server.scorers.base import (
    Compared,
    Kind,
    Normalization,
    Outcome,
    Prepared,
    Scored,
    Scorer,
    ScoreTask,
    Task,
    TaskError,
    padded,
)
from reward_server.server import RewardServer
from reward_server.service import SERVICE
from reward_server.traces import Traces


class LengthScorer:
    """The reward is the number of characters of the response; one character is one token.

    A batch with a response `poison` raises; a response `nan` scores NaN. `gate` holds every forward until set.
    """

    kind: Kind = "reward_model"
    name = "length"
    version = "length-1"
    normalization = Normalization(center=10.0, scale=5.0, source="a rule")
    parallel_batches = 1
    max_batch_items = 0
    shares_prefixes = False

    def __init__(self, max_tokens_per_item: int = 10_000) -> None:
        self.max_tokens_per_item = max_tokens_per_item
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.batches: list[list[str]] = []

    @property
    def computed(self) -> list[str]:
        """Every response that the model read, in order."""
        return [response for batch in self.batches for response in batch]

    def prepare(self, task: Task) -> Prepared:
        if isinstance(task, ScoreTask):
            lengths = [len(task.conversation[-1].content)]
        else:
            lengths = [len(task.pair.a), len(task.pair.b)]
        if max(lengths) > self.max_tokens_per_item and task.truncation == "reject":
            raise TaskError("too_long", f"{max(lengths)} tokens are more than {self.max_tokens_per_item}")
        sequences = tuple(tuple([0] * n) for n in lengths)
        return Prepared(task, sequences, tokens=sum(lengths), width=max(lengths))

    def cost(self, batch: Sequence[Prepared]) -> int:
        return padded(batch)

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        self.started.set()
        await self.gate.wait()
        self.batches.append([_response(item.task) for item in batch])
        return [_outcome(item) for item in batch]

    async def warm_up(self) -> None:
        return

    async def close(self) -> None:
        return


def _response(task: Task) -> str:
    return task.conversation[-1].content if isinstance(task, ScoreTask) else task.pair.a


def _outcome(item: Prepared) -> Outcome:
    response = _response(item.task)
    if response == "poison":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if isinstance(item.task, ScoreTask):
        return Scored(math.nan if response == "nan" else float(len(response)), tokens=item.tokens)
    return Compared(0.5, tokens=item.tokens)


@dataclass(frozen=True)
class Served:
    """A running server and a client of it."""

    server: RewardServer
    address: str
    stub: Any
    health: Any

    async def status(self, service: str = SERVICE) -> str:
        """Health of a service, by name."""
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


@asynccontextmanager
async def serving(scorer: Scorer, *, traces: Traces | None = None, **flags: Any) -> AsyncIterator[Served]:
    """A server on a free loopback port with this scorer, drained at the end."""
    config = ServeConfig(model=scorer.name, port=0, **flags)
    server = RewardServer(config, traces)
    address = await server.start()
    await server.open(scorer)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            yield Served(server, address, stub, health_pb2_grpc.HealthStub(channel))
        finally:
            await server.drain()


def conversation(*turns: str) -> pb.Conversation:
    """Turns of user and assistant in turn."""
    roles = ("user", "assistant")
    return pb.Conversation(
        messages=[pb.Message(role=roles[i % 2], content=text) for i, text in enumerate(turns)]
    )


def score_request(*responses: str, **fields: Any) -> pb.ScoreRequest:
    """A request that scores these responses to one prompt; ids count from 100."""
    items = [pb.ScoreItem(id=100 + i, conversation=conversation("q", r)) for i, r in enumerate(responses)]
    return pb.ScoreRequest(items=items, **fields)
