"""`rlaif serve`: the process around the service. Binds, loads, warms up, serves, drains."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from reward_server.batcher import Batcher
from reward_server.config import ServeConfig
from reward_server.facade.app import Facade
from reward_server.files import files_of
from reward_server.observe import Metrics, Observer, Observers
from reward_server.registry import ModelRegistry
from reward_server.scorers.base import Scorer
from reward_server.scorers.composite import SUFFIXES, CompositeScorer
from reward_server.scorers.rule import PartSpec
from reward_server.security import MetadataInterceptor, Role, TokenInterceptor, Tokens, server_credentials
from reward_server.service import ADMIN_SERVICE, SERVICE, RewardService
from rlaif.errors import ConfigError
from rlaif.models import ModelRef
from rlaif.signals import termination
from rlaif.storage import write_atomic

if TYPE_CHECKING:
    from reward_server.traces import Traces

MAX_METADATA_BYTES = 16 << 10
"""Metadata of one call: a token and a trace are a few hundred bytes."""

_HEALTH_SERVICES = ("", SERVICE, ADMIN_SERVICE)


class RewardServer:
    """A bound gRPC server: first warming up, then serving, then drained.

    Health says NOT_SERVING before `open` and from `drain` on, for the whole server and for the service by name.

    Args:
        config: the flags.
        traces: hears what is to be traced; None traces nothing.
    """

    def __init__(self, config: ServeConfig, traces: Traces | None = None) -> None:
        self._config = config
        # As they are before they are read.
        self._files = None if config.model is None else files_of(config.model)
        self._metrics = None if config.metrics_port is None else Metrics()
        self._traces = traces
        heard = [observer for observer in (self._metrics, traces) if observer is not None]
        self._observer: Observer = Observers(*heard)
        self._service = RewardService(
            observer=self._observer,
            max_items=config.max_items,
            max_request_bytes=config.max_request_bytes,
            max_stream_requests=config.max_stream_requests,
            load=self._load,
        )
        self._facade = None
        if config.http_port is not None:
            self._facade = Facade(config, self._service, self._observer)
        self._health = HealthServicer()
        self._registry: ModelRegistry | None = None
        self.metrics_port: int | None = None
        self.http_address: str | None = None
        self._server = grpc.aio.server(
            interceptors=_interceptors(config),
            options=(
                ("grpc.so_reuseport", 0),  # else a second server shares the port in silence
                ("grpc.max_receive_message_length", config.max_request_bytes),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.max_concurrent_streams", 256),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Who opens a connection and does not get on with it is let go,
                ("grpc.server_handshake_timeout_ms", 20_000),
                # and so is who is gone without a word, or answers nothing.
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
            ),
        )

    async def start(self) -> str:
        """Bind and answer health checks; returns HOST:PORT.

        Raises:
            ConfigError: the port is taken.
        """
        config = self._config
        for name in _HEALTH_SERVICES:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._server.add_generic_rpc_handlers(self._service.handlers())
        reflection.enable_server_reflection(
            (
                SERVICE,
                ADMIN_SERVICE,
                health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
                reflection.SERVICE_NAME,
            ),
            self._server,
        )
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            port = self._bind(f"{host}:{config.port}")
        except RuntimeError as err:
            raise ConfigError(
                f"cannot listen on {host}:{config.port}: the port is in use or not allowed; give another --port"
            ) from err
        if self._metrics is not None and config.metrics_port is not None:
            self._metrics.watch_queue(self._queued_tokens)
            self.metrics_port = self._metrics.serve(config.metrics_host, config.metrics_port)
        if self._facade is not None:
            self.http_address = await self._facade.start()
        await self._server.start()
        return f"{host}:{port}"

    def _bind(self, address: str) -> int:
        config = self._config
        if config.tls_cert is None or config.tls_key is None:
            return int(self._server.add_insecure_port(address))
        credentials = server_credentials(config.tls_cert, config.tls_key, config.tls_client_ca)
        return int(self._server.add_secure_port(address, credentials))

    async def open(self, scorer: Scorer) -> asyncio.Future[None]:
        """Warm up and serve; the returned future ends only if computing breaks, with the exception."""

        async def at_hand() -> Scorer:
            return scorer

        self._registry = ModelRegistry(
            self._queue, max_models=self._config.max_models, observer=self._observer
        )
        await self._registry.load(at_hand, files=self._files, activate=True)
        self._service.open(self._registry)
        for name in _HEALTH_SERVICES:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return self._registry.broken

    async def drain(self) -> bool:
        """Say NOT_SERVING, finish what is in flight, stop; returns whether all of it finished in time."""
        await self._health.enter_graceful_shutdown()
        finished = await self._service.drain(self._config.drain_timeout_s)
        if self._facade is not None:
            await self._facade.stop()
        await self._server.stop(grace=1.0)  # health answers until here, and idle connections close
        if self._registry is not None:
            await self._registry.close()
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)
        return finished

    def _queue(self, scorer: Scorer) -> Batcher:
        return Batcher(
            scorer,
            max_batch_tokens=self._config.max_batch_tokens,
            max_queue_tokens=self._config.max_queue_tokens,
            max_queue_items=self._config.max_queue_items,
            observer=self._observer,
        )

    def _queued_tokens(self) -> float:
        models = () if self._registry is None else self._registry.models
        return sum(model.batcher.queued_tokens for model in models)

    async def _load(self, model: str) -> Scorer:
        """A reward model of another name with this server's settings, for the admin calls."""
        config = replace(self._config, model=model, judge=None)
        scorer = await asyncio.to_thread(load_scorer, config)
        _settle()
        return scorer


def _interceptors(config: ServeConfig) -> list[grpc.aio.ServerInterceptor[Any, Any]]:
    limit = MetadataInterceptor(MAX_METADATA_BYTES)
    if config.token_file is None:
        return [limit]
    roles = {SERVICE: Role.SCORE, ADMIN_SERVICE: Role.ADMIN, reflection.SERVICE_NAME: Role.SCORE}
    return [limit, TokenInterceptor(Tokens(config.token_file), roles)]


def load_scorer(config: ServeConfig) -> Scorer:
    """The scorer that the flags name.

    Raises:
        ConfigError: a rubric cannot be used.
        ModelError: the model cannot be loaded or is of the wrong kind.
    """
    if config.judge is not None:
        from reward_server.scorers.judge import JudgeScorer

        return JudgeScorer.open(config)
    assert config.model is not None
    if config.model.endswith(SUFFIXES):
        return CompositeScorer.open(config.model, partial(_load_part, config))
    if ModelRef.parse(config.model).backend == "vllm":
        from reward_server.scorers.vllm import VLLMScorer

        return VLLMScorer.open(config)
    from reward_server.model import load_reward_model
    from reward_server.scorers.learned import LearnedScorer

    reward_model = load_reward_model(
        config.model, device=config.device, dtype=config.dtype, max_length=config.max_length
    )
    return LearnedScorer(config.model, reward_model, torch_compile=config.torch_compile)


def _load_part(config: ServeConfig, part: PartSpec) -> Scorer:
    if part.model is not None and part.model.endswith(SUFFIXES):
        raise ConfigError(
            f"{config.model}: {part.model} is a composite itself; write its rule inside this one's"
        )
    model = part.model
    if model is not None and model.startswith("./"):
        assert config.model is not None  # the file that the part stands in
        model = str(Path(config.model).parent / model)
    torch_compile = config.torch_compile and model is not None and ModelRef.parse(model).backend != "vllm"
    own = replace(
        config,
        model=model,
        judge=part.judge,
        rubric=part.rubric,
        cot=part.cot,
        torch_compile=torch_compile,
    )
    return load_scorer(own)


async def serve(config: ServeConfig, load: Callable[[], Awaitable[Scorer]]) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        config: the flags.
        load: makes the scorer; awaited after the port is bound, so that health answers meanwhile.
    """
    stop = termination()
    server = RewardServer(config, _traces(config))
    address = await server.start()
    stopping: asyncio.Future[bool] = asyncio.ensure_future(stop.wait())
    loading = asyncio.ensure_future(load())
    try:
        await _first(stopping, loading)
        if stop.is_set():
            return
        scorer = await loading
        broken = await server.open(scorer)
        _settle()
        also = "" if server.http_address is None else f" and {server.http_address}"
        print(f"serving {scorer.name} version={scorer.version} on {address}{also}", flush=True)
        del scorer, loading  # the registry alone holds a model, and lets it go when it is unloaded
        if config.ready_file is not None:
            write_atomic(config.ready_file, address)
        await _first(stopping, broken)
        if broken.done():
            broken.result()
    finally:
        stopping.cancel()
        if config.ready_file is not None:
            config.ready_file.unlink(missing_ok=True)
        if not await server.drain():
            print(f"rlaif: requests were still in flight after {config.drain_timeout_s:g} s", flush=True)


def _traces(config: ServeConfig) -> Traces | None:
    """What the flags want to be traced.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if config.otlp_endpoint is None:
        return None
    try:
        from reward_server.traces import Traces
    except ImportError as err:
        raise ConfigError("--otlp_endpoint needs OpenTelemetry: pip install 'rlaif[otel]'") from err
    return Traces.to_collector(config.otlp_endpoint)


def _settle() -> None:
    """Keep the garbage collector away from what is there to stay.

    A full collection walks the 400,000 objects of PyTorch and transformers and holds every thread for 0.2 s, health
    checks among them. Models that are unloaded are freed all the same: by their reference counts.
    """
    gc.collect()
    gc.freeze()


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def log_to_stderr() -> None:
    """Print warnings with time and origin, each once: huggingface_hub prints its own besides."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False


def run(config: ServeConfig) -> None:
    """Serve rewards (see `ServeConfig`)."""
    log_to_stderr()
    asyncio.run(serve(config, lambda: asyncio.to_thread(load_scorer, config)))
