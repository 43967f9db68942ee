"""The service over real gRPC on loopback, with a rule for a model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.config import ServeConfig
from reward_server.scorers.base import Compared, Outcome, Prepared
from reward_server.server import RewardServer
from reward_server.service import SERVICE
from rlaif.errors import ConfigError
from tests.reward_server.fakes import LengthScorer, conversation, score_request, serving

M = TypeVar("M", bound=Message)


async def refusal(call: grpc.aio.UnaryUnaryCall) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def test_every_item_has_one_outcome_in_the_order_asked() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer(), max_batch_tokens=20) as served:
            responses = ["a" * n for n in (7, 1, 12, 3, 9, 2, 15)]
            answer = await served.stub.Score(score_request(*responses))
            assert [o.id for o in answer.outcomes] == [100, 101, 102, 103, 104, 105, 106]
            assert [o.score.raw for o in answer.outcomes] == [7, 1, 12, 3, 9, 2, 15]
            assert [o.score.normalized for o in answer.outcomes] == [
                (n - 10) / 5 for n in (7, 1, 12, 3, 9, 2, 15)
            ]
            assert [o.score.tokens for o in answer.outcomes] == [7, 1, 12, 3, 9, 2, 15]
            assert (answer.model.name, answer.model.version) == ("length", "length-1")

    asyncio.run(scenario())


def test_a_poison_item_fails_alone_and_health_stays_serving() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with serving(scorer) as served:
            responses = ["a" * (n + 1) for n in range(63)]
            responses.insert(40, "poison")
            answer = await served.stub.Score(score_request(*responses))
            failed = [i for i, o in enumerate(answer.outcomes) if o.HasField("error")]
            assert failed == [40]
            assert answer.outcomes[40].error.code == code_pb2.INTERNAL
            assert "CUDA" not in answer.outcomes[40].error.message
            assert [o.score.raw for o in answer.outcomes if o.HasField("score")] == list(range(1, 64))
            assert len(scorer.batches) <= 1 + 6 + 2  # the search, the item alone, the rest
            assert await served.status() == "SERVING"

    asyncio.run(scenario())


def test_a_score_that_is_not_finite_is_an_error_of_its_item() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer()) as served:
            answer = await served.stub.Score(score_request("abc", "nan", "de"))
            assert [o.WhichOneof("outcome") for o in answer.outcomes] == ["score", "error", "score"]
            assert answer.outcomes[1].error.code == code_pb2.INTERNAL
            assert "nan" in answer.outcomes[1].error.message

    asyncio.run(scenario())


def test_another_version_than_expected_computes_nothing() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        async with serving(scorer) as served:
            error = await refusal(served.stub.Score(score_request("abc", expected_version="length-2")))
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert scorer.batches == []
            await served.stub.Score(score_request("abc", expected_version="length-1"))
            assert scorer.computed == ["abc"]

    asyncio.run(scenario())


def test_a_full_queue_refuses_whole_requests_at_once_while_health_answers() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        scorer.gate.clear()
        async with serving(scorer, max_queue_tokens=30) as served:
            running = asyncio.ensure_future(served.stub.Score(score_request("a" * 10)))
            await scorer.started.wait()
            queued = asyncio.ensure_future(served.stub.Score(score_request("b" * 10, "b" * 10)))
            await until_refused(served.stub, "c" * 25)
            error = await refusal(served.stub.Score(score_request("d" * 2, "d" * 9)))
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            retry = detail(error, RetryInfo())
            assert retry.retry_delay.ToMilliseconds() > 0
            assert await served.status() == "SERVING"
            scorer.gate.set()
            assert [o.score.raw for o in (await running).outcomes] == [10]
            assert [o.score.raw for o in (await queued).outcomes] == [10, 10]
            assert not any(r.startswith(("c", "d")) for r in scorer.computed)

    asyncio.run(scenario())


def probe(stub: Any, response: str = "probe") -> grpc.aio.UnaryUnaryCall:
    """A call that is refused at once if the queue is full, and else waits in it for a moment."""
    call: grpc.aio.UnaryUnaryCall = stub.Score(score_request(response), timeout=0.2)
    return call


async def until_refused(stub: Any, response: str) -> None:
    """Return when the queue has no room for this response: what was sent before has arrived."""
    while (await refusal(probe(stub, response))).code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
        pass


def detail(error: grpc.aio.AioRpcError, message: M) -> M:
    """The detail of this type in a rich status."""
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata[rpc_status.GRPC_DETAILS_METADATA_KEY])
    packed = next(d for d in status.details if d.Is(message.DESCRIPTOR))
    packed.Unpack(message)
    return message


def test_an_item_whose_deadline_passed_while_queued_is_not_computed() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        scorer.gate.clear()
        async with serving(scorer) as served:
            running = asyncio.ensure_future(served.stub.Score(score_request("first")))
            await scorer.started.wait()
            late = [served.stub.Score(score_request("late"), timeout=0.05) for _ in range(200)]
            for call in late:
                assert (await refusal(call)).code() == grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.sleep(0.1)  # the server's clock reaches the deadline a moment after the caller's
            scorer.gate.set()
            await running
            await served.stub.Score(score_request("after"))
            assert scorer.computed == ["first", "after"]

    asyncio.run(scenario())


def test_an_item_whose_caller_left_while_queued_is_not_computed() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        scorer.gate.clear()
        async with serving(scorer, max_queue_items=1) as served:
            running = asyncio.ensure_future(served.stub.Score(score_request("first")))
            await scorer.started.wait()
            gone = served.stub.Score(score_request("gone"))
            await until_refused(served.stub, "probe")
            gone.cancel()
            while (await refusal(probe(served.stub))).code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                pass  # still no room: the server has not yet heard that the caller left
            scorer.gate.set()
            await running
            while True:
                try:
                    await served.stub.Score(score_request("after"))
                    break
                except grpc.aio.AioRpcError as err:
                    assert err.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "gone" not in scorer.computed
            assert (scorer.computed[0], scorer.computed[-1]) == ("first", "after")

    asyncio.run(scenario())


def test_draining_finishes_what_is_in_flight_and_refuses_what_comes_after() -> None:
    async def scenario() -> None:
        scorer = LengthScorer()
        scorer.gate.clear()
        async with serving(scorer, max_queue_items=2) as served:
            running = [asyncio.ensure_future(served.stub.Score(score_request("a")))]
            await scorer.started.wait()
            running += [asyncio.ensure_future(served.stub.Score(score_request("a" * n))) for n in (2, 3)]
            await until_refused(served.stub, "probe")  # one is computed, two wait
            draining = asyncio.ensure_future(served.server.drain())
            while await served.status() != "NOT_SERVING":
                await asyncio.sleep(0.01)
            assert (
                await refusal(served.stub.Score(score_request("x")))
            ).code() == grpc.StatusCode.UNAVAILABLE
            scorer.gate.set()
            answers = await asyncio.gather(*running)
            assert [a.outcomes[0].score.raw for a in answers] == [1, 2, 3]
            assert await draining

    asyncio.run(scenario())


def test_a_server_that_warms_up_answers_health_but_scores_nothing() -> None:
    async def scenario() -> None:
        server = RewardServer(ServeConfig(model="fake", port=0))
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE):
                answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
                assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            error = await refusal(stub.Score(score_request("x")))
            assert error.code() == grpc.StatusCode.UNAVAILABLE
        await server.drain()

    asyncio.run(scenario())


def test_a_second_server_on_the_port_is_refused() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer()) as served:
            port = int(served.address.rpartition(":")[2])
            with pytest.raises(ConfigError, match=f"{port}.*in use"):
                await RewardServer(ServeConfig(model="fake", port=port)).start()

    asyncio.run(scenario())


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "example.org"])
def test_only_loopback_is_served(host: str) -> None:
    with pytest.raises(ConfigError, match="not loopback"):
        ServeConfig(model="fake", host=host)


@pytest.mark.parametrize("flags", [{}, {"model": "a", "judge": "b"}])
def test_a_server_has_a_model_or_a_judge(flags: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="either --model"):
        ServeConfig(**flags)  # type: ignore[arg-type]


def test_bad_fields_are_named_and_bad_items_fail_alone() -> None:
    async def scenario() -> None:
        scorer = LengthScorer(max_tokens_per_item=5)
        async with serving(scorer, max_items=4) as served:
            for request, field in (
                (pb.ScoreRequest(), "items"),
                (score_request(*"abcde"), "items"),
                (pb.ScoreRequest(items=[score_request("a").items[0]] * 2), "items[1].id"),
                (score_request("a", truncation=9), "truncation"),
            ):
                error = await refusal(served.stub.Score(request))
                assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert [v.field for v in detail(error, BadRequest()).field_violations] == [field]
            assert scorer.batches == []

            request = pb.ScoreRequest(
                items=[
                    pb.ScoreItem(id=1, conversation=conversation("q", "good")),
                    pb.ScoreItem(id=2, conversation=conversation("q")),
                    pb.ScoreItem(id=3),
                    pb.ScoreItem(id=4, conversation=conversation("q", "too long")),
                ]
            )
            codes = [o.error.code for o in (await served.stub.Score(request)).outcomes]
            bad = code_pb2.INVALID_ARGUMENT
            assert codes == [code_pb2.OK, bad, bad, code_pb2.OUT_OF_RANGE]
            (empty,) = (await served.stub.Score(score_request(""))).outcomes
            assert empty.HasField("score"), "a response of no text is a response"
            request.truncation = pb.TRUNCATION_LEFT
            assert (await served.stub.Score(request)).outcomes[3].HasField("score")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("count", "fields"),
    [(256, [f"items[{i}].id" for i in range(1, 9)]), (300_000, ["items"])],
    ids=["ids left out", "too many items"],
)
def test_a_mistake_repeated_in_every_item_is_named_a_few_times(count: int, fields: list[str]) -> None:
    """What is named travels in the trailer, which a client refuses beyond 16 KiB."""

    async def scenario() -> None:
        async with serving(LengthScorer()) as served:
            request = pb.ScoreRequest(items=[pb.ScoreItem()] * count)
            error = await refusal(served.stub.Score(request))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert [v.field for v in detail(error, BadRequest()).field_violations] == fields

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "data", [b"\x0a\x05\xff", b"\xff" * 30, b"\x12\x02\xc3\x28"], ids=["cut off", "no message", "not UTF-8"]
)
def test_bytes_that_are_no_message_are_the_callers_mistake(data: bytes) -> None:
    async def scenario() -> None:
        async with serving(LengthScorer()) as served, grpc.aio.insecure_channel(served.address) as channel:
            error = await refusal(channel.unary_unary(f"/{SERVICE}/Score")(data))
            assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "google.protobuf" not in str(error.details()) and "Error" not in str(error.details())

    asyncio.run(scenario())


def test_an_unforeseen_error_is_told_without_its_class_and_logged_without_its_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Unfinished(LengthScorer):
        async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
            return [Compared(0.5, tokens=1) for _ in batch]  # where a score was asked for

    async def scenario() -> None:
        async with serving(Unfinished()) as served:
            error = await refusal(served.stub.Score(score_request("private")))
            assert error.code() == grpc.StatusCode.INTERNAL
            assert "Error" not in str(error.details()) and "internal" in str(error.details())

    asyncio.run(scenario())
    assert "Score failed with AssertionError" in caplog.text and "private" not in caplog.text


def test_info_tells_limits_and_scale_and_reflection_lists_the_service() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer(77), max_items=9) as served:
            info = await served.stub.GetInfo(pb.GetInfoRequest())
            assert info.kind == pb.SCORER_KIND_REWARD_MODEL
            assert (info.limits.max_items, info.limits.max_tokens_per_item) == (9, 77)
            assert (info.normalization.center, info.normalization.scale) == (10.0, 5.0)
            async with grpc.aio.insecure_channel(served.address) as channel:
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                call = stub.ServerReflectionInfo(
                    iter([reflection_pb2.ServerReflectionRequest(list_services="")])
                )
                listed = (await call.read()).list_services_response.service
                assert {SERVICE, "grpc.health.v1.Health"} <= {s.name for s in listed}

    asyncio.run(scenario())


def test_the_health_check_command_tells_by_its_exit_code() -> None:
    async def scenario() -> None:
        command = [sys.executable, "-m", "reward_server.healthcheck"]
        async with serving(LengthScorer()) as served:
            up = await asyncio.to_thread(
                subprocess.run, [*command, served.address], capture_output=True, text=True
            )
            address = served.address
        down = await asyncio.to_thread(subprocess.run, [*command, address], capture_output=True, text=True)
        assert (up.returncode, up.stdout.split()[1]) == (0, "SERVING")
        assert down.returncode == 1

    asyncio.run(scenario())
