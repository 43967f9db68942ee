"""Token-budget batching between requests and a scorer.

A request is admitted whole or refused at once. A batch is cut whenever the device is free: there is no timer, so
an idle server answers at once and a busy one fills its batches by itself. After the design of
text-embeddings-inference (core/src/queue.rs), with length bucketing, priorities, deadlines and isolation of bad items.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from enum import IntEnum
from statistics import median

from reward_server.observe import Observer
from reward_server.plan import families
from reward_server.scorers.base import (
    Failure,
    Outcome,
    OutOfMemory,
    Prepared,
    Scorer,
    Task,
    TaskError,
    finite,
)
from rlaif.errors import EndpointError

_LOG = logging.getLogger(__name__)

_WINDOW_BATCHES = 4
"""Lengths are matched among about this many batches' worth of the foremost items."""

_LEAST_PREFIX = 96
"""Tokens that items must share to be brought together; what sharing is worth to a device, its scorer decides."""

_PATIENCE = 3
"""An item that so many batches passed over, while it was near enough to the front, goes by age and not by length."""

_BULK_TURN = 8
"""Every so many batches the oldest bulk item goes first, so that interactive load cannot starve it."""

_WAITING_TURN = 8
"""Once so many batches did not let in the oldest request that waits for room, room is kept for it: else a large one
would wait for as long as small ones take every place that falls free."""


class Priority(IntEnum):
    """Who goes first: lower numbers."""

    INTERACTIVE = 0
    BULK = 1


class Overloaded(Exception):
    """The queue is full; `retry_after_s` estimates when there will be room."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; retry in {retry_after_s:.2f} s")
        self.retry_after_s = retry_after_s


class TooLate(Exception):
    """The queue is longer than the time that the caller has left; nothing was computed."""


@dataclass(frozen=True, slots=True)
class Report:
    """The outcomes of a request, in order, and what was measured on the way.

    Attributes:
        queue_s: from admission to the first batch with one of its items, in seconds.
        tokenize_s: template and tokeniser, in seconds.
        compute_s: model time of the batches with its items, in seconds.
        batch_items: items of the largest of them.
        batch_tokens: tokens of the largest of them.
        padded_tokens: tokens that the device computed for it: with padding, and a shared prefix once.
        input_tokens: tokens of this request's items.
    """

    outcomes: list[Outcome]
    queue_s: float = 0.0
    tokenize_s: float = 0.0
    compute_s: float = 0.0
    batch_items: int = 0
    batch_tokens: int = 0
    padded_tokens: int = 0
    input_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Request:
    """A request on its way, and the context of the call that made it.

    `deadline` and times are in seconds of `time.monotonic`.
    """

    outcomes: list[Outcome | None]
    done: asyncio.Future[None]
    deadline: float
    priority: Priority
    pending: int
    context: Context = field(default_factory=copy_context)
    first_cut: float | None = None
    compute_s: float = 0.0
    batch_items: int = 0
    batch_tokens: int = 0
    padded_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Entry:
    request: _Request
    index: int
    item: Prepared
    passed_over: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for room. `admitted` tells whether it is queued, or came too late to be.

    `passed_over` counts the batches that did not let it in while it was the oldest.
    """

    entries: list[_Entry]
    cost: int
    admitted: asyncio.Future[bool]
    passed_over: int = 0


@dataclass(slots=True)
class _Rate:
    """Tokens per second, for estimates: the median over the last batches that left others waiting.

    A batch that takes all there is tells what was asked for: the device can do at least as much. One that the machine
    held up tells nothing, which is why it is the median, of three at least.
    """

    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=9))

    def update(self, tokens: int, seconds: float, *, at_least: bool) -> None:
        """Take a measurement into account; one that is `at_least` so much only if it is more than was thought."""
        measured = tokens / max(seconds, 1e-6)
        if not at_least or (self._recent and measured > median(self._recent)):
            self._recent.append(measured)

    def seconds(self, tokens: int) -> float | None:
        """How long so many tokens take; None as long as too little was measured."""
        return tokens / median(self._recent) if len(self._recent) >= 3 else None


class Batcher:
    """The queue in front of one scorer. All methods belong to one event loop."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        max_batch_tokens: int,
        max_queue_tokens: int,
        max_queue_items: int,
        observer: Observer | None = None,
    ) -> None:
        self.scorer = scorer
        self._observer = observer or Observer()
        self._max_batch_tokens = max_batch_tokens
        self._max_queue_tokens = max_queue_tokens
        self._max_queue_items = max_queue_items
        self._queues: dict[Priority, list[_Entry]] = {priority: [] for priority in Priority}  # oldest first
        self._queued_tokens = 0
        self._queued_items = 0
        self._preparing_items = 0
        self._patient_items = 0
        self._waiting: list[_Waiting] = []  # oldest first
        self._since_bulk = 0
        self._arrived = asyncio.Event()
        self._tokenizer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward-tokenize")
        self._lanes: list[asyncio.Task[None]] = []
        self._rate = _Rate()
        self._gone: Failure | None = None

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait to be computed."""
        return self._queued_tokens

    @property
    def max_batch_tokens(self) -> int:
        """Tokens that the device computes for a batch; falls when the device runs out of memory."""
        return self._max_batch_tokens

    def start(self) -> asyncio.Future[None]:
        """Start computing. The returned future ends only if computing itself breaks, with the exception."""
        self._lanes = [asyncio.create_task(self._lane()) for _ in range(self.scorer.parallel_batches)]
        return asyncio.ensure_future(self._first_failure())

    async def stop(self) -> None:
        """Stop computing and release the threads; what is still queued is not computed."""
        for lane in self._lanes:
            lane.cancel()
        await asyncio.gather(*self._lanes, return_exceptions=True)
        self._lanes.clear()  # their tracebacks lead back here, and a model must be freed without a collection
        self._tokenizer.shutdown(wait=False, cancel_futures=True)
        await self.scorer.close()

    async def submit(
        self,
        tasks: Sequence[Task],
        time_left_s: float | None = None,
        *,
        priority: Priority = Priority.INTERACTIVE,
        wait_s: float = 0.0,
    ) -> Report:
        """One outcome per task, in order. Cancelling this call removes its items from the queue.

        Args:
            tasks: what to score.
            time_left_s: until the caller's deadline; items whose turn comes later are not computed.
            priority: interactive items go first.
            wait_s: how long to wait for room in a full queue before being refused; infinite never refuses. Only
                so many items wait for room as the queue holds: further ones are refused at once.

        Raises:
            Overloaded: the queue has no room for all of them; none was admitted.
            TooLate: the queue is longer than the time left; none was admitted.
        """
        arrived = time.monotonic()
        deadline = math.inf if time_left_s is None else arrived + time_left_s
        if wait_s <= 0 and not self._has_room(len(tasks), 0):
            raise Overloaded(self._retry_after())
        if 0 < wait_s < math.inf and 0 < self._patient_items > self._max_queue_items - len(tasks):
            raise Overloaded(self._retry_after())
        loop = asyncio.get_running_loop()
        self._preparing_items += len(tasks)
        try:
            prepared = await loop.run_in_executor(self._tokenizer, self._prepare, tasks)
        finally:
            self._preparing_items -= len(tasks)
            loop.call_soon(self._let_in)  # what this request leaves over of the room it has held until here
        tokenized = time.monotonic()

        outcomes: list[Outcome | None] = [p if isinstance(p, Failure) else None for p in prepared]
        done: asyncio.Future[None] = loop.create_future()
        request = _Request(outcomes, done, deadline, priority, pending=outcomes.count(None))
        entries = [_Entry(request, i, p) for i, p in enumerate(prepared) if isinstance(p, Prepared)]
        cost = sum(e.item.tokens for e in entries)
        if entries:
            try:
                await self._admit(entries, cost, arrived + wait_s)
                await done
            except asyncio.CancelledError:
                self._drop(request)
                raise
        first_cut = request.first_cut if request.first_cut is not None else time.monotonic()
        return Report(
            [o for o in request.outcomes if o is not None],
            queue_s=first_cut - tokenized,
            tokenize_s=tokenized - arrived,
            compute_s=request.compute_s,
            batch_items=request.batch_items,
            batch_tokens=request.batch_tokens,
            padded_tokens=request.padded_tokens,
            input_tokens=cost,
        )

    def _prepare(self, tasks: Sequence[Task]) -> list[Prepared | Failure]:
        prepared: list[Prepared | Failure] = []
        for task in tasks:
            try:
                prepared.append(self.scorer.prepare(task))
            except TaskError as err:
                prepared.append(err.failure)
            except Exception as err:
                _LOG.warning("an item could not be prepared: %s", type(err).__name__)
                prepared.append(
                    Failure("model_failed", "the item could not be prepared; the server's log says how")
                )
        return prepared

    # ---- the queue ----

    async def _admit(self, entries: list[_Entry], cost: int, patience: float) -> None:
        """Put the items into the queue; `patience` ends the wait for room, in seconds of `time.monotonic`."""
        if self._has_room(len(entries), cost):
            in_time = self._enqueue(entries, cost)
        else:
            in_time = await self._wait_for_room(entries, cost, patience)
        if not in_time:
            raise TooLate

    async def _wait_for_room(self, entries: list[_Entry], cost: int, patience: float) -> bool:
        left = patience - time.monotonic()
        if left <= 0:
            raise Overloaded(self._retry_after())
        waiting = _Waiting(entries, cost, asyncio.get_running_loop().create_future())
        patient = 0 if math.isinf(left) else len(entries)  # streams bound themselves
        self._patient_items += patient
        self._waiting.append(waiting)
        try:
            await asyncio.wait([waiting.admitted], timeout=None if math.isinf(left) else left)
        finally:
            self._patient_items -= patient
            if not waiting.admitted.done():
                self._waiting.remove(waiting)
                self._let_in()  # room may have been kept for it
        if not waiting.admitted.done():
            raise Overloaded(self._retry_after())
        return waiting.admitted.result()

    def _enqueue(self, entries: list[_Entry], cost: int) -> bool:
        """Let the items wait for their turn; False if their deadline comes before it, and nothing is queued."""
        request = entries[0].request
        ahead = sum(e.item.tokens for p in Priority if p <= request.priority for e in self._queues[p])
        # With nobody ahead it is tried: an estimate by which all were refused would never be made anew.
        needed = self._rate.seconds(ahead + cost) if ahead else None
        if time.monotonic() + (needed or 0.0) > request.deadline:
            return False
        if self._gone is not None:
            for entry in entries:
                self._deliver(entry, self._gone)
            return True
        self._queues[request.priority] += entries
        self._queued_items += len(entries)
        self._queued_tokens += cost
        self._arrived.set()
        return True

    def _let_in(self) -> None:
        """Queue what waits for room and fits, the oldest first. Called whenever there may be more room."""
        for waiting in tuple(self._waiting):
            if self._has_room(len(waiting.entries), waiting.cost, waiting):
                self._waiting.remove(waiting)
                waiting.admitted.set_result(self._enqueue(waiting.entries, waiting.cost))

    def _has_room(self, items: int, tokens: int, waiting: _Waiting | None = None) -> bool:
        """Whether a request fits beside what is there and what room is kept for; `waiting` if it is one that waits.

        An empty queue takes any, since waiting would not make it fit better.
        """
        oldest = self._waiting[0] if self._waiting else None
        kept_for = oldest if oldest is not None and oldest.passed_over >= _WAITING_TURN else None
        if not self._queued_items and (kept_for is waiting if kept_for else not self._preparing_items):
            return True
        items += self._queued_items + self._preparing_items
        tokens += self._queued_tokens
        if kept_for is not None and kept_for is not waiting:
            items += len(kept_for.entries)
            tokens += kept_for.cost
        return items <= self._max_queue_items and tokens <= self._max_queue_tokens

    def _retry_after(self) -> float:
        needed = self._rate.seconds(self._queued_tokens)
        return 1.0 if needed is None else min(max(needed / 2, 0.05), 30.0)

    def _drop(self, request: _Request) -> None:
        gone = {id(e) for e in self._queues[request.priority] if e.request is request}
        self._observer.cancelled(len(gone))
        self._remove(gone)

    def _remove(self, entries: set[int]) -> None:
        """Take entries out of the queues, by identity, and let waiting requests in."""
        if not entries:
            return
        for priority, queue in self._queues.items():
            self._queues[priority] = [e for e in queue if id(e) not in entries]
        waiting = [e for queue in self._queues.values() for e in queue]
        self._queued_items = len(waiting)
        self._queued_tokens = sum(e.item.tokens for e in waiting)
        self._let_in()

    # ---- computing ----

    async def _first_failure(self) -> None:
        done, _ = await asyncio.wait(self._lanes, return_when=asyncio.FIRST_COMPLETED)
        for lane in done:
            if not lane.cancelled():
                lane.result()

    async def _lane(self) -> None:
        while True:
            batch = self._cut()
            if batch:
                await self._compute(batch, busy=self._queued_items > 0)
            else:
                self._arrived.clear()
                await self._arrived.wait()

    def _cut(self) -> list[_Entry]:
        """Take the next batch: the foremost item, so that nothing starves, and what goes best with it."""
        now = time.monotonic()
        expired = [e for queue in self._queues.values() for e in queue if e.request.deadline <= now]
        for entry in expired:
            self._deliver(entry, Failure("expired", "the deadline passed before this item's turn"))
        self._remove({id(e) for e in expired})
        batch = self._choose()
        if batch and self._waiting:
            self._waiting[0].passed_over += 1
        for entry in batch:
            if entry.request.first_cut is None:
                entry.request.first_cut = now
        self._remove({id(e) for e in batch})
        return batch

    def _choose(self) -> list[_Entry]:
        line = self._line()
        if not line:
            return []
        window: list[_Entry] = []
        tokens = 0
        for entry in line:
            window.append(entry)
            tokens += entry.item.tokens
            if tokens > _WINDOW_BATCHES * self._max_batch_tokens:
                break
        first = window[0]
        if first.item.alone:
            return [first]
        limit = self.scorer.max_batch_items or len(window)
        batch: list[_Entry] = []
        left = self._max_batch_tokens
        for prefix, family in self._by_fit([e for e in window if not e.item.alone]):
            whole = prefix + sum(e.item.tokens - prefix for e in family)
            if batch and left < whole <= self._max_batch_tokens:
                continue  # it fits into another batch as a whole
            for number, entry in enumerate(family):
                added = entry.item.tokens - (prefix if number else 0)
                if batch and (added > left or len(batch) == limit):
                    break
                batch.append(entry)
                left -= added
        batch = batch[: self._fitting([e.item for e in batch])]
        taken = set(map(id, batch))
        for entry in window:
            entry.passed_over += id(entry) not in taken
        return batch

    def _fitting(self, items: list[Prepared]) -> int:
        """How many of them, from the first, the device computes within the budget, at least one."""
        if len(items) == 1 or self.scorer.cost(items) <= self._max_batch_tokens:
            return len(items)
        fits, too_many = 1, len(items)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.scorer.cost(items[:middle]) <= self._max_batch_tokens:
                fits = middle
            else:
                too_many = middle
        return fits

    def _by_fit(self, window: list[_Entry]) -> list[tuple[int, list[_Entry]]]:
        """Families of entries that share a prefix, with its length in tokens, or single ones.

        First that of the foremost entry, and it first in it; then, each priority by itself, those that were passed
        over too often, and the nearest to the foremost in length, which waste least by padding; the older first among
        equals.
        """
        found: list[tuple[int, list[int]]] = [(0, [i]) for i in range(len(window))]
        if self.scorer.shares_prefixes:
            found = families([e.item.sequences[0] for e in window], _LEAST_PREFIX // 2)

        def turn(i: int) -> tuple[bool, Priority, int, int]:
            entry = window[i]
            patient = entry.passed_over < _PATIENCE
            distance = abs(entry.item.width - window[0].item.width)
            return i != 0, entry.request.priority, distance if patient else -1, i

        for _, members in found:
            members.sort(key=turn)
        found.sort(key=lambda family: turn(family[1][0]))
        return [(prefix, [window[i] for i in members]) for prefix, members in found]

    def _line(self) -> list[_Entry]:
        """All that wait, in the order of their turn."""
        interactive, bulk = self._queues[Priority.INTERACTIVE], self._queues[Priority.BULK]
        if not bulk or not interactive:
            self._since_bulk = 0
            return interactive or bulk
        self._since_bulk += 1
        if self._since_bulk < _BULK_TURN:
            return interactive + bulk
        self._since_bulk = 0
        return [bulk[0], *interactive, *bulk[1:]]

    async def _compute(self, batch: list[_Entry], *, busy: bool) -> None:
        started = time.monotonic()
        items = [e.item for e in batch]
        try:
            outcomes = await self._score(items)
        except EndpointError as err:  # nothing will be computed any more
            self._gone = Failure("unavailable", str(err))
            waiting = [e for queue in self._queues.values() for e in queue]
            for entry in (*batch, *waiting):
                self._deliver(entry, self._gone)
            self._remove(set(map(id, waiting)))
            raise
        seconds = time.monotonic() - started
        tokens = sum(item.tokens for item in items)
        padded = self.scorer.cost(items)
        lanes = self.scorer.parallel_batches if busy else 1  # where others wait, all lanes are busy
        self._rate.update(tokens * lanes, seconds, at_least=not busy)
        requests = {id(e.request): e.request for e in batch}.values()
        self._observer.batch(len(batch), tokens, padded, seconds, [r.context for r in requests])
        for request in requests:
            request.compute_s += seconds
            request.batch_items = max(request.batch_items, len(batch))
            if tokens > request.batch_tokens:
                request.batch_tokens, request.padded_tokens = tokens, padded
        for entry, outcome in zip(batch, outcomes, strict=True):
            self._deliver(entry, outcome)

    async def _score(self, items: list[Prepared]) -> list[Outcome]:
        """Score a batch: one too large for the device is halved, one that fails is searched for the item to blame."""
        try:
            return await self._forward(items)
        except EndpointError:
            raise
        except Exception as err:
            if len(items) == 1:
                _LOG.warning("an item of %d tokens failed in the model: %r", items[0].tokens, err)
                return [Failure("model_failed", "the model failed on this item; the server's log says how")]
            if not isinstance(err, OutOfMemory):
                return await self._isolate(items)
        size = self.scorer.cost(items)
        self._max_batch_tokens = max(1, min(self._max_batch_tokens, size // 2))
        self._observer.out_of_memory()
        _LOG.warning("out of memory at %d tokens; batches hold %d now", size, self._max_batch_tokens)
        middle = len(items) // 2
        return [*await self._score(items[:middle]), *await self._score(items[middle:])]

    async def _isolate(self, items: list[Prepared]) -> list[Outcome]:
        """Outcomes of a batch that fails as a whole: binary search for the item to blame, then the rest as one batch.

        Takes ⌈log2 n⌉ + 2 passes for one bad item, where halving both sides would take twice as many. An item is tried
        alone before it is blamed.
        """
        outcomes: dict[int, Outcome] = {}
        aside: list[int] = []
        low, high = 0, len(items)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                outcomes.update(zip(range(low, middle), await self._forward(items[low:middle]), strict=True))
            except EndpointError:
                raise
            except Exception:  # the search goes on where it fails, and ends at one item with its reason
                aside += range(middle, high)
                high = middle
            else:
                low = middle
        outcomes.update(zip([low], await self._score(items[low:high]), strict=True))
        if aside:
            outcomes.update(zip(aside, await self._score([items[i] for i in aside]), strict=True))
        return [outcomes[i] for i in range(len(items))]

    async def _forward(self, items: list[Prepared]) -> list[Outcome]:
        outcomes = await self.scorer.score(items)
        if len(outcomes) != len(items):
            raise RuntimeError(f"{self.scorer.name} gave {len(outcomes)} outcomes for {len(items)} items")
        return [finite(o) for o in outcomes]

    def _deliver(self, entry: _Entry, outcome: Outcome) -> None:
        request = entry.request
        request.outcomes[entry.index] = outcome
        request.pending -= 1
        if request.pending == 0 and not request.done.done():
            request.done.set_result(None)
