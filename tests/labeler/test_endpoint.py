"""Retries and the choice among several servers, on a virtual clock and without sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import pytest

from labeler.backends.endpoint import ConnectionBroken, Endpoints, NoConnection, Refused, Reply
from labeler.backends.openai import OpenAIModel
from labeler.judge import Judge, Recipe
from labeler.llm import Abilities, LLMOptions, RequestFailed
from labeler.rubric import load_rubric
from rlaif.errors import EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Pair, Preference, user_prompt
from tests.labeler.virtual import run_virtual

T = TypeVar("T")
Answer = Reply | Exception
OPTIONS = LLMOptions(timeout_s=30.0, max_retries=3, backoff_s=1.0)


def ok(value: object = 1) -> Reply:
    return Reply(200, {}, json.dumps({"value": value}).encode())


def status(number: int, headers: Mapping[str, str] | None = None, **error: str) -> Reply:
    return Reply(number, headers or {}, json.dumps({"error": {"message": "scripted", **error}}).encode())


class ScriptedWire:
    """A server that answers by a function of (time, body), after some time."""

    def __init__(
        self, answer: Callable[[float, Any], Answer], where: str = "http://a/v1", latency: float = 0.1
    ) -> None:
        self.where, self.answer, self.latency = where, answer, latency
        self.asked: list[tuple[float, str, Any]] = []

    async def send(self, method: str, url: str, body: bytes | None) -> Reply:
        loop = asyncio.get_running_loop()
        value = None if body is None else json.loads(body)
        self.asked.append((loop.time(), f"{method} {url}", value))
        answer = self.answer(loop.time(), value)
        await asyncio.sleep(self.latency)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        pass


def in_turn(*answers: Answer) -> Callable[[float, Any], Answer]:
    """These answers, the last of them again and again."""
    left = list(answers)
    return lambda now, body: left.pop(0) if len(left) > 1 else left[0]


def run(use: Callable[[Endpoints], Awaitable[T]], *wires: ScriptedWire, options: LLMOptions = OPTIONS) -> T:
    async def main() -> T:
        return await use(Endpoints(wires, "judge", options))

    return run_virtual(main())


def ask(wire: ScriptedWire, options: LLMOptions = OPTIONS) -> Any:
    return run(lambda pool: pool.ask("/x", {"q": 1}), wire, options=options)


def gaps(wire: ScriptedWire) -> list[float]:
    """Seconds from one answer to the next request."""
    times = [t for t, _, _ in wire.asked]
    return [b - a - wire.latency for a, b in itertools.pairwise(times)]


@pytest.mark.parametrize(
    "failure",
    [
        status(500),
        status(503),
        status(408),
        ConnectionBroken("reset"),
        NoConnection("refused"),
        Reply(200, {}, b'{"value": '),
    ],
    ids=["500", "503", "408", "broken", "unreached", "truncated"],
)
def test_a_transient_failure_is_tried_again_with_full_jitter(failure: Answer) -> None:
    wire = ScriptedWire(in_turn(failure, failure, ok()))
    assert ask(wire) == {"value": 1}
    first, second = gaps(wire)
    assert 0.0 < first < 1.0 and 0.0 < second < 2.0


def test_the_waits_differ_from_one_request_to_the_next() -> None:
    wires = [ScriptedWire(in_turn(status(500), ok())) for _ in range(8)]
    for wire in wires:
        ask(wire)
    waits = [gaps(wire)[0] for wire in wires]
    assert len(set(waits)) == len(waits) and min(waits) < 0.5 * max(waits)


@pytest.mark.parametrize(
    ("failure", "error", "text"),
    [
        (status(500), RequestFailed, "answered 500: scripted"),
        (ConnectionBroken("reset"), RequestFailed, "the connection broke: reset"),
        (Reply(200, {}, b"{"), RequestFailed, "cannot be read"),
        (NoConnection("no"), EndpointError, "no connection to http://a/v1 after 4 attempts"),
    ],
    ids=["500", "broken", "truncated", "unreached"],
)
def test_retries_end(failure: Answer, error: type[Exception], text: str) -> None:
    wire = ScriptedWire(lambda now, body: failure)
    with pytest.raises(error, match=text):
        ask(wire)
    assert len(wire.asked) == 4


WAITS = pytest.mark.parametrize(
    ("headers", "seconds"), [({"retry-after": "7"}, 7.0), ({"retry-after-ms": "50"}, 0.05)]
)


@WAITS
def test_retry_after_is_kept_to_the_instant(headers: dict[str, str], seconds: float) -> None:
    wire = ScriptedWire(in_turn(status(503, headers), ok()))
    ask(wire)
    assert gaps(wire) == [pytest.approx(seconds)]


@WAITS
def test_a_first_refusal_is_waited_out_for_half_a_second_at_least(
    headers: dict[str, str], seconds: float
) -> None:
    wire = ScriptedWire(in_turn(status(429, headers), ok()))
    ask(wire)
    assert gaps(wire) == [pytest.approx(max(seconds, 0.5))]


def test_a_rate_limit_is_waited_for_longer_than_a_failing_server() -> None:
    wire = ScriptedWire(lambda now, body: ok() if now > 90.0 else status(429))
    assert ask(wire) == {"value": 1}
    assert len(wire.asked) > 5


def test_a_rate_limit_that_never_opens_ends_after_two_minutes() -> None:
    wire = ScriptedWire(lambda now, body: status(429))
    with pytest.raises(RequestFailed, match="answered 429"):
        ask(wire)
    assert 120.0 < wire.asked[-1][0] < 300.0


def test_no_retries_are_none_for_a_rate_limit_too() -> None:
    wire = ScriptedWire(lambda now, body: status(429))
    with pytest.raises(RequestFailed, match="429"):
        ask(wire, LLMOptions(max_retries=0))
    assert len(wire.asked) == 1


@pytest.mark.parametrize("number", [429, 503])
def test_a_wait_of_hours_ends_the_run_and_not_every_row(number: int) -> None:
    wire = ScriptedWire(lambda now, body: status(number, {"retry-after": "7200"}))
    with pytest.raises(EndpointError, match=rf"http://a/v1 asks to wait for 7200 s \({number}: scripted\)"):
        ask(wire)
    assert len(wire.asked) == 1


@pytest.mark.parametrize("number", [429, 503])
def test_a_server_that_says_not_to_wait_is_not_flooded(number: int) -> None:
    wire = ScriptedWire(lambda now, body: status(number, {"retry-after": "0"}))
    with pytest.raises(RequestFailed, match=f"answered {number}"):
        ask(wire, LLMOptions(adaptive=False, max_retries=3, backoff_s=1.0))
    first, *later = gaps(wire)
    assert first == pytest.approx(0.0)
    assert all(wait > 1e-9 for wait in later)
    # Waits of 30 s on average once the longest backoff is reached, for two minutes.
    assert len(wire.asked) < 40


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (status(429, code="insufficient_quota"), EndpointError, "quota at http://a/v1 is used up"),
        (status(402, message="Insufficient Balance"), EndpointError, "used up: Insufficient Balance"),
        (status(401), EndpointError, "set OPENAI_API_KEY"),
        (status(403), EndpointError, "set OPENAI_API_KEY"),
        (status(403, message="requires moderation and your input was flagged"), Refused, "answered 403: req"),
        (status(404, message="The model `judge` does not exist."), ModelError, "does not know 'judge'"),
        (status(400, message="too long", param="input_tokens"), Refused, "answered 400: too long"),
    ],
    ids=["quota", "credit", "key", "forbidden", "flagged", "model", "bad-request"],
)
def test_what_cannot_get_better_is_not_repeated(answer: Reply, error: type[Exception], text: str) -> None:
    wire = ScriptedWire(lambda now, body: answer)
    with pytest.raises(error, match=text):
        ask(wire)
    assert len(wire.asked) == 1


def test_what_is_forbidden_after_an_answer_is_the_request_and_not_the_key() -> None:
    wire = ScriptedWire(lambda now, body: status(403) if body == {"q": "bad"} else ok())

    async def use(pool: Endpoints) -> Any:
        await pool.ask("/x", {"q": "good"})
        with pytest.raises(Refused, match="answered 403"):
            await pool.ask("/x", {"q": "bad"})
        return await pool.ask("/x", {"q": "good"})

    assert run(use, wire) == {"value": 1}


def test_a_public_list_of_models_says_nothing_of_the_key() -> None:
    wire = ScriptedWire(lambda now, body: ok() if body is None else status(403))

    async def use(pool: Endpoints) -> None:
        await pool.ask("/models", None)
        await pool.ask("/x", {})

    with pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        run(use, wire)


def inside(code: object) -> Reply:
    """An error in a reply of status 200."""
    return Reply(200, {}, json.dumps({"error": {"message": "no provider", "code": code}}).encode())


@pytest.mark.parametrize("code", [502, "429"])
def test_an_error_inside_a_reply_is_tried_again_as_its_status_would_be(code: object) -> None:
    wire = ScriptedWire(in_turn(inside(code), ok()))
    assert ask(wire) == {"value": 1}
    assert len(wire.asked) == 2


@pytest.mark.parametrize(("code", "told"), [(400, 400), (None, 200), ("bad_input", 200)])
def test_another_error_inside_a_reply_fails_its_request(code: object, told: int) -> None:
    wire = ScriptedWire(lambda now, body: inside(code))
    with pytest.raises(Refused, match=f"answered {told}: no provider"):
        ask(wire)
    assert len(wire.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [Reply(200, {}, b"<!doctype html><title>Hello</title>"), Reply(404, {}, b"404: Not Found")],
    ids=["a web page", "no such route"],
)
def test_a_wrong_base_url_is_one_line_that_says_so(answer: Reply) -> None:
    wire = ScriptedWire(lambda now, body: answer)

    async def probe() -> Abilities:
        return await OpenAIModel(ModelRef("openai", "judge"), OPTIONS, [wire]).probe()

    with pytest.raises(EndpointError, match=r"http://a/v1 .*usually ends in /v1"):
        run_virtual(probe())


def test_a_model_that_is_no_chat_model_is_asked_by_text_completions() -> None:
    told = "This is not a chat model and thus not supported in the v1/chat/completions endpoint."
    logprobs = {"tokens": ["1"], "top_logprobs": [{"1": -0.1}]}
    text = {"choices": [{"text": "1", "finish_reason": "length", "logprobs": logprobs}]}

    def instruct(now: float, body: Any) -> Answer:
        if body is None:
            return status(404)
        if "messages" in body:
            return status(404, message=told, param="model")
        return Reply(200, {}, json.dumps(text).encode())

    async def probe() -> str:
        return (
            await OpenAIModel(ModelRef("openai", "judge"), OPTIONS, [ScriptedWire(instruct)]).probe()
        ).note

    assert run_virtual(probe()).startswith("text completions")


def reasons(now: float, body: Any) -> Answer:
    """A reasoning model at OpenAI: it takes few fields, and thinks for 20 tokens before it answers."""
    if body is None:
        return status(404)
    unsupported = "Unsupported parameter: '{0}' is not supported with this model."
    for name in ("max_tokens", "temperature", "stop"):
        if name in body:
            return status(400, message=unsupported.format(name), param=name)
    if "continue_final_message" in body:
        return status(400, message="Unrecognized request argument supplied: continue_final_message")
    if "logprobs" in body:
        return status(403, message="You are not allowed to request logprobs from this model")
    if body["max_completion_tokens"] < 20:
        return status(
            400,
            message="Could not finish the message because max_tokens or model output limit was reached. "
            "Please try again with higher max_tokens.",
        )
    user = body["messages"][0]["content"]
    verdict = "1>>2" if user.find("good one") < user.find("bad one") else "2>1"
    said = {"message": {"content": f"Both try.\nVerdict: {verdict}"}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 10 * len(body["messages"]), "completion_tokens": 25}
    return Reply(200, {}, json.dumps({"choices": [said], "usage": usage}).encode())


def test_a_model_that_thinks_before_it_answers_serves_by_the_declared_fallback() -> None:
    wire = ScriptedWire(reasons)
    recipe = Recipe(fallback="verdict")

    async def judged() -> tuple[Abilities, Preference]:
        llm = OpenAIModel(ModelRef("openai", "judge"), OPTIONS, [wire])
        judge = Judge(llm, load_rubric("helpfulness-pair"), recipe)
        pair = Pair(user_prompt("Which?"), "good one", "bad one")
        return await llm.probe(), await judge.judge_pair(pair)

    abilities, preference = run_virtual(judged())
    assert (abilities.logprobs, abilities.continues) == ("none", False)
    # 0.95 for the good one as number 1, 0.75 for it as number 2.
    assert preference.p_a == pytest.approx((0.95 + 0.75) / 2)
    assert preference.ab is not None and preference.ab.source == "verdict"
    assert wire.asked[-1][2]["max_completion_tokens"] == recipe.max_rationale_tokens


def test_a_hanging_request_is_given_up_at_its_time() -> None:
    wire = ScriptedWire(lambda now, body: ok(), latency=1e6)
    with pytest.raises(RequestFailed, match="no answer within 30 s"):
        ask(wire, LLMOptions(timeout_s=30.0, max_retries=0))


def test_the_root_of_a_server_is_beside_its_versioned_routes() -> None:
    wire = ScriptedWire(lambda now, body: ok())

    async def use(pool: Endpoints) -> None:
        await pool.ask("//tokenize", {})
        await pool.ask("/models", None)

    run(use, wire)
    assert [url for _, url, _ in wire.asked] == ["POST http://a/tokenize", "GET http://a/v1/models"]


# ---- several servers ----


def pair(*answers: Callable[[float, Any], Answer], latency: float = 0.1) -> list[ScriptedWire]:
    return [
        ScriptedWire(answer, f"http://{name}/v1", latency) for name, answer in zip("ab", answers, strict=True)
    ]


def serve(now: float, body: Any) -> Answer:
    return ok()


def test_equal_prompts_go_to_one_server_and_all_servers_are_used() -> None:
    wires = pair(serve, serve)

    async def use(pool: Endpoints) -> None:
        for n in range(40):
            await pool.ask("/x", {"n": n % 10}, affinity=str(n % 10))

    run(use, *wires)
    a, b = ({body["n"] for _, _, body in wire.asked} for wire in wires)
    assert a and b and not a & b


def test_a_busy_server_passes_equal_prompts_on() -> None:
    wires = pair(serve, serve)

    async def use(pool: Endpoints) -> None:
        await asyncio.gather(*(pool.ask("/x", {}, affinity="same") for _ in range(100)))

    run(use, *wires)
    counts = sorted(len(wire.asked) for wire in wires)
    assert sum(counts) == 100 and counts[0] >= 35


def test_a_slow_server_gets_less() -> None:
    wires = pair(serve, serve)
    wires[0].latency = 1.0

    async def use(pool: Endpoints) -> None:
        queue = iter(range(600))

        async def worker() -> None:
            for n in queue:
                await pool.ask("/x", {}, affinity=str(n))

        await asyncio.gather(*(worker() for _ in range(20)))

    run(use, *wires)
    assert len(wires[1].asked) > 3 * len(wires[0].asked)


def test_a_server_that_is_gone_is_left_out_and_tried_again_later() -> None:
    def away(now: float, body: Any) -> Answer:
        return NoConnection("gone") if now < 35.0 else ok()

    wires = pair(away, serve)

    async def use(pool: Endpoints) -> None:
        queue = iter(range(12000))

        async def worker() -> None:
            for n in queue:
                await pool.ask("/x", {}, affinity=str(n))

        await asyncio.gather(*(worker() for _ in range(20)))  # for a minute

    run(use, *wires)
    tried = [t for t, _, _ in wires[0].asked]
    failed = [t for t in tried if 1.0 < t < 35.0]
    assert len(failed) == 3  # a single request every ten seconds
    assert len([t for t in tried if t > 41.0]) > 1000  # and then it is used again


def test_those_who_wait_for_a_server_move_on_when_it_is_gone() -> None:
    wires = pair(lambda now, body: NoConnection("gone"), serve)

    async def use(pool: Endpoints) -> float:
        await asyncio.gather(*(pool.ask("/x", {}, affinity=str(n)) for n in range(200)))
        return asyncio.get_running_loop().time()

    assert run(use, *wires, options=LLMOptions(max_in_flight=10)) < 5.0
    assert len(wires[0].asked) <= 10
    assert len(wires[1].asked) == 200


def test_when_all_servers_are_gone_the_run_ends() -> None:
    def gone(now: float, body: Any) -> Answer:
        return NoConnection("gone")

    with pytest.raises(EndpointError, match="no connection to http://a/v1, http://b/v1 after"):
        run(lambda pool: pool.ask("/x", {}), *pair(gone, gone))
