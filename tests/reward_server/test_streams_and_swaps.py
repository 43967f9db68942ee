"""Bulk streams over a real channel, and models that are swapped under load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.batcher import Batcher
from reward_server.registry import ModelRegistry, NoSuchModel, State, TooManyModels
from reward_server.scorers.base import Outcome, Prepared, Scorer
from reward_server.service import SERVICE, RewardService
from rlaif.errors import ModelError
from tests.reward_server.fakes import LengthScorer, score_request, serving


def envelope(number: int, *responses: str, **fields: Any) -> pb.ScoreStreamRequest:
    return pb.ScoreStreamRequest(request_id=number, request=score_request(*responses, **fields))


async def sent(*envelopes: pb.ScoreStreamRequest) -> AsyncIterator[pb.ScoreStreamRequest]:
    for one in envelopes:
        yield one


def raws(response: pb.ScoreResponse) -> list[float]:
    return [o.score.raw for o in response.outcomes]


def test_every_request_of_a_stream_is_answered_once_under_its_id() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer(), max_stream_requests=4) as served:
            wanted = {i: "x" * (i % 7 + 1) for i in range(200)}
            call = served.stub.ScoreStream(sent(*(envelope(i, text) for i, text in wanted.items())))
            got = {answer.request_id: raws(answer.response) async for answer in call}
            assert got == {i: [float(len(text))] for i, text in wanted.items()}

    asyncio.run(scenario())


def test_the_server_reads_no_further_than_it_may() -> None:
    async def scenario() -> None:
        scorer = LengthScorer(max_tokens_per_item=10**7)
        scorer.gate.clear()
        taken = 0

        async def endless() -> AsyncIterator[pb.ScoreStreamRequest]:
            nonlocal taken
            while taken < 100:
                taken += 1
                yield envelope(taken, "xxx" * 400_000)

        async with serving(scorer, max_stream_requests=2) as served:
            call = served.stub.ScoreStream(endless())
            await scorer.started.wait()
            before = 0
            while taken > before:
                before = taken
                await asyncio.sleep(0.3)
            assert taken < 30, "held by a window, which gRPC lets grow to 16 MiB"
            call.cancel()
            scorer.gate.set()

    asyncio.run(scenario())


class OneByOne(LengthScorer):
    """Computes one batch each time that its gate is opened."""

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        found = await super().score(batch)
        self.gate.clear()
        return found


class LeftInTheMiddle:
    """The context of a call whose caller leaves while its first answer is on the way."""

    def __init__(self) -> None:
        self.written = 0

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> None:
        return None

    async def write(self, response: pb.ScoreStreamResponse) -> None:
        self.written += 1
        raise grpc.aio.InternalError('Failed "execute_batch"')


def test_what_waits_for_a_caller_that_left_in_the_middle_of_an_answer_is_not_computed() -> None:
    async def scenario() -> None:
        scorer = OneByOne()
        scorer.gate.clear()
        queue = Batcher(scorer, max_batch_tokens=10, max_queue_tokens=1000, max_queue_items=1000)
        registry = ModelRegistry(lambda _: queue, max_models=1)

        async def at_hand() -> Scorer:
            return scorer

        async def no_other(name: str) -> Scorer:
            raise ModelError(name)

        service = RewardService(
            max_items=10, max_request_bytes=1 << 20, max_stream_requests=10, load=no_other
        )
        await registry.load(at_hand, activate=True)
        service.open(registry)
        last_is_here = asyncio.Event()

        async def requests() -> AsyncIterator[bytes]:
            for number in range(8):
                yield envelope(number, "x" * 10).SerializeToString()
            last_is_here.set()
            await asyncio.Event().wait()

        context = LeftInTheMiddle()
        details = SimpleNamespace(method=f"/{SERVICE}/ScoreStream", invocation_metadata=())
        handler: Any = service.handlers()[0].service(details)  # type: ignore[arg-type]
        call = asyncio.ensure_future(handler.stream_stream(requests(), context))
        await last_is_here.wait()
        while queue.queued_tokens != 70:  # and one is being computed
            await asyncio.sleep(0.001)
        scorer.gate.set()
        await call
        assert context.written == 1
        assert queue.queued_tokens == 0
        assert len(scorer.computed) == 1
        await registry.close()

    asyncio.run(scenario())


def test_a_bad_request_of_a_stream_fails_alone_and_bytes_that_are_no_message_end_it() -> None:
    async def scenario() -> None:
        async with serving(LengthScorer()) as served:
            bad = pb.ScoreStreamRequest(request_id=2, request=pb.ScoreRequest())
            call = served.stub.ScoreStream(sent(envelope(1, "ab"), bad, envelope(3, "abc")))
            got = {answer.request_id: answer async for answer in call}
            assert raws(got[1].response) == [2.0] and raws(got[3].response) == [3.0]
            assert got[2].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            async with grpc.aio.insecure_channel(served.address) as channel:
                raw = channel.stream_stream("/rlaif.reward.v1.RewardService/ScoreStream")

                async def garbage() -> AsyncIterator[bytes]:
                    yield b"\xff\xff\xff"

                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    _ = [answer async for answer in raw(garbage())]
                assert failed.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "Error" not in (failed.value.details() or "")

    asyncio.run(scenario())


class Versioned(LengthScorer):
    """A scorer whose score names its version."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.version = f"v{number}"
        self.closed = False

    async def score(self, batch: Any) -> Any:
        from reward_server.scorers.base import Scored

        assert not self.closed
        await asyncio.sleep(0.001)
        return [Scored(float(self.number), tokens=item.tokens) for item in batch]

    async def close(self) -> None:
        self.closed = True


def registry(max_models: int = 3) -> ModelRegistry:
    def queue(scorer: Scorer) -> Batcher:
        return Batcher(scorer, max_batch_tokens=1000, max_queue_tokens=10**6, max_queue_items=10**6)

    return ModelRegistry(queue, max_models=max_models)


async def made(scorer: Scorer) -> Scorer:
    return scorer


def test_twenty_swaps_under_load_refuse_nobody_and_mix_no_versions() -> None:
    async def scenario() -> None:
        async with serving(Versioned(0), max_models=3) as served:
            models = served.server._registry
            assert models is not None
            stop = asyncio.Event()
            answers: list[pb.ScoreResponse] = []

            async def caller() -> None:
                while not stop.is_set():
                    answers.append(await served.stub.Score(score_request("a", "bb", "ccc")))

            callers = [asyncio.create_task(caller()) for _ in range(4)]
            for number in range(1, 21):
                before = models.active
                assert before is not None
                scorer = Versioned(number)
                await models.load(lambda scorer=scorer: made(scorer), activate=True)  # type: ignore[misc]
                await models.unload(before.version)
                seen = len(answers)
                while len(answers) == seen:  # at least one call is answered between two swaps
                    await asyncio.sleep(0.001)
            stop.set()
            await asyncio.gather(*callers)
            for answer in answers:
                assert set(raws(answer)) == {float(answer.model.version.removeprefix("v"))}
            assert len({a.model.version for a in answers}) > 2
            assert [m.version for m in models.models] == ["v20"]

    asyncio.run(scenario())


def test_a_caller_keeps_the_version_it_expects_as_long_as_it_is_loaded() -> None:
    async def scenario() -> None:
        async with serving(Versioned(1)) as served:
            models = served.server._registry
            assert models is not None
            await models.load(lambda: made(Versioned(2)), activate=True)
            assert raws(await served.stub.Score(score_request("a"))) == [2.0]
            pinned = score_request("a", expected_version="v1")
            assert raws(await served.stub.Score(pinned)) == [1.0]
            await models.unload("v1")
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await served.stub.Score(pinned)
            assert failed.value.code() is grpc.StatusCode.FAILED_PRECONDITION

    asyncio.run(scenario())


def test_a_model_that_cannot_be_loaded_leaves_the_active_one_alone() -> None:
    async def broken() -> Scorer:
        raise ModelError("the checkpoint is incomplete")

    async def scenario() -> None:
        models = registry()
        await models.load(lambda: made(Versioned(1)), activate=True)
        with pytest.raises(ModelError):
            await models.load(broken, activate=True)
        assert models.active is not None and models.active.version == "v1"
        assert models.loading == 0
        await models.close()

    asyncio.run(scenario())


def test_unloading_waits_for_the_calls_that_hold_the_model() -> None:
    async def scenario() -> None:
        models = registry()
        scorer = Versioned(1)
        await models.load(lambda: made(scorer), activate=True)
        await models.load(lambda: made(Versioned(2)), activate=True)
        old = models.find("v1")
        assert old is not None
        with models.hold(old):
            leaving = asyncio.create_task(models.unload("v1"))
            await asyncio.sleep(0.01)
            assert old.state is State.DRAINING and not scorer.closed
            assert models.find("v1") is None, "no new call gets it"
        await leaving
        assert scorer.closed
        await models.close()

    asyncio.run(scenario())


def test_what_cannot_be_done_with_models_is_refused() -> None:
    async def scenario() -> None:
        models = registry(max_models=1)
        await models.load(lambda: made(Versioned(1)), activate=True)
        with pytest.raises(TooManyModels, match=r"holds \(v1\): unload one, or .*models activate"):
            await models.load(lambda: made(Versioned(2)))
        with pytest.raises(NoSuchModel, match="is active"):
            await models.unload("v1")
        with pytest.raises(NoSuchModel, match="no model of version v9 is loaded, only v1"):
            models.activate("v9")
        with pytest.raises(NoSuchModel, match="no model of version v9 is loaded, only v1"):
            await models.unload("v9")
        await models.close()

    asyncio.run(scenario())


def test_a_model_whose_files_are_as_they_were_is_there_without_being_loaded_again() -> None:
    async def scenario() -> None:
        models = registry(max_models=2)
        await models.load(lambda: made(Versioned(1)), files=("rm1", 1), activate=True)
        await models.load(lambda: made(Versioned(2)), files=("rm2", 1), activate=True)

        async def again() -> Scorer:
            raise AssertionError("it is loaded")

        back = await models.load(again, files=("rm1", 1), activate=True)
        assert (back.version, back.state) == ("v1", State.ACTIVE)
        for changed in (("rm1", 2), None):
            with pytest.raises(TooManyModels):
                await models.load(again, files=changed)
        await models.unload("v2")
        with pytest.raises(AssertionError, match="it is loaded"):  # the files of a model that is gone
            await models.load(again, files=("rm2", 1))
        await models.close()

    asyncio.run(scenario())


def test_admin_calls_over_the_wire(tmp_path: Any) -> None:
    async def scenario() -> None:
        async with serving(Versioned(1)) as served, grpc.aio.insecure_channel(served.address) as channel:
            admin: Any = reward_pb2_grpc.ModelAdminServiceStub(channel)  # type: ignore[no-untyped-call]
            for call, code in (
                (admin.LoadModel(pb.LoadModelRequest(model=f"hf:{tmp_path}/none")), "INVALID_ARGUMENT"),
                (admin.LoadModel(pb.LoadModelRequest()), "INVALID_ARGUMENT"),
                (admin.ActivateModel(pb.ActivateModelRequest(version="v9")), "NOT_FOUND"),
                (admin.UnloadModel(pb.UnloadModelRequest(version="v1")), "FAILED_PRECONDITION"),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await call
                assert failed.value.code().name == code
            info = await served.stub.GetInfo(pb.GetInfoRequest())
            assert [(m.model.version, m.state) for m in info.models] == [("v1", pb.MODEL_STATE_ACTIVE)]

    asyncio.run(scenario())
