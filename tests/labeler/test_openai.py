"""The endpoint back end against a real server on loopback that answers from a script."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Literal, TypeVar

import pytest

from labeler.backends.openai import OpenAIModel
from labeler.judge import Judge
from labeler.llm import LabelReading, LLMOptions, NoAnswer, RequestFailed
from labeler.rubric import load_rubric
from rlaif.errors import EndpointError, ModelError
from rlaif.models import ModelRef
from rlaif.types import Pair, user_prompt
from tests.labeler.openai_server import ASSISTANT, USER, Fault, ScriptedServer

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
    # Its tokenizer has one token per character: a label after a space is two, and " 1" is no token of it.
    assert [math.exp(x) for x in reading.distribution.logprobs] == pytest.approx([0.5, 0.2])
    assert reading.distribution.mass == pytest.approx(0.7)
    first, second = server.asked
    assert first["logprob_token_ids"] == [ord(" "), ord("1"), ord("2")]
    assert first["continue_final_message"] is True and first["add_generation_prompt"] is False
    assert second["prompt"][-8:] == [ord(c) for c in "Better: "]


def test_labels_are_tokenised_once_for_all_rows() -> None:
    async def many(llm: OpenAIModel) -> None:
        reads = [llm.label_logprobs(Q, f"Row {n}\n\nBetter:", ("1", "2")) for n in range(30)]
        await asyncio.gather(*reads)

    with ScriptedServer(script, vllm=True) as server:
        ask(server.ref, many)
    texts = server.tokenized[1:]  # the probe's comes first
    assert sorted(texts) == ["Better:", "Better: 1", "Better: 2", "Better:1", "Better:2"]


def scale(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
    """P(1) = 0.5 and P(0 | 1) = 0.4, so that 10 has 0.2; 9 has 0.3."""
    if not wanted:
        return "10"
    return {"0": 0.4, ".": 0.6} if prefix.endswith("1") else {"1": 0.5, "9": 0.3, "x": 0.2}


TEN = tuple(str(i) for i in range(1, 11))


def test_vllm_reads_the_parts_of_a_split_label() -> None:
    with ScriptedServer(scale, vllm=True) as server:
        reading = read(server.ref, TEN)
    probs = [math.exp(x) for x in reading.distribution.logprobs]
    assert [probs[0], probs[8], probs[9]] == pytest.approx([0.3, 0.3, 0.2])
    assert not reading.distribution.censored and reading.top is None


def test_an_endpoint_that_continues_reads_the_parts_of_a_split_label_from_two_lists() -> None:
    with ScriptedServer(scale, prefills=True) as server:
        reading = read(server.ref, TEN)
    probs = [math.exp(x) for x in reading.distribution.logprobs]
    assert [probs[0], probs[8], probs[9]] == pytest.approx([0.3, 0.3, 0.2])
    assert reading.distribution.censored  # the levels 2 to 8 are bounds
    assert [b["messages"][-1]["content"] for b in server.asked[1:]] == ["Better:", "Better:1"]


def test_a_split_label_is_refused_where_its_parts_cannot_be_read() -> None:
    with (
        ScriptedServer(scale) as server,
        pytest.raises(ModelError, match=r"splits the label '10' .* such as helpfulness-score-5"),
    ):
        read(server.ref, TEN)


def test_a_label_that_is_one_token_needs_no_second_list() -> None:
    def whole(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
        return {"1": 0.5, "10": 0.3, "9": 0.1} if wanted else {"10": 0.9, "1": 0.1}

    with ScriptedServer(whole) as server:
        reading = read(server.ref, TEN)
    probs = [math.exp(x) for x in reading.distribution.logprobs]
    assert [probs[0], probs[8], probs[9]] == pytest.approx([0.5, 0.1, 0.3])
    assert len(server.asked) == 2  # how the label is written, and the reading


def test_a_label_outside_the_top_tokens_is_censored() -> None:
    with ScriptedServer(script, top_k=1) as server:
        reading = read(server.ref)
    assert reading.distribution.censored
    # Token 1 alone is seen with 0.5; all else together has 0.5.
    assert math.exp(reading.distribution.logprobs[1]) == pytest.approx(0.5)


def test_an_endpoint_without_logprobs_generates_but_reads_no_labels() -> None:
    with ScriptedServer(script, logprobs=False) as server:
        assert ask(server.ref, lambda llm: llm.probe()).logprobs == "none"
        assert (
            ask(server.ref, lambda llm: llm.generate(Q, "Comparison:", max_tokens=5)).text == " A thought. "
        )
        with pytest.raises(EndpointError, match="no log-probabilities for judge"):
            read(server.ref)
    assert len(server.asked) == 1


Kind = Literal["exact", "top_k", "none"]


@pytest.mark.parametrize(
    ("server", "logprobs", "continues", "note"),
    [
        (ScriptedServer(script, vllm=True), "exact", True, "vLLM, chat"),
        (ScriptedServer(script, vllm=True, template=False), "exact", True, "vLLM, text completions"),
        (ScriptedServer(script), "top_k", False, "20 likeliest"),
        (ScriptedServer(script, prefills=True), "top_k", True, "20 likeliest"),
        (ScriptedServer(script, most_top=5), "top_k", False, "5 likeliest"),
        (ScriptedServer(script, most_top=5, template=False), "top_k", True, "5 likeliest"),
        (ScriptedServer(script, logprobs=False), "none", False, "no log-probabilities"),
        (ScriptedServer(script, refuses=("logprobs",)), "none", False, "no log-probabilities"),
    ],
    ids=["vllm", "vllm-base", "plain", "prefill", "top-5", "base", "null", "refused"],
)
def test_the_probe_finds_what_an_endpoint_gives(
    server: ScriptedServer, logprobs: Kind, continues: bool, note: str
) -> None:
    with server:
        found = ask(server.ref, lambda llm: llm.probe())
    assert (found.logprobs, found.continues) == (logprobs, continues)
    assert note in found.note
    assert server.asked == []


def unanswered(
    times: int, finish: str = "content_filter"
) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """The first replies to a probe are no answers: without text, and without log-probabilities."""
    left = iter(range(times))

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if next(left, None) is not None:
            choice |= {"message": {"role": "assistant", "content": None}, "logprobs": None}
            choice["finish_reason"] = finish

    return amend


@pytest.mark.parametrize("finish", ["content_filter", "abort", "stop"])
def test_a_reply_to_the_probe_that_is_no_answer_is_asked_for_again(finish: str) -> None:
    with ScriptedServer(script, amend_probe=unanswered(2, finish)) as server:
        assert ask(server.ref, lambda llm: llm.probe()).logprobs == "top_k"


def test_a_probe_that_is_never_answered_is_no_verdict_and_the_next_request_probes_again() -> None:
    async def twice(llm: OpenAIModel) -> str:
        for _ in range(2):
            with pytest.raises(EndpointError, match=r"'content_filter', 3 times"):
                await llm.probe()
        return (await llm.probe()).logprobs

    with ScriptedServer(script, amend_probe=unanswered(6)) as server:
        assert ask(server.ref, twice) == "top_k"


def test_a_vllm_that_breaks_off_a_probe_is_still_a_vllm() -> None:
    broken = iter((False, True, False))

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if next(broken, False):
            choice |= {"finish_reason": "abort", "logprobs": None}

    with ScriptedServer(script, vllm=True, amend_probe=amend) as server:
        assert ask(server.ref, lambda llm: llm.probe()).logprobs == "exact"


def test_a_probe_that_a_filter_refuses_loses_no_feature() -> None:
    class Filtering(ScriptedServer):
        filtered = iter(range(2))

        def refusal(self, body: dict[str, Any]) -> str | None:
            if next(self.filtered, None) is not None:
                return "The response was filtered due to the prompt triggering content management policy."
            return super().refusal(body)

    with Filtering(script, vllm=True) as server:
        assert ask(server.ref, lambda llm: llm.probe()).logprobs == "exact"


def test_a_model_whose_first_token_is_hidden_thinking_has_no_place_for_labels() -> None:
    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        choice["logprobs"] = None
        if body["max_tokens"] == 1:
            choice |= {"message": {"role": "assistant", "content": None}, "finish_reason": "length"}

    with ScriptedServer(script, amend_probe=amend) as server:
        assert ask(server.ref, lambda llm: llm.probe()).logprobs == "none"


def test_a_model_that_takes_neither_temperature_nor_max_tokens_still_generates() -> None:
    refuses = ("max_tokens", "temperature", "stop", "logprobs")
    with ScriptedServer(script, refuses=refuses) as server:
        done = ask(server.ref, lambda llm: llm.generate(Q, max_tokens=7, temperature=0.0, stop=(".",)))
    assert done.text == " A thought"
    assert server.asked[0]["max_completion_tokens"] == 7
    assert not {"max_tokens", "temperature", "stop"} & server.asked[0].keys()


def test_a_model_without_a_chat_template_is_asked_by_text_completions() -> None:
    with ScriptedServer(script, template=False) as server:
        reading = read(server.ref)
    assert [math.exp(x) for x in reading.distribution.logprobs] == pytest.approx([0.6, 0.2])
    assert server.asked[0]["prompt"] == "Which one?\n\nBetter:"


@pytest.mark.parametrize("template", [True, False], ids=["chat", "completions"])
@pytest.mark.parametrize(
    ("stop", "text"),
    [((), " A thought. "), (("ought",), " A th"), (("none",), " A thought. ")],
    ids=["end-of-turn", "stop-string", "unmet-stop"],
)
def test_a_generation_tells_the_ids_of_its_text(template: bool, stop: tuple[str, ...], text: str) -> None:
    with ScriptedServer(script, vllm=True, template=template) as server:
        done = ask(server.ref, lambda llm: llm.generate(Q, "Comparison:", max_tokens=50, stop=stop))
    assert done.text == text
    shown = f"{USER}Which one?{ASSISTANT}Comparison:" if template else "Which one?\n\nComparison:"
    assert "".join(map(chr, done.context_ids)) == shown + text


def test_a_label_after_a_rationale_goes_on_from_its_ids() -> None:
    async def both(llm: OpenAIModel) -> LabelReading:
        done = await llm.generate(Q, "Comparison:", max_tokens=50, stop=("ought",))
        # Ids that no tokenizer would give for this text show which way the label was asked.
        done = replace(done, context_ids=(7, *done.context_ids[1:]))
        return await llm.label_logprobs(Q, "Comparison: A th\n\nBetter:", ("1", "2"), after=done)

    with ScriptedServer(script, vllm=True) as server:
        reading = ask(server.ref, both)
    assert reading.distribution.mass == pytest.approx(0.7)
    prompt = server.asked[1]["prompt"]
    assert prompt[0] == 7
    assert "".join(map(chr, prompt[1:])) == f"Which one?{ASSISTANT}Comparison: A th\n\nBetter:"


def test_a_label_after_a_rewritten_rationale_is_asked_as_text() -> None:
    async def both(llm: OpenAIModel) -> LabelReading:
        done = await llm.generate(Q, "Comparison:", max_tokens=50)
        return await llm.label_logprobs(Q, "Comparison: Another.\n\nBetter:", ("1", "2"), after=done)

    with ScriptedServer(script, vllm=True) as server:
        assert ask(server.ref, both).distribution.mass == pytest.approx(0.7)
    assert server.asked[1]["messages"][-1]["content"] == "Comparison: Another.\n\nBetter:"


def test_an_answer_without_logprobs_costs_its_row_alone() -> None:
    with ScriptedServer(lambda user, prefix, wanted: "Sorry.") as server, pytest.raises(RequestFailed):
        read(server.ref)


def test_a_label_that_was_filtered_fails_with_that_reason_by_token_ids_too() -> None:
    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        choice |= {"finish_reason": "content_filter", "logprobs": None}

    for vllm in (True, False):
        with ScriptedServer(script, vllm=vllm, amend=amend) as server:
            with pytest.raises(NoAnswer, match="ended the reply with 'content_filter'") as failed:
                read(server.ref)
            assert failed.value.prompt_tokens


def test_a_filtered_reply_does_not_tell_that_a_label_is_split() -> None:
    filters = iter((True,))

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if body["max_tokens"] > 1 and next(filters, False):
            choice |= {"finish_reason": "content_filter", "logprobs": None}

    async def twice(llm: OpenAIModel) -> LabelReading:
        with pytest.raises(NoAnswer, match="content_filter"):
            await llm.label_logprobs(Q, "", ("1", "10"))
        return await llm.label_logprobs(Q, "", ("1", "10"))

    def whole(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
        return {"1": 0.5, "10": 0.2} if wanted else "10"

    class OneToken(ScriptedServer):
        def generated(self, said: str, body: dict[str, Any]) -> dict[str, Any]:
            entry = {"token": said, "logprob": -0.1, "bytes": list(said.encode())}
            content = [{**entry, "top_logprobs": [entry]}]
            return {"index": 0, "finish_reason": "stop", "text": said, "logprobs": {"content": content}}

    with OneToken(whole, amend=amend) as server:
        assert math.exp(ask(server.ref, twice).distribution.logprobs[1]) == pytest.approx(0.2)


def test_a_token_listed_beyond_those_asked_for_is_no_reading() -> None:
    # vLLM adds the sampled token, which may be far less likely than labels that the list leaves out.
    with ScriptedServer(script, most_top=1, top_k=3) as server:
        distribution = read(server.ref).distribution
    assert distribution.censored
    assert [math.exp(x) for x in distribution.logprobs] == pytest.approx([0.5, 0.5])


def test_one_model_behind_two_servers_is_probed_at_both_and_shared() -> None:
    with ScriptedServer(script) as one, ScriptedServer(script) as other:
        ref = f"{one.ref},{other.ref.removeprefix('openai:judge@')}"

        async def many(llm: OpenAIModel) -> list[LabelReading]:
            questions = [user_prompt(f"Question {n}?") for n in range(40)]
            return list(await asyncio.gather(*(llm.label_logprobs(q, "A:", ("1", "2")) for q in questions)))

        readings = ask(ref, many)
    assert {r.distribution for r in readings} == {readings[0].distribution} and len(readings) == 40
    assert len(one.asked) + len(other.asked) == 40
    assert min(len(one.asked), len(other.asked)) > 5


def test_servers_that_differ_in_what_they_give_are_refused() -> None:
    with ScriptedServer(script) as one, ScriptedServer(script, vllm=True) as other:
        ref = f"{one.ref},{other.ref.removeprefix('openai:judge@')}"
        with pytest.raises(EndpointError, match=r"differ in what they give: chat completions.*; vLLM"):
            read(ref)


def test_a_server_that_is_not_up_yet_does_not_keep_the_other_from_work() -> None:
    with ScriptedServer(script) as server, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        reading = read(f"{server.ref},http://127.0.0.1:{unused.getsockname()[1]}/v1")
    assert reading.distribution.mass == pytest.approx(0.8)


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


# ---- replies that are no answer ----


def replying(message: dict[str, Any], finish: str | None) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    """Replies to requests for text have this message and end so."""

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if body["max_tokens"] > 1:
            choice.update(message={"role": "assistant", **message}, finish_reason=finish)

    return amend


THOUGHT = {"content": None, "reasoning_content": "Response 1 is clearer."}


@pytest.mark.parametrize(
    ("message", "finish", "reason"),
    [
        ({"content": None}, "content_filter", "ended the reply with 'content_filter'"),
        ({"content": "Half a"}, "abort", "ended the reply with 'abort'"),
        ({"content": "Half a"}, "insufficient_system_resource", "with 'insufficient_system_resource'"),
        (THOUGHT, "length", "cut before any text"),
        ({"content": ""}, "length", "cut before any text"),  # OpenAI's reasoning models hide what they think
        (THOUGHT, "stop", "thinking without an answer"),
        ({"content": "", "reasoning": "Well."}, "stop", "thinking without an answer"),
        ({"content": None}, "stop", "has no text"),
    ],
    ids=["filtered", "aborted", "overloaded", "thought-cut", "hidden", "thought", "reasoning", "null"],
)
def test_a_reply_without_an_answer_is_a_failure_and_no_empty_response(
    message: dict[str, Any], finish: str, reason: str
) -> None:
    with (
        ScriptedServer(script, amend=replying(message, finish)) as server,
        pytest.raises(RequestFailed, match=reason),
    ):
        ask(server.ref, lambda llm: llm.generate(Q, max_tokens=9))


@pytest.mark.parametrize(
    ("content", "finish", "read"),
    [
        ("", "stop", "stop"),
        ("Fine.", None, "stop"),
        ("Fine.", "eos_token", "stop"),
        ("Fine.", "COMPLETE", "stop"),
        ("Fine", "model_length", "length"),
    ],
    ids=["empty", "no-word", "tgi", "cohere", "mistral"],
)
def test_an_answer_may_be_empty_and_may_end_in_other_words(
    content: str, finish: str | None, read: str
) -> None:
    with ScriptedServer(script, amend=replying({"content": content}, finish)) as server:
        done = ask(server.ref, lambda llm: llm.generate(Q, max_tokens=9))
    assert (done.text, done.finish_reason) == (content, read)


THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Well."}]}


def test_an_answer_in_parts_is_the_text_of_them() -> None:
    parts = [THINKING, {"type": "text", "text": "Fi"}, {"type": "text", "text": "ne."}]
    with ScriptedServer(script, amend=replying({"content": parts}, "stop")) as server:
        assert ask(server.ref, lambda llm: llm.generate(Q, max_tokens=9)).text == "Fine."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([THINKING], "has no text"),
        ({"text": "Fine."}, "content of type dict"),
        (["Fine."], "no choice that can be read"),
    ],
    ids=["thinking", "object", "strings"],
)
def test_content_of_another_kind_fails_its_row(content: object, reason: str) -> None:
    with (
        ScriptedServer(script, amend=replying({"content": content}, "stop")) as server,
        pytest.raises(RequestFailed, match=reason),
    ):
        ask(server.ref, lambda llm: llm.generate(Q, max_tokens=9))


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_continuation_that_a_server_files_as_thinking_is_the_continuation(finish: str) -> None:
    with ScriptedServer(script, vllm=True, amend=replying(THOUGHT, finish)) as server:
        done = ask(server.ref, lambda llm: llm.generate(Q, "Comparison:", max_tokens=9))
    assert (done.text, done.finish_reason) == ("Response 1 is clearer.", finish)


def test_thinking_is_no_continuation_where_the_turn_is_not_continued() -> None:
    with (
        ScriptedServer(script, amend=replying(THOUGHT, "stop")) as server,
        pytest.raises(RequestFailed, match="thinking without an answer"),
    ):
        ask(server.ref, lambda llm: llm.generate(Q, "Comparison:", max_tokens=9))


def test_a_judge_whose_rationale_was_filtered_gives_no_label() -> None:
    with ScriptedServer(script, amend=replying({"content": None}, "content_filter")) as server:
        preference = ask(
            server.ref,
            lambda llm: Judge(llm, load_rubric("helpfulness-pair")).judge_pair(Pair(Q, "good", "bad")),
        )
    assert preference.p_a is None
    assert preference.reason == "the endpoint ended the reply with 'content_filter'"


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
    asked = []

    def prefers_a(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
        asked.append((wanted, prefix.rstrip(" ")))
        if not wanted:
            return " They differ. More helpful response: 1"  # a plain server that ignores the stop string
        a_first = user.index("good") < user.index("bad")
        return {"1": 0.8, "2": 0.1} if a_first else {"1": 0.1, "2": 0.8}

    with ScriptedServer(prefers_a, vllm=vllm) as server:
        preference = ask(
            server.ref,
            lambda llm: Judge(llm, load_rubric("helpfulness-pair")).judge_pair(Pair(Q, "good", "bad")),
        )
    assert preference.p_a == pytest.approx(8 / 9)
    assert asked.count((False, "Comparison:")) == 2
    assert set(asked) == {
        (False, "Comparison:"),
        (True, "Comparison: They differ.\n\nMore helpful response:"),
    }
