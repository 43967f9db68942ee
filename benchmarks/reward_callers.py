"""Callers of a reward server, in a process of their own that imports nothing heavy.

What they saw goes to stdout as JSON. A ticker beside them measures how late their own event loop is: a time that a
caller saw cannot be trusted further than that.

    python benchmarks/reward_callers.py 127.0.0.1:50051 arrive --rate 50 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc

HEALTH_INTERVAL_S = 0.1
TICK_S = 0.01
_LETTERS = "abcdefghijklmnopqrstuvwxyz     "


@dataclass(frozen=True)
class Chat:
    """A prompt and a response, of about as many tokens as characters."""

    prompt: str
    response: str

    def message(self, item_id: int) -> pb.ScoreItem:
        """As the wire carries it."""
        turns = [pb.Message(role="user", content=self.prompt)]
        turns.append(pb.Message(role="assistant", content=self.response))
        return pb.ScoreItem(id=item_id, conversation=pb.Conversation(messages=turns))


def text(rng: random.Random, length: int) -> str:
    """Letters and blanks."""
    return "".join(rng.choices(_LETTERS, k=length))


@dataclass
class Seen:
    """What the callers of one process saw. Times in seconds.

    Attributes:
        scored: from the moment a call was due to its score.
        refused: from sending a call to its refusal.
        batch_s: model time of the batches of a scored call, as the server reports it.
        refusals: refused calls by status and typed reason.
        health_s: from asking for health to the answer.
        health: answers by status.
        late_s: how late the event loop of these callers was.
        seconds: how long calls were sent.
        in_time: calls scored in these seconds.
    """

    scored: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    batch_s: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    health_s: list[float] = field(default_factory=list)
    health: Counter[str] = field(default_factory=Counter)
    late_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    in_time: int = 0

    @property
    def rate(self) -> float:
        """Chats scored per second, without those that were answered after the end."""
        return self.in_time / self.seconds


class Callers:
    """Callers on one event loop and one channel.

    Args:
        channel: to the server.
        rng: draws arrivals and texts.
        length: of a chat in tokens, about.
    """

    def __init__(self, channel: grpc.aio.Channel, rng: random.Random, length: int) -> None:
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
        self._health: Any = health_pb2_grpc.HealthStub(channel)
        self._rng = rng
        self._length = length
        self.seen = Seen()

    async def saturate(self, seconds: float, in_flight: int) -> None:
        """Keep so many calls in flight."""
        started = time.monotonic()

        async def work() -> None:
            while time.monotonic() < started + seconds:
                await self._call(time.monotonic())

        await asyncio.gather(*(work() for _ in range(in_flight)))
        self._count(started)

    async def arrive(self, seconds: float, rate: float) -> None:
        """Calls at random moments at this rate, whatever the server does."""
        started = due = time.monotonic()
        calls: set[asyncio.Task[None]] = set()
        while (due := due + self._rng.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            call = asyncio.create_task(self._call(due))
            calls.add(call)
            call.add_done_callback(calls.discard)
        self._count(started)
        await asyncio.gather(*calls)

    async def check_health(self, seconds: float) -> None:
        """Ask for health again and again."""
        started = time.monotonic()
        service = health_pb2.HealthCheckRequest(service="rlaif.reward.v1.RewardService")
        while time.monotonic() < started + seconds:
            sent = time.monotonic()
            answer = await self._health.Check(service)
            self.seen.health_s.append(time.monotonic() - sent)
            self.seen.health[health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)] += 1
            await asyncio.sleep(HEALTH_INTERVAL_S)
        self._count(started)

    async def tick(self) -> None:
        """Measure how late this event loop wakes, until cancelled."""
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self.seen.late_s.append(time.monotonic() - due)

    def _count(self, started: float) -> None:
        self.seen.seconds = time.monotonic() - started
        self.seen.in_time = len(self.seen.scored)

    async def _call(self, due: float) -> None:
        seen = self.seen
        prompt = text(self._rng, self._length // 3)
        chat = Chat(prompt, text(self._rng, self._length - self._length // 3))
        sent = time.monotonic()
        try:
            answer = await self._stub.Score(pb.ScoreRequest(items=[chat.message(0)]))
        except grpc.aio.AioRpcError as err:
            seen.refused.append(time.monotonic() - sent)
            seen.refusals[_reason(err)] += 1
            return
        if answer.outcomes[0].WhichOneof("outcome") != "score":
            raise SystemExit(f"an item has no score: {answer.outcomes[0].error.message}")
        seen.scored.append(time.monotonic() - due)
        seen.batch_s.append(answer.timing.compute_us / 1e6)


def _reason(err: grpc.aio.AioRpcError) -> str:
    """Code and typed reason of a refusal, or its message if there is none; whether it tells when to come back."""
    status = rpc_status.from_call(err)
    reason, delay = f"untyped: {err.details()}", ""
    for detail in () if status is None else status.details:
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            delay = " with RetryInfo"
    return f"{err.code().name} {reason}{delay}"


async def run(args: argparse.Namespace) -> Seen:
    """One phase."""
    async with grpc.aio.insecure_channel(args.address) as channel:
        callers = Callers(channel, random.Random(args.seed), args.length)
        ticker = asyncio.create_task(callers.tick())
        if args.what == "saturate":
            await callers.saturate(args.seconds, args.in_flight)
        elif args.what == "arrive":
            await callers.arrive(args.seconds, args.rate)
        else:
            await callers.check_health(args.seconds)
        ticker.cancel()
        return callers.seen


def main() -> None:
    """Call, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("what", choices=("saturate", "arrive", "health"))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=10.0, help="calls a second")
    parser.add_argument("--in_flight", type=int, default=48)
    parser.add_argument("--length", type=int, default=64, help="tokens of a chat")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    gc.freeze()
    print(json.dumps(vars(asyncio.run(run(args)))))


if __name__ == "__main__":
    main()
