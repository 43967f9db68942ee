"""Where the trainer's rewards come from: conversations in, one reward or one reason per conversation out.

`RewardClient` is the only file of this package that knows protobuf. `FunctionReward` puts a Python callable
behind the same interface, so a trainer cannot tell a served reward from a local one.
"""

from __future__ import annotations

import math
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple, Protocol, Self, TypeVar, cast

import grpc
from google.rpc import code_pb2, error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from protos.rlaif.reward.v1 import reward_pb2, reward_pb2_grpc
from rlaif.errors import ConfigError, RewardServerError
from rlaif.types import Conversation

Result = TypeVar("Result")

FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
PROBE_TIMEOUT_S = 5.0
UNANNOUNCED_WAIT_S = 1.0
REQUEST_OVERHEAD_BYTES = 1024
"""Room left in a request for everything that is not an item (version, flags, framing)."""
DEFAULT_REQUEST_BYTES = 4 * 1024 * 1024
"""gRPC's own default limit, taken when a server declares none."""
CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),  # requests are split by the limit that the server declares
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),  # rationales may be asked for
    ("grpc.enable_retries", 0),  # one retry policy, here, where RetryInfo and the give-up time are known
    ("grpc.enable_http_proxy", 0),  # a proxy variable meant for the web must not swallow loopback calls
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # gRPC's default of two minutes would outlive a restart
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class Reward(NamedTuple):
    """One conversation's reward, or the reason why there is none.

    Attributes:
        value: the normalised score that training optimises, (raw - center) / scale; None if missing.
        raw: the scorer's own output: a reward model's logit, a judge's expected level; None if missing.
        reason: why `value` is None, as `code: words`; None otherwise.
        tokens: tokens that the scorer read; 0 if unknown.
    """

    value: float | None
    raw: float | None
    reason: str | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Who scores, and within which limits.

    Attributes:
        name: what is served, as the server was told (`hf:DIR`, `tinyworld:judge`).
        version: changes whenever scores may change.
        kind: `reward_model` (raw scores are Bradley-Terry logits) or `judge` (they are levels of a scale).
        max_items: conversations per request.
        max_tokens_per_item: after the scorer's chat template; 0 means unknown.
        max_request_bytes: size of one serialised request.
        center: subtracted from the raw score.
        scale: divides the centred score; positive.
    """

    name: str
    version: str
    kind: Literal["reward_model", "judge"]
    max_items: int = 256
    max_tokens_per_item: int = 0
    max_request_bytes: int = DEFAULT_REQUEST_BYTES
    center: float = 0.0
    scale: float = 1.0


class RewardSource(Protocol):
    """Anything that gives rewards for conversations."""

    def info(self) -> ServerInfo:
        """Who scores; the same answer for the life of the source."""

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """One reward per conversation, in order. A conversation ends with the assistant turn to be scored."""

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """`score` in the background, so that it overlaps other work."""

    def close(self) -> None:
        """Release threads and connections; calls under way are abandoned."""


class RewardClient:
    """A reward server over gRPC, with deadlines, bounded retries and a pinned model version.

    Retried: UNAVAILABLE (restarting, warming up, draining) and RESOURCE_EXHAUSTED that carries RetryInfo (the
    queue is full), until `give_up_after_s` have passed since the call began. Everything else is an error at
    once. The version is pinned by the first `info()`: a server that comes back with other weights is refused,
    because rewards of two models must not be mixed in one run.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = 120.0,
        give_up_after_s: float = 120.0,
        expected_version: str | None = None,
        max_in_flight: int = 4,
        truncation: Literal["reject", "left"] = "reject",
    ) -> None:
        """Open a lazily connecting channel.

        Args:
            address: `HOST:PORT`.
            timeout_s: deadline of one request.
            give_up_after_s: how long an unavailable or overloaded server is waited for; 0 never retries.
            expected_version: the model version that must be serving; None pins the version found first.
            max_in_flight: requests at a time.
            truncation: what the server does with a conversation longer than its context: `reject` makes it a
                missing reward, `left` drops the oldest tokens of the prompt.

        Raises:
            ConfigError: the address is not `HOST:PORT`, or a number is out of range.
        """
        self.address = parse_address(address)
        if timeout_s <= 0 or give_up_after_s < 0 or max_in_flight < 1:
            raise ConfigError(
                "the reward client needs timeout_s > 0, give_up_after_s >= 0 and max_in_flight >= 1"
            )
        self._timeout_s = timeout_s
        self._give_up_after_s = give_up_after_s
        self._expected_version = expected_version
        self._truncation = {
            "reject": reward_pb2.TRUNCATION_REJECT,
            "left": reward_pb2.TRUNCATION_LEFT,
        }[truncation]
        self._info: ServerInfo | None = None
        self._closing = threading.Event()
        self._channel = grpc.insecure_channel(self.address, options=list(CHANNEL_OPTIONS))
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._requests = ThreadPoolExecutor(max_in_flight, thread_name_prefix="reward-request")
        self._batches = ThreadPoolExecutor(max_in_flight, thread_name_prefix="reward-batch")
        self._jitter = random.Random()

    def wait_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Wait until the server's health is SERVING, then read and pin who serves; a long wait is announced.

        Raises:
            RewardServerError: it is not so within `timeout_s`; the line names the address and what to start.
        """
        until = time.monotonic() + timeout_s
        pause = FIRST_BACKOFF_S
        announced = timeout_s <= UNANNOUNCED_WAIT_S
        while True:
            state = self._probe()
            if state is None:
                return self.info()
            if time.monotonic() + pause > until:
                raise RewardServerError(state)
            if not announced:
                print(f"waiting up to {timeout_s:.0f} s: {state}", file=sys.stderr, flush=True)
                announced = True
            self._pause(pause)
            pause = min(2 * pause, 1.0)

    def info(self) -> ServerInfo:
        """Who serves; asked once, and pinned.

        Raises:
            RewardServerError: the server cannot be reached, or serves another version than was expected.
        """
        if self._info is None:
            request = reward_pb2.GetInfoRequest()
            answer = self._retrying(lambda: self._stub.GetInfo(request, timeout=self._timeout_s), "GetInfo")
            self._info = self._read_info(answer)
        return self._info

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """One reward per conversation, in order; requests are split to the server's limits.

        Raises:
            RewardServerError: the server cannot be reached, refuses the request, or serves another model.
        """
        info = self.info()
        rewards: list[Reward | None] = [None] * len(conversations)
        items: list[tuple[int, reward_pb2.Conversation]] = []
        room = info.max_request_bytes - REQUEST_OVERHEAD_BYTES
        for index, conversation in enumerate(conversations):
            message = encode(conversation)
            if message is None:
                rewards[index] = Reward(None, None, "invalid_text: lone surrogates cannot be sent as UTF-8")
            elif message.ByteSize() > room:
                rewards[index] = Reward(
                    None, None, f"too_large: {message.ByteSize()} bytes, the server takes {room} per request"
                )
            else:
                items.append((index, message))
        requests = [
            self._requests.submit(self._score_request, [message for _, message in part])
            for part in split(items, info.max_items, room)
        ]
        outcomes = [reward for request in requests for reward in request.result()]
        for (index, _), reward in zip(items, outcomes, strict=True):
            rewards[index] = reward
        return [reward for reward in rewards if reward is not None]

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """`score` in a thread of its own."""
        return self._batches.submit(self.score, list(conversations))

    def close(self) -> None:
        """Abandon calls under way and close the channel; waits for the client's own threads."""
        self._closing.set()
        self._channel.close()
        self._batches.shutdown(cancel_futures=True)
        self._requests.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _score_request(self, messages: Sequence[reward_pb2.Conversation]) -> list[Reward]:
        request = reward_pb2.ScoreRequest(
            items=[reward_pb2.ScoreItem(id=i, conversation=m) for i, m in enumerate(messages)],
            expected_version=self.info().version,
            truncation=self._truncation,
        )
        answer = self._retrying(lambda: self._stub.Score(request, timeout=self._timeout_s), "Score")
        if [outcome.id for outcome in answer.outcomes] != list(range(len(messages))):
            raise RewardServerError(
                f"the reward server at {self.address} answered {len(messages)} items with other ids or "
                "in another number; it does not keep the contract of rlaif.reward.v1"
            )
        return [read_outcome(outcome) for outcome in answer.outcomes]

    def _retrying(self, call: Callable[[], Result], method: str) -> Result:
        started = time.monotonic()
        pause = FIRST_BACKOFF_S
        while True:
            if self._closing.is_set():
                raise RewardServerError("the reward client was closed while a call was under way")
            try:
                return call()
            except grpc.RpcError as err:
                if self._closing.is_set():
                    raise RewardServerError(
                        "the reward client was closed while a call was under way"
                    ) from err
                asked = retry_delay(err)
                if asked is None:
                    raise self._refused(err, method) from err
                wait = max(asked, pause * self._jitter.uniform(0.5, 1.0))
                waited = time.monotonic() - started
                if waited + wait > self._give_up_after_s:
                    raise self._gave_up(err, waited) from err
            self._pause(wait)
            pause = min(2 * pause, MAX_BACKOFF_S)

    def _probe(self) -> str | None:
        """None if health is SERVING, else what is wrong."""
        try:
            answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as err:
            if err.code() is grpc.StatusCode.UNIMPLEMENTED:
                return self._not_a_reward_server()
            return f"no reward server at {self.address} ({details(err)}); start one: {self._how_to_start()}"
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return None
        return f"the reward server at {self.address} is up but still loading or draining; wait for it"

    def _not_a_reward_server(self) -> str:
        return f"what listens at {self.address} is not a reward server; start one: {self._how_to_start()}"

    def _how_to_start(self) -> str:
        return f"rlaif serve --model hf:DIR --port {self.address.rpartition(':')[2]}"

    def _read_info(self, answer: reward_pb2.GetInfoResponse) -> ServerInfo:
        info = ServerInfo(
            name=answer.model.name,
            version=answer.model.version,
            kind="judge" if answer.kind == reward_pb2.SCORER_KIND_JUDGE else "reward_model",
            max_items=answer.limits.max_items or 1,
            max_tokens_per_item=answer.limits.max_tokens_per_item,
            max_request_bytes=answer.limits.max_request_bytes or DEFAULT_REQUEST_BYTES,
            center=answer.normalization.center,
            scale=answer.normalization.scale or 1.0,
        )
        if self._expected_version not in (None, info.version):
            raise RewardServerError(
                f"the reward server at {self.address} serves {info.name} version {info.version}, "
                f"not version {self._expected_version}; serve that model again or start a new run"
            )
        return info

    def _refused(self, err: grpc.RpcError, method: str) -> RewardServerError:
        code = err.code()
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return RewardServerError(
                f"the reward server at {self.address} serves another model than this run began with "
                f"({details(err)}); serve that model again or start a new run"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RewardServerError(
                f"the reward server at {self.address} did not answer {method} within {self._timeout_s:g} s; "
                "raise the reward timeout or send smaller batches"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return RewardServerError(self._not_a_reward_server())
        return RewardServerError(
            f"the reward server at {self.address} refused {method} with {code.name}: {details(err)}"
        )

    def _gave_up(self, err: grpc.RpcError, waited: float) -> RewardServerError:
        if err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return RewardServerError(
                f"the reward server at {self.address} stayed overloaded for {waited:.0f} s; "
                "run fewer clients or a faster server"
            )
        return RewardServerError(
            f"no reward server at {self.address} for {waited:.0f} s ({details(err)}); "
            f"start one: {self._how_to_start()}"
        )

    def _pause(self, seconds: float) -> None:
        self._closing.wait(seconds)


class FunctionReward:
    """A Python callable as a reward source: `function(prompts, responses) -> list of float or None`.

    `prompts` are conversations that end with a user turn, `responses` the assistant texts. None means that no
    reward could be had. The calls run in one background thread, in order.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Conversation], Sequence[str]], Iterable[float | None]],
        *,
        name: str = "function",
        version: str = "1",
        kind: Literal["reward_model", "judge"] = "reward_model",
        center: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        """Wrap `function`; `version` is the caller's word for which function it is."""
        self._function = function
        self._info = ServerInfo(name, version, kind, center=center, scale=scale)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="function-reward")

    def info(self) -> ServerInfo:
        """What the constructor was told."""
        return self._info

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """Call the function on prompts and responses.

        Raises:
            RewardServerError: it returned another number of rewards than there are conversations.
        """
        raws = list(self._function([c[:-1] for c in conversations], [c[-1].content for c in conversations]))
        if len(raws) != len(conversations):
            raise RewardServerError(
                f"reward function {self._info.name} gave {len(raws)} rewards for {len(conversations)} "
                "conversations; return one number or None for each"
            )
        return [self._reward(raw) for raw in raws]

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """`score` in the background thread."""
        return self._thread.submit(self.score, list(conversations))

    def close(self) -> None:
        """Wait for the background thread."""
        self._thread.shutdown()

    def _reward(self, raw: float | None) -> Reward:
        if raw is None:
            return Reward(None, None, "no_reward: the function returned None")
        if not math.isfinite(raw):
            return Reward(None, None, f"not_finite: the function returned {raw}")
        return Reward((raw - self._info.center) / self._info.scale, float(raw))


def parse_address(address: str) -> str:
    """`HOST:PORT`, checked.

    Raises:
        ConfigError: it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"reward server {address!r} must be HOST:PORT, for example 127.0.0.1:50051")
    return address


def encode(conversation: Conversation) -> reward_pb2.Conversation | None:
    """The conversation as a protobuf message, or None if its text is not valid Unicode."""
    try:
        return reward_pb2.Conversation(
            messages=[reward_pb2.Message(role=m.role, content=m.content) for m in conversation]
        )
    except UnicodeEncodeError:
        return None


def split(
    items: Sequence[tuple[int, reward_pb2.Conversation]], max_items: int, max_bytes: int
) -> list[list[tuple[int, reward_pb2.Conversation]]]:
    """Cut `items` into consecutive parts of at most `max_items` items and `max_bytes` bytes, none empty."""
    parts: list[list[tuple[int, reward_pb2.Conversation]]] = []
    size = 0
    for item in items:
        cost = item[1].ByteSize() + 16  # tags, lengths and the id of one ScoreItem
        if not parts or len(parts[-1]) == max_items or size + cost > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += cost
    return parts


def read_outcome(outcome: reward_pb2.ScoreOutcome) -> Reward:
    """One item's outcome as a reward; an error, an empty or a non-finite outcome is missing with a reason."""
    kind = outcome.WhichOneof("outcome")
    if kind == "score":
        score = outcome.score
        if not (math.isfinite(score.raw) and math.isfinite(score.normalized)):
            return Reward(None, None, "not_finite: the server sent a score that is not a finite number")
        return Reward(score.normalized, score.raw, None, score.tokens)
    if kind == "error":
        known = outcome.error.code in code_pb2.Code.values()
        code = code_pb2.Code.Name(outcome.error.code) if known else str(outcome.error.code)
        return Reward(None, None, f"{code.lower()}: {outcome.error.message}")
    return Reward(None, None, "no_outcome: the server sent neither a score nor an error")


def missing_by_reason(rewards: Iterable[Reward]) -> Counter[str]:
    """How many rewards are missing, by the code that begins their reason."""
    return Counter(
        (reward.reason or "unknown").partition(":")[0] for reward in rewards if reward.value is None
    )


def retry_delay(err: grpc.RpcError) -> float | None:
    """Seconds that the server asks to wait (0: it does not say), or None if the call must not be repeated.

    RESOURCE_EXHAUSTED without RetryInfo is a message over a size limit: the same call would fail again.
    """
    if err.code() is grpc.StatusCode.UNAVAILABLE:
        return _retry_info(err) or 0.0
    if err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _retry_info(err)
    return None


def _retry_info(err: grpc.RpcError) -> float | None:
    try:
        status = rpc_status.from_call(cast("grpc.Call", err))
    except ValueError:  # details that contradict the status itself tell nothing
        return None
    for detail in status.details if status is not None else ():
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            return float(retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9)
    return None


def details(err: grpc.RpcError) -> str:
    """What gRPC says of an error, on one line and short."""
    words = " ".join((err.details() or err.code().name).split())
    refused = "connection refused" in words.lower()
    return "connection refused" if refused else words[:200]
