"""Rows as people really store them, turned into the project's nouns: pure functions from a dict to a type.

The shapes are those of TRL's dataset formats (standard and conversational, explicit and implicit prompt), ShareGPT,
HH-RLHF transcripts, UltraFeedback, RLHFlow, LLMBar, PandaLM, HHH alignment, RewardBench and MT-bench. A row that fits
none raises `RowError` with one reason. An absent or null response is an error; an empty string is a response, since a
model may answer with nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from rlaif.types import (
    Candidate,
    CandidateSet,
    Conversation,
    Message,
    Pair,
    PreferenceRow,
    Role,
    ScoredRow,
    Vote,
    user_prompt,
)

Row = Mapping[str, Any]


class RowError(ValueError):
    """Why one row cannot be used. Readers turn it into a quarantined line; it never leaves `rlaif`."""


ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",  # ShareGPT
    "gpt": "assistant",
}
PROMPT_SHAPES = (
    "prompt (text or messages), messages, conversations (ShareGPT), instruction [+ input], question, turns, input "
    "alone, or text with Human:/Assistant: turns"
)
CONVERSATION_SHAPES = (
    "messages or conversations ending with an assistant turn, a prompt with response, completion or output, "
    "or text with Human:/Assistant: turns"
)
PAIR_SHAPES = (
    "a prompt with chosen + rejected, response_a + response_b, response1 + response2 (PandaLM) or output_1 + output_2 "
    "(LLMBar); chosen + rejected that both begin with the prompt (messages, Human:/Assistant: text or plain text); "
    "conversation_a + conversation_b (MT-bench); or input with target_scores or targets (HHH alignment)"
)
SCORED_SHAPES = "a score beside one of: " + CONVERSATION_SHAPES
CANDIDATE_SHAPES = "a prompt with completions [{response, model, ...}] or responses [text, ...]"

_PROMPT_KEYS = ("prompt", "messages", "conversations", "instruction", "question", "turns", "text", "input")
SUBSET_COLUMNS = ("subset", "category", "group")
"""Columns that name a row's subset, in order of preference."""

_PAIR_KEYS = (
    ("chosen", "rejected"), ("response_a", "response_b"), ("output_1", "output_2"), ("response1", "response2"),
)  # fmt: skip
_CONVERSATIONS = ("conversation_a", "conversation_b")
_ANNOTATOR = re.compile(r"annotator\d+")
_RESPONSE_KEYS = ("response", "completion", "output")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")
_LABELS = {
    1: 1.0, 2: 0.0, "1": 1.0, "2": 0.0, "a": 1.0, "b": 0.0, "model_a": 1.0, "model_b": 0.0, "tie": 0.5,
    "tie (bothbad)": 0.5, "tie (inconsistent)": 0.5,  # Chatbot Arena, and MT-bench of a judge's two orders
}  # fmt: skip


# ---- parts of a row ----


def plain_text(value: object, name: str) -> str:
    """Text, or the text of OpenAI's content parts; `name` says in an error what it is of.

    Raises:
        RowError: missing, or no text.
    """
    if value is None:
        raise RowError(f"{name} is missing")
    if isinstance(value, list | tuple):  # OpenAI content parts
        parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in value]
        if not parts or not all(isinstance(p, str) for p in parts):
            raise RowError(f"{name} holds something other than text")
        value = "".join(p for p in parts if p is not None)
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise RowError(f"{name} holds half a surrogate pair, which is not text") from err
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def _probability(value: object, name: str) -> float:
    number = _number(value, name)
    if not 0.0 <= number <= 1.0:
        raise RowError(f"{name} must lie in [0, 1], not {number:g}")
    return number


def _kind(value: object) -> str:
    return {
        "dict": "an object",
        "list": "a list",
        "str": "text",
        "NoneType": "null",
        "int": "a number",
        "float": "a number",
        "bool": "a boolean",
    }.get(type(value).__name__, type(value).__name__)


def messages(value: object, name: str) -> Conversation:
    """Messages in `{role, content}` (OpenAI, TRL) or `{from, value}` (ShareGPT) form.

    Raises:
        RowError: not a non-empty list of such messages, an unknown role, or a system turn that is not the first.
    """
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} must be a list of messages, not {_kind(value)}")
    if not value:
        raise RowError(f"{name} has no messages")
    turns = []
    for number, item in enumerate(value, 1):
        where = f"{name} message {number}"
        if not isinstance(item, dict):
            raise RowError(f"{where} must be an object with role and content, not {_kind(item)}")
        role = item.get("role") or item.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"{where} has role {role!r}; known roles: {', '.join(ROLES)}")
        content = plain_text(
            item["value"] if item.get("content") is None and "value" in item else item.get("content"),
            f"{where} content",
        )
        if ROLES[role] == "system" and number > 1:
            raise RowError(f"{where} is a system turn; a system turn can only come first")
        turns.append(Message(ROLES[role], content))
    return tuple(turns)


def transcript(text: str, name: str) -> Conversation:
    r"""Turns of an HH-RLHF transcript: `\n\nHuman: ...\n\nAssistant: ...`, surrounding white space removed.

    Raises:
        RowError: the text does not begin with such a turn.
    """
    text = text.strip()
    marks = list(_TURN.finditer(text))
    if not marks or marks[0].start() != 0:
        raise RowError(f"{name} does not begin with 'Human:' or 'Assistant:'")
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return tuple(
        Message("user" if mark[1] == "Human" else "assistant", text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    )


def _is_transcript(value: object) -> bool:
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None and "\n\nAssistant:" in value


def _checked_prompt(conversation: Conversation, name: str) -> Conversation:
    if not conversation or conversation[-1].role != "user":
        raise RowError(f"{name} does not end with a user turn")
    if not conversation[-1].content.strip():
        raise RowError(f"{name} is empty")
    return conversation


def _prompt_key(row: Row) -> str | None:
    return next((key for key in _PROMPT_KEYS if row.get(key) is not None), None)


def _turns(row: Row, key: str) -> Conversation:
    """What `key` holds, as messages, whoever speaks last."""
    value = row[key]
    if key in ("messages", "conversations") or (key == "prompt" and not isinstance(value, str)):
        return messages(value, key)
    if key == "turns":  # MT-Bench: the user's turns; only the first has a context that exists already
        if not isinstance(value, list) or not value:
            raise RowError(f"turns must be a list of user turns, not {_kind(value)}")
        return user_prompt(plain_text(value[0], "turns"))
    text = plain_text(value, key)
    if key == "text" or _is_transcript(text):
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
    if len(turns) > 1 and turns[:-1] != prompt:
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
        if not _is_transcript(first):
            shared = _shared_words(plain_text(first, name_a), plain_text(second, name_b))
            if not shared:
                raise RowError(
                    f"no prompt: {name_a} and {name_b} share no beginning and the row has {_keys(row)}"
                )
            return user_prompt(shared), first[len(shared) :].lstrip(), second[len(shared) :].lstrip()
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
        _checked_prompt(turns_a[:-1], f"{name_a} before its last turn"),
        turns_a[-1].content,
        turns_b[-1].content,
    )


def holds_pair(row: Row) -> bool:
    """Whether a row has the columns of a pair, usable or not."""
    return _has_choices(row) or any(
        row.get(name) is not None for names in (*_PAIR_KEYS, _CONVERSATIONS) for name in names
    )


def subset_of(row: Row, columns: Sequence[str] = SUBSET_COLUMNS) -> str:
    """The subset that a row names in the first of these columns that it has; empty if in none."""
    return str(next((row[name] for name in columns if row.get(name) is not None), ""))


# ---- pairs as evaluation sets publish them, in the plain columns ----


def _plain_pair(row: Row, *, whole_exchanges: bool = False) -> Row:
    if _has_choices(row):
        return _choice_pair(row)
    if any(row.get(name) is not None for name in _CONVERSATIONS):
        return _conversation_pair(row, whole_exchanges=whole_exchanges)
    return row


def _has_choices(row: Row) -> bool:
    return row.get("target_scores") is not None or isinstance(row.get("targets"), dict)


def _choice_pair(row: Row) -> Row:
    """HHH alignment: `target_scores {text: score}` (BIG-bench) or `targets {choices, labels}`; the higher is chosen."""
    scores = row.get("target_scores")
    if scores is None:
        targets = row["targets"]
        texts, labels = targets.get("choices"), targets.get("labels")
        if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
            raise RowError("targets must have choices and as many labels")
        choices = list(zip(texts, labels, strict=True))
    elif isinstance(scores, dict):
        choices = [(text, score) for text, score in scores.items() if score is not None]
    else:
        raise RowError(f"target_scores must be an object of texts and scores, not {_kind(scores)}")
    if len(choices) != 2:
        raise RowError(f"{len(choices)} choices are not a pair")
    (rejected, low), (chosen, high) = sorted(
        choices, key=lambda choice: _number(choice[1], "a choice's score")
    )
    if low == high:
        raise RowError("both choices have the same score, so none is preferred")
    prompt = plain_text(row.get("input"), "input").strip()
    if "\n\nAssistant:" in prompt and not prompt.startswith("Human:"):
        prompt = f"Human: {prompt}"  # BIG-bench opens every input with this turn itself
    plain = {
        "prompt": prompt,
        "chosen": plain_text(chosen, "a choice"),
        "rejected": plain_text(rejected, "a choice"),
    }
    return {
        key: value for key, value in row.items() if key not in ("input", "target_scores", "targets")
    } | plain


def _conversation_pair(row: Row, *, whole_exchanges: bool) -> Row:
    """MT-bench and Chatbot Arena: two models' conversations, of which `turn` was judged.

    From the second turn on, they differ before the last answer. A judge can read both exchanges whole, which is what
    people did; a reward model scores answers to one prompt.
    """
    turns = {name: messages(row.get(name), name) for name in _CONVERSATIONS}
    turn = row.get("turn")
    if turn is not None:
        if isinstance(turn, bool) or not isinstance(turn, int) or turn < 1:
            raise RowError(f"turn must be a whole number from 1, not {turn!r}")
        for name, said in turns.items():
            ends = [i for i, message in enumerate(said, 1) if message.role == "assistant"]
            if len(ends) < turn:
                raise RowError(f"{name} has {len(ends)} assistant turns, so there is no turn {turn}")
            turns[name] = said[: ends[turn - 1]]
    a, b = turns.values()
    if a[-1].role != "assistant" or b[-1].role != "assistant":
        raise RowError("conversation_a and conversation_b must end with an assistant turn")
    if a[:-1] == b[:-1]:
        prompt, first, second = a[:-1], a[-1].content, b[-1].content
    elif not whole_exchanges:
        raise RowError(
            f"{' and '.join(_CONVERSATIONS)} differ before their last turn, so they do not answer one prompt"
        )
    else:
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))
        prompt, first, second = a[:shared], _exchange(a[shared:]), _exchange(b[shared:])
    plain: dict[str, Any] = {
        "prompt": [{"role": m.role, "content": m.content} for m in prompt],
        "response_a": first,
        "response_b": second,
    }
    if turn is not None and not subset_of(row):
        plain["subset"] = f"turn {turn}"
    return {key: value for key, value in row.items() if key not in _CONVERSATIONS} | plain


def _exchange(turns: Conversation) -> str:
    """An answer, and what was said after it, as one text."""
    answer, *more = turns
    return "\n\n".join((answer.content, *(f"{m.role.capitalize()}: {m.content}" for m in more)))


def _annotators(row: Row) -> tuple[Vote, ...]:
    """The labels in PandaLM's columns annotator1, annotator2, ...: 0 is a tie."""
    columns = sorted(name for name in row if _ANNOTATOR.fullmatch(name) and row[name] is not None)
    for name in columns:
        if isinstance(row[name], bool) or row[name] not in (0, 1, 2):
            raise RowError(f"{name} is {row[name]!r}, not one of 0 (tie), 1, 2")
    return tuple(Vote(name, (0.5, 1.0, 0.0)[int(row[name])]) for name in columns)


def _votes(row: Row) -> tuple[Vote, ...]:
    """What single annotators said: PandaLM's columns, or the winner that one of MT-bench's judges named."""
    judge = row.get("judge")
    if judge is None or row.get("conversation_a") is None:
        return _annotators(row)
    p_a = _human_label(row, "response_a")
    name = " ".join(map(str, judge)) if isinstance(judge, list | tuple) else str(judge)
    return () if p_a is None else (Vote(name, p_a),)


def _majority(votes: Sequence[Vote]) -> float | None:
    """What more annotators said than anything else; None where nothing was."""
    (label, count), *others = Counter(vote.p_a for vote in votes).most_common()
    return None if others and others[0][1] == count else label


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


def _human_label(row: Row, first: str) -> float | None:
    if "human_p_a" in row:
        return None if row["human_p_a"] is None else _probability(row["human_p_a"], "human_p_a")
    if first == "chosen":
        return 1.0
    label = row.get("label", row.get("winner"))
    if label is None:
        votes = _annotators(row)
        return _majority(votes) if votes else None
    if isinstance(label, bool) or not isinstance(label, str | int) or _plain_label(label) not in _LABELS:
        raise RowError(f"label {label!r} is not one of 1, 2, a, b, tie")
    return _LABELS[_plain_label(label)]


def _plain_label(label: str | int) -> str | int:
    return label.strip().lower() if isinstance(label, str) else label


def parse_pair(row: Row, *, whole_exchanges: bool = False) -> Pair:
    """A pair and, where the row carries them, its human labels; `chosen` means a human preferred A.

    Args:
        row: from a file.
        whole_exchanges: where two conversations differ before their last turn, a response is all that follows what
            they share, later user turns included; else such a row is refused.

    Raises:
        RowError: no pair in any known shape (`PAIR_SHAPES`), or two equal responses.
    """
    votes = _votes(row)
    row = _plain_pair(row, whole_exchanges=whole_exchanges)
    first, prompt, a, b = _pair_parts(row)
    return Pair(prompt, a, b, _human_label(row, first), _extra(row), votes)


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
    row = _plain_pair(row)
    first, prompt, a, b = _pair_parts(row)
    if first == "chosen":
        return PreferenceRow(
            prompt, a, b, _probability(row.get("chosen_prob", 1.0), "chosen_prob"), _extra(row)
        )
    p_a = _human_label(row, first)
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
    score = _number(row["score"], "score")
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
    score = None if reward is None else _number(reward, f"{name} reward")
    if not isinstance(item, dict):
        return Candidate(_response(item, name, prompt), score=score)
    given = item.get("score", item.get("overall_score"))  # UltraFeedback says overall_score
    if score is None and given is not None:
        score = _number(given, f"{name} score")
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
