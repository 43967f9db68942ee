"""Spans of a running server over real channels: whose trace they continue, what they say; no text in them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import aiohttp
import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from policy_trainer.client import AsyncRewardClient, RewardClient
from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server.traces import Traces
from rlaif.types import user_prompt, with_response
from tests.reward_server.fakes import LengthScorer, score_request, serving

SCORE = "rlaif.reward.v1.RewardService/Score"
TRACE_ID, CALLER_ID = (
    "0af7651916cd43dd8448eb211c80319c",
    "b7ad6b7169203331",
)  # of W3C's Trace Context, section 3.2


class Recorded:
    """Traces whose spans stay in memory."""

    def __init__(self) -> None:
        self._memory = InMemorySpanExporter()
        self.traces = Traces(SimpleSpanProcessor(self._memory))

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._memory.get_finished_spans()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


def identity(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def traceparent(sampled: bool = True) -> str:
    return f"00-{TRACE_ID}-{CALLER_ID}-0{int(sampled)}"


def test_a_call_is_a_span_in_the_callers_trace_and_says_what_became_of_its_items() -> None:
    tracer = TracerProvider().get_tracer("trainer")

    async def scenario() -> None:
        recorded = Recorded()
        async with serving(LengthScorer(), traces=recorded.traces) as served:
            chats = [with_response(user_prompt("q"), text) for text in ("secret", "poison", "nan")]

            def train() -> int:
                """The client that runs in a thread of its own, called from a span of this thread."""
                with RewardClient(served.address) as client, tracer.start_as_current_span("step") as step:
                    client.score(chats)
                    return step.get_span_context().span_id

            step = await asyncio.to_thread(train)
            with tracer.start_as_current_span("other step") as other:
                async with AsyncRewardClient(served.address) as client:
                    await client.score(chats[:1])
            first, second = recorded.named(SCORE)
            assert first.parent is not None and first.parent.span_id == step
            assert second.parent is not None and second.parent.span_id == other.get_span_context().span_id
            assert first.kind is SpanKind.SERVER and first.status.status_code is StatusCode.UNSET
            said = attributes(first)
            assert (said["rpc.system.name"], said["rpc.method"]) == ("grpc", SCORE)
            assert said["rpc.response.status_code"] == "OK"
            assert (said["rlaif.model.name"], said["rlaif.model.version"]) == ("length", "length-1")
            assert (said["rlaif.items"], said["rlaif.tokens"]) == (3, len("secretpoisonnan"))
            outcomes = {name.rpartition(".")[2]: n for name, n in said.items() if "outcome" in name}
            assert outcomes == {"score": 1, "model_failed": 1, "not_finite": 1}
            assert said["rlaif.compute_s"] > 0 and said["rlaif.queue_s"] >= 0
            assert "secret" not in "".join(span.to_json() for span in recorded.spans)

    asyncio.run(scenario())


def test_a_batch_is_one_span_and_it_and_its_calls_link_to_one_another() -> None:
    async def scenario() -> None:
        recorded, scorer = Recorded(), LengthScorer()
        scorer.gate.clear()
        async with serving(scorer, traces=recorded.traces) as served:
            calls = [served.stub.Score(score_request("a"))]
            await scorer.started.wait()
            calls += [served.stub.Score(score_request("bb", "ccc")), served.stub.Score(score_request("dddd"))]
            (model,) = served.server._registry.models  # type: ignore[union-attr]
            while model.batcher.queued_tokens < len("bbcccdddd"):
                await asyncio.sleep(0.001)
            scorer.gate.set()
            await asyncio.gather(*calls)
        alone, shared = recorded.named("batch")
        assert attributes(alone)["rlaif.items"] == 1
        assert attributes(shared) == {"rlaif.items": 3, "rlaif.tokens": 9, "rlaif.padded_tokens": 12}
        by_tokens = {attributes(span)["rlaif.tokens"]: span for span in recorded.named(SCORE)}
        assert linked(alone) == {identity(by_tokens[1])} and linked(by_tokens[1]) == {identity(alone)}
        assert linked(shared) == {identity(by_tokens[5]), identity(by_tokens[4])}
        assert linked(by_tokens[5]) == linked(by_tokens[4]) == {identity(shared)}
        assert shared.start_time is not None and shared.end_time is not None
        assert shared.end_time > shared.start_time

    asyncio.run(scenario())


def test_what_the_caller_does_not_record_leaves_no_span_and_a_batch_joins_who_does() -> None:
    async def scenario() -> None:
        recorded, scorer = Recorded(), LengthScorer()
        async with serving(scorer, traces=recorded.traces) as served:
            unseen = (("traceparent", traceparent(sampled=False)),)
            await served.stub.Score(score_request("a"), metadata=unseen)
            assert recorded.spans == ()
            seen = (("traceparent", traceparent()),)
            await served.stub.Score(score_request("a"), metadata=seen)
            batch, call = recorded.spans
            assert (batch.name, call.name) == ("batch", SCORE)
            assert batch.parent is not None and batch.parent.span_id == identity(call)
            assert call.parent is not None and f"{call.parent.span_id:016x}" == CALLER_ID
            assert call.context is not None and f"{call.context.trace_id:032x}" == TRACE_ID

    asyncio.run(scenario())


def test_refused_and_abandoned_calls_are_spans_with_their_status() -> None:
    async def scenario() -> None:
        recorded, scorer = Recorded(), LengthScorer()
        async with serving(scorer, traces=recorded.traces) as served:
            with pytest.raises(grpc.aio.AioRpcError):
                await served.stub.Score(pb.ScoreRequest())
            scorer.gate.clear()
            going = served.stub.Score(score_request("a"))
            await scorer.started.wait()
            going.cancel()
            while len(recorded.named(SCORE)) < 2:
                await asyncio.sleep(0.001)
            scorer.gate.set()
            await served.server.drain()
            with pytest.raises(grpc.aio.AioRpcError):
                await served.stub.Score(score_request("a"), timeout=10)
        codes = [attributes(span)["rpc.response.status_code"] for span in recorded.named(SCORE)]
        assert codes == ["INVALID_ARGUMENT", "CANCELLED"]
        assert recorded.named("batch") == [], "nobody was there to be told of it"

    asyncio.run(scenario())


def test_requests_of_a_stream_are_spans_and_an_http_call_continues_its_trace() -> None:
    async def scenario() -> None:
        recorded = Recorded()
        async with serving(LengthScorer(), traces=recorded.traces, http_port=0) as served:
            envelopes = [pb.ScoreStreamRequest(request_id=i, request=score_request("a" * i)) for i in (1, 2)]
            headers = (("traceparent", traceparent()),)
            async for _ in served.stub.ScoreStream(iter(envelopes), metadata=headers):
                pass
            turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "secret"}]
            async with aiohttp.ClientSession(headers=dict(headers)) as session:
                url = f"{served.server.http_address}/classify"
                async with session.post(url, json={"messages": turns}) as answer:
                    assert answer.status == 200
                async with session.post(url, json={"input": 1}) as answer:
                    assert answer.status == 400
        streamed = recorded.named("rlaif.reward.v1.RewardService/ScoreStream")
        assert [attributes(span)["rlaif.tokens"] for span in streamed] == [1, 2]
        scored, refused = recorded.named("POST /classify")
        for span in (*streamed, scored, refused):
            assert span.context is not None and f"{span.context.trace_id:032x}" == TRACE_ID
        assert attributes(scored)["http.response.status_code"] == 200
        assert attributes(scored)["rlaif.outcome.score"] == 1
        assert attributes(refused)["http.response.status_code"] == 400

    asyncio.run(scenario())


def test_a_server_sends_its_spans_to_a_collector_before_it_ends() -> None:
    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        """An OTLP collector that keeps what it gets."""

        def __init__(self) -> None:
            self.got: list[Any] = []

        def Export(self, request: Any, context: Any) -> Any:
            self.got.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    async def scenario() -> None:
        collector = Collector()
        listening = grpc.server(futures.ThreadPoolExecutor(1))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, listening)
        port = listening.add_insecure_port("127.0.0.1:0")
        listening.start()
        traces = Traces.to_collector(f"http://127.0.0.1:{port}")
        async with serving(LengthScorer(), traces=traces) as served:
            await served.stub.Score(score_request("a"))
        listening.stop(None).wait()
        (resource,) = [r for request in collector.got for r in request.resource_spans]
        named = {a.key: a.value.string_value for a in resource.resource.attributes}
        assert named["service.name"] == "rlaif-reward-server"
        names = {span.name for scope in resource.scope_spans for span in scope.spans}
        assert names == {SCORE, "batch"}

    asyncio.run(scenario())


def test_without_opentelemetry_the_flag_is_one_line_and_without_the_flag_it_is_not_imported() -> None:
    program = """
import asyncio, sys
import policy_trainer.client, reward_server.server as server
from reward_server.config import ServeConfig
server._traces(ServeConfig(judge="tinyworld:judge"))
assert policy_trainer.client.trace_headers() == ()
assert not [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]
sys.modules["opentelemetry"] = None
from rlaif.cli import main
sys.exit(main(["serve", "--judge", "tinyworld:judge", "--otlp_endpoint", "http://127.0.0.1:9"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == "rlaif: --otlp_endpoint needs OpenTelemetry: pip install 'rlaif[otel]'"
    )
