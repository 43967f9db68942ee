"""Hostile clients and rough handling, against a server in a process of its own.

Every test holds its criterion at a size of seconds; `--soak` runs it at full size, and those besides that measure time.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest

from protos.rlaif.reward.v1 import reward_pb2_grpc
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess, server_process

T = TypeVar("T")


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Callable[[T, T], T]:
    """Picks a length: the first, or with `--soak` the second."""
    soak = request.config.getoption("--soak")
    return lambda short, full: full if soak else short


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    """A server that logs no traceback, whatever the test does to it, and whose memory is what it holds.

    By default glibc has an arena for each of gRPC's threads, and keeps in each what was once needed there: 430 MB after
    12 GB of frames of which nothing was held.
    """
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with server_process(tmp_path) as running:
        yield running
        assert "Traceback" not in running.log.read_text()


class Neighbour:
    """A well-behaved client that scores one item at a time; an answer that is wrong or missing raises.

    Attributes:
        latencies_s: of its calls, in seconds.
        batches_s: model time of the batches that answered them.
    """

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self.latencies_s: list[float] = []
        self.batches_s: list[float] = []

    async def ask(self, calls: int, pause_s: float = 0.0) -> None:
        """Make so many calls, one after the other."""
        for number in range(calls):
            started = time.monotonic()
            answer = await self._stub.Score(score_request("x" * (number % 50)), timeout=30)
            self.latencies_s.append(time.monotonic() - started)
            self.batches_s.append(answer.timing.compute_us / 1e6)
            assert [o.score.raw for o in answer.outcomes] == [number % 50]
            await asyncio.sleep(pause_s)

    async def ask_while(self, work: asyncio.Future[Any], pause_s: float = 0.005) -> None:
        """Make calls until `work` is done, and raise what it raises."""
        while not work.done():
            await self.ask(1, pause_s)
        await work


@asynccontextmanager
async def neighbour(address: str) -> AsyncIterator[Neighbour]:
    """The client, on a connection of its own."""
    alone = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, alone) as channel:
        client = Neighbour(reward_pb2_grpc.RewardServiceStub(channel))  # type: ignore[no-untyped-call]
        await client.ask(20)
        client.latencies_s.clear()
        yield client


def quantile_ms(latencies_s: Sequence[float], percent: int) -> float:
    """A percentile, in milliseconds."""
    return 1000 * statistics.quantiles(latencies_s, n=100, method="inclusive")[percent - 1]


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it does not come true in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)
