"""A reward server for other people's trainers: reward functions with the signatures of TRL and verl.

Both score over gRPC with `RewardClient`, which retries, splits and pins the model's version. A reward that could not
be had stays missing, in the way the trainer knows: None for TRL, an exception for verl. OpenRLHF needs no function: its
remote reward URL is the server's `/get_reward`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, overload

from policy_trainer.client import RewardClient
from policy_trainer.reward_source import Reward
from rlaif.errors import DataError, RewardServerError
from rlaif.types import Conversation, Message, with_response

Turns = str | Sequence[Mapping[str, Any]]
"""A prompt or completion as TRL and verl have it: text, or `{role, content}` messages."""
SyncReward = Callable[..., list[float | None]]
AsyncReward = Callable[..., Awaitable[list[float | None]]]


class _Connection:
    """A client that is opened when it is first used: workers import reward functions before they fork or move."""

    def __init__(self, address: str, options: Mapping[str, Any]) -> None:
        self._address = address
        self._options = options
        self._lock = threading.Lock()
        self._client: RewardClient | None = None

    def client(self) -> RewardClient:
        """The client; waits for the server the first time.

        Raises:
            ConfigError: the address or an option cannot be.
            RewardServerError: no server answers.
        """
        with self._lock:
            if self._client is None:
                client = RewardClient(self._address, **self._options)
                client.wait_ready()
                self._client = client
            return self._client


def conversation(prompt: Turns, completion: Turns) -> Conversation:
    """A prompt and its completion as the conversation that the reward server scores.

    Args:
        prompt: text (one user turn), or messages.
        completion: text (one assistant turn), or messages that end with an assistant turn.

    Raises:
        DataError: a message has another role than system, user or assistant, or content that is no text.
    """
    turns = (Message("user", prompt),) if isinstance(prompt, str) else _messages(prompt)
    if isinstance(completion, str):
        return with_response(turns, completion)
    return (*turns, *_messages(completion))


def _messages(turns: Sequence[Mapping[str, Any]]) -> Conversation:
    found = []
    for turn in turns:
        role, content = turn.get("role"), turn.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise DataError(
                f"a message of role {role!r} with content of type {type(content).__name__} cannot be scored: "
                "a reward server reads text of the roles system, user and assistant"
            )
        found.append(Message(role, content))
    return tuple(found)


@overload
def trl_reward_function(
    address: str, *, name: str = ..., asynchronous: Literal[True] = ..., **options: Any
) -> AsyncReward: ...


@overload
def trl_reward_function(
    address: str, *, name: str = ..., asynchronous: Literal[False], **options: Any
) -> SyncReward: ...


def trl_reward_function(
    address: str, *, name: str = "reward_server", asynchronous: bool = True, **options: Any
) -> AsyncReward | SyncReward:
    """A reward function for TRL's `GRPOTrainer(reward_funcs=...)`.

    The function returns one normalised reward per completion, None where there is none: TRL leaves those out of the
    group's mean and gives them no advantage. An asynchronous one runs beside other asynchronous reward functions.

    Args:
        address: `HOST:PORT` of the gRPC port, or several separated by commas.
        name: under which TRL logs the rewards.
        asynchronous: whether the function is to be awaited; False for trainers that know plain functions alone.
        options: those of `AsyncRewardClient`.
    """
    connection = _Connection(address, options)

    def conversations(prompts: Sequence[Turns], completions: Sequence[Turns]) -> list[Conversation]:
        return [conversation(p, c) for p, c in zip(prompts, completions, strict=True)]

    def score(
        prompts: Sequence[Turns], completions: Sequence[Turns], **columns: object
    ) -> list[float | None]:
        return _values(connection.client().score(conversations(prompts, completions)))

    async def score_async(
        prompts: Sequence[Turns], completions: Sequence[Turns], **columns: object
    ) -> list[float | None]:
        client = await asyncio.to_thread(connection.client)
        rewards = await asyncio.wrap_future(client.submit(conversations(prompts, completions)))
        return _values(rewards)

    chosen = score_async if asynchronous else score
    chosen.__name__ = name
    return chosen


def _values(rewards: Sequence[Reward]) -> list[float | None]:
    return [reward.value for reward in rewards]


def verl_reward_function(
    address: str, *, prompt_key: str = "prompt", max_in_flight: int = 64, **options: Any
) -> Callable[..., Awaitable[dict[str, float]]]:
    """A custom reward function for verl, to be assigned to a name in the file that its config points at.

    verl gives the function no prompt, so the prompt must be in the dataset's `extra_info`. verl knows no missing
    reward and would train on whatever number it gets: where there is none, the function raises and training stops.

    Args:
        address: `HOST:PORT` of the gRPC port, or several separated by commas.
        prompt_key: the key of `extra_info` that holds the prompt, as text or messages.
        max_in_flight: requests at a time; verl sends every response by itself.
        options: those of `AsyncRewardClient`.
    """
    connection = _Connection(address, {"max_in_flight": max_in_flight, **options})

    async def compute_score(
        data_source: str,
        solution_str: str,
        ground_truth: object,
        extra_info: Mapping[str, Any] | None = None,
        **config: object,
    ) -> dict[str, float]:
        """The normalised reward as `score`; the other numbers are logged by verl.

        Raises:
            DataError: `extra_info` has no prompt.
            RewardServerError: the response could not be scored.
        """
        prompt = (extra_info or {}).get(prompt_key)
        if prompt is None:
            raise DataError(
                f"extra_info of data source {data_source} has no {prompt_key!r}: write the prompt there when the "
                "dataset is made, or name its key with prompt_key"
            )
        # A column of messages comes out of Parquet as an array.
        turns = prompt if isinstance(prompt, str) else list(prompt)
        client = await asyncio.to_thread(connection.client)
        (reward,) = await asyncio.wrap_future(client.submit([conversation(turns, solution_str)]))
        if reward.value is None or reward.raw is None:
            raise RewardServerError(
                f"the reward server at {address} could not score a response: {reward.reason}"
            )
        return {"score": reward.value, "raw_score": reward.raw, "reward_tokens": float(reward.tokens)}

    return compute_score
