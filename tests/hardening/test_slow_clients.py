"""Clients that dribble, that never read, and that are gone."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from tests.hardening.conftest import neighbour, quantile_ms, until
from tests.hardening.http2 import SCORE, connection, frame, send_all
from tests.hardening.http2 import STREAM as SCORE_STREAM
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess, server_process

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def dribble(address: str, head: bytes, ready: Callable[[], None]) -> None:
    """Send `head`, then a byte a second, until the server has enough of it."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(head)
        await writer.drain()
        ready()
        reading = asyncio.create_task(
            reader.read(-1)
        )  # nothing that the server sends is answered, its pings neither
        while not reading.done():
            writer.write(b"\0")
            await writer.drain()
            await asyncio.wait([reading], timeout=1)
    except OSError:
        pass
    finally:
        writer.close()


async def opening() -> tuple[bytes, bytes]:
    """What a client sends up to its SETTINGS, and up to the middle of a message."""
    from h2.connection import H2Connection

    client = H2Connection()
    client.initiate_connection()
    settings = client.data_to_send()
    headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", SCORE),
        (":authority", "test"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    ]
    client.send_headers(1, headers)
    client.send_data(1, frame(b"", declared=1 << 20))
    return settings, settings + client.data_to_send()


def test_hundreds_of_dribbling_clients_are_bounded_and_hold_nobody_up(
    server: ServerProcess, size: Callable[[int, int], int]
) -> None:
    count, seconds = size(60, 498), size(1, 60)

    async def scenario() -> None:
        settings, message = await opening()
        # In the preface; in the header of a frame; in a message, whose next bytes are frames of length 0.
        heads = (PREFACE[:5], settings + b"\0\0\x05\x01", message)
        connected = 0

        def ready() -> None:
            nonlocal connected
            connected += 1

        async with neighbour(server.address) as client:
            await client.ask(200, 0.005)
            alone = quantile_ms(client.latencies_s, 99)
            client.latencies_s.clear()
            files, memory = server.open_files(), server.rss_mib()
            tasks = [asyncio.create_task(dribble(server.address, heads[i % 3], ready)) for i in range(count)]
            await until(lambda: connected == count)
            await client.ask_while(asyncio.create_task(asyncio.sleep(seconds)), 0.01)
            assert server.open_files() - files <= count
            assert server.rss_mib() - memory < 8 + count / 8
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await until(lambda: server.open_files() <= files + 2)
            beside = quantile_ms(client.latencies_s, 99)
            print(f"p99 alone {alone:.1f} ms, beside {count} dribbling clients {beside:.1f} ms")
            assert seconds == 1 or beside < 2 * alone

    asyncio.run(scenario())


@pytest.mark.soak
def test_connections_that_never_finish_their_handshake_or_answer_no_ping_are_closed(
    server: ServerProcess,
) -> None:
    async def scenario() -> None:
        settings, message = await opening()
        files = server.open_files()
        tasks = [
            asyncio.create_task(dribble(server.address, head, lambda: None))
            for head in (b"", PREFACE[:5], settings + b"\0\0\x05\x01", message)
            for _ in range(25)
        ]
        await until(lambda: server.open_files() >= files + len(tasks))
        await until(lambda: server.open_files() <= files + 2, 150)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_a_stream_whose_answers_are_never_read_is_held_by_flow_control(
    server: ServerProcess, size: Callable[[int, int], int]
) -> None:
    wanted = size(20_000, 500_000)
    sent = 0

    async def requests() -> AsyncIterator[pb.ScoreStreamRequest]:
        nonlocal sent
        request = score_request(*("x" * n for n in range(8)))
        for sent in range(wanted):
            yield pb.ScoreStreamRequest(request_id=sent, request=request)
            await asyncio.sleep(0)

    async def scenario() -> None:
        memory = server.rss_mib()
        # A small window for the answers, so that the client's own library reads no further ahead.
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 1024),
        )
        async with (
            neighbour(server.address) as client,
            grpc.aio.insecure_channel(server.address, options) as channel,
        ):
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.ScoreStream(requests())
            before = -1
            while before != sent:
                before = sent
                await client.ask(20, 0.02)
            assert sent < wanted - 1, "it was stopped before its end"
            assert server.rss_mib() - memory < 32
            call.cancel()
            await until(lambda: server.metric("rlaif_queue_tokens") == 0)
            await client.ask(20)

    asyncio.run(scenario())


UNARY = """
calls = [stub.Score.future(score_request("x" * 10)) for _ in range(50)]
calls[0].result()
"""
STREAM = """
from itertools import count
next(stub.ScoreStream(pb.ScoreStreamRequest(request_id=i, request=score_request("x" * 10)) for i in count()))
"""
CLIENT = """
import sys, grpc
from protos.rlaif.reward.v1 import reward_pb2 as pb, reward_pb2_grpc
from tests.reward_server.fakes import score_request
stub = reward_pb2_grpc.RewardServiceStub(grpc.insecure_channel(sys.argv[1]))
"""


@pytest.mark.parametrize("calls", [UNARY, STREAM], ids=["calls", "a stream"])
def test_what_a_killed_client_left_waiting_is_not_computed(tmp_path: Path, calls: str) -> None:
    async def scenario(server: ServerProcess) -> None:
        client = subprocess.Popen([sys.executable, "-c", CLIENT + calls, server.address])
        await until(lambda: server.metric("rlaif_queue_tokens") == 490)  # and one is being computed
        client.send_signal(signal.SIGKILL)
        client.wait()
        await until(lambda: server.metric("rlaif_queue_tokens") == 0, 5)
        assert server.metric("rlaif_cancelled_items_total") == 49
        assert server.metric("rlaif_items_total") == 0

    with server_process(tmp_path, model="length:60", max_batch_tokens=10, max_stream_requests=50) as running:
        asyncio.run(scenario(running))
        assert "Traceback" not in running.log.read_text()


def test_callers_that_leave_while_flow_control_holds_their_answers_leave_nothing_behind(
    server: ServerProcess,
) -> None:
    refused = score_request("x", expected_version="another")  # an answer is longer than its request
    requests = b"".join(
        frame(pb.ScoreStreamRequest(request_id=i, request=refused).SerializeToString()) for i in range(1000)
    )

    def answered() -> float:
        return server.metric("rlaif_calls_total", method="ScoreStream")

    async def scenario() -> None:
        async with neighbour(server.address) as client:
            for _ in range(4):
                asked = answered()
                async with connection(server.address, reading=False) as peer:
                    stream = peer.request(SCORE_STREAM, end=False)
                    await send_all(peer, stream, requests)
                    before = -1.0
                    while before != answered() or before == asked:
                        before = answered()
                        await client.ask(20, 0.005)
                    assert before - asked < 1000, "the rest waits"
                await client.ask(20, 0.005)
            await until(lambda: server.metric("rlaif_queue_tokens") == 0)

    asyncio.run(scenario())


def test_a_preface_alone_holds_nothing_open_after_its_client_left(server: ServerProcess) -> None:
    async def scenario() -> None:
        files = server.open_files()
        for _ in range(20):
            async with connection(server.address) as peer:
                await peer.settled.wait()
        await until(lambda: server.open_files() <= files + 2)

    asyncio.run(scenario())
