"""Models that are loaded and unloaded while callers leave and models fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.batcher import Batcher
from reward_server.registry import ModelRegistry, TooManyModels
from reward_server.scorers.base import Scorer
from reward_server.service import RewardService
from tests.reward_server.fakes import LengthScorer


class Closable(LengthScorer):
    """A scorer that takes its time to be loaded and warmed up; `fails` is what its warm-up raises."""

    def __init__(self, version: str, fails: Exception | None = None) -> None:
        super().__init__()
        self.name = self.version = version
        self.fails = fails
        self.loading = asyncio.Event()
        self.warming = asyncio.Event()
        self.loaded = asyncio.Event()
        self.warm = asyncio.Event()
        self.closed = 0

    async def load(self) -> Scorer:
        self.loading.set()
        await self.loaded.wait()
        return self

    async def warm_up(self) -> None:
        self.warming.set()
        await self.warm.wait()
        if self.fails is not None:
            raise self.fails

    async def close(self) -> None:
        self.closed += 1


def ready(version: str, fails: Exception | None = None) -> Closable:
    scorer = Closable(version, fails)
    scorer.loaded.set()
    scorer.warm.set()
    return scorer


class Counting(ModelRegistry):
    """Counts how often it was asked to free a model."""

    unloads = 0

    async def unload(self, version: str) -> None:
        self.unloads += 1
        await super().unload(version)


async def registry(*versions: str, max_models: int = 2) -> Counting:
    """With these models loaded, the first one active."""

    def queue(scorer: Scorer) -> Batcher:
        return Batcher(scorer, max_batch_tokens=1000, max_queue_tokens=10**6, max_queue_items=10**6)

    models = Counting(queue, max_models=max_models)
    for version in versions:
        await models.load(ready(version).load, activate=models.active is None)
    return models


@asynccontextmanager
async def administered(models: ModelRegistry, load: Callable[[str], Awaitable[Scorer]]) -> AsyncIterator[Any]:
    """Admin calls to these models over a real channel."""
    service = RewardService(max_items=10, max_request_bytes=1 << 20, max_stream_requests=10, load=load)
    service.open(models)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(service.handlers())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield reward_pb2_grpc.ModelAdminServiceStub(channel)  # type: ignore[no-untyped-call]
    await server.stop(grace=None)
    await models.close()


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("stage", ["loading", "warming"])
def test_what_loads_for_a_caller_that_left_counts_until_it_has_ended_and_is_closed(stage: str) -> None:
    async def scenario() -> None:
        models = await registry("a")
        abandoned = Closable("b")
        if stage == "warming":
            abandoned.loaded.set()
        caller = asyncio.create_task(models.load(abandoned.load, activate=True))
        await getattr(abandoned, stage).wait()
        await cancelled(caller)
        assert models.loading == 1
        with pytest.raises(TooManyModels):
            await models.load(ready("c").load)
        abandoned.loaded.set()
        abandoned.warm.set()
        while models.loading:
            await asyncio.sleep(0)
        assert abandoned.closed == 1
        assert abandoned.warming.is_set() == (stage == "warming"), "nobody needs it to be warm"
        assert [m.version for m in models.models] == ["a"]
        assert models.active is not None and models.active.version == "a"
        assert (await models.load(ready("c").load)).version == "c"
        await models.close()

    asyncio.run(scenario())


def test_a_model_is_freed_although_the_caller_who_asked_for_it_left() -> None:
    async def scenario() -> None:
        models = await registry("a", "b")
        model = models.find("b")
        assert model is not None and isinstance(model.scorer, Closable)
        with models.hold(model):
            caller = asyncio.create_task(models.unload("b"))
            await asyncio.sleep(0)
            await cancelled(caller)
            again = asyncio.create_task(models.unload("b"))
            await asyncio.sleep(0)
            assert not again.done() and model.scorer.closed == 0
        await again
        assert model.scorer.closed == 1
        assert [m.version for m in models.models] == ["a"]
        assert (await models.load(ready("c").load)).version == "c"
        await models.close()

    asyncio.run(scenario())


def test_closing_waits_for_what_loads_and_for_nobody_who_holds_a_model() -> None:
    async def scenario() -> None:
        models = await registry("a", "b", max_models=3)
        loading, held = Closable("c"), models.find("b")
        assert held is not None and isinstance(held.scorer, Closable)
        caller = asyncio.create_task(models.load(loading.load))
        await loading.loading.wait()
        with models.hold(held):
            leaving = asyncio.create_task(models.unload("b"))
            await asyncio.sleep(0)
            closing = asyncio.create_task(models.close())
            loading.loaded.set()
            loading.warm.set()
            await asyncio.wait_for(closing, 60)
        await asyncio.gather(caller, leaving)
        assert (held.scorer.closed, loading.closed) == (1, 1)
        assert models.models == ()

    asyncio.run(scenario())


def test_a_model_that_fails_when_it_is_first_run_is_closed_and_the_caller_told_no_more_than_that() -> None:
    async def scenario() -> None:
        models = await registry("a")
        broken = ready("b", RuntimeError("CUDA error: device-side assert triggered"))

        async def load(name: str) -> Scorer:
            return broken

        async with administered(models, load) as admin:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await admin.LoadModel(pb.LoadModelRequest(model="b"))
            assert failed.value.code() is grpc.StatusCode.INTERNAL
            assert "could not be loaded" in (failed.value.details() or "")
            assert "Error" not in (failed.value.details() or "")
            assert broken.closed == 1
            assert (models.loading, [m.version for m in models.models]) == (0, ["a"])

    asyncio.run(scenario())


def test_two_callers_may_ask_for_the_same_model_to_be_freed() -> None:
    async def scenario() -> None:
        models = await registry("a", "b")
        model = models.find("b")
        assert model is not None

        async def none(name: str) -> Scorer:
            raise AssertionError(name)

        async with administered(models, none) as admin:
            request = pb.UnloadModelRequest(version="b")
            with models.hold(model):
                calls = [asyncio.ensure_future(admin.UnloadModel(request)) for _ in range(2)]
                while models.unloads < 2:
                    await asyncio.sleep(0.001)
                assert not any(call.done() for call in calls)
            assert await asyncio.gather(*calls) == [pb.UnloadModelResponse()] * 2
            with pytest.raises(grpc.aio.AioRpcError) as gone:
                await admin.UnloadModel(request)
            assert gone.value.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(scenario())
