"""Requests to one model behind one or several OpenAI-compatible endpoints: connections, retries, and whom to ask.

The `openai` client tells address, key and headers. Requests pass it by: one costs 0.3 ms of CPU inside aiohttp, 0.45 ms
through the client's aiohttp transport, 0.9 ms through `client.post`, 1.5 ms with the default transport, and 2.5 ms
through `client.chat.completions.create` (32 in flight, 2 KB each way, Python 3.11, Xeon).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NoReturn, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from openai import AsyncOpenAI
from pydantic_core import from_json, to_json

from labeler.backends.completions import PATHS
from labeler.backends.limits import Gate, Pass, RetryBudget, retry_after_s
from labeler.llm import LLMOptions, RequestFailed
from rlaif.errors import EndpointError, ModelError, RlaifError

_LONGEST_BACKOFF_S = 60.0

_KEEP_ALIVE_S = 4.0
"""An idle connection is not used again after so long: uvicorn, which vLLM runs on, closes it after 5 s."""

_LONGEST_WAIT_S = 300.0
"""An endpoint that asks to wait for longer is out of quota rather than busy."""

_OF_THE_REQUEST = ("logprobs", "moderation", "flagged")
"""Words of a 403 that is about what was asked and not about the key (OpenAI; OpenRouter)."""

_LEFT_OUT_S = 10.0
"""A server that nobody answers at is tried again after so long."""

_PATIENCE_S = 120.0
"""A request that is refused for exceeding a rate limit is sent again for so long at least: limits count minutes."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response; header names ignore case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class ConnectionBroken(Exception):
    """The connection broke before the reply was whole."""


class Disconnected(ConnectionBroken):
    """The connection was closed before any of the reply came, as servers do with one that was idle for a while."""


class NoConnection(ConnectionBroken):
    """Nobody answers at the address."""


class Wire(Protocol):
    """Carries requests to one server."""

    @property
    def where(self) -> str:
        """Base URL, without a slash at its end."""
        ...

    async def send(self, method: str, url: str, body: bytes | None) -> Reply:
        """Send one request and read the reply.

        Raises:
            NoConnection: nobody answers.
            Disconnected: the connection was closed before the reply.
            ConnectionBroken: the reply is not whole.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class HTTPWire:
    """HTTP by aiohttp, with the address and the headers of the `openai` client.

    Args:
        base_url: of the endpoint; None for OpenAI itself.
        api_key: sent as bearer token.
        max_connections: most connections at a time.
    """

    def __init__(self, base_url: str | None, api_key: str, max_connections: int) -> None:
        client = AsyncOpenAI(base_url=base_url, api_key=api_key)
        headers = {**client.default_headers, **client.auth_headers}
        # Less those that describe this machine: every header costs time at every request.
        self._headers = {
            name: value
            for name, value in headers.items()
            if isinstance(value, str) and not name.lower().startswith("x-stainless")
        }
        self._where = str(client.base_url).rstrip("/")
        self._max_connections = max_connections
        self._session: aiohttp.ClientSession | None = None

    @property
    def where(self) -> str:
        """Base URL, without a slash at its end."""
        return self._where

    async def send(self, method: str, url: str, body: bytes | None) -> Reply:
        """See `Wire.send`."""
        if self._session is None:
            self._session = self._open()
        try:
            async with self._session.request(method, url, data=body) as response:
                return Reply(response.status, response.headers, await response.read())
        except aiohttp.ClientConnectorError as err:
            raise NoConnection(str(err)) from err
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as err:
            raise Disconnected(str(err) or type(err).__name__) from err
        except aiohttp.ClientError as err:
            raise ConnectionBroken(str(err) or type(err).__name__) from err

    def _open(self) -> aiohttp.ClientSession:
        """A session on the running event loop. The proxy is looked up once; aiohttp would do so at every request."""
        address = urlsplit(self._where)
        bypassed = proxy_bypass(address.hostname or "")
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, keepalive_timeout=_KEEP_ALIVE_S),
            headers=self._headers,
            proxy=None if bypassed else getproxies().get(address.scheme),
            # Timeouts are set around whole requests, by asyncio.
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None


class Refused(RequestFailed):
    """The endpoint does not accept this request.

    Attributes:
        status: HTTP status, 4xx; 200 where an error without a status came with it.
        detail: what the endpoint said, in one line.
        param: the field at fault, where the endpoint names it.
    """

    def __init__(self, status: int, detail: str, param: str) -> None:
        super().__init__(f"the endpoint answered {status}: {detail}")
        self.status, self.detail, self.param = status, detail, param


@dataclass(slots=True)
class Endpoint:
    """One server of the model.

    Attributes:
        wire: how it is reached.
        gate: how fast it is asked.
        answered: it has answered a request, so that the key is good.
        lost: nobody answered there.
        lost_until: until when it is left out.
    """

    wire: Wire
    gate: Gate
    answered: bool = field(default=False, init=False)
    lost: bool = field(default=False, init=False)
    lost_until: float = field(default=0.0, init=False)


class Endpoints:
    """The servers of one model. A server that is gone is left out while others answer, and tried again later.

    Args:
        wires: one per server.
        model: named in errors.
        options: limits (per server), time-out and retries.
    """

    def __init__(self, wires: Sequence[Wire], model: str, options: LLMOptions) -> None:
        self._model = model
        self._options = options
        self._chance = random.Random()
        self._budget = RetryBudget()
        self._order = itertools.count()
        self.all = [
            Endpoint(
                wire,
                Gate(
                    options.max_in_flight,
                    adaptive=options.adaptive,
                    requests_per_minute=options.requests_per_minute,
                    tokens_per_minute=options.tokens_per_minute,
                ),
            )
            for wire in wires
        ]

    @property
    def where(self) -> str:
        """The base URLs."""
        return ", ".join(e.wire.where for e in self.all)

    async def close(self) -> None:
        """Close all connections."""
        for endpoint in self.all:
            await endpoint.wire.close()

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        *,
        urgent: bool = False,
        tokens: float = 0.0,
        affinity: str = "",
        only: Endpoint | None = None,
    ) -> Any:
        """Send a request, again after a transient failure, and return the JSON value of the reply.

        Args:
            path: after the base URL; from the server's root if it begins with `//`.
            body: JSON; None for a GET.
            urgent: goes before those that are not.
            tokens: an estimate of prompt and completion tokens.
            affinity: requests with equal affinity go to the same server if it is not much busier than others, so that
                its prefix cache is of use.
            only: ask this server alone.

        Raises:
            Refused: the server does not accept the request.
            RequestFailed: it failed again and again.
            ModelError: the server does not know the model.
            EndpointError: no server can be reached, or the key is refused, or the quota used up.
        """
        content = None if body is None else to_json(body)
        rank = (0 if urgent else 1, next(self._order))
        clock = asyncio.get_running_loop().time
        began = clock()
        attempt = 0
        while True:
            endpoint = only or self._pick(affinity, clock())
            passed = await endpoint.gate.enter(rank, tokens)
            if passed is None:  # the server was lost while this waited for it
                continue
            try:
                return await self._attempt(endpoint, passed, path, content)
            except _Transient as err:
                failure = err
            attempt += 1
            retries = self._options.max_retries
            if (
                failure.lost
                and only is None
                and attempt <= retries + len(self.all)
                and self._another_is_there(clock())
            ):
                continue
            spent = attempt > retries
            if not (failure.busy or failure.lost or (failure.closed and attempt == 1)):
                spent = spent or not self._budget.spend(attempt)
            if spent and not (failure.busy and retries and clock() - began < _PATIENCE_S):
                if isinstance(failure.error, EndpointError):
                    raise EndpointError(
                        f"no connection to {self.where if only is None else only.wire.where} after {attempt} attempts: "
                        "is the server running?",
                        advice="Answers so far are kept; run the same command again to go on",
                    ) from failure
                raise failure.error from failure
            backoff = min(_LONGEST_BACKOFF_S, self._options.backoff_s * 2.0 ** min(attempt - 1, 20))
            wait = self._chance.uniform(0.0, backoff)
            if failure.wait is not None:  # taken at its word once: 0 again and again would be a flood
                wait = failure.wait if attempt == 1 else max(wait, failure.wait)
            await asyncio.sleep(wait)

    async def _attempt(self, endpoint: Endpoint, passed: Pass, path: str, content: bytes | None) -> Any:
        """One request. Tells the gate how it went, and leaves it."""
        gate, used = endpoint.gate, None
        root = endpoint.wire.where
        url = root.removesuffix("/v1") + path[1:] if path.startswith("//") else root + path
        try:
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    reply = await endpoint.wire.send("GET" if content is None else "POST", url, content)
            except TimeoutError as err:
                gate.failed()
                raise _Transient(RequestFailed(f"no answer within {self._options.timeout_s:g} s")) from err
            except NoConnection as err:
                self._lose(endpoint)
                raise _Transient(EndpointError(f"no connection to {root}"), lost=True) from err
            except ConnectionBroken as err:
                gate.failed()
                broken = RequestFailed(f"the connection broke: {_line(str(err))}")
                raise _Transient(broken, closed=isinstance(err, Disconnected)) from err
            endpoint.lost, endpoint.lost_until = False, 0.0
            if reply.status != 200:
                self._refuse(endpoint, passed, path, reply, reply.status)
            try:
                value = from_json(reply.body)
            except ValueError as err:
                gate.failed()
                raise _Transient(
                    RequestFailed(f"the endpoint's answer cannot be read: {_line(str(err))}")
                ) from err
            if isinstance(value, dict) and value.get("error") and "choices" not in value:
                self._refuse(endpoint, passed, path, reply, _told_status(reply))
            gate.answered(reply.headers)
            endpoint.answered |= content is not None  # a list of models is often public
            self._budget.succeeded()
            used = _tokens(value)
            return value
        finally:
            gate.leave(passed, tokens=used)

    def _refuse(self, endpoint: Endpoint, passed: Pass, path: str, reply: Reply, status: int) -> NoReturn:
        """Raise what a status other than 200 means."""
        where = endpoint.wire.where
        detail, param, code = _error(reply.body)
        said = detail.lower()
        of_the_key = not endpoint.answered and not any(word in said for word in _OF_THE_REQUEST)
        if status == 401 or (status == 403 and of_the_key):
            raise EndpointError(f"{where} refuses the key ({status}): set OPENAI_API_KEY")
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            raise EndpointError(f"the quota at {where} is used up: {detail}")
        another_route = path == PATHS["chat"] and ("chat model" in said or "v1/completions" in said)
        if status == 404 and "model" in said and not path.endswith("/models") and not another_route:
            raise ModelError(f"{where} does not know {self._model!r}: {detail}")
        failed = RequestFailed(f"the endpoint answered {status}: {detail}")
        wait = retry_after_s(reply.headers, time.time())
        busy = status == 429
        if not (busy or (status >= 500 and status != 501) or status in (408, 409)):
            raise Refused(status, detail, param)
        if wait is not None and wait > _LONGEST_WAIT_S:
            raise EndpointError(
                f"{where} asks to wait for {wait:.0f} s ({status}: {detail}); answers so far are kept, run the same "
                "command again then"
            )
        if busy:
            endpoint.gate.refused(passed, reply.headers, wait)
        else:
            endpoint.gate.failed()
        raise _Transient(failed, wait=wait, busy=busy)

    # ---- whom to ask ----

    def _pick(self, affinity: str, now: float) -> Endpoint:
        """The server that has the prompt in its cache, unless another has much less to do."""
        if len(self.all) == 1:
            return self.all[0]
        there = [e for e in self.all if e.lost_until <= now]
        for endpoint in there:
            if endpoint.lost:  # a single request finds out whether it is back
                endpoint.lost_until = now + self._options.timeout_s
                return endpoint
        if not there:
            return min(self.all, key=lambda e: e.lost_until)
        least = min(there, key=lambda e: e.gate.load)
        usual = max(
            there, key=lambda e: blake2b(f"{e.wire.where} {affinity}".encode(), digest_size=8).digest()
        )
        return usual if usual.gate.load <= 1.25 * least.gate.load + 4 else least

    def _another_is_there(self, now: float) -> bool:
        return len(self.all) > 1 and any(e.lost_until <= now for e in self.all)

    def _lose(self, endpoint: Endpoint) -> None:
        """Leave a server out for a while, if there are others."""
        if len(self.all) > 1:
            endpoint.lost = True
            endpoint.lost_until = asyncio.get_running_loop().time() + _LEFT_OUT_S
            endpoint.gate.turn_away()


class _Transient(Exception):
    """A failure that another attempt may mend.

    Attributes:
        error: what to raise when no attempt is left.
        wait: seconds that the server asks to wait.
        busy: a rate limit was exceeded.
        lost: nobody answers at the address.
        closed: the connection was closed before the reply, which is no fault of the request.
    """

    def __init__(
        self,
        error: RlaifError,
        *,
        wait: float | None = None,
        busy: bool = False,
        lost: bool = False,
        closed: bool = False,
    ) -> None:
        super().__init__(str(error))
        self.error, self.wait, self.busy, self.lost, self.closed = error, wait, busy, lost, closed


def _error(body: bytes) -> tuple[str, str, str]:
    """(message in one line, field at fault, code) of an error reply, in OpenAI's form or another."""
    try:
        value = from_json(body)
    except ValueError:
        return _line(body.decode(errors="replace")), "", ""
    error = value.get("error", value) if isinstance(value, dict) else value
    if not isinstance(error, dict):
        return _line(str(error)), "", ""
    message = error.get("message") or error.get("detail") or error
    return _line(str(message)), str(error.get("param") or ""), str(error.get("code") or "")


def _told_status(reply: Reply) -> int:
    """The status that an error names in a reply of status 200 (OpenRouter, once it has begun to answer)."""
    code = _error(reply.body)[2]
    return int(code) if code.isdecimal() and 400 <= int(code) < 600 else reply.status


def _tokens(value: object) -> float | None:
    """Prompt and completion tokens of a reply, where it tells."""
    usage = value.get("usage") if isinstance(value, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return float(total) if isinstance(total, int) else None


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
