"""Reward functions for TRL and verl against a reward server whose score is the number that a response spells."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import grpc
import numpy as np
import pytest

from policy_trainer.adapters import conversation, trl_reward_function, verl_reward_function
from rlaif.errors import DataError, RewardServerError
from rlaif.types import Message
from tests.policy_trainer.reward_servers import NumberServer, free_port, overloaded, refusing, serving


def test_trl_gets_one_reward_per_completion_and_none_for_those_without() -> None:
    servicer = NumberServer()  # center 1, scale 2
    with serving(servicer) as address:
        prompts = ["one", "two", "three", "four", "five", "six"]
        completions = ["1", "x5", "word", "7", "9", "1.5"]
        columns = {"completion_ids": [[1]] * 6, "trainer_state": None, "answer": ["?"] * 6}
        plain = trl_reward_function(address, asynchronous=False)
        expected = [0.0, 2.0, None, 3.0, 4.0, 0.25]
        assert plain(prompts=prompts, completions=completions, **columns) == expected
        awaited = trl_reward_function(address, name="helpful")
        assert inspect.iscoroutinefunction(awaited) and not inspect.iscoroutinefunction(plain)
        assert (plain.__name__, awaited.__name__) == ("reward_server", "helpful")
        for _ in range(2):  # every call may come on another event loop
            assert asyncio.run(awaited(prompts=prompts, completions=completions, **columns)) == expected


def test_conversational_prompts_and_completions_are_one_conversation() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    completion = [{"role": "assistant", "content": "4"}]
    expected = (Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4"))
    assert conversation(prompt, completion) == conversation(prompt, "4") == expected
    assert conversation("2+2?", "4") == expected[1:]
    for odd in ({"role": "tool", "content": "4"}, {"role": "user", "content": [{"type": "image"}]}):
        with pytest.raises(DataError, match="cannot be scored"):
            conversation([*prompt, odd], completion)


def test_an_overloaded_server_is_waited_for_and_a_dead_one_is_an_error() -> None:
    servicer = NumberServer(moods=[overloaded(0.01)])
    with serving(servicer) as address:
        function = trl_reward_function(address, asynchronous=False)
        assert function(["q"], ["3"]) == [1.0]
        assert len(servicer.calls) == 2
        servicer.moods.append(refusing(grpc.StatusCode.INTERNAL, "broken"))
        with pytest.raises(RewardServerError, match="INTERNAL"):
            function(["q"], ["3"])


def test_the_server_is_looked_for_when_the_first_reward_is_wanted() -> None:
    address = f"127.0.0.1:{free_port()}"
    function = trl_reward_function(
        address, asynchronous=False
    )  # as a worker imports it, before there is a server
    with serving(NumberServer(), port=int(address.rpartition(":")[2])):
        assert function(["q"], ["3"]) == [1.0]


def test_verl_gets_a_score_and_never_a_number_for_a_failure() -> None:
    async def scenario(address: str) -> None:
        compute_score = verl_reward_function(address, prompt_key="question")
        assert inspect.iscoroutinefunction(compute_score), "verl awaits coroutine functions alone"
        messages: Any = np.array([{"role": "user", "content": "2+2?"}], dtype=object)
        for prompt in ("2+2?", messages):
            asked = {"question": prompt, "num_turns": 2, "rollout_reward_scores": {}}
            score = await compute_score(
                data_source="sums",
                solution_str="5",
                ground_truth="4",
                extra_info=asked,
                reward_router_address=None,
            )
            assert score == {"score": 2.0, "raw_score": 5.0, "reward_tokens": 3.0}
        many = [compute_score("sums", str(n), "4", {"question": "?"}) for n in range(20)]
        assert [s["score"] for s in await asyncio.gather(*many)] == [(n - 1) / 2 for n in range(20)]
        with pytest.raises(RewardServerError, match="could not score"):
            await compute_score("sums", "word", "4", {"question": "?"})
        for nothing in (None, {}, {"prompt": "?"}):
            with pytest.raises(DataError, match="no 'question'"):
                await compute_score("sums", "5", "4", nothing)

    servicer = NumberServer()
    with serving(servicer) as address:
        asyncio.run(scenario(address))
    first, second = servicer.calls[0].items[0].conversation, servicer.calls[1].items[0].conversation
    assert first == second
    assert [(m.role, m.content) for m in first.messages] == [("user", "2+2?"), ("assistant", "5")]
