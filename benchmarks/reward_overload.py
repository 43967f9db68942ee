"""`rlaif serve` at 70 % of its capacity, and at three times its capacity: latencies, refusals, health, memory.

Calls of one chat each arrive at random (Poisson) whatever the server does, and a latency counts from the moment the
call should have been sent. The capacity is measured with more calls in flight than a batch holds, before and after
each phase, since other work on the machine changes it.

    OMP_NUM_THREADS=1 python benchmarks/reward_overload.py
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import harness
import reward_load as load
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc

QUEUE_ITEMS = 64
BATCH_TOKENS = 2048
HEALTH_INTERVAL_S = 0.1


@dataclass
class Seen:
    """What the clients of one phase saw. Times in seconds."""

    scored: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    batch_s: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    health_s: list[float] = field(default_factory=list)
    health: Counter[str] = field(default_factory=Counter)
    late_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    seconds: float = 0.0
    in_time: int = 0

    @property
    def rate(self) -> float:
        """Chats scored per second, without those that were answered after the end."""
        return self.in_time / self.seconds


class Clients:
    """All clients of the benchmark, on one event loop.

    Args:
        server: under load.
        rng: draws arrivals and texts.
        length: of a chat in tokens, about.
    """

    def __init__(self, server: load.RewardServerProcess, rng: random.Random, length: int) -> None:
        self._server = server
        self._rng = rng
        self._length = length

    async def __aenter__(self) -> Clients:
        self._channel = grpc.aio.insecure_channel(self._server.address)
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._probe = grpc.aio.insecure_channel(
            self._server.address, (("grpc.use_local_subchannel_pool", 1),)
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.close()
        await self._probe.close()

    async def saturate(self, seconds: float, in_flight: int = 48) -> Seen:
        """Keep so many calls in flight."""
        seen = Seen()
        end = time.monotonic() + seconds

        async def work() -> None:
            while time.monotonic() < end:
                await self._call(seen, time.monotonic())

        started = time.monotonic()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        seen.seconds = time.monotonic() - started
        seen.in_time = len(seen.scored)
        return seen

    async def arrive(self, rate: float, seconds: float) -> Seen:
        """Calls at random moments at this rate, health checks and the server's memory beside them."""
        seen = Seen()
        started = time.monotonic()
        watch = [asyncio.create_task(self._check_health(seen)), asyncio.create_task(self._weigh(seen))]
        calls: set[asyncio.Task[None]] = set()
        due = started
        while (due := due + self._rng.expovariate(rate)) < started + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            seen.late_s.append(time.monotonic() - due)
            call = asyncio.create_task(self._call(seen, due))
            calls.add(call)
            call.add_done_callback(calls.discard)
        seen.seconds = time.monotonic() - started
        seen.in_time = len(seen.scored)
        await asyncio.gather(*calls)
        for task in watch:
            task.cancel()
        await asyncio.gather(*watch, return_exceptions=True)
        return seen

    async def _call(self, seen: Seen, due: float) -> None:
        prompt = load.text(self._rng, self._length // 3)
        chat = load.Chat(prompt, load.text(self._rng, self._length - self._length // 3))
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

    async def _check_health(self, seen: Seen) -> None:
        stub = health_pb2_grpc.HealthStub(self._probe)  # type: ignore[no-untyped-call]
        while True:
            sent = time.monotonic()
            answer = await stub.Check(health_pb2.HealthCheckRequest(service="rlaif.reward.v1.RewardService"))
            seen.health_s.append(time.monotonic() - sent)
            seen.health[health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)] += 1
            await asyncio.sleep(HEALTH_INTERVAL_S)

    async def _weigh(self, seen: Seen) -> None:
        while True:
            seen.rss_mib.append(self._server.rss_mib())
            await asyncio.sleep(0.5)


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


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share `q` does not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def milliseconds(values: Sequence[float]) -> str:
    """Median, 99th percentile and greatest, in ms."""
    if not values:
        return "none"
    parts = (statistics.median(values), quantile(values, 0.99), max(values))
    return " / ".join(f"{1000 * v:.1f}" for v in parts)


async def run(server: load.RewardServerProcess, args: Any) -> tuple[list[Seen], Seen, Seen]:
    """Capacity, 70 %, capacity, overload, capacity."""
    async with Clients(server, random.Random(0), args.length) as clients:
        await clients.saturate(args.capacity_s)  # memory settles
        capacities = [await clients.saturate(args.capacity_s)]
        moderate = await clients.arrive(0.7 * capacities[0].rate, args.moderate_s)
        capacities.append(await clients.saturate(args.capacity_s))
        overload = await clients.arrive(3 * capacities[1].rate, args.overload_s)
        capacities.append(await clients.saturate(args.capacity_s))
    return capacities, moderate, overload


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--capacity_s", type=float, default=10.0)
    parser.add_argument("--moderate_s", type=float, default=60.0)
    parser.add_argument("--overload_s", type=float, default=60.0)
    parser.add_argument("--length", type=int, default=64, help="tokens of a chat")
    args = parser.parse_args()
    load.alone()
    report = harness.Report.begin(
        "reward_overload", "The reward server at 70 % and at 300 % of its capacity, CPU"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = load.save_reward_model(folder / "model")
        flags = {"max_queue_items": QUEUE_ITEMS, "max_batch_tokens": BATCH_TOKENS}
        with load.RewardServerProcess(folder, model, **flags) as server:
            capacities, moderate, overload = asyncio.run(run(server, args))
    batch_s = statistics.median(s for c in capacities for s in c.batch_s)
    around = statistics.fmean(c.rate for c in capacities[1:])
    growth = max(overload.rss_mib) - overload.rss_mib[0]
    typed = "RESOURCE_EXHAUSTED QUEUE_FULL with RetryInfo"
    health = [*moderate.health_s, *overload.health_s]
    phases = (moderate, overload)
    sent = [f"{(len(p.scored) + len(p.refused)) / p.seconds:.1f}" for p in phases]
    body = harness.table(
        ("median / p99 / greatest in ms", "70 %", "300 %"),
        [
            ("calls sent a second", *sent),
            ("scored a second", *(f"{p.rate:.1f}" for p in phases)),
            ("time to a score", *(milliseconds(p.scored) for p in phases)),
            ("time of its batch", *(milliseconds(p.batch_s) for p in phases)),
            ("refused", *(dict(p.refusals) or "none" for p in phases)),
            ("time to a refusal", *(milliseconds(p.refused) for p in phases)),
            ("health", *(dict(p.health) for p in phases)),
            ("time to a health answer", *(milliseconds(p.health_s) for p in phases)),
            ("the client's own lateness", *(milliseconds(p.late_s) for p in phases)),
            ("growth of memory, MiB", *(f"{max(p.rss_mib) - p.rss_mib[0]:.1f}" for p in phases)),
        ],
    )
    rates = ", ".join(f"{c.rate:.1f}" for c in capacities)
    body += (
        f"\n\nCapacity before, between and after: {rates} chats a second; a full batch at capacity takes "
        f"{1000 * batch_s:.0f} ms at the median. One chat of about {args.length} tokens a call, Poisson arrivals; "
        f"--max_queue_items={QUEUE_ITEMS} --max_batch_tokens={BATCH_TOKENS}. Qwen3 classifier, 14 M parameters, "
        f"float32. Server, clients and whatever else the machine does share its cores."
    )
    checks = {
        "70 %: p99 at most 3 full batches": quantile(moderate.scored, 0.99) <= 3 * batch_s,
        "70 %: nothing refused": not moderate.refused,
        "300 %: at least 0.9 of the capacity is scored": overload.rate >= 0.9 * around,
        "300 %: every refusal is typed": set(overload.refusals) == {typed},
        "300 %: refusals within 20 ms at p99": quantile(overload.refused, 0.99) <= 0.020,
        "every health check answered SERVING": set(moderate.health) | set(overload.health) == {"SERVING"},
        "every health check within 100 ms": max(health) <= 0.1,
        "300 %: memory grows by less than 50 MB": growth < 50,
    }
    figures = {
        "capacity": [c.rate for c in capacities],
        "batch_s": batch_s,
        "moderate": vars(moderate),
        "overload": {k: v for k, v in vars(overload).items() if k not in ("refused", "late_s")},
        "refused_p99_s": quantile(overload.refused, 0.99),
    }
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
