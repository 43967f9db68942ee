"""The loop: how many questions are open, in which order, and when it gives up."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.loop import ask_all, replay, side_by_side
from rlaif.errors import QualityError


class Silent:
    """A progress display that shows nothing."""

    def advance(self, n: int = 1, **stats: object) -> None:
        pass


@pytest.mark.parametrize("max_open", [1, 8, 64])
def test_a_constant_number_of_questions_is_open_and_a_slow_one_holds_nobody_up(max_open: int) -> None:
    n, release = 300, asyncio.Event()
    open_now, answered = 0, 0
    peaks: list[int] = []

    async def ask(question: int) -> None:
        nonlocal open_now, answered
        open_now += 1
        peaks.append(open_now)
        if question == 0 and max_open > 1:
            await release.wait()  # the straggler waits for all the others
        await asyncio.sleep(0)
        open_now -= 1
        answered += 1
        if answered == n - 1:
            release.set()

    asyncio.run(ask_all(range(n), ask, max_open=max_open, progress=Silent()))
    assert answered == n
    assert max(peaks) == max_open
    assert peaks.count(max_open) > n - 2 * max_open, "slots stay filled"


def test_reasons_are_counted_and_the_rest_goes_on() -> None:
    async def ask(question: int) -> str | None:
        return f"reason {question % 2}" if question % 5 == 0 else None

    assert asyncio.run(ask_all(range(20), ask, max_open=3, progress=Silent())) == Counter(
        {"reason 0": 2, "reason 1": 2}
    )


def test_nothing_but_failures_ends_the_run_unless_told_to_go_on() -> None:
    async def fail(question: int) -> str:
        return "down"

    with pytest.raises(QualityError, match="the first 50 questions all failed, the last with: down"):
        asyncio.run(ask_all(range(500), fail, max_open=4, progress=Silent()))
    reasons = asyncio.run(ask_all(range(500), fail, max_open=4, progress=Silent(), give_up=False))
    assert reasons == {"down": 500}


def test_an_error_that_is_no_failed_request_ends_the_run() -> None:
    async def ask(question: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask_all(range(10), ask, max_open=4, progress=Silent()))


def test_answers_are_replayed_in_the_order_of_the_questions() -> None:
    async def answer(question: int) -> int:
        return question**2

    assert list(replay(range(600), answer)) == [(i, i * i) for i in range(600)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers()), max_size=60), st.integers(1, 70))
def test_questions_that_share_a_prompt_stand_together_and_none_is_lost(
    questions: list[tuple[int, int]], window: int
) -> None:
    ordered = list(side_by_side(questions, lambda q: q[0], window))
    assert Counter(ordered) == Counter(questions)
    first = ordered[:window]
    changes = sum(a[0] != b[0] for a, b in pairwise(first))
    assert changes == max(0, len({q[0] for q in first}) - 1)
    assert [q for q in ordered if q[0] == 0] == [q for q in questions if q[0] == 0], "in their own order"
