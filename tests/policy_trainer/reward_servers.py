"""A reward server for tests of the client: the whole contract over real gRPC, with a script for its moods.

The score of a conversation is the number that its last message spells, unless the test says otherwise; a text
that cannot be scored is that item's error.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.rlaif.reward.v1 import reward_pb2, reward_pb2_grpc
from rlaif.types import Conversation, Message


def conversation(text: str) -> Conversation:
    return (Message("user", "say a number"), Message("assistant", text))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def overloaded(retry_after_s: float) -> Callable[[grpc.ServicerContext], None]:
    """A mood that refuses a call as a full queue does."""

    def refuse(context: grpc.ServicerContext) -> None:
        detail = AnyMessage()
        delay = Duration(nanos=int(retry_after_s * 1e9))
        detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status = status_pb2.Status(
            code=code_pb2.RESOURCE_EXHAUSTED, message="the queue is full", details=[detail]
        )
        context.abort_with_status(rpc_status.to_status(status))

    return refuse


def too_late(context: grpc.ServicerContext) -> None:
    """A mood that refuses a call whose deadline will pass in the queue."""
    detail = AnyMessage()
    detail.Pack(error_details_pb2.ErrorInfo(reason="DEADLINE_TOO_SHORT"))
    status = status_pb2.Status(code=code_pb2.DEADLINE_EXCEEDED, message="the queue is long", details=[detail])
    context.abort_with_status(rpc_status.to_status(status))


def refusing(code: grpc.StatusCode, words: str) -> Callable[[grpc.ServicerContext], None]:
    return lambda context: context.abort(code, words)


def spelled_number(text: str) -> float:
    return float(text.strip("x"))


@dataclass
class NumberServer(reward_pb2_grpc.RewardServiceServicer):
    """Scores the last message; `moods` are consumed one per Score call before it is answered."""

    version: str = "v1"
    kind: int = reward_pb2.SCORER_KIND_REWARD_MODEL
    max_items: int = 4
    max_request_bytes: int = 1 << 20
    center: float = 1.0
    scale: float = 2.0
    score: Callable[[str], float] = spelled_number
    preference: Callable[[float], float] = lambda difference: (
        0.5 + 0.25 * ((difference > 0) - (difference < 0))
    )
    moods: list[Callable[[grpc.ServicerContext], None]] = field(default_factory=list)
    calls: list[reward_pb2.ScoreRequest] = field(default_factory=list)
    compared: list[reward_pb2.CompareRequest] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def GetInfo(
        self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext
    ) -> reward_pb2.GetInfoResponse:
        return reward_pb2.GetInfoResponse(
            model=reward_pb2.ModelVersion(name="numbers", version=self.version),
            kind=self.kind,  # type: ignore[arg-type]
            limits=reward_pb2.Limits(max_items=self.max_items, max_request_bytes=self.max_request_bytes),
            normalization=reward_pb2.Normalization(center=self.center, scale=self.scale, source="the test"),
        )

    def Score(
        self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext
    ) -> reward_pb2.ScoreResponse:
        with self.lock:
            self.calls.append(request)
            mood = self.moods.pop(0) if self.moods else None
        if mood is not None:
            mood(context)
        if request.HasField("expected_version") and request.expected_version != self.version:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"serving version {self.version}")
        if len(request.items) > self.max_items or request.ByteSize() > self.max_request_bytes:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "over the limits of GetInfo")
        return reward_pb2.ScoreResponse(
            outcomes=[self._outcome(item) for item in request.items],
            model=reward_pb2.ModelVersion(name="numbers", version=self.version),
        )

    def Compare(
        self, request: reward_pb2.CompareRequest, context: grpc.ServicerContext
    ) -> reward_pb2.CompareResponse:
        """Prefers the greater number; like a judge with a taste for what it sees first."""
        with self.lock:
            self.compared.append(request)
        if request.expected_version != self.version:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"serving version {self.version}")
        if len(request.items) > self.max_items:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "over the limits of GetInfo")
        return reward_pb2.CompareResponse(
            outcomes=[self._comparison(item) for item in request.items],
            model=reward_pb2.ModelVersion(name="numbers", version=self.version),
        )

    def _comparison(self, item: reward_pb2.CompareItem) -> reward_pb2.CompareOutcome:
        try:
            a, b = self.score(item.response_a), self.score(item.response_b)
        except ValueError:
            error = status_pb2.Status(code=code_pb2.OUT_OF_RANGE, message="no number")
            return reward_pb2.CompareOutcome(id=item.id, error=error)
        p = self.preference(a - b)
        found = reward_pb2.Comparison(p_a=p, p_a_first=p + 0.2, p_a_second=p - 0.2)
        return reward_pb2.CompareOutcome(id=item.id, comparison=found)

    def _outcome(self, item: reward_pb2.ScoreItem) -> reward_pb2.ScoreOutcome:
        text = item.conversation.messages[-1].content
        try:
            raw = self.score(text)
        except ValueError:
            error = status_pb2.Status(code=code_pb2.OUT_OF_RANGE, message=f"{text} is no number")
            return reward_pb2.ScoreOutcome(id=item.id, error=error)
        score = reward_pb2.Score(raw=raw, normalized=(raw - self.center) / self.scale, tokens=3)
        return reward_pb2.ScoreOutcome(id=item.id, score=score)


@contextmanager
def serving(servicer: NumberServer, *, port: int = 0, healthy: bool = True) -> Iterator[str]:
    """Serve on loopback; gives the address."""
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    state = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
    health_servicer = health.HealthServicer()
    health_servicer.set("", state)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(None).wait()
