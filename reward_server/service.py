"""The gRPC servicer: the one place that knows calls and their status codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, status_pb2
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server import wire
from reward_server.batcher import Overloaded, Priority, Report, TooLate
from reward_server.files import files_of
from reward_server.observe import Call, Observer
from reward_server.registry import Model, ModelRegistry, NoSuchModel, TooManyModels
from reward_server.scorers.base import Failure, Outcome, Scorer, Task
from rlaif.errors import RlaifError

SERVICE = pb.DESCRIPTOR.services_by_name["RewardService"].full_name
ADMIN_SERVICE = pb.DESCRIPTOR.services_by_name["ModelAdminService"].full_name

_LOG = logging.getLogger(__name__)
_NAMES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_INTERNAL = status_pb2.Status(code=code_pb2.INTERNAL, message="internal error; the server's log says where")

Context = grpc.aio.ServicerContext[Any, Any]
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Load = Callable[[str], Awaitable[Scorer]]


class Refusal(Exception):
    """A whole call that gets no answer but a status.

    Attributes:
        status: code, message for the caller, and typed details.
    """

    def __init__(self, code: int, message: str, *details: Message) -> None:
        super().__init__(message)
        self.status = status_pb2.Status(code=code, message=message)
        for detail in details:
            self.status.details.add().Pack(detail)


@dataclass(frozen=True, slots=True)
class Answer:
    """What `RewardService.answer` found: one outcome per task, in order, and the scorer that made them."""

    scorer: Scorer
    outcomes: list[Outcome]
    report: Report


class RewardService:
    """`rlaif.reward.v1.RewardService` and `ModelAdminService` over the models of a registry.

    Without an active model the server is warming up, and after `drain` it is going away: both answer UNAVAILABLE.

    Args:
        max_items: most items in one request.
        max_request_bytes: as the server was told, for callers to know.
        max_stream_requests: unanswered requests of one stream.
        load: loads a model by its name, for the admin calls.
        observer: hears how calls end.
    """

    def __init__(
        self,
        *,
        max_items: int,
        max_request_bytes: int,
        max_stream_requests: int,
        load: Load,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer or Observer()
        self._max_items = max_items
        self._max_request_bytes = max_request_bytes
        self._max_stream_requests = max_stream_requests
        self._load = load
        self._registry: ModelRegistry | None = None
        self._draining = False
        self._opened = asyncio.Event()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self, registry: ModelRegistry) -> None:
        """Start answering."""
        self._registry = registry
        self._opened.set()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls and wait for those in flight; returns whether all of them finished."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def handlers(self) -> tuple[grpc.GenericRpcHandler[bytes, bytes], ...]:
        """The methods for `add_generic_rpc_handlers`.

        They take bytes and parse here: a message that cannot be parsed is the caller's mistake and gets
        INVALID_ARGUMENT, where grpc's own parsing step would answer UNKNOWN with a Python class name.
        """
        reward = {
            "Score": self._unary(SERVICE, "Score", self.score, pb.ScoreRequest),
            "ScoreStream": grpc.stream_stream_rpc_method_handler(
                cast("Any", self._stream), request_deserializer=None, response_serializer=_serialize
            ),
            "Compare": self._unary(SERVICE, "Compare", self.compare, pb.CompareRequest),
            "GetInfo": self._unary(SERVICE, "GetInfo", self.info, pb.GetInfoRequest),
        }
        admin = {
            "LoadModel": self._unary(ADMIN_SERVICE, "LoadModel", self.load_model, pb.LoadModelRequest),
            "ActivateModel": self._unary(
                ADMIN_SERVICE, "ActivateModel", self.activate_model, pb.ActivateModelRequest
            ),
            "UnloadModel": self._unary(
                ADMIN_SERVICE, "UnloadModel", self.unload_model, pb.UnloadModelRequest
            ),
        }
        return (
            grpc.method_handlers_generic_handler(SERVICE, reward),
            grpc.method_handlers_generic_handler(ADMIN_SERVICE, admin),
        )

    # ---- scoring ----

    async def score(self, request: pb.ScoreRequest, time_left_s: float | None) -> pb.ScoreResponse:
        """Score conversations.

        Raises:
            Refusal: the call as a whole cannot be answered.
        """
        return await self._score(request, time_left_s, Priority.INTERACTIVE, wait_s=0.0)

    async def compare(self, request: pb.CompareRequest, time_left_s: float | None) -> pb.CompareResponse:
        """Compare two responses to each prompt.

        Raises:
            Refusal: the call as a whole cannot be answered.
        """
        model = self._admit(request)
        with self._counted(), self._models.hold(model):
            tasks = wire.compare_tasks(request)
            outcomes, report = await self._compute(
                model,
                tasks,
                time_left_s,
                priority=wire.PRIORITY.get(request.priority, Priority.INTERACTIVE),
            )
            return wire.compare_response(request, outcomes, report, model)

    async def info(self, request: pb.GetInfoRequest, time_left_s: float | None) -> pb.GetInfoResponse:
        """Who is serving.

        Raises:
            Refusal: nobody is.
        """
        active = self._active()
        scorer = active.scorer
        scale = scorer.normalization
        return pb.GetInfoResponse(
            model=wire.version_of(scorer),
            kind=wire.KINDS[scorer.kind],
            limits=pb.Limits(
                max_items=self._max_items,
                max_tokens_per_item=scorer.max_tokens_per_item,
                max_request_bytes=self._max_request_bytes,
                max_stream_requests=self._max_stream_requests,
            ),
            normalization=pb.Normalization(center=scale.center, scale=scale.scale, source=scale.source),
            models=[wire.loaded(model) for model in self._models.models],
        )

    async def scorer(self, wait_s: float = 0.0) -> Scorer:
        """Who scores for callers without a wish; a server that warms up is waited for.

        Raises:
            Refusal: nobody does.
        """
        if wait_s > 0 and not self._draining:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._opened.wait(), wait_s)
        return self._active().scorer

    async def answer(self, tasks: Sequence[Task | Failure], *, wait_s: float = 0.0) -> Answer:
        """Outcomes of tasks that came by another door than gRPC, from the same queue.

        Args:
            tasks: what to do, or why an item cannot be done.
            wait_s: how long a full queue is waited for before the call is refused.

        Raises:
            Refusal: the call as a whole cannot be answered.
        """
        model = self._active()
        with self._counted(), self._models.hold(model):
            outcomes, report = await self._compute(model, tasks, None, wait_s=wait_s)
            return Answer(model.scorer, outcomes, report)

    async def _score(
        self, request: pb.ScoreRequest, time_left_s: float | None, default: Priority, *, wait_s: float
    ) -> pb.ScoreResponse:
        model = self._admit(request)
        with self._counted(), self._models.hold(model):
            tasks = wire.score_tasks(request)
            outcomes, report = await self._compute(
                model,
                tasks,
                time_left_s,
                priority=wire.PRIORITY.get(request.priority, default),
                wait_s=wait_s,
            )
            return wire.score_response(request, outcomes, report, model)

    async def _compute(
        self,
        model: Model,
        tasks: Sequence[Task | Failure],
        time_left_s: float | None,
        *,
        priority: Priority = Priority.INTERACTIVE,
        wait_s: float = 0.0,
    ) -> tuple[list[Outcome], Report]:
        """Outcomes in the order of `tasks`, failures among them as they are."""
        valid = [t for t in tasks if not isinstance(t, Failure)]
        report = Report([])
        if valid:
            try:
                report = await model.batcher.submit(
                    valid,
                    time_left_s,
                    priority=priority,
                    wait_s=wait_s,
                )
            except Overloaded as err:
                delay = Duration()
                delay.FromMilliseconds(round(err.retry_after_s * 1000))
                info = ErrorInfo(reason="QUEUE_FULL", domain=wire.DOMAIN)
                raise Refusal(
                    code_pb2.RESOURCE_EXHAUSTED, str(err), info, RetryInfo(retry_delay=delay)
                ) from err
            except TooLate as err:
                raise Refusal(
                    code_pb2.DEADLINE_EXCEEDED,
                    "the queue is longer than the time left; nothing was computed",
                    ErrorInfo(reason="DEADLINE_TOO_SHORT", domain=wire.DOMAIN),
                ) from err
        computed = iter(report.outcomes)
        outcomes = [t if isinstance(t, Failure) else next(computed) for t in tasks]
        self._observer.answered(model.scorer, outcomes, report)
        return outcomes, report

    # ---- streams ----

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Answer requests as they are done; read on only while few enough are unanswered."""
        answers: asyncio.Queue[pb.ScoreStreamResponse | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._max_stream_requests)
        open_tasks: set[asyncio.Task[None]] = set()

        headers = _headers(context)

        async def answer(envelope: pb.ScoreStreamRequest) -> None:
            response = pb.ScoreStreamResponse(request_id=envelope.request_id)
            call = Call("ScoreStream", headers, SERVICE)
            with self._observer.during(call):
                try:
                    scored = await self._score(
                        envelope.request, context.time_remaining(), Priority.BULK, wait_s=math.inf
                    )
                    response.response.CopyFrom(scored)
                    call.code = "OK"
                except Refusal as err:
                    response.error.CopyFrom(err.status)
                    call.code = _NAMES[err.status.code].name
                except Exception as err:
                    log_unforeseen("ScoreStream", err)
                    response.error.CopyFrom(_INTERNAL)
                    call.code = "INTERNAL"
            await answers.put(response)

        async def read() -> None:
            async for data in requests:
                await room.acquire()
                task = asyncio.create_task(answer(_parse(pb.ScoreStreamRequest, data)))
                open_tasks.add(task)
                task.add_done_callback(open_tasks.discard)
            await asyncio.gather(*open_tasks)

        async def end() -> None:
            try:
                await reader
            finally:
                await answers.put(None)

        reader = asyncio.create_task(read())
        ender = asyncio.create_task(end())
        try:
            while (response := await answers.get()) is not None:
                await context.write(response)
                room.release()
            await ender
        except Refusal as err:
            await _abort(context, err.status)
        except grpc.aio.InternalError:
            _LOG.debug("the caller of a stream left while it was being answered")
        finally:
            for task in (reader, ender, *open_tasks):
                task.cancel()
            await asyncio.gather(reader, ender, *open_tasks, return_exceptions=True)

    # ---- models ----

    async def load_model(
        self, request: pb.LoadModelRequest, time_left_s: float | None
    ) -> pb.LoadModelResponse:
        """Load a model beside the active one, or find it among those that are loaded.

        Raises:
            Refusal: there is no such model, or no room for it.
        """
        self._active()
        if not request.model:
            raise _invalid([BadRequest.FieldViolation(field="model", description="must name a model")])
        files = await asyncio.to_thread(files_of, request.model)
        try:
            model = await self._models.load(
                lambda: self._load(request.model), files=files, activate=request.activate
            )
        except TooManyModels as err:
            raise Refusal(
                code_pb2.RESOURCE_EXHAUSTED, str(err), ErrorInfo(reason="TOO_MANY_MODELS", domain=wire.DOMAIN)
            ) from err
        except RlaifError as err:
            raise _invalid([BadRequest.FieldViolation(field="model", description=str(err))]) from err
        except Exception as err:  # whatever a model raises when it is first run; the registry logs it
            raise Refusal(
                code_pb2.INTERNAL, "the model could not be loaded; the server's log says how"
            ) from err
        return pb.LoadModelResponse(model=wire.loaded(model))

    async def activate_model(
        self, request: pb.ActivateModelRequest, time_left_s: float | None
    ) -> pb.ActivateModelResponse:
        """Let a loaded model answer from now on.

        Raises:
            Refusal: it is not loaded.
        """
        self._active()
        try:
            before = self._models.activate(request.version)
        except NoSuchModel as err:
            raise Refusal(code_pb2.NOT_FOUND, str(err)) from err
        previous = None if before is None else wire.version_of(before.scorer)
        return pb.ActivateModelResponse(model=wire.loaded(self._active()), previous=previous)

    async def unload_model(
        self, request: pb.UnloadModelRequest, time_left_s: float | None
    ) -> pb.UnloadModelResponse:
        """Free a model that is not active.

        Raises:
            Refusal: it is not loaded, or it is active.
        """
        active = self._active()
        if active.version == request.version:
            raise Refusal(
                code_pb2.FAILED_PRECONDITION,
                f"version {request.version} is active: activate another one first",
            )
        try:
            await self._models.unload(request.version)
        except NoSuchModel as err:
            raise Refusal(code_pb2.NOT_FOUND, str(err)) from err
        return pb.UnloadModelResponse()

    # ---- admission ----

    @property
    def _models(self) -> ModelRegistry:
        assert self._registry is not None  # callers went through _active
        return self._registry

    def _active(self) -> Model:
        active = None if self._registry is None else self._registry.active
        if active is None or self._draining:
            doing = "draining" if self._draining else "warming up"
            raise Refusal(code_pb2.UNAVAILABLE, f"the server is {doing}")
        return active

    def _admit(self, request: wire.Request) -> Model:
        """Everything that is checked before any item is looked at; gives the model that answers."""
        model = self._active()
        if request.HasField("expected_version") and request.expected_version != model.version:
            pinned = self._models.find(request.expected_version)
            if pinned is None:
                raise Refusal(
                    code_pb2.FAILED_PRECONDITION,
                    f"version {model.version} is served, not {request.expected_version}; nothing was computed",
                    ErrorInfo(
                        reason="VERSION_MISMATCH", domain=wire.DOMAIN, metadata={"served": model.version}
                    ),
                )
            model = pinned
        found = list(wire.violations(request, self._max_items))
        if found:
            raise _invalid(found)
        return model

    def _unary(
        self,
        service: str,
        method: str,
        behaviour: Callable[[Request, float | None], Awaitable[Response]],
        request_class: type[Request],
    ) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def answer(data: bytes, context: Context) -> Response:
            call = Call(method, _headers(context), service)
            with self._observer.during(call):
                try:
                    response = await behaviour(_parse(request_class, data), context.time_remaining())
                    call.code = "OK"
                    return response
                except Refusal as err:
                    call.code = _NAMES[err.status.code].name
                    await _abort(context, err.status)
                    raise
                except Exception as err:
                    call.code = "INTERNAL"
                    log_unforeseen(method, err)
                    await _abort(context, _INTERNAL)
                    raise

        return grpc.unary_unary_rpc_method_handler(
            cast("Any", answer), request_deserializer=None, response_serializer=_serialize
        )

    def _counted(self) -> _InFlight:
        return _InFlight(self)


class _InFlight:
    """Counts a call, so that a drain waits for it."""

    def __init__(self, service: RewardService) -> None:
        self._service = service

    def __enter__(self) -> None:
        self._service._in_flight += 1
        self._service._idle.clear()

    def __exit__(self, *error: object) -> None:
        self._service._in_flight -= 1
        if self._service._in_flight == 0:
            self._service._idle.set()


def _invalid(found: Sequence[BadRequest.FieldViolation]) -> Refusal:
    first = found[0]
    text = f"{first.field}: {first.description}"
    return Refusal(code_pb2.INVALID_ARGUMENT, text, BadRequest(field_violations=found))


def _parse(request_class: type[Request], data: bytes) -> Request:
    try:
        return request_class.FromString(data)
    except DecodeError as err:
        name = request_class.DESCRIPTOR.full_name
        raise Refusal(code_pb2.INVALID_ARGUMENT, f"the message is no valid {name}") from err


def _headers(context: Context) -> dict[str, str]:
    """The text metadata of a call."""
    return {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def log_unforeseen(method: str, err: Exception) -> None:
    """Where an unforeseen error came from, and neither its message nor its values: they may hold a caller's text."""
    where = "".join(traceback.format_tb(err.__traceback__))
    _LOG.error("%s failed with %s:\n%s", method, type(err).__name__, where)


async def _abort(context: Context, status: status_pb2.Status) -> None:
    """End the call with a rich status (google.rpc.Status in the trailer, as grpcio-status reads it)."""
    number = _NAMES[status.code]
    trailer = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(number, status.message, trailing_metadata=trailer)
