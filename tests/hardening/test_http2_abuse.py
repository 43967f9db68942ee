"""What HTTP/2 allows and no gRPC client does: reset storms, ping floods, oversized and compressed everything."""

from __future__ import annotations

import asyncio
import socket
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import hpack
import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import ContinuationFrame, HeadersFrame, SettingsFrame

from tests.hardening.conftest import neighbour, quantile_ms, until
from tests.hardening.http2 import SCORE, connection, frame, send_all
from tests.reward_server.fakes import score_request
from tests.reward_server.process import ServerProcess, server_process

RESOURCE_EXHAUSTED = 8
PSEUDO_HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", SCORE),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


async def flood(address: str, kind: str, count: int) -> None:
    command = [sys.executable, "-m", "tests.hardening.flood", address, kind, str(count)]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0


def test_calls_that_are_reset_at_once_cost_no_memory_no_forwards_and_no_neighbour(
    server: ServerProcess, size: Callable[[int, int], int]
) -> None:
    count = size(5_000, 50_000)

    async def scenario() -> None:
        async with neighbour(server.address) as client:
            await client.ask_while(asyncio.create_task(flood(server.address, "resets", count)))
            await until(lambda: server.metric("rlaif_queue_tokens") == 0)
            settled = server.rss_mib()
            await client.ask_while(asyncio.create_task(flood(server.address, "resets", count)))
            assert server.rss_mib() - settled < 8
            scored = server.metric("rlaif_items_total", outcome="score")
            own = len(client.latencies_s) + 22  # 20 to warm up, and the last of each flood
            assert own <= scored <= own + count // 50, "what was reset was not computed"

    asyncio.run(scenario())


@pytest.mark.soak
def test_a_reset_storm_holds_neighbours_up_below_a_second(server: ServerProcess) -> None:
    async def scenario() -> None:
        percentiles = {}
        async with neighbour(server.address) as client:
            await client.ask(500, 0.005)
            percentiles["alone"] = quantile_ms(client.latencies_s, 99)
            for kind, count in (("answers", 20_000), ("resets", 50_000)):
                client.latencies_s.clear()
                await client.ask_while(asyncio.create_task(flood(server.address, kind, count)))
                percentiles[kind] = quantile_ms(client.latencies_s, 99)
        print({kind: f"p99 {value:.1f} ms" for kind, value in percentiles.items()})
        assert (
            percentiles["resets"] < 1000
        )  # of a machine that the storm keeps busy with thousands of calls a second

    asyncio.run(scenario())


def test_calls_that_are_reset_while_they_wait_free_their_places(tmp_path: Path) -> None:
    async def scenario(server: ServerProcess) -> None:
        body = frame(score_request("x" * 10).SerializeToString())
        async with connection(server.address) as peer:
            await peer.settled.wait()
            assert peer.max_streams == 256
            for waves in (1, 2, 3):
                streams = [peer.request(SCORE, body) for _ in range(peer.max_streams)]
                await peer.flush()
                computing = 1 if waves == 1 else 0
                await until(
                    lambda wait=256 - computing: server.metric("rlaif_queue_tokens") == 10 * wait  # type: ignore[misc]
                )
                for stream in streams:
                    peer.h2.reset_stream(stream)
                await peer.flush()
                await until(lambda: server.metric("rlaif_queue_tokens") == 0)
                assert server.metric("rlaif_cancelled_items_total") == 256 * waves - 1
        assert server.metric("rlaif_items_total") == 0, "one is being computed, and none was after it"

    with server_process(tmp_path, model="length:60", max_batch_tokens=10) as running:
        asyncio.run(scenario(running))


def test_a_ping_flood_ends_its_connection_and_no_other(server: ServerProcess) -> None:
    async def scenario() -> None:
        async with neighbour(server.address) as client, connection(server.address) as peer:
            for _ in range(20):
                peer.h2.ping(b"12345678")
            await peer.flush()
            await asyncio.wait_for(peer.closed.wait(), 10)
            assert (peer.goaway, peer.debug) == (ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings")
            await client.ask(20)

    asyncio.run(scenario())


@pytest.mark.soak
def test_a_client_that_keeps_its_connection_alive_every_30_s_keeps_it_for_ten_minutes(
    server: ServerProcess,
) -> None:
    async def scenario() -> None:
        async with connection(server.address) as peer:
            await peer.settled.wait()
            for _ in range(20):
                peer.h2.ping(b"12345678")
                await peer.flush()
                await asyncio.sleep(30)
                assert not peer.closed.is_set()
            stream = peer.request(SCORE, frame(score_request("ab").SerializeToString()))
            await peer.flush()
            assert (await peer.reply(stream)).status == 0

    asyncio.run(scenario())


# ---- bombs ----

HELD_MIB = 2048
"""What a bomb holds. A server that kept it would grow by twice what it may grow by: up to 600 MB pass through its
buffers where it gets little of a busy machine."""


def peak_mib(server: ServerProcess) -> float:
    """The most memory that the process ever had."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def zeros(mib: int) -> bytes:
    """So many MiB of zeros as gzip, but for its checksum."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    first, each = (packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + each * (mib - 1)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
def test_a_message_of_two_gibibytes_is_refused_without_taking_it_in(
    server: ServerProcess, encoding: str
) -> None:
    if encoding == "gzip":
        body = frame(zeros(HELD_MIB), compressed=True)
    else:
        body = frame(bytes(64 << 20), declared=HELD_MIB << 20)

    async def scenario() -> None:
        async with neighbour(server.address), connection(server.address) as peer:
            before = peak_mib(server)
            await peer.settled.wait()
            stream = peer.request(SCORE, metadata=[("grpc-encoding", encoding)])
            sending = asyncio.create_task(send_all(peer, stream, body))
            assert (await asyncio.wait_for(peer.reply(stream), 60)).status == RESOURCE_EXHAUSTED
            sending.cancel()
            assert peak_mib(server) - before < HELD_MIB / 2

    asyncio.run(scenario())


def block(*headers: tuple[str, str], pseudo: bool = True) -> bytes:
    """A block of headers that can be decoded after any other."""
    return hpack.Encoder().encode([*(PSEUDO_HEADERS if pseudo else ()), *headers], huffman=False)


def header_frames(stream: int, data: bytes, *, begins: bool = True, ends: bool = True) -> bytes:
    """A header block, or what follows in one, cut into HEADERS and CONTINUATION frames."""
    parts = [data[i : i + 16_000] for i in range(0, len(data), 16_000)]
    frames: list[Any] = [ContinuationFrame(stream, data=part) for part in parts]
    if begins:
        frames[0] = HeadersFrame(stream, data=parts[0], flags=["END_STREAM"])
    if ends:
        frames[-1].flags.add("END_HEADERS")
    return b"".join(one.serialize() for one in frames)


def tokens() -> Iterable[bytes]:
    """One call after another, each with a token of 256 kB; 256 of them may be in flight."""
    data = block(("authorization", "Bearer " + "s" * (1 << 18)))
    return (header_frames(2 * i + 1, data) for i in range(4 * HELD_MIB))


def metadata(*, ends: bool) -> Iterable[bytes]:
    """One call's metadata; that they never end is CVE-2024-27316 and kin."""
    yield header_frames(1, block(), ends=False)
    more = header_frames(
        1, block(*((f"x-{i}", "v" * 3000) for i in range(350)), pseudo=False), begins=False, ends=False
    )
    for _ in range((HELD_MIB << 20) // len(more) + 1):
        yield more
    if ends:
        yield header_frames(1, block(("x", "y"), pseudo=False), begins=False)


def hpack_bomb() -> Iterable[bytes]:
    """One header of 4 kB in the dynamic table, named again by one byte each."""
    yield header_frames(1, block(("x-bomb", "v" * 3900)) + b"\xbe" * ((HELD_MIB << 20) // 3900))


def test_calls_with_too_much_metadata_are_refused_before_their_messages_come(server: ServerProcess) -> None:
    async def scenario() -> None:
        async with connection(server.address, acknowledging=False) as peer:
            await peer.settled.wait()
            streams = [peer.request(SCORE, end=False) for _ in range(100)]
            peer.h2.data_to_send()  # instead of which there come, all at once:
            data = block(("authorization", "Bearer " + "s" * 50_000))
            await peer.write(b"".join(header_frames(stream, data) for stream in streams))
            for stream in streams:
                assert (await asyncio.wait_for(peer.reply(stream), 20)).status == RESOURCE_EXHAUSTED
        assert server.metric("rlaif_calls_total") == 0, "no handler was entered"

    asyncio.run(scenario())


def send_blindly(address: str, frames: Iterable[bytes]) -> int:
    """Send frames on a connection of their own, reading and acknowledging nothing; how many bytes it took."""
    host, _, port = address.rpartition(":")
    sent = 0
    with socket.create_connection((host, int(port)), timeout=60) as peer:
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize())
        for one in frames:
            try:
                peer.sendall(one)
            except (BrokenPipeError, ConnectionResetError):
                break
            sent += len(one)
    return sent


@pytest.mark.parametrize(
    "frames",
    [tokens(), metadata(ends=True), hpack_bomb(), metadata(ends=False)],
    ids=["tokens of 256 kB", "metadata of 2 GiB", "HPACK bomb", "endless CONTINUATION"],
)
def test_metadata_beyond_its_limit_is_not_kept(server: ServerProcess, frames: Iterable[bytes]) -> None:
    async def scenario() -> None:
        async with neighbour(server.address) as client:
            before = peak_mib(server)
            sent = await asyncio.to_thread(send_blindly, server.address, frames)
            print(f"sent {sent >> 20} MiB, peak {before:.0f} to {peak_mib(server):.0f} MiB")
            assert peak_mib(server) - before < HELD_MIB / 2
            await client.ask(5)
        assert server.metric("rlaif_calls_total") == 25, "no handler was entered"

    asyncio.run(scenario())
