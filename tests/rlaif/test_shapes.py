"""Every row shape the readers promise to understand, and the reason given for those they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif import shapes
from rlaif.fields import RowError
from rlaif.types import Candidate, Message, user_prompt

USER = {"role": "user", "content": "What colour is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
PROMPT = user_prompt("What colour is the sky?")
DIALOGUE = (Message("user", "hi"), Message("assistant", "hello"), Message("user", "how are you?"))
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how are you?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        pytest.param({"prompt": "What colour is the sky?"}, PROMPT, id="trl-standard"),
        pytest.param({"prompt": [USER]}, PROMPT, id="trl-conversational"),
        pytest.param({"messages": [USER]}, PROMPT, id="messages-ending-in-user"),
        pytest.param({"messages": [USER, BLUE]}, PROMPT, id="messages-ending-in-assistant-are-cut"),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "What colour is the sky?"},
                    {"from": "gpt", "value": "?"},
                ]
            },
            PROMPT,
            id="sharegpt",
        ),
        pytest.param({"instruction": "What colour is the sky?"}, PROMPT, id="instruction"),
        pytest.param(
            {"instruction": "Add.", "input": "1 2"}, user_prompt("Add.\n\n1 2"), id="alpaca-with-input"
        ),
        pytest.param({"question": "What colour is the sky?"}, PROMPT, id="question"),
        pytest.param({"turns": ["What colour is the sky?", "Why?"]}, PROMPT, id="mt-bench-first-turn"),
        pytest.param({"text": HH}, DIALOGUE, id="hh-text-with-a-cue"),
        pytest.param({"prompt": HH}, DIALOGUE, id="hh-text-in-prompt"),
        pytest.param({"text": HH + " fine"}, DIALOGUE, id="hh-text-with-a-response-is-cut"),
        pytest.param(
            {"prompt": [{"role": "system", "content": "Be brief."}, USER]},
            (Message("system", "Be brief."), *PROMPT),
            id="system-turn-first",
        ),
        pytest.param(
            {"system": "Be brief.", "question": "What colour is the sky?"},
            (Message("system", "Be brief."), *PROMPT),
            id="system-in-a-column",
        ),
        pytest.param(
            {"system_prompt": "Be long.", "prompt": [{"role": "system", "content": "Be brief."}, USER]},
            (Message("system", "Be brief."), *PROMPT),
            id="a-system-turn-before-a-column",
        ),
        pytest.param({"system": "", "query": "What colour is the sky?"}, PROMPT, id="query-and-no-system"),
        pytest.param(
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What colour is the sky?"}]}]},
            PROMPT,
            id="openai-content-parts",
        ),
        pytest.param(
            {"prompt": [{**USER, "from": None, "value": None}]}, PROMPT, id="null-columns-of-parquet"
        ),
    ],
)
def test_prompt_shapes(row: dict[str, Any], prompt: object) -> None:
    assert shapes.parse_prompt(row) == prompt


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"id": 3}, "no prompt: the row has id", id="no-known-column"),
        pytest.param({"prompt": "  "}, "prompt is empty", id="blank"),
        pytest.param({"prompt": 7}, "prompt must be a list of messages, not a number", id="a-number"),
        pytest.param({"prompt": []}, "prompt has no messages", id="no-messages"),
        pytest.param(
            {"prompt": [USER, BLUE]}, "prompt does not end with a user turn", id="ends-with-assistant"
        ),
        pytest.param({"messages": ["hi"]}, "messages message 1 must be an object", id="message-is-text"),
        pytest.param(
            {"messages": [{"role": "tool", "content": "x"}]},
            "has role 'tool'; known roles",
            id="unknown-role",
        ),
        pytest.param(
            {"messages": [USER, {"role": "system", "content": "x"}]},
            "a system turn can only come",
            id="late-system",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": None}]},
            "message 1 content is missing",
            id="null-content",
        ),
        pytest.param(
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "holds something other than text",
            id="an-image",
        ),
        pytest.param({"prompt": "\ud800"}, "half a surrogate pair", id="lone-surrogate"),
        pytest.param({"text": "just text"}, "text does not begin with 'Human:'", id="text-without-turns"),
    ],
)
def test_refused_prompts_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        shapes.parse_prompt(row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            {"prompt": PROMPT[0].content, "chosen": "It is blue.", "rejected": "It is green."}, id="standard"
        ),
        pytest.param({"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]}, id="conversational"),
        pytest.param({"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, id="conversational-implicit"),
        pytest.param(
            {"messages": [USER], "chosen": "It is blue.", "rejected": "It is green."}, id="messages"
        ),
        pytest.param(
            {"prompt": PROMPT[0].content, "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            id="prompt-repeated-in-the-responses",
        ),
        pytest.param(
            {
                "chosen": "\n\nHuman: What colour is the sky?\n\nAssistant: It is blue.",
                "rejected": "\n\nHuman: What colour is the sky?\n\nAssistant: It is green.",
            },
            id="hh-text",
        ),
        pytest.param(
            {
                "conversations": [{"from": "human", "value": "What colour is the sky?"}],
                "chosen": {"from": "gpt", "value": "It is blue."},
                "rejected": {"from": "gpt", "value": "It is green."},
            },
            id="sharegpt-single-message-responses",
        ),
    ],
)
def test_chosen_and_rejected_make_a_pair_whose_a_a_human_preferred(row: dict[str, Any]) -> None:
    pair = shapes.parse_pair(row)
    assert (pair.prompt, pair.a, pair.b, pair.human_p_a) == (PROMPT, "It is blue.", "It is green.", 1.0)


@pytest.mark.parametrize(
    "responses",
    [
        {"question": "What colour is the sky?", "chosen": "It is blue.", "rejected": "It is green."},
        {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
        {"prompt": [USER], "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
    ],
    ids=["orca", "implicit", "repeated"],
)
def test_a_system_prompt_in_a_column_opens_the_prompt_of_a_pair(responses: dict[str, Any]) -> None:
    pair = shapes.parse_pair({"system": "Be brief.", **responses})
    assert pair.prompt == (Message("system", "Be brief."), *PROMPT)
    assert (pair.a, pair.b, pair.extra) == ("It is blue.", "It is green.", {})


def test_an_implicit_plain_text_prompt_is_the_shared_beginning_in_whole_words() -> None:
    pair = shapes.parse_pair({"chosen": "The sky is blue today.", "rejected": "The sky is black."})
    assert (pair.prompt, pair.a, pair.b) == (user_prompt("The sky is"), "blue today.", "black.")


@pytest.mark.parametrize(
    ("label", "p_a"),
    [
        (1, 1.0),
        (2, 0.0),
        ("2", 0.0),
        ("A", 1.0),
        ("b", 0.0),
        ("model_b", 0.0),
        ("tie", 0.5),
        (None, None),
        (2.0, 0.0),
        ("1.0", 1.0),
        ("", None),
    ],
)
def test_labels_become_the_probability_that_a_is_preferred(label: object, p_a: float | None) -> None:
    row = {"instruction": "q", "output_1": "x", "output_2": "y", "label": label}
    assert shapes.parse_pair(row).human_p_a == p_a


def test_a_winner_counts_where_the_label_is_missing() -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "label": None, "winner": "model_b"}
    assert shapes.parse_pair(row).human_p_a == 0.0


def test_llmbar_rows_read_as_published() -> None:
    pair = shapes.parse_pair({"input": "Sort these.", "output_1": "1 2", "output_2": "2 1", "label": 1})
    assert (pair.prompt, pair.a, pair.human_p_a) == (user_prompt("Sort these."), "1 2", 1.0)


def test_a_pair_without_a_label_has_none_and_not_a_tie() -> None:
    assert shapes.parse_pair({"prompt": "q", "response_a": "x", "response_b": "y"}).human_p_a is None


def test_an_empty_response_is_a_response() -> None:
    assert shapes.parse_pair({"prompt": "q", "chosen": "x", "rejected": ""}).b == ""


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"prompt": "q"}, "no pair of responses: the row has prompt", id="no-responses"),
        pytest.param({"prompt": "q", "chosen": "x"}, "rejected is missing", id="one-response"),
        pytest.param(
            {"prompt": "q", "chosen": "x", "rejected": None}, "rejected is missing", id="null-response"
        ),
        pytest.param({"prompt": "q", "chosen": "x", "rejected": "x"}, "the same text", id="equal"),
        pytest.param({"chosen": "abc", "rejected": "xyz"}, "share no beginning", id="nothing-shared"),
        pytest.param(
            {"chosen": [USER], "rejected": [USER, BLUE]},
            "chosen does not end with an assistant",
            id="no-turn",
        ),
        pytest.param(
            {"chosen": [USER, BLUE, USER, BLUE], "rejected": [USER, GREEN, USER, BLUE]},
            "differ before their last turn",
            id="diverged-early",
        ),
        pytest.param(
            {"prompt": "other", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            "does not begin with the row's prompt",
            id="another-prompt",
        ),
        pytest.param(
            {"prompt": "q", "response_a": "x", "response_b": "y", "label": 3},
            "label 3 is not one of",
            id="label",
        ),
        pytest.param(
            {"prompt": "q", "response_a": "x", "response_b": "y", "human_p_a": 1.5},
            "in [0, 1], not 1.5",
            id="p-above-1",
        ),
    ],
)
def test_refused_pairs_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        shapes.parse_pair(row)
    assert reason in str(caught.value)


def test_a_preference_keeps_its_soft_label_and_its_other_columns() -> None:
    row = {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN], "chosen_prob": 0.75, "judge": "hf:m"}
    preference = shapes.parse_preference(row)
    assert (preference.chosen_prob, preference.extra) == (0.75, {"judge": "hf:m"})


def test_a_preference_from_a_labelled_pair_is_turned_so_that_chosen_is_preferred() -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y", "human_p_a": 0.25}
    preference = shapes.parse_preference(row)
    assert (preference.chosen, preference.rejected, preference.chosen_prob) == ("y", "x", 0.75)


@pytest.mark.parametrize("value", [None, float("nan"), -0.1, "0.5", True])
def test_a_soft_label_must_be_a_probability(value: object) -> None:
    with pytest.raises(RowError, match="chosen_prob must"):
        shapes.parse_preference({"prompt": "q", "chosen": "x", "rejected": "y", "chosen_prob": value})


def test_a_preference_without_a_label_is_refused() -> None:
    with pytest.raises(RowError, match="no label"):
        shapes.parse_preference({"prompt": "q", "response_a": "x", "response_b": "y"})


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            {
                "prompt": [USER],
                "completions": [
                    {
                        "response": "It is blue.",
                        "model": "m",
                        "finish_reason": "stop",
                        "seed": 3,
                        "score": 0.5,
                    },
                    {
                        "response": "It is green.",
                        "model": "m",
                        "finish_reason": "stop",
                        "seed": 4,
                        "score": -1,
                    },
                ],
            },
            id="ours",
        ),
    ],
)
def test_candidates_keep_where_they_came_from(row: dict[str, Any]) -> None:
    assert shapes.parse_candidates(row).candidates == (
        Candidate("It is blue.", "m", "stop", 3, 0.5),
        Candidate("It is green.", "m", "stop", 4, -1.0),
    )


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            {
                "instruction": PROMPT[0].content,
                "completions": [
                    {
                        "response": "It is blue.",
                        "overall_score": 4.5,
                        "annotations": {"honesty": {"Rating": "5"}},
                    },
                    {"response": "It is green.", "overall_score": 1.0, "annotations": {}},
                ],
            },
            id="ultrafeedback",
        ),
        pytest.param(
            {"prompt": [USER], "responses": ["It is blue.", "It is green."], "rewards": [4.5, 1]},
            id="rlhflow",
        ),
    ],
)
def test_scored_completions_of_others_keep_their_scores(row: dict[str, Any]) -> None:
    found = shapes.parse_candidates(row)
    assert [(c.response, c.score) for c in found.candidates] == [("It is blue.", 4.5), ("It is green.", 1.0)]
    assert found.prompt == PROMPT


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BLUE], "responses": ["It is grey.", "It is green."]},
        {
            "text": "\n\nHuman: What colour is the sky?\n\nAssistant: It is blue.",
            "responses": ["It is grey.", "It is green."],
        },
        {
            "question": "What colour is the sky?",
            "completions": [{"response": "It is grey.", "prompt": "Why?"}, {"response": "It is green."}],
        },
    ],
    ids=["answered", "answered-transcript", "an-entry-with-a-prompt"],
)
def test_each_response_of_a_list_answers_the_prompt_of_its_row(row: dict[str, Any]) -> None:
    found = [shapes.parse_conversation(one) for one in shapes.one_response_each(row)]
    assert found == [(*PROMPT, Message("assistant", text)) for text in ("It is grey.", "It is green.")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"prompt": "q"}, "no completions or responses", id="none"),
        pytest.param({"prompt": "q", "responses": []}, "at least one response", id="empty-list"),
        pytest.param(
            {"prompt": "q", "completions": [{"model": "m"}]}, "entry 1 response is missing", id="no-response"
        ),
        pytest.param(
            {"prompt": "q", "responses": ["x"], "rewards": [1, 2]}, "as long as responses", id="lengths"
        ),
        pytest.param(
            {"prompt": "q", "responses": ["x"], "rewards": [float("inf")]},
            "a finite number",
            id="infinite-reward",
        ),
    ],
)
def test_refused_candidates_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        shapes.parse_candidates(row)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"messages": [USER, BLUE]}, id="messages"),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": USER["content"]},
                    {"from": "gpt", "value": "It is blue."},
                ]
            },
            id="sharegpt",
        ),
        pytest.param({"prompt": PROMPT[0].content, "response": "It is blue."}, id="prompt-response"),
        pytest.param({"prompt": [USER], "completion": [BLUE]}, id="trl-prompt-completion"),
        pytest.param({"instruction": PROMPT[0].content, "output": "It is blue."}, id="alpaca"),
        pytest.param({"text": "Human: What colour is the sky?\n\nAssistant: It is blue."}, id="hh-text"),
        pytest.param(
            {"prompt": "Human: What colour is the sky?\n\nAssistant:", "response": "It is blue."},
            id="hh-prompt",
        ),
    ],
)
def test_conversation_shapes(row: dict[str, Any]) -> None:
    assert shapes.parse_conversation(row) == (*PROMPT, Message("assistant", "It is blue."))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"messages": [USER]}, "no response: messages ends with a user turn", id="no-response"),
        pytest.param({"prompt": "q", "response": None}, "response is missing", id="null-response"),
        pytest.param({"messages": [BLUE]}, "messages does not end with a user turn", id="no-prompt"),
    ],
)
def test_refused_conversations_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        shapes.parse_conversation(row)
    assert reason in str(caught.value)


def test_a_scored_response_needs_a_finite_score() -> None:
    row = {"prompt": [USER], "response": "It is blue.", "judge": "j"}
    scored = shapes.parse_scored({**row, "score": 7})
    assert (scored.prompt, scored.response, scored.score) == (PROMPT, "It is blue.", 7.0)
    assert scored.extra["judge"] == "j"
    for score, reason in ((None, "no score"), ("high", "score must be a finite number")):
        with pytest.raises(RowError, match=reason):
            shapes.parse_scored({**row, "score": score})
    assert shapes.holds_pair({"chosen": "a"}) and not shapes.holds_pair(row)
