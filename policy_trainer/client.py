"""A reward server over gRPC: with `wire`, `grpc_errors` and `admin`, all of this package that knows protobuf.

`AsyncRewardClient` holds the rules: deadlines, retries, pinned versions, splitting. `RewardClient` is the same for
code that does not await: it runs one on an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from policy_trainer.grpc_errors import details, mismatch, refused_early, retry_delay
from policy_trainer.reward_source import DEFAULT_REQUEST_BYTES, Comparison, Reward, ServerInfo
from policy_trainer.wire import (
    INVALID_TEXT,
    Item,
    encode,
    encode_pair,
    read_comparison,
    read_outcome,
    split,
    too_large,
)
from protos.rlaif.reward.v1 import reward_pb2, reward_pb2_grpc
from rlaif.errors import ConfigError, RewardServerError
from rlaif.types import Conversation, Pair

Result = TypeVar("Result")

SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
FIRST_BACKOFF_S = 0.1
MAX_BACKOFF_S = 5.0
PROBE_TIMEOUT_S = 5.0
UNANNOUNCED_WAIT_S = 1.0
ANNOUNCED_AFTER_S = 3.0
"""A client that has waited so long for any word of its server says so."""
REQUEST_OVERHEAD_BYTES = 1024
"""Room left in a request for everything that is not an item (version, flags, framing)."""
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
    ("grpc.use_local_subchannel_pool", 1),  # a client's connections are its own, and end with it
)
ROUND_ROBIN = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "healthCheckConfig": {"serviceName": SERVICE},
}
"""Calls go to all replicas in turn, and to none that says NOT_SERVING (gRPC's client-side health checking)."""

_grpc_process: int | None = None
"""The process that has opened a channel. Its forks inherit gRPC's state without the threads that it needs, and a call
would wait for ever."""


def check_not_forked() -> None:
    """Refuse to go on in a fork of a process that has opened a channel.

    Raises:
        RewardServerError: it is one.
    """
    global _grpc_process
    if _grpc_process is None:
        _grpc_process = os.getpid()
    if _grpc_process != os.getpid():
        raise RewardServerError(
            "gRPC does not survive a fork, and the process that this one was forked from had a reward client; "
            'start workers with multiprocessing\'s "spawn" or "forkserver", or open the first client in the worker'
        )


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is reached that is not open to everybody.

    Attributes:
        token: bearer token.
        ca: certificate authorities that the server's certificate must come from, PEM; makes the connection TLS.
        cert: the client's certificate chain for mutual TLS, PEM.
        key: its private key, PEM.
    """

    token: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def from_environment(cls) -> Access:
        """Read RLAIF_REWARD_TOKEN, RLAIF_REWARD_CA, RLAIF_REWARD_CERT and RLAIF_REWARD_KEY.

        Raises:
            ConfigError: certificate and key do not come together, or without the authorities.
        """
        ca, cert, key = (
            Path(value) if (value := os.environ.get(f"RLAIF_REWARD_{name}")) else None
            for name in ("CA", "CERT", "KEY")
        )
        if (cert is None) != (key is None) or (cert is not None and ca is None):
            raise ConfigError(
                "mutual TLS needs RLAIF_REWARD_CA, RLAIF_REWARD_CERT and RLAIF_REWARD_KEY together"
            )
        return cls(os.environ.get("RLAIF_REWARD_TOKEN"), ca, cert, key)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """TLS credentials, or None for plain text.

        Raises:
            ConfigError: a file cannot be read.
        """
        if self.ca is None:
            return None
        try:
            ca, key, cert = (path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        except OSError as err:
            raise ConfigError(f"{err.filename} cannot be read: {err.strerror}") from err
        return grpc.ssl_channel_credentials(ca, key, cert)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


class AsyncRewardClient:
    """A reward server over gRPC, with deadlines, bounded retries and a pinned model version.

    Retried: UNAVAILABLE (restarting, warming up, draining), CANCELLED by the server (it stopped with the call just
    arrived), RESOURCE_EXHAUSTED that carries RetryInfo (the queue is full) and DEADLINE_EXCEEDED (the server hangs, or
    it said at once that its queue is longer than the timeout), until `give_up_after_s` have passed since the call
    began. Everything else is an error at once. The version is pinned by the first `info()`: a server that comes back
    with other weights is refused, because rewards of two models must not be mixed in one run.
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
        access: Access | None = None,
    ) -> None:
        """Open a lazily connecting channel. Needs a running event loop.

        Args:
            address: `HOST:PORT`, or several separated by commas: replicas of one model, used in turn.
            timeout_s: deadline of one request.
            give_up_after_s: how long an unavailable or overloaded server is waited for; 0 never retries.
            expected_version: the model version that must be serving; None pins the version found first.
            max_in_flight: requests at a time.
            truncation: what the server does with a conversation longer than its context: `reject` makes it a
                missing reward, `left` drops the oldest tokens of the prompt.
            access: TLS and token; from the environment if None.

        Raises:
            ConfigError: the address is not `HOST:PORT`, or a number is out of range.
            RewardServerError: this process was forked from one that has opened a client.
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
        access = access or Access.from_environment()
        self._metadata = access.metadata()
        self._with_tls = access.ca is not None
        self._heard_at = time.monotonic()
        self._away_since: float | None = None
        self._info: ServerInfo | None = None
        self._asking_info = asyncio.Lock()
        self._closed = asyncio.Event()
        self._channel = open_channel(self.address, access)
        self._stub: Any = reward_pb2_grpc.RewardServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)
        self._slots = asyncio.Semaphore(max_in_flight)
        self._jitter = random.Random()

    async def wait_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """Wait until the server's health is SERVING, then read and pin who serves; a long wait is announced.

        Raises:
            RewardServerError: it is not so within `timeout_s`; the line names the address and what to start.
        """
        until = time.monotonic() + timeout_s
        pause = FIRST_BACKOFF_S
        announced = timeout_s <= UNANNOUNCED_WAIT_S
        while True:
            state, hopeless = await self._probe()
            if state is None:
                return await self.info()
            if hopeless or time.monotonic() + pause > until:
                raise RewardServerError(state)
            if not announced:
                print(f"waiting up to {timeout_s:.0f} s: {state}", file=sys.stderr, flush=True)
                announced = True
            await self._pause(pause)
            pause = min(2 * pause, 1.0)

    async def info(self) -> ServerInfo:
        """Who serves; asked once, and pinned.

        Raises:
            RewardServerError: the server cannot be reached, or serves another version than was expected.
        """
        async with self._asking_info:
            if self._info is None:
                answer = await self._retrying(self._stub.GetInfo, reward_pb2.GetInfoRequest(), "GetInfo")
                self._info = self._read_info(answer)
        return self._info

    async def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """One reward per conversation, in order; requests are split to the server's limits.

        Raises:
            RewardServerError: the server cannot be reached, refuses the request, or serves another model.
        """
        info = await self.info()
        return await self._by_parts(
            [encode(conversation) for conversation in conversations],
            partial(self._score, info),
            lambda reason: Reward(None, None, reason),
        )

    async def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Which response of each pair is preferred, in order; requests are split to the server's limits.

        Raises:
            RewardServerError: the server cannot be reached, refuses the request, or serves another model.
        """
        info = await self.info()
        return await self._by_parts(
            [encode_pair(pair) for pair in pairs],
            partial(self._compare, info),
            lambda reason: Comparison(None, reason=reason),
        )

    async def _by_parts(
        self,
        messages: Sequence[Item | None],
        ask: Callable[[Sequence[Item]], Awaitable[list[Result]]],
        missing: Callable[[str], Result],
    ) -> list[Result]:
        """Ask for all messages that can be sent, in parts that the server takes, and put the answers in order."""
        info = await self.info()
        found: dict[int, Result] = {}
        items: list[tuple[int, Item]] = []
        room = info.max_request_bytes - REQUEST_OVERHEAD_BYTES
        for index, message in enumerate(messages):
            if message is None:
                found[index] = missing(INVALID_TEXT)
            elif message.ByteSize() > room:
                found[index] = missing(too_large(message.ByteSize(), room))
            else:
                items.append((index, message))
        parts = split(items, info.max_items, room)
        tasks = [asyncio.ensure_future(ask([message for _, message in part])) for part in parts]
        try:
            outcomes = [outcome for part in await asyncio.gather(*tasks) for outcome in part]
        finally:
            for task in tasks:
                task.cancel()
        found.update((index, outcome) for (index, _), outcome in zip(items, outcomes, strict=True))
        return [found[index] for index in range(len(messages))]

    async def close(self) -> None:
        """Abandon calls under way and close the channel."""
        self._closed.set()
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _score(self, info: ServerInfo, messages: Sequence[reward_pb2.Conversation]) -> list[Reward]:
        request = reward_pb2.ScoreRequest(
            items=[reward_pb2.ScoreItem(id=i, conversation=m) for i, m in enumerate(messages)],
            expected_version=info.version,
            truncation=self._truncation,
        )
        async with self._slots:
            answer = await self._retrying(self._stub.Score, request, "Score")
        self._check_ids(answer, len(messages))
        return [read_outcome(outcome) for outcome in answer.outcomes]

    async def _compare(
        self, info: ServerInfo, messages: Sequence[reward_pb2.CompareItem]
    ) -> list[Comparison]:
        request = reward_pb2.CompareRequest(expected_version=info.version, truncation=self._truncation)
        for i, message in enumerate(messages):
            request.items.add(id=i).MergeFrom(message)
        async with self._slots:
            answer = await self._retrying(self._stub.Compare, request, "Compare")
        self._check_ids(answer, len(messages))
        return [read_comparison(outcome) for outcome in answer.outcomes]

    def _check_ids(self, answer: Any, count: int) -> None:
        if [outcome.id for outcome in answer.outcomes] != list(range(count)):
            raise RewardServerError(
                f"the reward server at {self.address} answered {count} items with other ids or "
                "in another number; it does not keep the contract of rlaif.reward.v1"
            )

    async def _retrying(self, call: Callable[..., Awaitable[Any]], request: Any, method: str) -> Any:
        started = time.monotonic()
        pause = FIRST_BACKOFF_S
        while True:
            self._check_open()
            try:
                metadata = (*self._metadata, *trace_headers())
                answer = await call(request, timeout=self._timeout_s, metadata=metadata)
                self._hear()
                return answer
            except (grpc.aio.AioRpcError, grpc.aio.UsageError) as err:
                self._check_open(err)
                if isinstance(err, grpc.aio.UsageError):
                    raise
                asked = retry_delay(err)
                if asked is None:
                    raise self._refused(err, method) from err
                wait = max(asked, pause * self._jitter.uniform(0.5, 1.0))
                waited = time.monotonic() - started
                if waited + wait > self._give_up_after_s:
                    raise self._gave_up(err, waited, method) from err
                if err.code() is grpc.StatusCode.RESOURCE_EXHAUSTED or refused_early(err):
                    self._hear()  # it has too many calls, but it is there
                else:
                    self._tell_that_it_is_away(err, started)
            except asyncio.CancelledError as err:
                self._check_open(err)  # closing the channel cancels its calls
                raise
            await self._pause(wait)
            pause = min(2 * pause, MAX_BACKOFF_S)

    def _tell_that_it_is_away(self, err: grpc.aio.AioRpcError, asked_at: float) -> None:
        """Say once, on stderr, that calls wait; a server that is restarted quickly is not worth a line."""
        since = max(asked_at, self._heard_at)
        if time.monotonic() - since < ANNOUNCED_AFTER_S or self._away_since is not None:
            return
        self._away_since = since
        print(
            f"waiting up to {self._give_up_after_s:.0f} s for the reward server at {self.address} ({details(err)})",
            file=sys.stderr,
            flush=True,
        )

    def _hear(self) -> None:
        """Note a word of the server, and say if it was told to be away."""
        self._heard_at = time.monotonic()
        if self._away_since is not None:
            away, self._away_since = self._heard_at - self._away_since, None
            print(
                f"the reward server at {self.address} answers again, after {away:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    def _check_open(self, err: BaseException | None = None) -> None:
        if self._closed.is_set():
            raise RewardServerError("the reward client was closed while a call was under way") from err

    async def _pause(self, seconds: float) -> None:
        """Wait, but not beyond `close`."""
        try:
            await asyncio.wait_for(self._closed.wait(), seconds)
        except TimeoutError:
            return

    async def _probe(self) -> tuple[str | None, bool]:
        """None if health is SERVING, else what is wrong; and whether waiting cannot mend it."""
        self._check_open()
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as err:
            if err.code() is grpc.StatusCode.UNIMPLEMENTED:
                return self._not_a_reward_server(), False
            return self._unreachable(err), mismatch(err) is not None
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return None, False
        return f"the reward server at {self.address} is up but still loading or draining; wait for it", False

    def _unreachable(self, err: grpc.aio.AioRpcError, waited: float | None = None) -> str:
        if (why := mismatch(err)) is not None:
            return f"what listens at {self.address} cannot be spoken with: {why} ({details(err)})"
        since = "" if waited is None else f" for {waited:.0f} s"
        if "Socket closed" in details(err) and not self._with_tls:
            return (
                f"what listens at {self.address} closes the connection{since}: if it has TLS, set RLAIF_REWARD_CA to "
                "the certificate of its authority"
            )
        return (
            f"no reward server at {self.address}{since} ({details(err)}); start one: {self._how_to_start()}"
        )

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

    def _refused(self, err: grpc.aio.AioRpcError, method: str) -> RewardServerError:
        code = err.code()
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            replicas = "; all replicas must serve one model" if "," in self.address else ""
            return RewardServerError(
                f"the reward server at {self.address} serves another model than this run began with "
                f"({details(err)}); serve that model again or start a new run{replicas}"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return RewardServerError(
                f"the reward server at {self.address} did not answer {method} within {self._timeout_s:g} s; "
                "raise the reward timeout or send smaller batches"
            )
        if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return RewardServerError(
                f"the reward server at {self.address} refuses the token ({details(err)}): set RLAIF_REWARD_TOKEN"
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return RewardServerError(self._not_a_reward_server())
        return RewardServerError(
            f"the reward server at {self.address} refused {method} with {code.name}: {details(err)}"
        )

    def _gave_up(self, err: grpc.aio.AioRpcError, waited: float, method: str) -> RewardServerError:
        if err.code() is grpc.StatusCode.DEADLINE_EXCEEDED and not refused_early(err):
            return self._refused(err, method)
        if err.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED):
            return RewardServerError(
                f"the reward server at {self.address} stayed overloaded for {waited:.0f} s; "
                "run fewer clients or a faster server"
            )
        return RewardServerError(self._unreachable(err, waited))


class RewardClient:
    """`AsyncRewardClient` for code that does not await; its calls may come from any thread, and not from a fork.

    Takes the same arguments.
    """

    def __init__(self, address: str, **options: Any) -> None:
        """Start the client's own event loop and open its channel.

        Args:
            address: `HOST:PORT`, or several separated by commas.
            options: those of `AsyncRewardClient`.

        Raises:
            ConfigError: see `AsyncRewardClient`.
            RewardServerError: see `AsyncRewardClient`.
        """
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True)
        self._thread.start()

        async def opened() -> AsyncRewardClient:
            return AsyncRewardClient(address, **options)

        try:
            self._client = self._wait(opened())
        except (ConfigError, RewardServerError):
            self._stop()
            raise

    @property
    def address(self) -> str:
        """Where the server is."""
        return self._client.address

    def wait_ready(self, timeout_s: float = 60.0) -> ServerInfo:
        """See `AsyncRewardClient.wait_ready`."""
        return self._wait(self._client.wait_ready(timeout_s))

    def info(self) -> ServerInfo:
        """See `AsyncRewardClient.info`."""
        return self._wait(self._client.info())

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """See `AsyncRewardClient.score`."""
        return self.submit(conversations).result()

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """`score` in the background."""
        return self._start(self._client.score(list(conversations)))

    def submit_pairs(self, pairs: Sequence[Pair]) -> Future[list[Comparison]]:
        """`AsyncRewardClient.compare` in the background."""
        return self._start(self._client.compare(list(pairs)))

    def close(self) -> None:
        """Abandon calls under way, close the channel and end the thread; in a fork there is nothing to close."""
        if self._loop.is_closed() or self._process != os.getpid():
            return
        self._wait(self._close())
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def _close(self) -> None:
        await self._client.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._start(work).result()

    def _start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        if self._process != os.getpid():
            work.close()
            check_not_forked()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def open_channel(address: str, access: Access) -> grpc.aio.Channel:
    """A lazily connecting channel to one server, or to replicas that are used in turn.

    Raises:
        ConfigError: one of several hosts has no address.
        RewardServerError: this process was forked from one that has opened a channel.
    """
    check_not_forked()
    hosts = address.split(",")
    options: list[tuple[str, Any]] = list(CHANNEL_OPTIONS)
    target = address
    if len(hosts) > 1:
        options.append(("grpc.service_config", json.dumps(ROUND_ROBIN)))
        target = _addresses(hosts)
    credentials = access.credentials()
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    if len(hosts) > 1:  # the target no longer names the host that the certificate is for
        options.append(("grpc.ssl_target_name_override", hosts[0].rpartition(":")[0]))
    return grpc.aio.secure_channel(target, credentials, options=options)


def _addresses(hosts: Sequence[str]) -> str:
    """Several servers as one gRPC target; gRPC resolves a single host name by itself, but not a list."""
    found = []
    for host in hosts:
        name, _, port = host.rpartition(":")
        try:
            ip = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0]
        except OSError as err:
            raise ConfigError(f"reward server {host}: the host is unknown") from err
        version = ipaddress.ip_address(ip).version
        found.append((version, f"[{ip}]:{port}" if version == 6 else f"{ip}:{port}"))
    if len({version for version, _ in found}) > 1:
        raise ConfigError("reward servers must all have IPv4 or all have IPv6 addresses")
    return f"ipv{found[0][0]}:" + ",".join(text for _, text in found)


def parse_address(address: str) -> str:
    """`HOST:PORT`, or several separated by commas, checked; without white space.

    Raises:
        ConfigError: it is something else.
    """
    parts = [part.strip() for part in address.split(",")]
    for part in parts:
        host, _, port = part.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536 or "/" in host:
            raise ConfigError(f"reward server {part!r} must be HOST:PORT, for example 127.0.0.1:50051")
    return ",".join(parts)


def trace_headers() -> tuple[tuple[str, str], ...]:
    """`traceparent` of the span under way, so that the server's belongs to the same trace; nothing without one.

    Whoever has a span has imported OpenTelemetry; nobody else needs to.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry import propagate

    headers: dict[str, str] = {}
    propagate.inject(headers)
    return tuple(headers.items())
