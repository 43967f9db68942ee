"""The gRPC servicer: the one place that knows protobuf and status codes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server.batcher import Batcher, Overloaded, Report
from reward_server.scorers.base import (
    Compared,
    CompareTask,
    Failure,
    Normalization,
    Outcome,
    Problem,
    Scored,
    ScoreTask,
    Task,
    Truncation,
)
from rlaif import types

SERVICE = pb.DESCRIPTOR.services_by_name["RewardService"].full_name
_DOMAIN = "rlaif.reward.v1"

_TRUNCATION: dict[int, Truncation] = {
    pb.TRUNCATION_UNSPECIFIED: "reject",
    pb.TRUNCATION_REJECT: "reject",
    pb.TRUNCATION_LEFT: "left",
}
_CODES: dict[Problem, int] = {
    "invalid": code_pb2.INVALID_ARGUMENT,
    "too_long": code_pb2.OUT_OF_RANGE,
    "no_score": code_pb2.INTERNAL,
    "not_finite": code_pb2.INTERNAL,
    "model_failed": code_pb2.INTERNAL,
    "unavailable": code_pb2.UNAVAILABLE,
    "expired": code_pb2.DEADLINE_EXCEEDED,
    "unsupported": code_pb2.UNIMPLEMENTED,
}

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class RewardService:
    """`rlaif.reward.v1.RewardService` over one batcher.

    Without a batcher the server is warming up, and after `drain` it is going away: both answer UNAVAILABLE.
    """

    def __init__(self, *, max_items: int, max_request_bytes: int) -> None:
        self._max_items = max_items
        self._max_request_bytes = max_request_bytes
        self._batcher: Batcher | None = None
        self._draining = False
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, batcher: Batcher) -> None:
        """Start answering."""
        self._batcher = batcher

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls and wait for those in flight; returns whether all of them finished."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def handlers(self) -> grpc.GenericRpcHandler[bytes, bytes]:
        """The methods for `add_generic_rpc_handlers`.

        They take bytes and parse here: a message that cannot be parsed is the caller's mistake and gets
        INVALID_ARGUMENT, where grpc's own parsing step would answer UNKNOWN with a Python class name.
        """
        methods = {
            "Score": _method(self.Score, pb.ScoreRequest),
            "Compare": _method(self.Compare, pb.CompareRequest),
            "GetInfo": _method(self.GetInfo, pb.GetInfoRequest),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        """Score conversations."""
        async with self._serving(request, context) as batcher:
            truncation = _TRUNCATION[request.truncation]
            tasks: list[Task | Failure] = []
            for item in request.items:
                conversation = _conversation(item.conversation)
                if isinstance(conversation, Failure):
                    tasks.append(conversation)
                elif conversation[-1].role != "assistant":
                    tasks.append(
                        Failure("invalid", "the conversation must end with the assistant turn to score")
                    )
                elif len(conversation) == 1:
                    tasks.append(
                        Failure("invalid", "the conversation has no prompt before the assistant turn")
                    )
                else:
                    tasks.append(ScoreTask(conversation, truncation, request.with_rationale))
            outcomes, timing = await self._submit(batcher, tasks, context)
            scale = batcher.scorer.normalization
            return pb.ScoreResponse(
                outcomes=[
                    _score_outcome(i.id, o, scale) for i, o in zip(request.items, outcomes, strict=True)
                ],
                model=_model(batcher),
                timing=timing,
            )

    async def Compare(self, request: pb.CompareRequest, context: Context) -> pb.CompareResponse:
        """Compare two responses to each prompt."""
        async with self._serving(request, context) as batcher:
            truncation = _TRUNCATION[request.truncation]
            tasks: list[Task | Failure] = []
            for item in request.items:
                prompt = _conversation(item.prompt)
                if isinstance(prompt, Failure):
                    tasks.append(prompt)
                elif prompt[-1].role != "user":
                    tasks.append(Failure("invalid", "the prompt must end with a user turn"))
                else:
                    tasks.append(
                        CompareTask(types.Pair(prompt, item.response_a, item.response_b), truncation)
                    )
            outcomes, timing = await self._submit(batcher, tasks, context)
            return pb.CompareResponse(
                outcomes=[_compare_outcome(i.id, o) for i, o in zip(request.items, outcomes, strict=True)],
                model=_model(batcher),
                timing=timing,
            )

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> pb.GetInfoResponse:
        """Who is serving."""
        if self._batcher is None or self._draining:
            await self._unavailable(context)
        scorer = self._batcher.scorer
        kinds = {"reward_model": pb.SCORER_KIND_REWARD_MODEL, "judge": pb.SCORER_KIND_JUDGE}
        scale = scorer.normalization
        return pb.GetInfoResponse(
            model=_model(self._batcher),
            kind=kinds[scorer.kind],
            limits=pb.Limits(
                max_items=self._max_items,
                max_tokens_per_item=scorer.max_tokens_per_item,
                max_request_bytes=self._max_request_bytes,
            ),
            normalization=pb.Normalization(center=scale.center, scale=scale.scale, source=scale.source),
        )

    @contextlib.asynccontextmanager
    async def _serving(
        self, request: pb.ScoreRequest | pb.CompareRequest, context: Context
    ) -> AsyncIterator[Batcher]:
        """Everything that is checked before any item is looked at."""
        if self._batcher is None or self._draining:
            await self._unavailable(context)
        self._in_flight += 1
        self._idle.clear()
        try:
            version = self._batcher.scorer.version
            if request.HasField("expected_version") and request.expected_version != version:
                await _abort(
                    context,
                    code_pb2.FAILED_PRECONDITION,
                    f"version {version} is served, not {request.expected_version}; nothing was computed",
                    ErrorInfo(reason="VERSION_MISMATCH", domain=_DOMAIN, metadata={"served": version}),
                )
            violations = list(self._violations(request))
            if violations:
                first = violations[0]
                await _abort(
                    context,
                    code_pb2.INVALID_ARGUMENT,
                    f"{first.field}: {first.description}",
                    BadRequest(field_violations=violations),
                )
            yield self._batcher
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    def _violations(
        self, request: pb.ScoreRequest | pb.CompareRequest
    ) -> Iterable[BadRequest.FieldViolation]:
        ids = [item.id for item in request.items]
        if not 1 <= len(ids) <= self._max_items:
            text = f"must hold 1 to {self._max_items} items, not {len(ids)}"
            yield BadRequest.FieldViolation(field="items", description=text)
        seen: set[int] = set()
        for index, item_id in enumerate(ids):
            if item_id in seen:
                text = f"{item_id} is the id of an earlier item; ids must be unique within a request"
                yield BadRequest.FieldViolation(field=f"items[{index}].id", description=text)
            seen.add(item_id)
        if request.truncation not in _TRUNCATION:
            text = f"{request.truncation} is no Truncation"
            yield BadRequest.FieldViolation(field="truncation", description=text)

    async def _submit(
        self, batcher: Batcher, tasks: Sequence[Task | Failure], context: Context
    ) -> tuple[list[Outcome], pb.Timing]:
        """Outcomes in the order of `tasks`, failures among them as they are."""
        valid = [t for t in tasks if not isinstance(t, Failure)]
        report = Report([], 0.0, 0.0, 0)
        if valid:
            try:
                report = await batcher.submit(valid, context.time_remaining())
            except Overloaded as err:
                delay = Duration()
                delay.FromMilliseconds(round(err.retry_after_s * 1000))
                await _abort(
                    context,
                    code_pb2.RESOURCE_EXHAUSTED,
                    str(err),
                    ErrorInfo(reason="QUEUE_FULL", domain=_DOMAIN),
                    RetryInfo(retry_delay=delay),
                )
        computed = iter(report.outcomes)
        outcomes = [t if isinstance(t, Failure) else next(computed) for t in tasks]
        timing = pb.Timing(
            queue_us=round(report.queue_s * 1e6),
            compute_us=round(report.compute_s * 1e6),
            batch_items=report.batch_items,
        )
        return outcomes, timing

    async def _unavailable(self, context: Context) -> NoReturn:
        doing = "draining" if self._draining else "warming up"
        await _abort(context, code_pb2.UNAVAILABLE, f"the server is {doing}")


def _method(
    behaviour: Callable[[Request, Context], Awaitable[Response]], request_class: type[Request]
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def parse_and_call(data: bytes, context: Context) -> Response:
        try:
            request = request_class.FromString(data)
        except DecodeError:
            name = request_class.DESCRIPTOR.full_name
            await _abort(context, code_pb2.INVALID_ARGUMENT, f"the message is no valid {name}")
        return await behaviour(request, context)

    return grpc.unary_unary_rpc_method_handler(
        parse_and_call, request_deserializer=None, response_serializer=lambda m: m.SerializeToString()
    )


async def _abort(context: Context, code: int, message: str, *details: Message) -> NoReturn:
    """End the call with a rich status (google.rpc.Status in the trailer, as grpcio-status reads it)."""
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        status.details.add().Pack(detail)
    number = {c.value[0]: c for c in grpc.StatusCode}[code]
    trailer = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(number, message, trailing_metadata=trailer)
    raise AssertionError("abort raises")


def _conversation(message: pb.Conversation) -> types.Conversation | Failure:
    if not message.messages:
        return Failure("invalid", "the conversation has no messages")
    turns = []
    for index, turn in enumerate(message.messages):
        if turn.role not in ("system", "user", "assistant"):
            return Failure("invalid", f"messages[{index}].role must be system, user or assistant")
        turns.append(types.Message(turn.role, turn.content))  # type: ignore[arg-type]
    return tuple(turns)


def _score_outcome(item_id: int, outcome: Outcome, scale: Normalization) -> pb.ScoreOutcome:
    if isinstance(outcome, Failure):
        return pb.ScoreOutcome(id=item_id, error=_status(outcome))
    assert isinstance(outcome, Scored)
    score = pb.Score(
        raw=outcome.raw,
        normalized=(outcome.raw - scale.center) / scale.scale,
        tokens=outcome.tokens,
        truncated=outcome.truncated,
        rationale=outcome.rationale,
    )
    if outcome.distribution is not None:
        reading = outcome.distribution
        score.distribution.CopyFrom(
            pb.LevelDistribution(probability=reading.probability, level=reading.level, mass=reading.mass)
        )
    return pb.ScoreOutcome(id=item_id, score=score)


def _compare_outcome(item_id: int, outcome: Outcome) -> pb.CompareOutcome:
    if isinstance(outcome, Failure):
        return pb.CompareOutcome(id=item_id, error=_status(outcome))
    assert isinstance(outcome, Compared)
    return pb.CompareOutcome(
        id=item_id,
        comparison=pb.Comparison(
            p_a=outcome.p_a,
            p_a_first=outcome.p_a_first,
            p_a_second=outcome.p_a_second,
            tokens=outcome.tokens,
            truncated=outcome.truncated,
        ),
    )


def _status(failure: Failure) -> status_pb2.Status:
    status = status_pb2.Status(code=_CODES[failure.problem], message=failure.message)
    status.details.add().Pack(ErrorInfo(reason=failure.problem.upper(), domain=_DOMAIN))
    return status


def _model(batcher: Batcher) -> pb.ModelVersion:
    return pb.ModelVersion(name=batcher.scorer.name, version=batcher.scorer.version)
