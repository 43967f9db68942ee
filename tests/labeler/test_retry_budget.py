"""Requests that fail are sent again as long as the server is to blame, and not much when they are themselves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from labeler.backends.endpoint import Disconnected, Endpoints, Reply
from labeler.backends.limits import RetryBudget
from labeler.llm import LLMOptions, RequestFailed
from tests.labeler.virtual import run_virtual

Outcome = Reply | Exception
OK, BROKEN = Reply(200, {}, b"{}"), Reply(500, {}, b'{"error": {"message": "scripted"}}')
ROWS = 2000


class Server:
    """Answers by (request number, attempt, time); counts attempts."""

    where = "http://a/v1"

    def __init__(self, fails: Callable[[int, int, float], bool], failure: Outcome = BROKEN) -> None:
        self.fails, self.failure = fails, failure
        self.attempts = dict.fromkeys(range(ROWS), 0)

    async def send(self, method: str, url: str, body: bytes | None) -> Reply:
        assert body is not None
        number = json.loads(body)["n"]
        self.attempts[number] += 1
        await asyncio.sleep(0.1)
        now = asyncio.get_running_loop().time()
        outcome = self.failure if self.fails(number, self.attempts[number], now) else OK
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def close(self) -> None:
        pass


def failed_rows(server: Server) -> set[int]:
    """Numbers of the requests that got no answer."""

    async def main() -> set[int]:
        pool = Endpoints([server], "judge", LLMOptions(max_in_flight=32, max_retries=5))

        async def one(number: int) -> int | None:
            try:
                await pool.ask("/x", {"n": number})
            except RequestFailed:
                return number
            return None

        numbers = await asyncio.gather(*map(one, range(ROWS)))
        return {n for n in numbers if n is not None}

    return run_virtual(main())


def test_rows_that_always_fail_cost_little_and_no_other_row() -> None:
    server = Server(lambda number, attempt, now: number % 20 == 7)
    assert failed_rows(server) == set(range(7, ROWS, 20))
    assert sum(server.attempts.values()) <= 1.1 * ROWS


def test_rows_that_fail_by_chance_are_all_answered() -> None:
    server = Server(lambda number, attempt, now: number % 12 == 7 and attempt == 1)
    assert failed_rows(server) == set()


def test_an_outage_is_waited_out_by_every_row() -> None:
    began: list[float] = []

    def fails(number: int, attempt: int, now: float) -> bool:
        began.append(now)
        return 2.0 < now - began[0] < 2.6

    assert failed_rows(Server(fails)) == set()


def test_idle_connections_that_the_server_closed_cost_no_row() -> None:
    server = Server(lambda number, attempt, now: number % 3 == 1 and attempt == 1, Disconnected("closed"))
    assert failed_rows(server) == set()


@pytest.mark.parametrize("attempt", [1, 2, 3, 4, 5])
def test_a_lone_request_has_all_its_attempts(attempt: int) -> None:
    budget = RetryBudget()
    assert all(budget.spend(number) for number in range(1, attempt + 1))


def test_first_retries_go_before_later_ones() -> None:
    budget = RetryBudget()
    while budget.spend(4):
        pass
    assert budget.spend(2)
    while budget.spend(2):
        pass
    assert budget.spend(1)
