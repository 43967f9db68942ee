"""How fast an endpoint is asked, on a virtual clock: minutes pass in milliseconds, and the same way every time."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeler.backends.limits import Concurrency, Gate, Pass, RateFinder, TokenBucket, retry_after_s
from tests.labeler.virtual import run_virtual


def most_within(times: list[float], window: float) -> int:
    """Most of the events, in order of time, in any half-open window that begins with one."""
    return max(bisect_left(times, start + window - 1e-6) - i for i, start in enumerate(times))


@settings(deadline=None)
@given(
    cap=st.integers(1, 900),
    pauses=st.lists(st.floats(0.0, 30.0), max_size=8),
    lateness=st.floats(0.0, 0.2),
)
def test_a_cap_per_minute_is_never_exceeded_in_any_minute(
    cap: int, pauses: list[float], lateness: float
) -> None:
    bucket = TokenBucket.per_minute(cap)
    now, times = 0.0, []
    for i in range(2 * cap + 3):
        now += bucket.wait(now) + lateness
        if i < len(pauses):
            now += pauses[i]
        bucket.take(now)
        times.append(now)
    assert most_within(times, 60.0) <= cap


@pytest.mark.parametrize("cap", [1, 60, 600, 6000])
def test_a_cap_per_minute_is_used_in_full(cap: int) -> None:
    bucket = TokenBucket.per_minute(cap)
    now = 0.0
    for _ in range(3 * cap):
        now += bucket.wait(now) + 0.001  # a timer is never quite on time
        bucket.take(now)
    assert now <= 3 * 60.0 * 1.02


def send_all(
    gate: Gate, requests: list[tuple[int, float, float]], latency: float = 0.1
) -> tuple[list[tuple[float, int]], float]:
    """Send (priority, estimated tokens, used tokens) requests; when each went out, and when the last was done."""
    went: list[tuple[float, int]] = []

    async def one(n: int, priority: int, tokens: float, used: float) -> None:
        passed = await gate.enter((priority, n), tokens)
        assert passed is not None
        went.append((passed.sent_at, n))
        await asyncio.sleep(latency)
        gate.answered({})
        gate.leave(passed, tokens=used)

    async def run() -> float:
        await asyncio.gather(*(one(n, *request) for n, request in enumerate(requests)))
        return asyncio.get_running_loop().time()

    return went, run_virtual(run())


def test_requests_per_minute_hold_in_every_minute_and_are_used() -> None:
    went, end = send_all(Gate(64, requests_per_minute=300), [(0, 0.0, 0.0)] * 1200)
    assert most_within([t for t, _ in went], 60.0) <= 300
    assert end <= 4 * 60.0 * 1.02


def test_tokens_per_minute_count_what_was_used() -> None:
    # 200 requests of 100 tokens at 6000 per minute take 200 s, though each was estimated at 1000.
    went, end = send_all(Gate(64, tokens_per_minute=6000), [(0, 1000.0, 100.0)] * 200)
    assert len(went) == 200
    assert end == pytest.approx(200.0, rel=0.05)


def test_urgent_requests_go_first_and_equals_in_order() -> None:
    went, _ = send_all(Gate(1), [(1, 0.0, 0.0), (1, 0.0, 0.0), (0, 0.0, 0.0), (0, 0.0, 0.0)])
    assert [n for _, n in went] == [0, 2, 3, 1]  # the first went before the others came


def test_the_number_in_flight_doubles_per_round_up_to_the_most() -> None:
    went, _ = send_all(Gate(128), [(0, 0.0, 0.0)] * 400, latency=1.0)
    by_second = Counter(math.floor(t + 0.5) for t, _ in went)
    assert [by_second[s] for s in range(4)] == [20, 40, 80, 128]


def test_the_number_in_flight_does_not_grow_while_it_is_not_used() -> None:
    slots = Concurrency(128)
    for _ in range(100):
        slots.answered(in_flight=15)
    assert slots.limit == 20
    slots.answered(in_flight=16)
    assert slots.limit == 21


def test_a_refusal_cuts_the_number_in_flight_by_a_fifth_and_growth_is_slow_up_to_there() -> None:
    slots = Concurrency(128)
    slots.refused(in_flight=20)
    assert slots.limit == pytest.approx(16.0)
    for _ in range(16):
        slots.answered(in_flight=16)
    assert slots.limit == pytest.approx(17.0, abs=0.05)  # one more per round


def test_a_refusal_of_a_request_that_was_almost_alone_is_no_matter_of_their_number() -> None:
    slots = Concurrency(128)
    slots.refused(in_flight=3)
    assert slots.limit == 20


def test_errors_of_the_server_pause_growth_but_cut_nothing() -> None:
    slots = Concurrency(128)
    slots.failed()
    for _ in range(5):
        slots.answered(in_flight=20)
    assert slots.limit == 20
    slots.answered(in_flight=20)
    assert slots.limit == 21


def test_a_fixed_number_in_flight_stays() -> None:
    slots = Concurrency(7, adaptive=False)
    slots.refused(in_flight=7)
    assert slots.limit == 7


def test_a_wave_of_refusals_is_one_refusal() -> None:
    finder = RateFinder()
    for n in range(20):
        finder.sent(n * 0.01)
    assert finder.refused(0.21, 10, 0.10, None) is not None
    rate = finder.rate(0.21)
    assert all(finder.refused(0.22, n, n * 0.01, None) is None for n in range(11, 20))
    assert finder.rate(0.21) == rate


def test_a_limit_that_the_server_names_anew_replaces_what_was_learnt() -> None:
    finder = RateFinder()
    finder.announced(0.0, 600.0)
    assert finder.rate(0.0) == pytest.approx(9.9)
    for n in range(6):
        finder.sent(0.1 * n)
    finder.refused(0.6, 5, 0.5, None)  # it refuses below the limit that it names
    assert finder.rate(0.6) < 9.9
    finder.announced(0.7, 600.0)
    assert finder.rate(0.7) < 9.9
    finder.announced(0.8, 1200.0)
    assert finder.rate(0.8) == pytest.approx(19.8)


def test_a_cancelled_request_gives_its_slot_back() -> None:
    async def run() -> int:
        gate = Gate(1)
        held = await gate.enter((0, 0))
        assert held is not None
        waiting = [asyncio.create_task(gate.enter((0, n))) for n in (1, 2)]
        await asyncio.sleep(0)
        waiting[0].cancel()  # while it waits
        gate.leave(held)
        waiting[1].cancel()  # after it was let out, before it noticed
        await asyncio.gather(*waiting, return_exceptions=True)
        return gate.load

    assert run_virtual(run()) == 0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "120", "retry-after": "1"}, 0.12),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 10.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, 0.0),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, now=90.0) == seconds


# ---- a server that limits the rate ----


class Bucket:
    """A server's token bucket."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.level, self.at = rate, burst, burst, 0.0

    def set(self, rate: float) -> None:
        self.burst, self.rate = self.burst * rate / self.rate, rate

    def admits(self, now: float) -> bool:
        self.level = min(self.burst, self.level + self.rate * (now - self.at))
        self.at = now
        if self.level < 1.0:
            return False
        self.level -= 1.0
        return True

    def wait(self, now: float) -> float:
        return max(0.0, (1.0 - self.level) / self.rate)


class Window:
    """So many requests in every minute of the clock."""

    def __init__(self, rate: float, burst: float) -> None:
        self.limit, self.minute, self.count = rate * 60.0, -1, 0

    def set(self, rate: float) -> None:
        self.limit = rate * 60.0

    def admits(self, now: float) -> bool:
        if now // 60.0 != self.minute:
            self.minute, self.count = int(now // 60.0), 0
        self.count += 1
        return self.count <= self.limit

    def wait(self, now: float) -> float:
        return 60.0 - now % 60.0


class Fickle:
    """Refuses one request in twenty, whatever the rate."""

    def __init__(self) -> None:
        self.rate, self.chance = math.inf, random.Random(2)

    def set(self, rate: float) -> None:
        pass

    def admits(self, now: float) -> bool:
        return self.chance.random() >= 0.05

    def wait(self, now: float) -> float:
        return 0.1


Retry = Callable[[float], float | None]


def besiege(
    server: Bucket | Window | Fickle,
    *,
    seconds: float,
    change: tuple[float, float],
    retry: Retry,
    announces: bool = False,
    latency: float = 0.2,
) -> tuple[Counter[int], Counter[int]]:
    """Ask without end through a gate of 128; admitted and refused requests by the half minute."""
    admitted: Counter[int] = Counter()
    refused: Counter[int] = Counter()
    chance = random.Random(0)
    numbers = itertools.count()
    per_minute = [server.limit if isinstance(server, Window) else server.rate * 60.0]

    async def attempt(gate: Gate, passed: Pass, clock: Callable[[], float]) -> float | None:
        """One request; how long to wait for the next attempt, None if it was admitted."""
        headers = {"x-ratelimit-limit-requests": str(per_minute[0])} if announces else {}
        await asyncio.sleep(chance.uniform(0.0, 0.005))
        now = clock()
        if server.admits(now):
            admitted[int(now // 30)] += 1
            await asyncio.sleep(latency * chance.uniform(0.5, 1.5))
            gate.answered(headers)
            gate.leave(passed)
            return None
        refused[int(now // 30)] += 1
        wait = retry(server.wait(now))
        await asyncio.sleep(0.005)
        gate.refused(passed, headers, wait)
        gate.leave(passed)
        return chance.uniform(0.0, 1.0) if wait is None else wait

    async def worker(gate: Gate, clock: Callable[[], float]) -> None:
        while clock() < seconds:
            number = next(numbers)
            wait: float | None = 0.0
            while wait is not None and clock() < seconds:
                await asyncio.sleep(wait)
                passed = await gate.enter((0, number))
                assert passed is not None
                wait = await attempt(gate, passed, clock)

    async def run() -> None:
        gate = Gate(128)
        clock = asyncio.get_running_loop().time

        async def changer() -> None:
            await asyncio.sleep(change[0])
            server.set(change[1])
            per_minute[0] = change[1] * 60.0

        await asyncio.gather(changer(), *(worker(gate, clock) for _ in range(160)))

    run_virtual(run())
    return admitted, refused


def silent(wait: float) -> None:
    return None


RETRIES: dict[str, Retry] = {"silent": silent, "whole": lambda wait: float(math.ceil(wait)), "exact": float}


@pytest.mark.parametrize("announces", [True, False], ids=["announced", "unannounced"])
@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("after", [20.0, 5.0], ids=["raised", "lowered"])
def test_a_rate_limit_is_used_within_a_minute_of_its_change(
    announces: bool, retry: str, after: float
) -> None:
    admitted, refused = besiege(
        Bucket(10.0, 10.0),
        seconds=270.0,
        change=(90.0, after),
        retry=RETRIES[retry],
        announces=announces,
    )
    asked = sum(admitted.values()) + sum(refused.values())
    assert sum(refused.values()) < 0.02 * asked
    for half_minute in range(5, 9):  # from one minute after the change on
        assert 0.95 * after * 30 <= admitted[half_minute] <= 1.05 * after * 30


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize("burst", [2.0, 600.0], ids=["two-at-once", "a-minute-at-once"])
def test_the_rate_is_found_whatever_the_server_lets_through_at_once(burst: float, retry: str) -> None:
    admitted, refused = besiege(Bucket(10.0, burst), seconds=240.0, change=(1e3, 10.0), retry=RETRIES[retry])
    assert sum(refused.values()) < 0.02 * (sum(admitted.values()) + sum(refused.values()))
    assert sum(admitted[s] for s in range(4, 8)) >= 0.95 * 10.0 * 120


def test_a_limit_per_clock_minute_is_used_in_every_minute() -> None:
    admitted, refused = besiege(Window(10.0, 0.0), seconds=240.0, change=(1e3, 10.0), retry=RETRIES["whole"])
    assert [admitted[2 * m] + admitted[2 * m + 1] for m in range(4)] == [600] * 4
    assert sum(refused.values()) < 0.02 * sum(admitted.values())


@pytest.mark.parametrize("retry", RETRIES)
def test_refusals_that_come_at_any_rate_do_not_slow_the_run(retry: str) -> None:
    admitted, refused = besiege(Fickle(), seconds=120.0, change=(1e3, 1.0), retry=RETRIES[retry])
    at_most = 128 / 0.2 * 30  # requests in flight through their latency, in half a minute
    assert 0.9 * at_most <= admitted[3] <= 1.1 * at_most
    asked = admitted[3] + refused[3]
    assert refused[3] == pytest.approx(0.05 * asked, rel=0.15)


def test_stragglers_delay_nothing_but_themselves() -> None:
    chance = random.Random(1)
    latencies = [20.0 if chance.random() < 0.01 else 0.2 for _ in range(6000)]

    async def ask(gate: Gate, number: int) -> None:
        passed = await gate.enter((0, number))
        assert passed is not None
        await asyncio.sleep(latencies[number])
        gate.answered({})
        gate.leave(passed)

    async def run(gate: Gate) -> float:
        await asyncio.gather(*(ask(gate, n) for n in range(len(latencies))))
        return asyncio.get_running_loop().time()

    alone = run_virtual(run(Gate(64, adaptive=False)))
    assert alone <= run_virtual(run(Gate(64))) <= alone / 0.95
