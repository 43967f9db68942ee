"""What is read from replies: recorded JSON as OpenAI and vLLM send it, and labels in parts."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.backends.completions import Choice, read_choice, read_recorded, text_ids
from labeler.backends.top_tokens import read_top_tokens_in_parts, tokens_to_continue
from labeler.llm import RequestFailed

CHAT: dict[str, Any] = json.loads(
    """{"id": "chatcmpl-9", "object": "chat.completion", "created": 1717000000, "model": "gpt-4o-2024-08-06",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": " 2", "refusal": null},
      "logprobs": {"content": [{"token": " 2", "logprob": -0.35667494, "bytes": [32, 50], "top_logprobs": [
        {"token": " 2", "logprob": -0.35667494, "bytes": [32, 50]},
        {"token": "1", "logprob": -1.6094379, "bytes": [49]},
        {"token": "2", "logprob": -2.9957323, "bytes": [50]},
        {"token": "\\\\xe2\\\\x80", "logprob": -5.2983174, "bytes": [226, 128]},
        {"token": "Neither", "logprob": -9999.0, "bytes": [78]}]}], "refusal": null},
      "finish_reason": "length"}],
    "usage": {"prompt_tokens": 431, "completion_tokens": 1, "total_tokens": 432,
      "prompt_tokens_details": {"cached_tokens": 128, "audio_tokens": 0}},
    "system_fingerprint": "fp_1"}"""
)
"""Probabilities 0.7 (" 2"), 0.2 ("1"), 0.05 ("2"), 0.005, and OpenAI's mark for "very unlikely"."""


def test_a_recorded_chat_completion_becomes_labels() -> None:
    reading = read_recorded(CHAT, ("1", "2"))
    assert [math.exp(lp) for lp in reading.distribution.logprobs] == pytest.approx([0.2, 0.75], rel=1e-6)
    assert reading.distribution.probs[1] == pytest.approx(0.75 / 0.95, abs=1e-7)
    assert reading.distribution.mass == pytest.approx(0.95, rel=1e-6)
    assert not reading.distribution.censored
    assert (reading.prompt_tokens, reading.completion_tokens, reading.cached_tokens) == (431, 1, 128)


def test_a_label_that_openai_calls_very_unlikely_is_bounded_and_not_impossible() -> None:
    distribution = read_recorded(CHAT, ("1", "Neither")).distribution
    assert distribution.censored
    assert math.exp(distribution.logprobs[1]) == pytest.approx(0.005, rel=1e-6)  # the last of the list


def test_a_recorded_text_completion_becomes_labels() -> None:
    reply = {
        "object": "text_completion",
        "choices": [
            {
                "text": " B",
                "index": 0,
                "finish_reason": "length",
                "logprobs": {
                    "tokens": [" B"],
                    "token_logprobs": [-0.6931],
                    "top_logprobs": [{" B": math.log(0.5), " A": math.log(0.25), "A": math.log(0.125)}],
                    "text_offset": [10],
                },
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
    }
    distribution = read_recorded(reply, ("A", "B")).distribution
    assert [math.exp(lp) for lp in distribution.logprobs] == pytest.approx([0.375, 0.5])


def filtered(logprobs: object) -> dict[str, Any]:
    """A reply to a request for a label that a filter ended."""
    message = {"role": "assistant", "content": None}
    return {"choices": [{"message": message, "logprobs": logprobs, "finish_reason": "content_filter"}]}


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        ({}, "no choice that can be read"),
        ({"choices": []}, "no choice that can be read"),
        ([1], "no choice that can be read"),
        ({"choices": [{"message": {"content": "2"}, "logprobs": None}]}, "left out the log-probabilities"),
        (filtered(None), "ended the reply with 'content_filter'"),
        (filtered(CHAT["choices"][0]["logprobs"]), "ended the reply with 'content_filter'"),
        (CHAT, "none of the labels A, B is among"),
    ],
    ids=["empty", "no-choice", "list", "no-logprobs", "filtered", "filtered-with-logprobs", "other-labels"],
)
def test_a_reply_that_cannot_be_read_fails_its_row(reply: object, text: str) -> None:
    with pytest.raises(RequestFailed, match=text):
        read_recorded(reply, ("A", "B"))


def generated(pieces: list[bytes], text: str, *, stop: str | None = None, cut: bool = False) -> Choice:
    """A generation of these tokens, ids from 100 on, after a prompt of ids 1 and 2."""
    bare = read_choice({"choices": [{"text": text}]})
    ids = tuple(range(100, 100 + len(pieces)))
    reason = "length" if cut else "stop"
    return replace(bare, finish_reason=reason, stop=stop, prompt_ids=(1, 2), ids=ids, pieces=tuple(pieces))


@pytest.mark.parametrize(
    ("choice", "text", "ids"),
    [
        (generated([b" A", b" th", b"</s>"], " A th"), " A th", (1, 2, 100, 101)),
        (generated([b" A", b" th"], " A th", cut=True), " A th", (1, 2, 100, 101)),
        (generated([b" A", b" th", b"\n", b"End"], " A th\n", stop="End"), " A th\n", (1, 2, 100, 101, 102)),
        (generated([b" A", b" th\nE", b"nd"], " A th\n", stop="End"), " A th\n", ()),
        (generated([b" \xe2\x82", b"\xac", b"!"], " €", stop="!"), " €", (1, 2, 100, 101)),
        (generated([b"End"], "", stop="End"), "", (1, 2)),
        (generated([b" A", b" th", b"ought"], " A thought"), " A", (1, 2, 100)),
        (generated([b" A", b" \xe2"], " A \ufffd", cut=True), " A \ufffd", ()),
        (replace(generated([b" A", b"x"], " A", stop="x"), pieces=()), " A", ()),
        (replace(generated([b" A", b"</s>"], " A"), prompt_ids=()), " A", ()),
    ],
    ids=[
        "end-of-turn", "length", "stop", "stop-inside-token", "character-of-two-tokens", "stop-at-once",
        "cut-by-us", "unfinished-character", "no-bytes", "no-ids",
    ],
)  # fmt: skip
def test_the_ids_of_a_text_end_with_it(choice: Choice, text: str, ids: tuple[int, ...]) -> None:
    assert text_ids(choice, text) == ids


@given(
    first=st.dictionaries(st.sampled_from(["1", " 1", "2", "9", "x", "10"]), st.integers(1, 100), min_size=2),
    then=st.integers(0, 100),
    rest=st.integers(1, 100),
)
def test_labels_in_parts_have_the_probability_of_their_whole_spelling(
    first: dict[str, int], then: int, rest: int
) -> None:
    labels = ("1", "2", "9", "10")
    total = sum(first.values()) + 1  # something is left over
    top = [(token, math.log(n / total)) for token, n in first.items()]
    if not any(token.strip() in labels for token, _ in top):
        return
    zero = then / (then + rest)
    after = [(".", math.log(1.0 - zero))] + ([("0", math.log(zero))] if then else [])
    started = tokens_to_continue(top, ["10"])
    spelled = [first[token] for token in ("1", " 1") if token in first]
    assert [first[token] for token in started.values()] == ([max(spelled)] if spelled else [])
    distribution = read_top_tokens_in_parts(top, dict.fromkeys(started, after), labels)
    one = sum(n for t, n in first.items() if t.strip() == "1") / total
    probs = [math.exp(lp) for lp in distribution.logprobs]
    if one and then:
        assert probs[0] == pytest.approx(one * (1.0 - zero))
        assert probs[3] == pytest.approx(one * zero + first.get("10", 0) / total)
    for label, p in zip(labels[1:3], probs[1:3], strict=True):
        if label in first:
            assert p == pytest.approx(first[label] / total)
    assert distribution.censored == (not {"2", "9"} <= first.keys() or not one or not then)


def test_a_part_that_is_not_listed_makes_a_bound() -> None:
    top = [("1", math.log(0.5)), ("2", math.log(0.4))]
    distribution = read_top_tokens_in_parts(top, {"1": [(".", math.log(0.9))]}, ("1", "2", "10"))
    assert distribution.censored
    assert [math.exp(lp) for lp in distribution.logprobs] == pytest.approx([0.45, 0.4, 0.05])


def test_labels_in_parts_share_what_the_first_list_leaves_over() -> None:
    words = [("Sure", 0.3), ("I", 0.2), ("The", 0.15), ("As", 0.1), ("7", 0.08)]
    scale = tuple(str(i) for i in range(1, 11))
    distribution = read_top_tokens_in_parts([(t, math.log(p)) for t, p in words], {}, scale)
    probs = [math.exp(lp) for lp in distribution.logprobs]
    # 0.17 is left for nine levels, of which none is listed.
    assert probs == pytest.approx([0.17 / 9] * 6 + [0.08] + [0.17 / 9] * 3)
    assert distribution.mass == pytest.approx(0.08)
    assert distribution.censored


def test_a_bound_of_a_part_adds_nothing_to_the_mass() -> None:
    first = [("2", math.log(0.6)), ("1", math.log(0.3))]
    after = {"1": [(".", math.log(0.5)), ("0", math.log(0.2))], "2": [("5", math.log(0.5))]}
    # 1 is a label and 2 is none; 0.3 is left after 1 for "1" and "2", and 0.5 after 2 for "0".
    distribution = read_top_tokens_in_parts(first, after, ("1", "10", "11", "12", "20", "25"))
    probs = [math.exp(lp) for lp in distribution.logprobs]
    assert probs == pytest.approx([0.3 * 0.5, 0.3 * 0.2, 0.3 * 0.15, 0.3 * 0.15, 0.6 * 0.5, 0.6 * 0.5])
    assert distribution.mass == pytest.approx(0.3 + 0.6 * 0.5)
    assert distribution.censored


def test_no_label_nor_the_beginning_of_one_is_a_failure() -> None:
    with pytest.raises(RequestFailed, match="none of the labels 1, 10 is among"):
        read_top_tokens_in_parts([("x", -0.1)], {}, ("1", "10"))
