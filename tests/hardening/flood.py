"""Calls as fast as one connection takes them, in a process of its own: `python -m tests.hardening.flood`.

Arguments: ADDRESS, `resets` (each call is reset as soon as it is sent: CVE-2023-44487) or `answers` (each is
waited for, half as many at a time as the server allows), and COUNT.
"""

from __future__ import annotations

import asyncio
import sys

from h2.errors import ErrorCodes

from tests.hardening.http2 import SCORE, Connection, connection, frame
from tests.reward_server.fakes import score_request

BODY = frame(score_request("x").SerializeToString())
BURST = 100


async def resets(peer: Connection, count: int) -> None:
    for _ in range(0, count, BURST):
        for _ in range(BURST):
            stream = peer.request(SCORE, BODY)
            peer.h2.reset_stream(stream)
            del peer.replies[stream]
        await peer.flush()
        await asyncio.sleep(0)


async def answers(peer: Connection, count: int) -> None:
    left = iter(range(count))

    async def caller() -> None:
        for _ in left:
            stream = peer.request(SCORE, BODY)
            await peer.flush()
            assert (await peer.reply(stream)).status == 0

    await asyncio.gather(*(caller() for _ in range(peer.max_streams // 2)))


async def main(address: str, kind: str, count: int) -> None:
    async with connection(address) as peer:
        await peer.settled.wait()
        await (resets if kind == "resets" else answers)(peer, count)
        while True:  # until all that went before has been dealt with
            stream = peer.request(SCORE, BODY)
            await peer.flush()
            reply = await peer.reply(stream)
            if reply.status == 0:
                break
            assert reply.reset == ErrorCodes.REFUSED_STREAM, (
                "over the limit of open calls: the server's own brake"
            )


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
