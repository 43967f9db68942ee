"""`rlaif models`: which models a reward server holds, and swapping them while it serves.

Of several servers each is asked: a score comes from one of the replicas, a swap is for all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from policy_trainer.client import AsyncRewardClient, parse_address
from policy_trainer.grpc_errors import details
from protos.rlaif.reward.v1 import reward_pb2, reward_pb2_grpc
from rlaif.errors import RewardServerError

if TYPE_CHECKING:
    from policy_trainer.config import ActivateModelConfig, LoadModelConfig, ModelsConfig, UnloadModelConfig


class AdminClient(AsyncRewardClient):
    """A reward client that may change the models of one server; its token needs the role `admin`."""

    def __init__(self, address: str, **options: Any) -> None:
        """See `AsyncRewardClient`; `timeout_s` must be long enough to load a model."""
        super().__init__(address, **options)
        self._admin: Any = reward_pb2_grpc.ModelAdminServiceStub(self._channel)

    async def models(self) -> list[reward_pb2.LoadedModel]:
        """All that are loaded.

        Raises:
            RewardServerError: the server cannot be reached.
        """
        answer = await self._retrying(self._stub.GetInfo, reward_pb2.GetInfoRequest(), "GetInfo")
        return list(answer.models)

    async def load(self, model: str, *, activate: bool = False) -> reward_pb2.LoadedModel:
        """Load and warm up a model beside the active one, and make it the active one if asked.

        Raises:
            RewardServerError: there is no such model or no room for it, or the token does not allow it.
        """
        request = reward_pb2.LoadModelRequest(model=model, activate=activate)
        answer = await self._retrying(self._admin.LoadModel, request, "LoadModel")
        loaded: reward_pb2.LoadedModel = answer.model
        return loaded

    async def activate(self, version: str) -> reward_pb2.LoadedModel:
        """Let a loaded model answer all calls that expect no version.

        Raises:
            RewardServerError: it is not loaded, or the token does not allow it.
        """
        request = reward_pb2.ActivateModelRequest(version=version)
        answer = await self._retrying(self._admin.ActivateModel, request, "ActivateModel")
        active: reward_pb2.LoadedModel = answer.model
        return active

    async def unload(self, version: str) -> None:
        """Free a model once the calls that it has begun are answered.

        Raises:
            RewardServerError: it is not loaded or is the active one, or the token does not allow it.
        """
        request = reward_pb2.UnloadModelRequest(version=version)
        await self._retrying(self._admin.UnloadModel, request, "UnloadModel")

    def _refused(self, err: grpc.aio.AioRpcError, method: str) -> RewardServerError:
        if err.code() is grpc.StatusCode.FAILED_PRECONDITION:
            return RewardServerError(f"the reward server at {self.address} refused {method}: {details(err)}")
        return super()._refused(err, method)


def show(model: reward_pb2.LoadedModel) -> str:
    """State, version and name of a model, on one line."""
    state = reward_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower()
    return f"{state:<8}  {model.model.version}  {model.model.name}"


def list_models(config: ModelsConfig) -> None:
    """Print the models of each server.

    Raises:
        RewardServerError: a server cannot be reached.
    """

    async def ask(client: AdminClient) -> str:
        return "\n".join(map(show, await client.models()))

    _each(config, ask)


def load(config: LoadModelConfig) -> None:
    """Load a model in each server.

    Raises:
        RewardServerError: see `AdminClient.load`; servers after the one that it names are as they were.
    """

    async def ask(client: AdminClient) -> str:
        return show(await client.load(config.model, activate=config.activate))

    _each(config, ask)


def activate(config: ActivateModelConfig) -> None:
    """Make a loaded model the active one of each server.

    Raises:
        RewardServerError: see `AdminClient.activate`; servers after the one that it names are as they were.
    """

    async def ask(client: AdminClient) -> str:
        return show(await client.activate(config.version))

    _each(config, ask)


def unload(config: UnloadModelConfig) -> None:
    """Free a model in each server.

    Raises:
        RewardServerError: see `AdminClient.unload`; servers after the one that it names are as they were.
    """

    async def ask(client: AdminClient) -> str:
        await client.unload(config.version)
        return f"unloaded  {config.version}"

    _each(config, ask)


def _each(config: ModelsConfig, ask: Callable[[AdminClient], Awaitable[str]]) -> None:
    """Ask the servers one after the other, so that not all of them load at the same time, and print the answers."""
    addresses = parse_address(config.reward_server).split(",")

    async def ask_all() -> None:
        for address in addresses:
            options = {"timeout_s": config.timeout_s, "give_up_after_s": config.give_up_after_s}
            async with AdminClient(address, **options) as client:
                answer = await ask(client)
            if len(addresses) > 1:
                print(f"{address}:")
            print(answer, flush=True)

    asyncio.run(ask_all())
