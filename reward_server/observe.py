"""What the server tells of itself: the hooks that the batcher and the service report to, and Prometheus behind them.

No text of a prompt or response is ever reported, counted by, or logged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from reward_server.scorers.base import Failure, Outcome, Scored, Scorer
from rlaif.errors import ConfigError

if TYPE_CHECKING:
    from reward_server.batcher import Report

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_TOKENS = tuple(2**n for n in range(5, 18))
_ITEMS = tuple(2**n for n in range(11))


@dataclass(slots=True)
class Call:
    """One call, or one request of a stream, on its way.

    Attributes:
        method: name of the gRPC method, or `POST /path`.
        headers: metadata or headers that came with it.
        service: full name of the gRPC service; None for HTTP.
        code: how it ended: a gRPC status or an HTTP status; as long as nobody says, its caller went away.
    """

    method: str
    headers: Mapping[str, str] = field(default_factory=dict)
    service: str | None = None
    code: str = "CANCELLED"


class Observer:
    """Hears what happens, and must return at once. This one tells nobody."""

    def during(self, call: Call) -> AbstractContextManager[None]:
        """Entered when a call arrives; left when it ended with `call.code`."""
        return nullcontext()

    def answered(self, scorer: Scorer, outcomes: Sequence[Outcome], report: Report) -> None:
        """The items of the call under way have their outcomes; `report` is of those that reached the queue."""

    def batch(
        self, items: int, tokens: int, padded: int, seconds: float, calls: Sequence[Context] = ()
    ) -> None:
        """A batch was computed, for the calls under way in these contexts."""

    def out_of_memory(self) -> None:
        """A batch was split because the device had no room."""

    def cancelled(self, items: int) -> None:
        """So many waiting items were dropped because their caller went away."""

    def activated(self, name: str, version: str) -> None:
        """This model scores from now on."""


class Observers(Observer):
    """Several that hear the same."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """See `Observer`."""
        with ExitStack() as stack:
            for observer in self._observers:
                stack.enter_context(observer.during(call))
            yield

    def answered(self, scorer: Scorer, outcomes: Sequence[Outcome], report: Report) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.answered(scorer, outcomes, report)

    def batch(
        self, items: int, tokens: int, padded: int, seconds: float, calls: Sequence[Context] = ()
    ) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.batch(items, tokens, padded, seconds, calls)

    def out_of_memory(self) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.out_of_memory()

    def cancelled(self, items: int) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.cancelled(items)

    def activated(self, name: str, version: str) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.activated(name, version)


class Metrics(Observer):
    """Prometheus metrics of one server, in a registry of their own.

    Attributes:
        registry: what `serve` exposes.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at = self.registry
        self._calls = Counter("rlaif_calls", "Calls by method and status.", ["method", "code"], registry=at)
        self._call_seconds = Histogram(
            "rlaif_call_seconds", "Duration of calls.", ["method"], buckets=_SECONDS, registry=at
        )
        self._wait = Histogram(
            "rlaif_queue_seconds", "From admission to the batch.", buckets=_SECONDS, registry=at
        )
        self._compute = Histogram(
            "rlaif_batch_seconds", "Model time of a batch.", buckets=_SECONDS, registry=at
        )
        self._items = Histogram("rlaif_batch_items", "Items of a batch.", buckets=_ITEMS, registry=at)
        self._tokens = Histogram("rlaif_batch_tokens", "Tokens of a batch.", buckets=_TOKENS, registry=at)
        self._padded = Counter("rlaif_padded_tokens", "Tokens computed, padding included.", registry=at)
        self._real = Counter("rlaif_tokens", "Tokens of the items computed.", registry=at)
        self._outcomes = Counter(
            "rlaif_items", "Items: `score`, or why there is none.", ["outcome"], registry=at
        )
        self._oom = Counter("rlaif_out_of_memory", "Batches split for lack of memory.", registry=at)
        self._cancelled = Counter(
            "rlaif_cancelled_items", "Waiting items whose caller went away.", registry=at
        )
        self._scores = Histogram(
            "rlaif_score", "Raw scores.", buckets=(-10, -5, -2, -1, 0, 1, 2, 5, 10), registry=at
        )
        self._model = Gauge("rlaif_active_model", "1 for the active model.", ["name", "version"], registry=at)
        self._swaps = Counter("rlaif_activations", "Models activated.", registry=at)
        self._queue = Gauge("rlaif_queue_tokens", "Tokens that wait.", registry=at)

    def watch_queue(self, tokens: Callable[[], float]) -> None:
        """Where the length of the queue is read when somebody asks."""
        self._queue.set_function(tokens)

    def serve(self, host: str, port: int) -> int:
        """Expose the metrics over HTTP at /metrics; returns the port.

        Raises:
            ConfigError: the port is taken.
        """
        try:
            server, _ = start_http_server(port, host, self.registry)
        except OSError as err:
            raise ConfigError(
                f"cannot serve metrics on {host}:{port}: the port is in use or not allowed; give another --metrics_port"
            ) from err
        return int(server.server_port)

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """See `Observer`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._calls.labels(call.method, call.code).inc()
            self._call_seconds.labels(call.method).observe(time.monotonic() - started)

    def answered(self, scorer: Scorer, outcomes: Sequence[Outcome], report: Report) -> None:
        """See `Observer`."""
        if report.outcomes:
            self._wait.observe(report.queue_s)
        for outcome in outcomes:
            if isinstance(outcome, Failure):
                self._outcomes.labels(outcome.problem).inc()
                continue
            self._outcomes.labels("score").inc()
            if isinstance(outcome, Scored):
                self._scores.observe(outcome.raw)

    def batch(
        self, items: int, tokens: int, padded: int, seconds: float, calls: Sequence[Context] = ()
    ) -> None:
        """See `Observer`."""
        self._compute.observe(seconds)
        self._items.observe(items)
        self._tokens.observe(tokens)
        self._real.inc(tokens)
        self._padded.inc(padded)

    def out_of_memory(self) -> None:
        """See `Observer`."""
        self._oom.inc()

    def cancelled(self, items: int) -> None:
        """See `Observer`."""
        self._cancelled.inc(items)

    def activated(self, name: str, version: str) -> None:
        """See `Observer`."""
        self._model.clear()
        self._model.labels(name, version).set(1)
        self._swaps.inc()
