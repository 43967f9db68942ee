"""Rows as people really store them, turned into the project's nouns: pure functions from a dict to a type.

The shapes are those of TRL's dataset formats (standard and conversational, explicit and implicit prompt), ShareGPT,
HH-RLHF transcripts, UltraFeedback, RLHFlow, LLMBar, PandaLM, HHH alignment, RewardBench and MT-bench. A row that fits
none raises `RowError` with one reason. An absent or null response is an error; an empty string is a response, since a
model may answer with nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rlaif.fields import (
    Row,
    RowError,
    is_transcript,
    kind_of,
    messages,
    number,
    plain_text,
    probability,
    transcript,
)
from rlaif.published import holds_published_pair, human_label, one_by_one, plain_pair, votes_of
from rlaif.types import (
    Candidate,
    CandidateSet,
    Conversation,
    Message,
    Pair,
    PreferenceRow,
    ScoredRow,
    to_dicts,
    user_prompt,
)

PROMPT_SHAPES = (
    "prompt (text or messages), messages, conversations (ShareGPT), instruction [+ input], question, query, turns, "
    "input alone, or text with Human:/Assistant: turns; with system beside it or not"
)
CONVERSATION_SHAPES = (
    "messages or conversations ending with an assistant turn, a prompt with response, completion or output, "
    "or text with Human:/Assistant: turns"
)
PAIR_SHAPES = (
    "a prompt with chosen + rejected (RewardBench 2: lists of them), response_a + response_b, response1 + response2 "
    "(PandaLM) or output_1 + output_2 (LLMBar); chosen + rejected that both begin with the prompt (messages, "
    "Human:/Assistant: text or plain text); conversation_a + conversation_b (MT-bench); or input with target_scores or "
    "targets (HHH alignment)"
)
SCORED_SHAPES = "a score beside one of: " + CONVERSATION_SHAPES
CANDIDATE_SHAPES = "a prompt with completions [{response, model, ...}] or responses [text, ...]"

_PROMPT_KEYS = (
    "prompt",
    "messages",
    "conversations",
    "instruction",
    "question",
    "query",
    "turns",
    "text",
    "input",
)
_SYSTEM_KEYS = ("system", "system_prompt")
_PAIR_KEYS = (
    ("chosen", "rejected"), ("response_a", "response_b"), ("output_1", "output_2"), ("response1", "response2"),
)  # fmt: skip
_RESPONSE_KEYS = ("response", "completion", "output")


def _checked_prompt(conversation: Conversation, name: str) -> Conversation:
    if not conversation or conversation[-1].role != "user":
        raise RowError(f"{name} does not end with a user turn")
    if not conversation[-1].content.strip():
        raise RowError(f"{name} is empty")
    return conversation


def _prompt_key(row: Row) -> str | None:
    return next((key for key in _PROMPT_KEYS if row.get(key) is not None), None)


def _turns(row: Row, key: str) -> Conversation:
    """What `key` holds, as messages, whoever speaks last; after the row's system prompt."""
    return _after_system(row, _said(row, key))


def _after_system(row: Row, turns: Conversation) -> Conversation:
    """The turns after the system prompt that has a column of its own, unless they begin with one."""
    name = next((key for key in _SYSTEM_KEYS if row.get(key)), None)
    if name is None or (turns[:1] and turns[0].role == "system"):
        return turns
    return (Message("system", plain_text(row[name], name)), *turns)


def _said(row: Row, key: str) -> Conversation:
    value = row[key]
    if key in ("messages", "conversations") or (key == "prompt" and not isinstance(value, str)):
        return messages(value, key)
    if key == "turns":  # MT-Bench: the user's turns; only the first has a context that exists already
        if not isinstance(value, list) or not value:
            raise RowError(f"turns must be a list of user turns, not {kind_of(value)}")
        return user_prompt(plain_text(value[0], "turns"))
    text = plain_text(value, key)
    if key == "text" or is_transcript(text):
        turns = transcript(text, key)
        is_cue = turns[-1] == Message(
            "assistant", ""
        )  # "... Assistant:" asks for a response, it does not hold one
        return turns[:-1] if is_cue else turns
    if key == "instruction" and (extra := row.get("input")):  # Alpaca
        return user_prompt(f"{text}\n\n{plain_text(extra, 'input')}")
    return user_prompt(text)


# ---- whole rows ----


def parse_prompt(row: Row) -> Conversation:
    """The prompt of a row; a final assistant turn of `messages`, `conversations` or `text` is cut off.

    Raises:
        RowError: no prompt in any known shape (`PROMPT_SHAPES`), or an empty one.
    """
    key = _prompt_key(row)
    if key is None:
        raise RowError(f"no prompt: the row has {_keys(row)}")
    turns = _turns(row, key)
    if turns and turns[-1].role == "assistant" and (key != "prompt" or isinstance(row[key], str)):
        turns = turns[:-1]
    return _checked_prompt(turns, key)


def parse_conversation(row: Row) -> Conversation:
    """A conversation that ends with the assistant turn to be scored.

    Raises:
        RowError: no such conversation in any known shape (`CONVERSATION_SHAPES`).
    """
    key = _prompt_key(row)
    if key is None:
        raise RowError(f"no conversation: the row has {_keys(row)}")
    turns = _turns(row, key)
    name = next((k for k in _RESPONSE_KEYS if k in row), None)
    if name is not None and (not turns or turns[-1].role == "user"):
        prompt = _checked_prompt(turns, key)
        return (*prompt, Message("assistant", _response(row[name], name, prompt)))
    if not turns or turns[-1].role != "assistant":
        raise RowError(
            f"no response: {key} ends with a user turn and the row has no response, completion or output"
        )
    _checked_prompt(turns[:-1], key)
    return turns


def _response(value: object, name: str, prompt: Conversation) -> str:
    """One response: text, an assistant message (alone or in a list), or the conversation with its prompt repeated."""
    if isinstance(value, str) or value is None:
        return plain_text(value, name)
    turns = messages([value] if isinstance(value, dict) else value, name)
    if turns[-1].role != "assistant":
        raise RowError(f"{name} does not end with an assistant turn")
    said = (
        prompt[1:] if prompt and prompt[0].role == "system" else prompt
    )  # the system prompt is not always repeated
    if len(turns) > 1 and turns[:-1] not in (prompt, said):
        raise RowError(f"{name} is more than one assistant turn and does not begin with the row's prompt")
    return turns[-1].content


def _shared_words(first: str, second: str) -> str:
    """The beginning both texts share, up to the last whole word: "is blue" and "is black" share "is"."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return re.sub(r"\S+\Z", "", "".join(char for char, _ in same)).rstrip()


def _implicit(row: Row, name_a: str, name_b: str) -> tuple[Conversation, str, str]:
    """Prompt and responses where both columns hold the whole exchange: the prompt is what they share."""
    first, second = row[name_a], row[name_b]
    if isinstance(first, str) and isinstance(second, str):
        if not is_transcript(first):
            shared = _shared_words(plain_text(first, name_a), plain_text(second, name_b))
            if not shared:
                raise RowError(
                    f"no prompt: {name_a} and {name_b} share no beginning and the row has {_keys(row)}"
                )
            return (
                _after_system(row, user_prompt(shared)),
                first[len(shared) :].lstrip(),
                second[len(shared) :].lstrip(),
            )
        turns_a, turns_b = (
            transcript(plain_text(first, name_a), name_a),
            transcript(plain_text(second, name_b), name_b),
        )
    else:
        turns_a, turns_b = messages(first, name_a), messages(second, name_b)
    for turns, name in ((turns_a, name_a), (turns_b, name_b)):
        if turns[-1].role != "assistant":
            raise RowError(f"{name} does not end with an assistant turn")
    if turns_a[:-1] != turns_b[:-1]:
        raise RowError(
            f"{name_a} and {name_b} differ before their last turn, so they do not answer one prompt"
        )
    return (
        _after_system(row, _checked_prompt(turns_a[:-1], f"{name_a} before its last turn")),
        turns_a[-1].content,
        turns_b[-1].content,
    )


def holds_pair(row: Row) -> bool:
    """Whether a row has the columns of a pair, usable or not."""
    return holds_published_pair(row) or any(row.get(name) is not None for pair in _PAIR_KEYS for name in pair)


def _pair_parts(row: Row) -> tuple[str, Conversation, str, str]:
    """(name of the first response's column, prompt, first, second)."""
    names = next((pair for pair in _PAIR_KEYS if any(row.get(name) is not None for name in pair)), None)
    if names is None:
        raise RowError(f"no pair of responses: the row has {_keys(row)}")
    for name in names:
        if row.get(name) is None:
            raise RowError(f"{name} is missing")
    if _prompt_key(row) is None:
        prompt, a, b = _implicit(row, *names)
    else:
        prompt = parse_prompt(row)
        a, b = (_response(row[name], name, prompt) for name in names)
    if a == b:
        raise RowError(f"{names[0]} and {names[1]} are the same text, so there is nothing to compare")
    return names[0], prompt, a, b


def parse_pair(row: Row, *, whole_exchanges: bool = False) -> Pair:
    """A pair and, where the row carries them, its human labels; `chosen` means a human preferred A.

    Args:
        row: from a file.
        whole_exchanges: where two conversations differ before their last turn, a response is all that follows what
            they share, later user turns included; else such a row is refused.

    Raises:
        RowError: no pair in any known shape (`PAIR_SHAPES`), or two equal responses.
    """
    votes = votes_of(row)
    row = plain_pair(row, whole_exchanges=whole_exchanges)
    first, prompt, a, b = _pair_parts(row)
    return Pair(prompt, a, b, human_label(row, first), _extra(row), votes)


def parse_pairs(row: Row, *, whole_exchanges: bool = False) -> list[Pair]:
    """All pairs of a row: one as `parse_pair` reads it, or each right answer with each wrong one (RewardBench 2).

    Raises:
        RowError: see `parse_pair`.
    """
    return [parse_pair(one, whole_exchanges=whole_exchanges) for one in one_by_one(row)]


def parse_preferences(row: Row) -> list[PreferenceRow]:
    """All labelled pairs of a row, see `parse_pairs` and `parse_preference`.

    Raises:
        RowError: see `parse_preference`.
    """
    return [parse_preference(one) for one in one_by_one(row)]


def parse_preference(row: Row) -> PreferenceRow:
    """A labelled pair oriented as chosen and rejected; `chosen_prob` is 1 where the row gives none.

    Raises:
        RowError: no pair, no label, or a probability outside [0, 1].
    """
    found = parse_labelled(row)
    if isinstance(found, Pair):
        raise RowError("the pair has no label")
    return found


def parse_labelled(row: Row) -> PreferenceRow | Pair:
    """A preference where the row carries a label, as `parse_preference` has it, and else the pair alone.

    Raises:
        RowError: no pair, or a probability outside [0, 1].
    """
    row = plain_pair(row)
    first, prompt, a, b = _pair_parts(row)
    if first == "chosen":
        return PreferenceRow(
            prompt, a, b, probability(row.get("chosen_prob", 1.0), "chosen_prob"), _extra(row)
        )
    p_a = human_label(row, first)
    if p_a is None:
        return Pair(prompt, a, b, None, _extra(row))
    if p_a >= 0.5:
        return PreferenceRow(prompt, a, b, p_a, _extra(row))
    return PreferenceRow(prompt, b, a, 1.0 - p_a, _extra(row))


def parse_scored(row: Row) -> ScoredRow:
    """A response and its score.

    Raises:
        RowError: no conversation in any known shape (`CONVERSATION_SHAPES`), or no finite `score`.
    """
    if row.get("score") is None:
        raise RowError(f"no score: the row has {_keys(row)}")
    conversation = parse_conversation(row)
    score = number(row["score"], "score")
    return ScoredRow(conversation[:-1], conversation[-1].content, score, _extra(row))


def parse_candidates(row: Row) -> CandidateSet:
    """All responses to one prompt.

    Raises:
        RowError: no list of responses in any known shape (`CANDIDATE_SHAPES`).
    """
    if row.get("completions") is not None:
        value, name = row["completions"], "completions"
    elif row.get("responses") is not None:
        value, name = row["responses"], "responses"
    else:
        raise RowError(f"no completions or responses: the row has {_keys(row)}")
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{name} must be a list with at least one response")
    prompt = parse_prompt(row)
    rewards = row.get("rewards")
    if rewards is None:
        rewards = [None] * len(value)
    if not isinstance(rewards, list | tuple) or len(rewards) != len(value):
        raise RowError(f"rewards must be a list as long as {name}")
    candidates = tuple(
        _candidate(item, reward, prompt, f"{name} entry {number}")
        for number, (item, reward) in enumerate(zip(value, rewards, strict=True), 1)
    )
    return CandidateSet(prompt, candidates, _extra(row))


def one_response_each(row: Row) -> list[dict[str, Any]]:
    """A row that lists several responses, as a row for each of them, with what the list says of it. Others as they are.

    Each has the row's own prompt, whatever an entry of the list calls so. Where the prompt's column goes on with an
    assistant turn, which is none of the responses, `prompt` takes its place.

    Raises:
        RowError: the list has no known shape (`CANDIDATE_SHAPES`).
    """
    given = row.get("completions") if row.get("completions") is not None else row.get("responses")
    if given is None:
        return [dict(row)]
    found = parse_candidates(row)
    shared = {key: value for key, value in row.items() if key not in ("completions", "responses", "rewards")}
    key = _prompt_key(row)
    if key is not None and _turns(row, key) != found.prompt:
        del shared[key]
        shared["prompt"] = to_dicts(found.prompt)
    taken = {*_PROMPT_KEYS, *_SYSTEM_KEYS}
    said = [
        {name: item[name] for name in item if name not in taken} if isinstance(item, dict) else {}
        for item in given
    ]
    return [
        {**shared, **more, "response": candidate.response}
        for more, candidate in zip(said, found.candidates, strict=True)
    ]


def parse_ranking(row: Row) -> CandidateSet:
    """Responses to one prompt as `rlaif label rank` ordered them, best first; their scores are the strengths.

    Raises:
        RowError: no such list of responses.
    """
    ranking = row.get("ranking")
    if not isinstance(ranking, list | tuple) or not all(isinstance(entry, dict) for entry in ranking):
        raise RowError(f"no ranking: the row has {_keys(row)}")
    completions = [{**entry, "score": entry.get("strength")} for entry in ranking]
    rest = {key: value for key, value in row.items() if key != "ranking"}
    return parse_candidates({**rest, "completions": completions})


def _candidate(item: object, reward: object, prompt: Conversation, name: str) -> Candidate:
    score = None if reward is None else number(reward, f"{name} reward")
    if not isinstance(item, dict):
        return Candidate(_response(item, name, prompt), score=score)
    given = item.get("score", item.get("overall_score"))  # UltraFeedback says overall_score
    if score is None and given is not None:
        score = number(given, f"{name} score")
    seed = item.get("seed")
    if seed is not None and not isinstance(seed, int):
        raise RowError(f"{name} seed must be a whole number, not {seed!r}")
    return Candidate(
        response=plain_text(item.get("response"), f"{name} response"),
        model=str(item.get("model") or ""),
        finish_reason=str(item.get("finish_reason") or ""),
        seed=seed,
        score=score,
    )


_CONSUMED = frozenset(
    {
        *_PROMPT_KEYS,
        *_SYSTEM_KEYS,
        *(name for pair in _PAIR_KEYS for name in pair),
        "chosen_prob",
        "human_p_a",
        "completions",
    }
    | {"responses", "rewards"}
)


def _extra(row: Row) -> dict[str, Any]:
    """The columns that carry no part of the noun itself, kept for provenance."""
    return {key: value for key, value in row.items() if key not in _CONSUMED}


def _keys(row: Row) -> str:
    names: Sequence[str] = sorted(map(str, row))
    return ", ".join(names[:12]) if names else "no columns"
