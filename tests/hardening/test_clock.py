"""The wall clock jumps, as NTP makes it: deadlines, queues and retries are on another clock and do not notice."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.rlaif.reward.v1 import reward_pb2_grpc
from tests.hardening.conftest import until
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess, server_process

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)

pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="there is no libfaketime: apt-get install libfaketime"
)

CLIENT = """
import sys, time
from policy_trainer.client import RewardClient
from rlaif.types import user_prompt, with_response

with RewardClient(sys.argv[1], give_up_after_s=60) as client:
    print(client.score([with_response(user_prompt("q"), "abcd")])[0].raw, int(time.time()), flush=True)
"""


class WallClock:
    """Of the processes that run in its `environment`. They look for another time once a second.

    libfaketime can do it at every look at the clock, and then gives one of two threads now and then the time of the
    world: a few calls in a thousand had no time left, since gRPC subtracts the wall clock from their deadlines.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "offset"
        self.set_hours(0)
        self.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set_hours(self, hours: int) -> None:
        """Let it go so many hours fast."""
        part = self._file.with_suffix(".part")
        part.write_text(f"{hours:+d}h\n")
        part.replace(self._file)


@pytest.fixture
def clock(tmp_path: Path) -> WallClock:
    return WallClock(tmp_path)


@pytest.fixture
def server(tmp_path: Path, clock: WallClock) -> Iterator[ServerProcess]:
    with server_process(tmp_path, clock.environment, model="length:0.1", max_batch_tokens=100) as running:
        yield running


def test_what_waits_keeps_its_deadline_when_the_clock_jumps(server: ServerProcess, clock: WallClock) -> None:
    async def scenario() -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            for computed, hours in ((40, 1), (80, -1)):
                calls = [
                    asyncio.ensure_future(stub.Score(score_request("x" * 100), timeout=60)) for _ in range(40)
                ]
                await until(lambda: server.metric("rlaif_queue_tokens") > 1500)  # 1.5 s of work
                late = asyncio.ensure_future(stub.Score(score_request("y" * 100), timeout=1))
                clock.set_hours(hours)
                answers = await asyncio.gather(*calls)
                assert {answer.outcomes[0].score.raw for answer in answers} == {100.0}
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await late
                assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert server.metric("rlaif_batch_items_sum") == computed, (
                    "what came too late was not computed"
                )

    asyncio.run(scenario())


def test_a_client_keeps_its_patience_with_a_server_that_is_away_when_its_clock_jumps(
    tmp_path: Path, clock: WallClock
) -> None:
    server = ServerProcess(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **clock.environment},
    ) as client:
        assert client.stdout is not None and client.stderr is not None
        try:
            assert client.stderr.readline().startswith("waiting up to 60 s")
            clock.set_hours(1)
            time.sleep(6)  # so long that it has tried again, and found the other time
            server.start()
            raw, now = client.stdout.readline().split()
            assert raw == "4.0"
            assert int(now) - time.time() > 3000, "its clock did jump"
        finally:
            client.kill()
            server.end()
