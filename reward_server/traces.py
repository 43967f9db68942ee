"""OpenTelemetry spans of a server (the extra `otel`): one per call, and one per batch.

A call's span continues the trace that its `traceparent` names. A batch's span has the first recorded call in it as its
parent, so that it is recorded if one of its calls is; it and each of its calls link to one another. Spans hold names,
numbers and statuses, never text of a prompt or response.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from typing import TYPE_CHECKING

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanKind, StatusCode

from reward_server.observe import Call, Observer
from reward_server.scorers.base import Failure, Outcome, Scorer

if TYPE_CHECKING:
    from reward_server.batcher import Report

_SERVICE_NAME = "rlaif-reward-server"
_ERRORS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""Statuses that are the server's fault (https://opentelemetry.io/docs/specs/semconv/rpc/grpc, server spans)."""


class Traces(Observer):
    """Spans of one server. Names and attributes of calls are OpenTelemetry's conventions for gRPC and HTTP.

    Args:
        processor: where ended spans go.
    """

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create()
        if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": _SERVICE_NAME}))
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("rlaif.reward_server")

    @classmethod
    def to_collector(cls, endpoint: str) -> Traces:
        """Spans that go to an OTLP collector over gRPC. What is not the endpoint, the OTEL_* variables decide."""
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def close(self) -> None:
        """Send what is left. Blocks meanwhile."""
        self._provider.shutdown()

    @contextmanager
    def during(self, call: Call) -> Iterator[None]:
        """See `Observer`."""
        if call.service:
            name = f"{call.service}/{call.method}"
            about = {"rpc.system.name": "grpc", "rpc.method": name}
        else:
            name = call.method
            verb, _, route = name.partition(" ")
            about = {"http.request.method": verb, "http.route": route}
        span = self._tracer.start_span(
            name, propagate.extract(call.headers), kind=SpanKind.SERVER, attributes=about
        )
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield
            finally:
                self._end(span, call)

    def _end(self, span: trace.Span, call: Call) -> None:
        if call.service:
            span.set_attribute("rpc.response.status_code", call.code)
            failed = call.code in _ERRORS
        else:
            span.set_attribute("http.response.status_code", int(call.code))
            failed = int(call.code) >= 500
        if failed:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", call.code)

    def answered(self, scorer: Scorer, outcomes: Sequence[Outcome], report: Report) -> None:
        """See `Observer`."""
        counts = Counter(o.problem if isinstance(o, Failure) else "score" for o in outcomes)
        trace.get_current_span().set_attributes(
            {
                "rlaif.model.name": scorer.name,
                "rlaif.model.version": scorer.version,
                "rlaif.items": len(outcomes),
                "rlaif.tokens": report.input_tokens,
                "rlaif.tokenize_s": report.tokenize_s,
                "rlaif.queue_s": report.queue_s,
                "rlaif.compute_s": report.compute_s,
                **{f"rlaif.outcome.{name}": count for name, count in counts.items()},
            }
        )

    def batch(
        self, items: int, tokens: int, padded: int, seconds: float, calls: Sequence[Context] = ()
    ) -> None:
        """See `Observer`."""
        ended = time.time_ns()
        spans = [context.run(trace.get_current_span) for context in calls]
        recorded = [span for span in spans if span.is_recording()]
        if not recorded:
            return
        batch = self._tracer.start_span(
            "batch",
            trace.set_span_in_context(recorded[0]),
            links=[Link(call.get_span_context()) for call in recorded],
            start_time=ended - round(1e9 * seconds),
            attributes={"rlaif.items": items, "rlaif.tokens": tokens, "rlaif.padded_tokens": padded},
        )
        batch.end(ended)
        for call in recorded:
            call.add_link(batch.get_span_context())
