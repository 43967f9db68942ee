"""How batches are cut."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_server.batcher import Batcher, Overloaded, Priority, TooLate
from reward_server.scorers.base import Failure, Outcome, OutOfMemory, Prepared, Scored, ScoreTask, Task
from rlaif.errors import EndpointError
from rlaif.types import Message, user_prompt
from tests.reward_server.fakes import LengthScorer


def task(length: int, *, alone: bool = False) -> Task:
    return ScoreTask((*user_prompt("q"), Message("assistant", "x" * length)), alone=alone)


def batcher(scorer: LengthScorer, **limits: int) -> Batcher:
    defaults = {"max_batch_tokens": 64, "max_queue_tokens": 10**6, "max_queue_items": 10**6}
    return Batcher(scorer, **{**defaults, **limits})


@asynccontextmanager
async def busy(scorer: LengthScorer, first: Task | None = None, **limits: int) -> AsyncIterator[Batcher]:
    """A queue whose scorer computes one item, of one token unless another is given, until its gate is set."""
    scorer.gate.clear()
    queue = batcher(scorer, **limits)
    queue.start()
    running = asyncio.ensure_future(queue.submit([first or task(1)]))
    await scorer.started.wait()
    yield queue
    await running
    await queue.stop()


async def queued(queue: Batcher, tokens: int) -> None:
    """Wait until so many tokens wait for their turn."""
    while queue.queued_tokens != tokens:
        await asyncio.sleep(0.001)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=8))
def test_each_item_is_computed_once_within_the_budget_and_answered_in_order(
    requests: list[list[int]],
) -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        queue = batcher(scorer)
        queue.start()
        reports = await asyncio.gather(*(queue.submit([task(n) for n in lengths]) for lengths in requests))
        await queue.stop()
        for report, lengths in zip(reports, requests, strict=True):
            assert [o.raw for o in report.outcomes if isinstance(o, Scored)] == lengths
        assert sorted(map(len, scorer.computed)) == sorted(n for lengths in requests for n in lengths)
        for batch in scorer.batches:
            padded = len(batch) * max(map(len, batch))
            assert padded <= 64 or len(batch) == 1  # an item larger than the budget goes alone

    asyncio.run(scenario())


def test_a_batch_takes_the_oldest_item_and_those_of_its_length() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, max_batch_tokens=40) as queue:
            waiting = asyncio.ensure_future(queue.submit([task(n) for n in (20, 3, 19, 4, 5)]))
            await queued(queue, 51)
            scorer.gate.set()
            await waiting
        assert [[len(r) for r in batch] for batch in scorer.batches] == [[1], [20, 19], [3, 4, 5]]

    asyncio.run(scenario())


def test_a_long_item_that_does_not_fit_leaves_the_batch_full_of_short_ones() -> None:
    """Without padding all 31 have the 1,000 tokens of the budget; padded, the 30 have 600."""

    async def scenario() -> None:
        scorer = LengthScorer()
        queue = batcher(scorer, max_batch_tokens=1000)
        queue.start()
        await queue.submit([task(n) for n in (*[20] * 15, 400, *[20] * 15)])
        await queue.stop()
        assert [[len(r) for r in batch] for batch in scorer.batches] == [[20] * 30, [400]]

    asyncio.run(scenario())


def test_an_idle_queue_takes_a_request_larger_than_its_bounds() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        queue = batcher(scorer, max_queue_tokens=10, max_queue_items=1)
        queue.start()
        report = await queue.submit([task(30), task(30)])
        assert len(report.outcomes) == 2
        scorer.gate.clear()
        scorer.started.clear()
        running = asyncio.ensure_future(queue.submit([task(1)]))
        await scorer.started.wait()
        waiting = asyncio.ensure_future(queue.submit([task(9)]))
        await queued(queue, 9)
        with pytest.raises(Overloaded) as refused:
            await queue.submit([task(2)])
        assert refused.value.retry_after_s > 0
        scorer.gate.set()
        await asyncio.gather(running, waiting)
        await queue.stop()

    asyncio.run(scenario())


def test_an_item_whose_time_is_up_when_its_turn_comes_is_not_computed() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer) as queue:
            late = asyncio.ensure_future(queue.submit([task(5)], time_left_s=1.0))
            await queued(queue, 5)
            await asyncio.sleep(1.0)
            scorer.gate.set()
            outcome = (await late).outcomes[0]
        assert isinstance(outcome, Failure) and outcome.problem == "expired"
        assert scorer.computed == ["x"]

    asyncio.run(scenario())


@pytest.mark.parametrize(("ahead", "time_left_s"), [(0, 0.0), (100, 1.0)])
def test_a_request_that_cannot_be_done_in_time_is_refused_before_it_is_queued(
    ahead: int, time_left_s: float
) -> None:
    class Slow(LengthScorer):
        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            await asyncio.sleep(0.05)
            return await super().score(batch)

    async def scenario() -> None:
        scorer = Slow()
        queue = batcher(scorer, max_batch_tokens=1)  # one item a batch: 20 tokens a second
        queue.start()
        await queue.submit([task(1)] * 5)  # from now on the rate is known
        others = asyncio.ensure_future(queue.submit([task(1)] * ahead)) if ahead else None
        while queue.queued_tokens < ahead - 1:
            await asyncio.sleep(0.001)
        before = queue.queued_tokens
        with pytest.raises(TooLate):
            await queue.submit([task(2)], time_left_s=time_left_s)
        assert queue.queued_tokens <= before and "xx" not in scorer.computed
        if others:
            others.cancel()
        await queue.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("lanes", "before", "then"),
    [(1, [1], [60] * 64), (8, [1] * 16, [1] * 300)],
    ids=["a small batch", "lanes"],
)
def test_no_request_is_refused_for_a_deadline_that_the_device_can_meet(
    lanes: int, before: list[int], then: list[int]
) -> None:
    class Slow(LengthScorer):
        parallel_batches = lanes
        max_batch_items = 0 if lanes == 1 else 1

        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            await asyncio.sleep(0.05)
            return await super().score(batch)

    async def scenario() -> None:
        scorer = Slow()
        queue = batcher(scorer, max_batch_tokens=10**4)
        queue.start()
        # One token in 0.05 s, by one lane, would make 192 s of the first case and 15 s of the second.
        for _ in range(3):
            await queue.submit([task(n) for n in before])
        scorer.gate.clear()
        scorer.started.clear()
        running = asyncio.ensure_future(queue.submit([task(1)] * lanes))
        await scorer.started.wait()
        while queue.queued_tokens:
            await asyncio.sleep(0.001)
        ahead = asyncio.ensure_future(queue.submit([task(1)]))
        while not queue.queued_tokens:
            await asyncio.sleep(0.001)
        late = asyncio.ensure_future(queue.submit([task(n) for n in then], time_left_s=12.5))
        await asyncio.sleep(0.01)
        scorer.gate.set()
        report = (await asyncio.gather(running, ahead, late))[2]
        await queue.stop()
        assert len(report.outcomes) == len(then)

    asyncio.run(scenario())


class HeldUp(LengthScorer):
    """Its first batches take 0.2 s: two tokens each are 10 a second, by which 60 tokens would take 6 s."""

    def __init__(self, slow: int) -> None:
        super().__init__()
        self._slow = slow

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        if len(self.batches) < self._slow:
            await asyncio.sleep(0.2)
            self.batches.append(["x" * item.tokens for item in batch])
            return [Scored(2.0, item.tokens) for item in batch]
        return await super().score(batch)


def test_one_batch_that_the_machine_held_up_tells_nothing_of_those_to_come() -> None:
    async def scenario() -> None:
        scorer = HeldUp(1)
        scorer.gate.clear()
        queue = batcher(scorer, max_batch_tokens=2)
        queue.start()
        running = asyncio.ensure_future(queue.submit([task(2)] * 12))
        while not scorer.started.is_set():  # the second batch
            await asyncio.sleep(0.001)
        then = asyncio.ensure_future(queue.submit([task(2)] * 30, time_left_s=3.0))
        await asyncio.sleep(0.01)
        scorer.gate.set()
        _, report = await asyncio.gather(running, then)
        assert all(isinstance(outcome, Scored) for outcome in report.outcomes)
        await queue.stop()

    asyncio.run(scenario())


def test_a_machine_that_was_held_up_for_long_refuses_nobody_for_good() -> None:
    async def scenario() -> None:
        queue = batcher(HeldUp(5), max_batch_tokens=2)
        queue.start()
        await queue.submit([task(2)] * 5)
        report = await queue.submit([task(2)] * 30, time_left_s=3.0)  # nobody is ahead of it
        assert all(isinstance(outcome, Scored) for outcome in report.outcomes)
        await queue.stop()

    asyncio.run(scenario())


def test_calls_of_one_batch_each_show_that_a_machine_is_as_fast_again_as_it_was() -> None:
    async def scenario() -> None:
        scorer = HeldUp(5)
        queue = batcher(scorer, max_batch_tokens=2)
        queue.start()
        await queue.submit([task(2)] * 6)
        for _ in range(9):  # none leaves another one waiting
            await queue.submit([task(60)])
        scorer.gate.clear()
        scorer.started.clear()
        running = asyncio.ensure_future(queue.submit([task(1)]))
        await scorer.started.wait()
        ahead = asyncio.ensure_future(queue.submit([task(1)]))
        await queued(queue, 1)
        then = asyncio.ensure_future(queue.submit([task(60)], time_left_s=3.0))
        while queue.queued_tokens != 61 and not then.done():
            await asyncio.sleep(0.001)
        scorer.gate.set()
        *_, report = await asyncio.gather(running, ahead, then)
        assert isinstance(report.outcomes[0], Scored)
        await queue.stop()

    asyncio.run(scenario())


def test_interactive_items_go_first_and_bulk_is_not_starved() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, max_batch_tokens=1) as queue:  # one item a batch
            bulk = asyncio.ensure_future(queue.submit([task(2)] * 2, priority=Priority.BULK))
            await queued(queue, 4)
            quick = asyncio.ensure_future(queue.submit([task(3)] * 20))
            await queued(queue, 64)
            scorer.gate.set()
            await asyncio.gather(bulk, quick)
        order = [len(text) for text in scorer.computed][1:]
        assert order[:7] == [3] * 7, "interactive first"
        assert order.index(2) == 7, "the eighth batch is the bulk's turn"
        assert order[-1] == 3

    asyncio.run(scenario())


def test_items_that_must_not_depend_on_neighbours_have_a_batch_of_their_own() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer) as queue:
            together = asyncio.ensure_future(queue.submit([task(4)] * 3))
            apart = asyncio.ensure_future(queue.submit([task(5, alone=True)] * 2))
            await queued(queue, 22)
            scorer.gate.set()
            await asyncio.gather(together, apart)
        assert [[len(text) for text in batch] for batch in scorer.batches] == [[1], [4, 4, 4], [5], [5]]

    asyncio.run(scenario())


def test_a_waiting_request_is_let_in_when_there_is_room() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, max_queue_items=2) as queue:
            full = asyncio.ensure_future(queue.submit([task(2)] * 2))
            await queued(queue, 4)
            with pytest.raises(Overloaded):
                await queue.submit([task(3)])
            patient = asyncio.ensure_future(queue.submit([task(3)], wait_s=math.inf))
            scorer.gate.set()
            _, report = await asyncio.gather(full, patient)
        assert [o.raw for o in report.outcomes if isinstance(o, Scored)] == [3.0]

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves", [False, True], ids=["its item cannot be prepared", "its caller leaves"])
def test_what_another_request_leaves_of_its_room_wakes_the_one_that_waits(leaves: bool) -> None:
    class Held(LengthScorer):
        """Tokenises a response of 99 characters when it is told to, and finds it too long."""

        def __init__(self) -> None:
            super().__init__(max_tokens_per_item=98)
            self.preparing, self.go_on = threading.Event(), threading.Event()

        def prepare(self, task: Task) -> Prepared:
            assert isinstance(task, ScoreTask)
            if len(task.conversation[-1].content) == 99:
                self.preparing.set()
                assert self.go_on.wait(60)
            return super().prepare(task)

    async def scenario() -> None:
        scorer = Held()
        queue = batcher(scorer, max_queue_items=2)
        queue.start()
        large = asyncio.ensure_future(
            queue.submit([task(5)] * 3, wait_s=math.inf)
        )  # more than the queue holds
        other = asyncio.ensure_future(queue.submit([task(99)], wait_s=math.inf))
        while not scorer.preparing.is_set():
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)  # the large one waits for room, since the other is on its way
        assert scorer.computed == []
        if leaves:
            other.cancel()
        scorer.go_on.set()
        report = await asyncio.wait_for(large, 20)
        assert [o.raw for o in report.outcomes if isinstance(o, Scored)] == [5.0] * 3
        await asyncio.gather(other, return_exceptions=True)
        await queue.stop()

    asyncio.run(scenario())


def test_large_requests_get_into_a_queue_whose_places_small_ones_take_as_they_fall_free() -> None:
    calls = 0

    class Slow(LengthScorer):
        """Computes for so long that each client may have called again."""

        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            until = calls + 16
            while calls < until:
                await asyncio.sleep(0.001)
            return await super().score(batch)

    async def scenario() -> None:
        scorer = Slow()
        queue = batcher(scorer, max_batch_tokens=1, max_queue_items=8)  # one item a batch
        queue.start()

        async def small() -> None:
            nonlocal calls
            while True:
                calls += 1
                try:
                    await queue.submit([task(1)])
                except Overloaded:
                    await asyncio.sleep(0.001)

        clients = [asyncio.ensure_future(small()) for _ in range(16)]
        while len(scorer.batches) < 10:
            await asyncio.sleep(0.001)
        large = [
            asyncio.ensure_future(queue.submit([task(2)] * 8, priority=Priority.BULK, wait_s=math.inf))
            for _ in range(3)
        ]
        # Each waits 8 batches for its turn and 8 for its places, and is computed in at most 64.
        while not all(request.done() for request in large) and len(scorer.batches) < 1000:
            await asyncio.sleep(0.001)
        for client in clients:
            client.cancel()
        assert [request.done() for request in large] == [True] * 3
        computed = [len(text) for text in scorer.computed]
        assert computed.count(1) > computed.count(2) == 24, "nor do the small ones starve"
        await asyncio.gather(*clients, return_exceptions=True)
        await queue.stop()

    asyncio.run(scenario())


def test_a_large_request_that_waits_is_not_passed_over_for_ever_by_small_ones_that_wait_behind_it() -> None:
    class Slow(LengthScorer):
        """Computes for so long that each client has called again."""

        called = 0

        def prepare(self, task: Task) -> Prepared:
            prepared = super().prepare(task)
            self.called += prepared.tokens == 1
            return prepared

        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            while self.called < 16 + self.computed.count("x"):
                await asyncio.sleep(0.001)
            return await super().score(batch)

    async def scenario() -> None:
        scorer = Slow()
        queue = batcher(scorer, max_batch_tokens=1, max_queue_items=4)  # one item a batch
        queue.start()

        async def small() -> None:
            while True:
                await queue.submit([task(1)], wait_s=math.inf)

        clients = [asyncio.ensure_future(small()) for _ in range(16)]
        while len(scorer.batches) < 4:
            await asyncio.sleep(0.001)
        large = asyncio.ensure_future(queue.submit([task(2)] * 4, wait_s=math.inf))
        while not large.done() and len(scorer.batches) < 200:
            await asyncio.sleep(0.001)
        for client in clients:
            client.cancel()
        assert large.done()
        await asyncio.gather(*clients, return_exceptions=True)
        await queue.stop()

    asyncio.run(scenario())


def test_who_waits_for_room_is_told_when_it_is_too_late_or_patience_ends_and_leaves_the_others_theirs() -> (
    None
):
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, max_queue_items=2) as queue:
            full = asyncio.ensure_future(queue.submit([task(2)] * 2))
            await queued(queue, 4)
            late = asyncio.ensure_future(queue.submit([task(3)], time_left_s=0.05, wait_s=math.inf))
            await asyncio.sleep(0)  # so that its time has begun before the next one's, which is longer
            with pytest.raises(Overloaded):
                await queue.submit([task(4)], wait_s=0.1)
            gone = asyncio.ensure_future(queue.submit([task(5)], wait_s=math.inf))
            patient = asyncio.ensure_future(queue.submit([task(6)], wait_s=60.0))
            await asyncio.sleep(0.02)
            gone.cancel()
            scorer.gate.set()
            await asyncio.gather(full, patient)
            with pytest.raises(TooLate):
                await late
            with pytest.raises(asyncio.CancelledError):
                await gone
        assert [len(text) for text in scorer.computed] == [1, 2, 2, 6]

    asyncio.run(scenario())


def test_no_more_items_wait_for_room_than_the_queue_holds() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, max_queue_items=2) as queue:
            full = asyncio.ensure_future(queue.submit([task(2)] * 2))
            await queued(queue, 4)
            patient = asyncio.ensure_future(queue.submit([task(3)] * 2, wait_s=60.0))
            with pytest.raises(Overloaded):
                while True:  # until the patient ones have come as far as the queue
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(queue.submit([task(4)], wait_s=60.0), 0.01)
            scorer.gate.set()
            await asyncio.gather(full, patient)
        assert len(scorer.computed) == 5

    asyncio.run(scenario())


def test_a_batch_too_large_for_the_device_is_split_and_the_budget_learned() -> None:
    class Small(LengthScorer):
        """A device with room for 16 padded tokens."""

        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            if len(batch) * max(item.width for item in batch) > 16:
                raise OutOfMemory("no room")
            return await super().score(batch)

    async def scenario() -> None:
        scorer = Small()
        queue = batcher(scorer)
        queue.start()
        report = await queue.submit([task(4)] * 12)
        assert [o.raw for o in report.outcomes if isinstance(o, Scored)] == [4.0] * 12
        assert queue.max_batch_tokens <= 16
        scorer.batches.clear()
        await queue.submit([task(4)] * 12)
        await queue.stop()
        assert [len(batch) for batch in scorer.batches] == [
            len(b) for b in scorer.batches if len(b) * 4 <= 16
        ]

    asyncio.run(scenario())


@pytest.mark.parametrize("bad", [{0}, {63}, {21}, {20, 21}, {0, 31, 32, 63}, set(range(64))], ids=str)
def test_bad_items_fail_alone_after_few_passes(bad: set[int]) -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        queue = batcher(scorer, max_batch_tokens=10**6)
        queue.start()
        texts = ["poison" if i in bad else "x" * (i + 1) for i in range(64)]
        tasks: list[Task] = [ScoreTask((*user_prompt("q"), Message("assistant", t))) for t in texts]
        outcomes = (await queue.submit(tasks)).outcomes
        await queue.stop()
        assert {i for i, o in enumerate(outcomes) if isinstance(o, Failure)} == bad
        assert all(o.raw == i + 1 for i, o in enumerate(outcomes) if isinstance(o, Scored))
        assert len(scorer.batches) - 1 <= len(bad) * (6 + 2), "⌈log2 64⌉ + 2 for each"

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_queue_and_is_not_computed() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer) as queue:
            gone = asyncio.ensure_future(queue.submit([task(9), task(9)]))
            await queued(queue, 18)
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            assert queue.queued_tokens == 0
            scorer.gate.set()
            await queue.submit([task(2)])
        assert [len(r) for r in scorer.computed] == [1, 2]

    asyncio.run(scenario())


def test_responses_to_one_prompt_are_computed_together_as_far_as_the_budget_goes() -> None:
    class Sharing(LengthScorer):
        """A device that computes a common first token sequence once; the text after `|` is a row's own."""

        shares_prefixes = True

        def prepare(self, task: Task) -> Prepared:
            assert isinstance(task, ScoreTask)
            ids = tuple(map(ord, task.conversation[-1].content))
            return Prepared(task, (ids,), len(ids), len(ids))

        def cost(self, batch: Sequence[Prepared]) -> int:
            prompts = {item.sequences[0][:200] for item in batch}
            return 200 * len(prompts) + sum(item.width - 200 for item in batch)

    def response(prompt: str, length: int) -> Task:
        return ScoreTask((*user_prompt("q"), Message("assistant", prompt * 200 + chr(length) * length)))

    async def scenario() -> None:
        scorer = Sharing()
        async with busy(scorer, response("x", 1), max_batch_tokens=600) as queue:
            mixed = [response(prompt, 40 + n) for n in range(3) for prompt in "abc"]
            waiting = asyncio.ensure_future(queue.submit([*mixed, response("d", 30)]))
            await queued(queue, 9 * 241 + 230)
            scorer.gate.set()
            report = await waiting
        # three of one prompt take 200 + 3 * 41 tokens; what is left would hold a part of the next three, or the d
        prompts = ["".join(text[0] for text in batch) for batch in scorer.batches]
        assert prompts == ["x", "aaad", "bbb", "ccc"]
        assert report.padded_tokens == 323 + 230 and report.batch_tokens == 3 * 241 + 230

    asyncio.run(scenario())


def test_the_older_of_equals_goes_first_and_who_was_passed_over_before_the_nearer() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, task(10), max_batch_tokens=20) as queue:  # two items of 10
            lengths = [10] * 7 + [3] + [10] * 6
            waiting = [asyncio.ensure_future(queue.submit([task(n)])) for n in lengths]
            await queued(queue, sum(lengths))
            scorer.gate.set()
            await asyncio.gather(*waiting)
        batches = [[len(text) for text in batch] for batch in scorer.batches]
        # three batches took a nearer item in its place; the fourth takes the 3 beside its foremost
        assert batches == [[10], [10, 10], [10, 10], [10, 10], [10, 3], [10, 10], [10, 10], [10, 10]]

    asyncio.run(scenario())


def test_equals_are_computed_in_the_order_of_their_arrival_whatever_they_say() -> None:
    class Sharing(LengthScorer):
        shares_prefixes = True

        def prepare(self, task: Task) -> Prepared:
            assert isinstance(task, ScoreTask)
            ids = tuple(map(ord, task.conversation[-1].content))
            return Prepared(task, (ids,), len(ids), len(ids))

    async def scenario() -> None:
        scorer = Sharing()
        scorer.gate.clear()
        queue = batcher(scorer, max_batch_tokens=30)
        queue.start()
        texts = [letter * 10 for letter in "mzaybxcwdv"]
        calls = []
        for text in texts:
            conversation = (*user_prompt("q"), Message("assistant", text))
            calls.append(asyncio.ensure_future(queue.submit([ScoreTask(conversation)])))
        await scorer.started.wait()
        while queue.queued_tokens < 10 * (len(texts) - 3):
            await asyncio.sleep(0.001)
        scorer.gate.set()
        await asyncio.gather(*calls)
        await queue.stop()
        assert scorer.computed == texts

    asyncio.run(scenario())


def test_interactive_items_fill_a_batch_before_bulk_items_nearer_in_length() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with busy(scorer, max_batch_tokens=40) as queue:
            bulk = asyncio.ensure_future(queue.submit([task(20)], priority=Priority.BULK))
            quick = asyncio.ensure_future(queue.submit([task(20), task(9)]))
            await queued(queue, 49)
            scorer.gate.set()
            await asyncio.gather(bulk, quick)
        assert [[len(text) for text in batch] for batch in scorer.batches] == [[1], [20, 9], [20]]

    asyncio.run(scenario())


def test_what_waits_for_a_model_that_is_gone_is_told_so_and_computing_ends() -> None:
    class Gone(LengthScorer):
        """A model in another process, which ends while it computes."""

        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            await super().score(batch)
            raise EndpointError("the engine has ended")

    async def scenario() -> None:
        scorer = Gone()
        scorer.gate.clear()
        queue = batcher(scorer, max_batch_tokens=10)
        broken = queue.start()
        requests = [asyncio.ensure_future(queue.submit([task(9)] * 2)) for _ in range(3)]
        await queued(queue, 45)
        scorer.gate.set()
        gone = Failure("unavailable", "the engine has ended")
        for report in await asyncio.gather(*requests):
            assert report.outcomes == [gone, gone]
        with pytest.raises(EndpointError):
            await broken
        assert (await queue.submit([task(3)])).outcomes == [gone]  # prepared too late to be refused
        assert len(scorer.batches) == 1
        await queue.stop()

    asyncio.run(scenario())
