"""The endpoint back end against a real server on loopback that answers from a script."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest

from labeler.backends.openai import OpenAIModel
from labeler.judge import Judge
from labeler.llm import LabelReading, LLMOptions, RequestFailed
from labeler.rubric import load_rubric
from rlaif.errors import EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Pair, user_prompt
from tests.labeler.openai_server import Fault, ScriptedServer

T = TypeVar("T")
Q = user_prompt("Which one?")
FAST = LLMOptions(timeout_s=20, max_retries=2, backoff_s=0.001)


def script(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
    return {"1": 0.5, " 1": 0.1, "2": 0.2, "x": 0.1} if wanted else " A thought. "


def ask(ref: str, call: Callable[[OpenAIModel], Awaitable[T]], options: LLMOptions = FAST) -> T:
    async def run() -> T:
        llm = OpenAIModel(ModelRef.parse(ref), options)
        try:
            return await call(llm)
        finally:
            await llm.close()

    return asyncio.run(run())


def read(ref: str, labels: tuple[str, ...] = ("1", "2"), options: LLMOptions = FAST) -> LabelReading:
    return ask(ref, lambda llm: llm.label_logprobs(Q, "Better:", labels), options)


def test_a_plain_endpoint_gives_labels_from_its_top_tokens() -> None:
    with ScriptedServer(script) as server:
        reading = read(server.ref)
    assert [math.exp(x) for x in reading.distribution.logprobs] == pytest.approx([0.6, 0.2])
    body = server.asked[0]
    assert body["max_tokens"] == 1 and body["top_logprobs"] == 20
    assert body["messages"][-1] == {"role": "assistant", "content": "Better:"}


def test_a_vllm_endpoint_is_asked_for_exactly_the_label_tokens() -> None:
    with ScriptedServer(script, vllm=True) as server:
        reading = read(server.ref)
    assert [math.exp(x) for x in reading.distribution.logprobs] == pytest.approx([0.5, 0.2])
    assert reading.distribution.mass == pytest.approx(0.7)
    body = server.asked[0]
    assert body["logprob_token_ids"] == [ord("1"), ord("2")]
    assert body["continue_final_message"] is True and body["add_generation_prompt"] is False


def test_a_vllm_endpoint_reveals_a_split_label() -> None:
    with (
        ScriptedServer(script, vllm=True) as server,
        pytest.raises(ModelError, match="splits the label '10'"),
    ):
        read(server.ref, tuple(str(i) for i in range(1, 11)))


def test_a_label_outside_the_top_tokens_is_censored() -> None:
    with ScriptedServer(script, top_k=1) as server:
        reading = read(server.ref)
    assert reading.distribution.censored
    # Token 1 alone is seen with 0.5; all else together has 0.5.
    assert math.exp(reading.distribution.logprobs[1]) == pytest.approx(0.5)


def test_an_endpoint_without_logprobs_is_refused_before_any_question() -> None:
    with ScriptedServer(script, logprobs=False) as server, pytest.raises(EndpointError, match="no log-prob"):
        ask(server.ref, lambda llm: llm.generate(Q, "Comparison:", max_tokens=5))
    assert server.asked == []


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with ScriptedServer(script) as server:
        other = server.ref.replace("judge", "jugde")
        with pytest.raises(ModelError, match=r"no model 'jugde'; it has: judge"):
            read(other)


def test_a_dead_server_is_given_up_after_the_retries() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        ref = f"openai:judge@http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"no connection .* after 3 attempts"):
            read(ref)


def faults(*planned: Fault | None) -> Callable[[dict[str, Any]], Fault | None]:
    queue = list(planned)
    return lambda body: queue.pop(0) if queue else None


def test_transient_failures_are_asked_again() -> None:
    fault = faults(Fault(429, {"Retry-After": "0"}), Fault(500))
    with ScriptedServer(script, fault=fault) as server:
        assert not read(server.ref).distribution.censored
    assert len(server.asked) == 3


def test_lasting_failures_end_with_the_status() -> None:
    with (
        ScriptedServer(script, fault=lambda body: Fault(503)) as server,
        pytest.raises(RequestFailed, match="answered 503"),
    ):
        read(server.ref)
    assert len(server.asked) == 3


def test_a_request_that_is_refused_is_not_repeated() -> None:
    fault = faults(Fault(400, message="maximum context length is 64 tokens"))
    with (
        ScriptedServer(script, fault=fault) as server,
        pytest.raises(RequestFailed, match="maximum context length"),
    ):
        read(server.ref)
    assert len(server.asked) == 1


def test_a_hanging_request_times_out() -> None:
    with (
        ScriptedServer(script, fault=lambda body: Fault(hang_s=60)) as server,
        pytest.raises(RequestFailed, match="no answer within"),
    ):
        read(server.ref, options=LLMOptions(timeout_s=0.5, max_retries=0))


def test_a_refused_key_ends_the_run() -> None:
    with (
        ScriptedServer(script, fault=lambda body: Fault(401)) as server,
        pytest.raises(EndpointError, match="OPENAI_API_KEY"),
    ):
        read(server.ref)


@pytest.mark.parametrize("vllm", [True, False])
def test_the_recipe_runs_through_an_endpoint(vllm: bool) -> None:
    def prefers_a(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
        if not wanted:
            return " They differ. More helpful response: 1"  # a server that ignores the stop string
        a_first = user.index("good") < user.index("bad")
        return {"1": 0.8, "2": 0.1} if a_first else {"1": 0.1, "2": 0.8}

    with ScriptedServer(prefers_a, vllm=vllm) as server:
        preference = ask(
            server.ref,
            lambda llm: Judge(llm, load_rubric("helpfulness-pair")).judge_pair(Pair(Q, "good", "bad")),
        )
    assert preference.p_a == pytest.approx(8 / 9)
    prefixes = sorted(b["messages"][-1]["content"] for b in server.asked)
    assert prefixes == ["Comparison:"] * 2 + ["Comparison: They differ.\n\nMore helpful response:"] * 2
