"""The HTTP server: routes, who may call, what is refused before it is read, and errors in one shape.

It runs in the event loop of the gRPC server and hands its items to the same queue.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import socket
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

from aiohttp import web

from reward_server.config import ServeConfig
from reward_server.facade import decisions, openrlhf, vllm
from reward_server.facade.body import read
from reward_server.facade.faults import Fault, refused, reply
from reward_server.observe import Call, Observer
from reward_server.scorers.base import Failure, Scorer, ScoreTask, Task
from reward_server.security import RenewingContext, Role, Tokens
from reward_server.service import Answer, Refusal, RewardService, log_unforeseen
from rlaif.errors import ConfigError

_OPEN_PATHS = ("/health", "/ping")
_LINGER_S = 2.0  # how long the rest of a refused body is read, so that the client gets to see why
_GRACE_S = 1.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Facade:
    """HTTP in front of a `RewardService`.

    Args:
        config: the server's flags.
        service: answers.
        observer: hears how requests end, as methods `POST /path` with HTTP statuses.
    """

    def __init__(self, config: ServeConfig, service: RewardService, observer: Observer) -> None:
        self._config = config
        self._service = service
        self._observer = observer
        self._tokens = None if config.token_file is None else Tokens(config.token_file)
        self._started = int(time.time())
        self._listening: asyncio.Server | None = None
        app = web.Application(middlewares=[self._guard], client_max_size=config.max_request_bytes)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/ping", self._health),
                web.get("/version", self._version),
                web.get("/v1/models", self._models),
                web.post("/get_reward", self._get_reward),
                web.post("/classify", self._classify),
                web.post("/score", self._score),
                web.post("/v1/score", self._score),
                web.post("/v1/decisions", self._decide),
            ]
        )
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,  # a client that went away is not computed for
            keepalive_timeout=config.http_read_timeout_s,  # also ends connections that never send their headers
            lingering_time=_LINGER_S,
            shutdown_timeout=_GRACE_S,
        )

    async def start(self) -> str:
        """Bind and answer; returns http[s]://HOST:PORT.

        Raises:
            ConfigError: the port is taken, or a TLS file cannot be read.
        """
        config = self._config
        await self._runner.setup()
        assert self._runner.server is not None
        protocol = self._runner.server
        tls = None
        if config.tls_cert is not None and config.tls_key is not None:
            tls = RenewingContext(config.tls_cert, config.tls_key, config.tls_client_ca)

        def connect() -> asyncio.BaseProtocol:
            if tls is not None:
                tls.renew()  # before the handshake of this connection
            return protocol()

        try:
            self._listening = await asyncio.get_running_loop().create_server(
                connect, config.host, config.http_port, ssl=None if tls is None else tls.context
            )
        except OSError as err:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.http_port}: the port is in use or not allowed; give another "
                "--http_port"
            ) from err
        listener: socket.socket = self._listening.sockets[0]
        host = f"[{config.host}]" if ":" in config.host else config.host
        return f"{'http' if tls is None else 'https'}://{host}:{listener.getsockname()[1]}"

    async def stop(self) -> None:
        """Take no connections any more and end those there are."""
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    # ---- doors ----

    async def _get_reward(self, request: web.Request) -> web.Response:
        """OpenRLHF. Its client gives up after a few seconds of refusals, so it is held instead of refused."""
        config = self._config
        asked = await read(request, openrlhf.GetReward, config.http_read_timeout_s)
        until = time.monotonic() + config.http_wait_s
        try:
            scorer = await self._service.scorer(config.http_wait_s)
            tasks = openrlhf.tasks(asked, scorer.kind)
            found = await self._answer(tasks, wait_s=max(0.0, until - time.monotonic()))
        except Refusal as err:
            raise refused(err, overloaded=503) from err
        body = openrlhf.answer(found.outcomes, found.scorer, drop_failed=config.http_drop_failed)
        return _reply(body, found.scorer)

    async def _classify(self, request: web.Request) -> web.Response:
        asked = await read(request, vllm.Classify, self._config.http_read_timeout_s)
        try:
            self._check_model(asked.model, await self._service.scorer())
            found = await self._answer(_checked(asked.tasks()))
        except Refusal as err:
            raise refused(err, overloaded=503) from err
        scorer = found.scorer
        return _reply(vllm.classify_answer(asked, found.outcomes, scorer.kind, self._name(scorer)), scorer)

    async def _score(self, request: web.Request) -> web.Response:
        asked = await read(request, vllm.Score, self._config.http_read_timeout_s)
        try:
            self._check_model(asked.model, await self._service.scorer())
            found = await self._answer(_checked(asked.tasks()))
        except Refusal as err:
            raise refused(err, overloaded=503) from err
        scorer = found.scorer
        return _reply(vllm.score_answer(asked, found.outcomes, scorer.kind, self._name(scorer)), scorer)

    async def _decide(self, request: web.Request) -> web.Response:
        asked = await read(request, decisions.Decide, self._config.http_read_timeout_s)
        try:
            scorer = await self._service.scorer()
            self._check_model(asked.model, scorer)
            found = await self._answer([*asked.tasks(scorer)])
        except Refusal as err:
            raise refused(err, overloaded=429) from err
        return _reply(decisions.answer(asked, found.outcomes, self._name(found.scorer)), found.scorer)

    async def _answer(self, tasks: list[Task | Failure], *, wait_s: float = 0.0) -> Answer:
        limit = self._config.max_items
        if len(tasks) > limit:
            raise Fault(413, f"the request has {len(tasks)} items, the limit is {limit}")
        return await self._service.answer(tasks, wait_s=wait_s)

    def _name(self, scorer: Scorer) -> str:
        return self._config.served_model_name or scorer.name

    def _check_model(self, asked: str | None, scorer: Scorer) -> None:
        """Refuse a request for another model, whose scores these would not be."""
        names = (None, scorer.name, scorer.name.removeprefix("hf:"), self._config.served_model_name)
        if asked not in names:
            raise Fault(404, f"the model {asked!r:.200} is not served here; {scorer.name} is", param="model")

    # ---- who is there ----

    async def _health(self, request: web.Request) -> web.Response:
        await self._active()
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return reply({"version": version("rlaif")})

    async def _models(self, request: web.Request) -> web.Response:
        scorer = await self._active()
        names = dict.fromkeys((self._name(scorer), scorer.name))
        cards: list[dict[str, object]] = [
            {
                "id": name,
                "object": "model",
                "created": self._started,
                "owned_by": "rlaif",
                "root": scorer.name,
                "parent": None,
                "max_model_len": scorer.max_tokens_per_item or None,
                "permission": [],
            }
            for name in names
        ]
        return _reply({"object": "list", "data": cards}, scorer)

    async def _active(self) -> Scorer:
        try:
            return await self._service.scorer()
        except Refusal as err:
            raise refused(err, overloaded=503) from err

    # ---- every request ----

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        method = "other" if resource is None else f"{request.method} {resource.canonical}"
        call = Call(method, request.headers, code="499")  # the client went away
        with self._observer.during(call):
            response = await self._guarded(request, handler)
            call.code = str(response.status)
            return response

    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            self._authorise(request)
            return await handler(request)
        except Fault as fault:
            return fault.response()
        except web.HTTPException as err:
            if err.status == 405:
                return Fault(405, f"{request.method} is not allowed here").response()
            return Fault(err.status, "there is nothing here" if err.status == 404 else err.reason).response()
        except Exception as err:
            log_unforeseen(request.path, err)
            return Fault(500, "internal error").response()

    def _authorise(self, request: web.Request) -> None:
        """Before the body is read.

        Raises:
            Fault: no good token.
        """
        if self._tokens is None or request.path in _OPEN_PATHS:
            return
        token = _token(request.headers.get("Authorization", ""))
        role = None if token is None else self._tokens.role(token)
        if role is None or role < Role.SCORE:
            raise Fault(401, "no valid bearer token")


def _token(header: str) -> bytes | None:
    """The bearer token, or the password of basic authentication, for clients that can only be given a URL."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("utf-8", "surrogateescape")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def _checked(tasks: list[Task]) -> list[Task | Failure]:
    """The tasks, with what is wrong in place of conversations that have nothing to score."""
    return [_whole(task) if isinstance(task, ScoreTask) else task for task in tasks]


def _whole(task: ScoreTask) -> ScoreTask | Failure:
    if task.conversation[-1].role != "assistant":
        return Failure("invalid", "the conversation must end with the assistant turn to score")
    if len(task.conversation) == 1:
        return Failure("invalid", "the conversation has no prompt before the assistant turn")
    return task


def _reply(body: dict[str, object], scorer: Scorer) -> web.Response:
    return reply(body, headers={"X-Model-Version": scorer.version})
