"""A server that is told to end, stopped in its tracks, or run for hours."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from tests.hardening.conftest import neighbour, quantile_ms, until
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess, server_process


async def code_of(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as err:
        return str(err.code().name)
    return "OK"


def test_two_hundred_calls_in_flight_at_sigterm_are_all_answered(tmp_path: Path) -> None:
    async def scenario(server: ServerProcess) -> None:
        async with (
            grpc.aio.insecure_channel(server.address) as channel,
            grpc.aio.insecure_channel(server.address, (("grpc.use_local_subchannel_pool", 1),)) as other,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            late = reward_pb2_grpc.RewardServiceStub(other)  # type: ignore[no-untyped-call]
            health: Any = health_pb2_grpc.HealthStub(other)  # type: ignore[no-untyped-call]
            assert await code_of(late.GetInfo(pb.GetInfoRequest())) == "OK"
            ahead = asyncio.ensure_future(stub.Score(score_request("y" * 5000, "y" * 5000)))
            await until(lambda: server.metric("rlaif_queue_tokens") == 5000)  # and one is being computed
            calls = [asyncio.ensure_future(stub.Score(score_request("x" * 10))) for _ in range(200)]
            # All have arrived, while the first batch was computed or while the second was.
            await until(lambda: server.metric("rlaif_queue_tokens") in (5000 + 2000, 2000))
            os.kill(server.pid, signal.SIGTERM)
            said = None
            while said != health_pb2.HealthCheckResponse.NOT_SERVING:
                said = (await health.Check(health_pb2.HealthCheckRequest())).status
            assert await code_of(late.Score(score_request("late"))) == "UNAVAILABLE"
            assert not all(call.done() for call in calls), "health and refusals came before the last answer"
            assert {a.outcomes[0].score.raw for a in await asyncio.gather(*calls)} == {10.0}
            assert [o.score.raw for o in (await ahead).outcomes] == [5000.0] * 2
        assert await asyncio.to_thread(server.end) == 0

    with server_process(tmp_path, model="length:1.5", max_batch_tokens=2000) as running:
        asyncio.run(scenario(running))


def test_a_server_that_was_stopped_computes_what_is_wanted_and_nothing_that_is_not(
    tmp_path: Path, size: Callable[[float, float], float]
) -> None:
    stopped_s = size(1.0, 10.0)

    async def scenario(server: ServerProcess) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            bulk = score_request("x" * 10, priority=pb.PRIORITY_BULK)
            patient = [asyncio.ensure_future(stub.Score(bulk, timeout=60)) for _ in range(2)]
            await until(lambda: server.metric("rlaif_queue_tokens") == 10)  # and one is being computed
            # Theirs is the first turn when the server goes on, before it hears that they have left.
            hurried = [
                asyncio.ensure_future(code_of(stub.Score(score_request("x" * 9), timeout=1.5)))
                for _ in range(20)
            ]
            await until(lambda: server.metric("rlaif_queue_tokens") == 20 * 9 + 10)
            os.kill(server.pid, signal.SIGSTOP)
            assert set(await asyncio.gather(*hurried)) == {"DEADLINE_EXCEEDED"}
            await asyncio.sleep(stopped_s)
            os.kill(server.pid, signal.SIGCONT)
            answers = await asyncio.gather(*patient)
            assert [a.outcomes[0].score.raw for a in answers] == [10.0] * 2
            await until(lambda: server.metric("rlaif_queue_tokens") == 0)
            assert server.metric("rlaif_batch_items_sum") == 2
            assert await code_of(stub.Score(score_request("after"))) == "OK"

    with server_process(tmp_path, model="length:2", max_batch_tokens=10) as running:
        asyncio.run(scenario(running))


@pytest.mark.soak
def test_a_bulk_stream_holds_interactive_calls_up_by_two_batches_at_most(tmp_path: Path) -> None:
    rng = random.Random(0)

    async def bulk() -> AsyncIterator[pb.ScoreStreamRequest]:
        for number in range(10**9):
            yield pb.ScoreStreamRequest(request_id=number, request=score_request(*["y" * 50] * 16))

    async def scenario(server: ServerProcess) -> None:
        async with (
            neighbour(server.address) as client,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            client.latencies_s.clear()
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.ScoreStream(bulk())
            answered = 0

            async def read() -> None:
                nonlocal answered
                async for _ in call:
                    answered += 1

            reading = asyncio.create_task(read())
            await until(lambda: answered > 20)
            before = answered
            for _ in range(150):
                await client.ask(1, rng.uniform(0.1, 0.3))
            latency, batch = quantile_ms(client.latencies_s, 99), quantile_ms(client.batches_s, 99)
            bulk_done = answered - before
            print(f"p99 {latency:.0f} ms, of a batch {batch:.0f} ms; bulk requests meanwhile {bulk_done}")
            assert latency <= 2 * batch + 10, "two batches, and 10 ms for the wire"
            assert bulk_done > 100, "the stream went on"
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    with server_process(tmp_path, model="length:0.1", max_batch_tokens=2048) as running:
        asyncio.run(scenario(running))


@pytest.mark.soak
def test_hours_of_load_leave_memory_files_and_latency_as_they_were(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    minutes = request.config.getoption("--soak_minutes")
    rng = random.Random(0)
    memory: list[tuple[float, float]] = []
    files: list[int] = []
    latencies: list[tuple[float, float]] = []

    async def scenario(server: ServerProcess) -> None:
        started = time.monotonic()
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]

            async def ask() -> None:
                sent = time.monotonic()
                lengths = [min(1000, int(rng.lognormvariate(4, 0.8))) for _ in range(rng.randint(1, 16))]
                answer = await stub.Score(score_request(*("x" * n for n in lengths)), timeout=60)
                assert [o.score.raw for o in answer.outcomes] == lengths
                latencies.append((sent - started, time.monotonic() - sent))

            async def saturate(calls: int) -> float:
                begun = time.monotonic()
                for _ in range(calls // 64):
                    await asyncio.gather(*(ask() for _ in range(64)))
                return calls / (time.monotonic() - begun)

            await saturate(1920)
            rate = 0.7 * await saturate(1920)
            latencies.clear()
            started = due = time.monotonic()
            calls: set[asyncio.Task[None]] = set()
            weighed = 0.0
            while (now := time.monotonic() - started) < 60 * minutes:
                due += rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                task = asyncio.create_task(ask())
                calls.add(task)
                task.add_done_callback(calls.discard)
                if now - weighed > 1:
                    weighed = now
                    memory.append((now / 60, server.rss_mib()))
                    files.append(server.open_files())
            await asyncio.gather(*calls)
            print(f"{len(latencies)} calls at {rate:.0f}/s, 70 % of capacity, in {minutes:g} min")

    with server_process(tmp_path, model="length:0.01", max_batch_tokens=8192) as running:
        asyncio.run(scenario(running))
        assert "Traceback" not in running.log.read_text()
    settled = memory[len(memory) // 3 :]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    third = 60 * minutes / 3

    def typical_p99(begin: float) -> float:
        """Median over twenty slices of a third, so that a moment's pause of the machine is no drift."""
        slices = [
            [s for at, s in latencies if begin + third * i / 20 <= at < begin + third * (i + 1) / 20]
            for i in range(20)
        ]
        return statistics.median(quantile_ms(one, 99) for one in slices)

    first, last = typical_p99(0.0), typical_p99(2 * third)
    print(
        f"memory {settled[0][1]:.1f} to {settled[-1][1]:.1f} MiB, slope {slope:.3f} MiB/min; files {files[0]} to"
    )
    print(f"{files[-1]}; p99 {first:.1f} ms in the first third, {last:.1f} ms in the last")
    assert slope < 1.0
    assert max(files) <= files[0] + 2
    assert last < 1.1 * first
