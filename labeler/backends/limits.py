"""How fast an endpoint is asked: requests at a time, requests and tokens per minute, and what a 429 teaches.

The parts that decide are pure functions of the times they are given; `Gate` puts them to work on the event loop's
clock. Two things are learnt, since a 429 can mean either:

- how many requests at a time: additive increase, multiplicative decrease, with a slow start (as inspect_ai does);
- how many requests a second: between two refusals the server admitted just what it allows, whatever its rule (token
  bucket, fixed or sliding window, requests at a time), so that count over that time is the allowed rate. From there
  the rate follows a cubic (RFC 9438, in rates instead of windows): flat near the known limit, then ever faster, so that
  refusals are rare and a raised limit is found within a minute.

A third kind of 429 teaches nothing: a server or a proxy that refuses a few requests whatever the rate. It is known by
going on as before while the rate falls.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

_EPSILON_S = 1e-6

_START = 20
"""Requests at a time to begin with."""

_CALM = 5
"""So many answers after an error of the server do not make the concurrency grow: it stops if one in six fails."""

_LONGEST_HOLD_S = 60.0

_STEP = 0.8
"""A rate that is cut to less than this at once was measured anew: the fall begins there."""

_LOWER = 0.99
"""A refusal at more than this share of the lowest rate that was refused in a fall ends it."""

_BEGUN = 0.9
"""Share of its first rate to which a fall must have come to be one: about a limit, the rate varies by less."""

_FUTILE = 0.5
"""Refusals that go on while the rate falls to this share of what it was may have another cause than the rate."""

_ENOUGH = 60
"""Requests of a fall before it is judged."""

_MOST_NOISE = 0.2
"""Share of requests refused in a fall that can be noise: a limit below half the rate refuses more."""

_RARER = 3.0
"""A refusal that comes so much later than on average is the sign of a fall that nears the limit."""

_NOISE_WINDOW = 100
"""Requests over which refusals without a cause are counted, to tell when a limit comes on top of them."""

_RETRY_SHARE = 0.09
"""Retries per answered request, in the long run."""

_RETRY_RESERVE = 20
"""Retries that may come at once."""


class TokenBucket:
    """Admits `rate` units per second on average and `burst` at once.

    Any half-open window of `w` seconds admits less than `burst + rate * w + 1` units, if single amounts are at
    most `burst`; a larger amount goes when the bucket is full and is paid back by those after it.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._level, self._at = burst, -math.inf

    @classmethod
    def per_minute(cls, cap: float) -> TokenBucket:
        """A bucket that never admits more than `cap` units within a minute, single amounts being small.

        A hundredth of the cap may come at once, so that a timer that fires late loses nothing.
        """
        burst = max(1.0, cap // 100)
        return cls((cap + 1.0 - burst) / 60.0, burst)

    def wait(self, now: float, amount: float = 1.0) -> float:
        """Seconds until `amount` units are admitted; 0 if they are now."""
        if math.isinf(self.rate):
            return 0.0
        self._fill(now)
        lack = min(amount, self.burst) - self._level
        return lack / self.rate if lack > _EPSILON_S * self.rate else 0.0

    def take(self, now: float, amount: float = 1.0) -> None:
        """Use `amount` units; a negative one gives back what was taken too much."""
        if math.isinf(self.rate):
            return
        self._fill(now)
        self._level = min(self.burst, self._level - amount)

    def set_rate(self, now: float, rate: float, burst: float) -> None:
        """Go on at another rate; what was saved up is kept as far as it fits."""
        if (rate, burst) != (self.rate, self.burst):
            self._fill(now)
            self.rate, self.burst = rate, burst
            self._level = min(burst, self._level)

    def _fill(self, now: float) -> None:
        if now > self._at:
            gained = (
                self.burst if math.isinf(self._at) or math.isinf(self.rate) else self.rate * (now - self._at)
            )
            self._level = min(self.burst, self._level + gained)
            self._at = now


@dataclass(slots=True)
class Concurrency:
    """How many requests may be in flight: additive increase, multiplicative decrease.

    Doubles per round of answers; shrinks to four fifths on a refusal, if the slots were in use, and then grows by a
    twentieth per round up to where it was refused. Grows only while at least four fifths of the slots are in use, and
    pauses when the server fails.

    Args:
        most: never more than this.
        adaptive: else always `most`.
    """

    most: int
    adaptive: bool = True
    limit: float = field(init=False)
    _refused_at: float = field(default=0.0, init=False)
    _calm: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.limit = min(_START, self.most) if self.adaptive else self.most

    def answered(self, in_flight: int) -> None:
        """An answer came while `in_flight` requests were out, this one included."""
        if self._calm:
            self._calm -= 1
        elif self.adaptive and in_flight >= 0.8 * int(self.limit):
            slow = self.limit <= self._refused_at
            step = max(1.0, 0.05 * self.limit) / self.limit if slow else 1.0
            self.limit = min(float(self.most), self.limit + step)

    def refused(self, in_flight: int) -> None:
        """The server asked for less, by a request sent after the last such answer."""
        if self.adaptive and in_flight >= 0.8 * int(self.limit):
            self._refused_at, self.limit = self.limit, max(1.0, 0.8 * self.limit)

    def failed(self) -> None:
        """The server failed, which says nothing of its limits; but this is no time to ask for more."""
        self._calm = min(self._calm + _CALM, int(self.limit))


class RetryBudget:
    """How many failed requests are sent again while others succeed: a share of these (gRPC's retry throttling, A6).

    A request that fails whenever it is sent would otherwise be paid for `max_retries` times more. First retries go
    before later ones, so that requests that failed by chance have theirs. While most requests fail it is the server and
    not the request: then nothing is counted, and every request has all its attempts. Only first attempts tell that;
    those after them are made by requests that fail.
    """

    def __init__(self) -> None:
        self._left = float(_RETRY_RESERVE)
        self._healthy = 1.0

    def succeeded(self) -> None:
        """A request was answered."""
        self._left = min(float(_RETRY_RESERVE), self._left + _RETRY_SHARE)
        self._healthy += 0.05 * (1.0 - self._healthy)

    def spend(self, attempt: int) -> bool:
        """Whether a request may be sent again after so many failed attempts, 1 or more; if so, it is counted."""
        if attempt == 1:
            self._healthy -= 0.05 * self._healthy
        if self._healthy < 0.5:
            return True
        if self._left < 1.0 + 0.15 * _RETRY_RESERVE * min(attempt - 1, 4):
            return False
        self._left -= 1.0
        return True


@dataclass(slots=True)
class _Fall:
    """Refusals at lower and lower rates.

    Attributes:
        rate: at its beginning, in requests per second.
        lowest: rate at which a request was refused, so far.
        first: number of the first request refused after the rate had fallen to `_BEGUN` of that.
        refused: requests refused after that one.
        last: number of the last request refused.
        gap: requests between that one and the one before.
    """

    rate: float
    lowest: float
    first: int | None = None
    refused: int = 0
    last: int = 0
    gap: int = 0

    def go_on(self, number: int, rate: float) -> None:
        """Another request was refused, in order of their answers."""
        self.last, self.gap = number, number - self.last
        if self.first is not None:
            self.refused += 1
        elif rate < _BEGUN * self.rate:
            self.first = number

    def noise(self, rate: float, sent: int) -> float | None:
        """Share of requests that are refused at any rate, once the fall shows it; `sent` counts all requests."""
        if self.first is None or rate > _FUTILE * self.rate or sent - self.first < _ENOUGH:
            return None
        share = self.refused / (sent - self.first)
        return share if share < _MOST_NOISE and self.gap * share < _RARER else None


class RateFinder:
    """The rate at which a server lets requests in, learnt from what it admits and refuses; infinite at first.

    After a refusal the rate is set a little below the limit found, rises back to it, stays about it, then rises ever
    faster: after t seconds it is limit * (1 + 0.05 ((t - K) / K)^3), which is 0.95 at first, 1.05 at 2 K, and twice the
    limit at 3.7 K. K is 10 s, more for slow limits so that refusals stay rare.

    Refusals at lower and lower rates make it fall. If few requests are refused while it falls to half of what it was,
    and some still are there, no limit is the cause: it would have refused more at first or none at last. Then they are
    noise and count no more, until they become many more than that.
    """

    def __init__(self) -> None:
        self._limit = math.inf
        self._ceiling = math.inf
        self._since = 0.0
        self._sent = 0
        self._heard = 0
        self._epoch_at: float | None = None
        self._epoch_number = 0
        self._refused = 0
        self._shut = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=64)
        self._fall = _Fall(math.inf, 0.0)
        self._noise = 0.0
        self._lately: deque[int] = deque(maxlen=_NOISE_WINDOW)

    def sent(self, now: float) -> int:
        """A request went out; returns its number."""
        if self._epoch_at is None:
            self._epoch_at = now
        if not self._marks or now - self._marks[-1][0] >= 0.25:
            self._marks.append((now, self._sent))
        self._sent += 1
        return self._sent - 1

    def announced(self, now: float, per_minute: float) -> None:
        """The server named its limit (`x-ratelimit-limit-requests`)."""
        ceiling = 0.99 * per_minute / 60.0
        if ceiling != self._ceiling:
            self._ceiling, self._limit, self._since = ceiling, math.inf, now

    def refused(self, now: float, number: int, sent_at: float, retry_after: float | None) -> float | None:
        """A request was refused.

        Args:
            now: seconds on the event loop's clock.
            number: of the request, as `sent` gave it.
            sent_at: when it went out.
            retry_after: seconds that the server asks for.

        Returns:
            None if the request went out before the last refusal was heard of, so that it tells nothing. Else for how
            many seconds nothing should be sent, often 0.
        """
        self._fall.go_on(number, self._limit)
        if self._noise and self._is_noise(number, sent_at):
            return None
        if number < self._heard:
            self._refused += number >= self._epoch_number
            return None
        assert self._epoch_at is not None
        self._heard = self._sent
        admitted = number - self._epoch_number - self._refused
        if admitted <= 0:  # still shut: no news of the rate, so ask less and less often until it opens
            self._refused += 1
            self._shut += 1
            return min(_LONGEST_HOLD_S, max(retry_after or 0.0, 0.25 * 2.0 ** min(self._shut, 10)))
        before = self.rate(now)
        self._limit, self._since = min(before, self._measure(admitted, number, sent_at, before)), now
        self._begin_epoch(number, sent_at)
        self._marks.clear()
        if self._limit < _STEP * before or before > _LOWER * self._fall.lowest:
            self._fall = _Fall(self._limit, before)
        self._fall.lowest = min(self._fall.lowest, before)
        if share := self._fall.noise(self._limit, self._sent):
            self._noise, self._limit = share, math.inf
            return 0.0
        if not math.isinf(before):
            return 0.0
        return min(_LONGEST_HOLD_S, max(retry_after or 0.0, 0.5))

    def _begin_epoch(self, number: int, sent_at: float) -> None:
        """Count what is admitted anew, from the refused request on."""
        self._epoch_at, self._epoch_number, self._refused, self._shut = sent_at, number + 1, 0, 0

    def _is_noise(self, number: int, sent_at: float) -> bool:
        """Whether a refusal is one of those that come at any rate.

        It is not if they are many more than chance brings in the life of a run, or if there was none for so long that
        the noise has ended.
        """
        since = number - max(self._lately, default=number)
        self._lately.append(number)
        recent = sum(n > number - _NOISE_WINDOW for n in self._lately)
        expected = self._noise * _NOISE_WINDOW
        if since * self._noise < 20.0 and recent <= 2.5 * expected + 6.0:
            if number - self._epoch_number >= _NOISE_WINDOW:
                self._begin_epoch(number, sent_at)
            else:
                self._refused += number >= self._epoch_number
            return True
        self._noise = 0.0
        self._lately.clear()
        return False

    def _measure(self, admitted: int, number: int, sent_at: float, before: float) -> float:
        """Requests per second that the server admitted until it refused this one.

        Over the time since the last refusal; but over the last seconds, if the rate has grown much since then, so
        that the server could have admitted more before.

        Args:
            admitted: since the last refusal.
            number: of the refused request.
            sent_at: when it went out.
            before: the rate until now.
        """
        assert self._epoch_at is not None
        span = sent_at - self._epoch_at
        if math.isinf(before):
            return (admitted + 0.5) / max(span, 0.25)
        if span < 0.25:  # too short to tell
            return 0.9 * before
        measured = (admitted + 0.5) / span
        if admitted < 5:
            return math.sqrt(measured * before) if measured < before else before
        for at, first in reversed(self._marks) if not self._shut else ():
            if at >= self._epoch_at and sent_at - at >= 2.0 and number - first >= 10:
                recent = (number - first + 0.5) / (sent_at - at)
                return recent if recent > 1.2 * measured else measured
        return measured

    def rate(self, now: float) -> float:
        """Requests per second."""
        if math.isinf(self._limit):
            return self._ceiling
        plateau = min(60.0, max(10.0, 50.0 / self._limit))
        x = (now - self._since - plateau) / plateau
        return min(self._ceiling, self._limit * (1.0 + 0.05 * x**3))


@dataclass(slots=True)
class Pass:
    """Leave to send one request: its number, when it was given, and the tokens reserved for it."""

    number: int
    sent_at: float
    tokens: float


@dataclass(order=True, slots=True)
class _Waiting:
    rank: tuple[int, int]
    tokens: float = field(compare=False)
    future: asyncio.Future[Pass | None] = field(compare=False)


class Gate:
    """Lets requests out to one endpoint, the smallest rank first, as fast as its limits allow.

    Args:
        max_in_flight: most requests at a time.
        adaptive: learn from refusals.
        requests_per_minute: cap; None for none.
        tokens_per_minute: cap on prompt and completion tokens together; None for none.
    """

    def __init__(
        self,
        max_in_flight: int,
        *,
        adaptive: bool = True,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self.concurrency = Concurrency(max_in_flight, adaptive)
        self.finder = RateFinder()
        self.in_flight = 0
        self._adaptive = adaptive
        self._caps = None if requests_per_minute is None else TokenBucket.per_minute(requests_per_minute)
        self._token_caps = None if tokens_per_minute is None else TokenBucket.per_minute(tokens_per_minute)
        self._pace = TokenBucket(math.inf, 1.0)
        self._told_tokens: float | None = None
        self._token_pace = TokenBucket(math.inf, 1.0)
        self._held_until = -math.inf
        self._queue: list[_Waiting] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def load(self) -> int:
        """Requests out and waiting."""
        return self.in_flight + len(self._queue)

    async def enter(self, rank: tuple[int, int], tokens: float = 0.0) -> Pass | None:
        """Wait for a turn. Whoever gets a pass must `leave`.

        Args:
            rank: smaller ones go first.
            tokens: an estimate of prompt and completion tokens.

        Returns:
            The pass; None if the endpoint was found to be gone meanwhile.
        """
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rank, tokens, loop.create_future())
        heapq.heappush(self._queue, waiting)
        self._pump(loop)
        try:
            return await waiting.future
        except asyncio.CancelledError:
            if waiting.future.done() and not waiting.future.cancelled() and waiting.future.result():
                self._release(loop)
            raise

    def leave(self, passed: Pass, *, tokens: float | None = None) -> None:
        """The request ended; correct the tokens that were reserved by those used, if they are known."""
        loop = asyncio.get_running_loop()
        if tokens is not None:
            for bucket in (self._token_caps, self._token_pace):
                if bucket is not None:
                    bucket.take(loop.time(), tokens - passed.tokens)
        self._release(loop)

    def answered(self, headers: Mapping[str, str]) -> None:
        """An answer came; call before `leave`."""
        now = asyncio.get_running_loop().time()
        self.concurrency.answered(self.in_flight)
        self._heed(now, headers)

    def refused(self, passed: Pass, headers: Mapping[str, str], retry_after: float | None) -> None:
        """The server answered 429; call before `leave`."""
        now = asyncio.get_running_loop().time()
        self._heed(now, headers)
        if self._adaptive:
            hold = self.finder.refused(now, passed.number, passed.sent_at, retry_after)
            if hold is not None:
                self.concurrency.refused(self.in_flight)
                self._held_until = max(self._held_until, now + hold)

    def failed(self) -> None:
        """The server answered 5xx or not at all; call before `leave`."""
        self.concurrency.failed()

    def turn_away(self) -> None:
        """The endpoint is gone: whoever waits gets no pass."""
        for waiting in self._queue:
            if not waiting.future.done():
                waiting.future.set_result(None)
        self._queue.clear()

    def _heed(self, now: float, headers: Mapping[str, str]) -> None:
        """What a server says of its limits, in OpenAI's headers."""
        if not self._adaptive:
            return
        if (limit := _number(headers.get("x-ratelimit-limit-requests"))) > 0:
            self.finder.announced(now, limit)
        if (limit := _number(headers.get("x-ratelimit-limit-tokens"))) > 0 and limit != self._told_tokens:
            self._told_tokens = limit
            self._token_pace.set_rate(now, limit / 60.0, max(1.0, limit // 100))

    def _release(self, loop: asyncio.AbstractEventLoop) -> None:
        self.in_flight -= 1
        self._pump(loop)

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let out as many as the limits allow now, and come back when they allow the next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = loop.time()
        if self._adaptive:
            rate = self.finder.rate(now)
            self._pace.set_rate(now, rate, 1.0 if math.isinf(rate) else max(1.0, 0.1 * rate))
        while self._queue and self.in_flight < int(self.concurrency.limit):
            head = self._queue[0]
            if head.future.done():  # cancelled while it waited
                heapq.heappop(self._queue)
                continue
            if (wait := self._wait(now, head.tokens)) > 0.0:
                self._timer = loop.call_later(wait, self._pump, loop)
                return
            heapq.heappop(self._queue)
            for bucket in (self._caps, self._pace):
                if bucket is not None:
                    bucket.take(now)
            for bucket in (self._token_caps, self._token_pace):
                if bucket is not None:
                    bucket.take(now, head.tokens)
            self.in_flight += 1
            head.future.set_result(Pass(self.finder.sent(now), now, head.tokens))

    def _wait(self, now: float, tokens: float) -> float:
        waits = [self._held_until - now, self._pace.wait(now), self._token_pace.wait(now, tokens)]
        if self._caps is not None:
            waits.append(self._caps.wait(now))
        if self._token_caps is not None:
            waits.append(self._token_caps.wait(now, tokens))
        return max(waits)


def _number(text: str | None) -> float:
    try:
        return float(text or 0.0)
    except ValueError:
        return 0.0


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms` (OpenAI), `Retry-After` in seconds or as an HTTP date.

    Args:
        headers: of the response; names in lower case, or a mapping that ignores case.
        now: seconds since the epoch.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(text).timestamp() - now
            except ValueError:
                continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    return None
