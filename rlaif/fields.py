"""Parts of a row, checked: text, numbers, messages, transcripts. Pure functions from a value to a value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rlaif.types import Conversation, Message, Role

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
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")


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
        raise RowError(f"{name} must be text, not {kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as err:
        raise RowError(f"{name} holds half a surrogate pair, which is not text") from err
    return value


def number(value: object, name: str) -> float:
    """A finite number.

    Raises:
        RowError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"{name} must be a finite number, not {value!r}")
    return float(value)


def probability(value: object, name: str) -> float:
    """A number in [0, 1].

    Raises:
        RowError: it is none.
    """
    given = number(value, name)
    if not 0.0 <= given <= 1.0:
        raise RowError(f"{name} must lie in [0, 1], not {given:g}")
    return given


def kind_of(value: object) -> str:
    """What a value is, in words for JSON's types."""
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
        raise RowError(f"{name} must be a list of messages, not {kind_of(value)}")
    if not value:
        raise RowError(f"{name} has no messages")
    turns = []
    for place, item in enumerate(value, 1):
        where = f"{name} message {place}"
        if not isinstance(item, dict):
            raise RowError(f"{where} must be an object with role and content, not {kind_of(item)}")
        role = item.get("role") or item.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(f"{where} has role {role!r}; known roles: {', '.join(ROLES)}")
        content = plain_text(
            item["value"] if item.get("content") is None and "value" in item else item.get("content"),
            f"{where} content",
        )
        if ROLES[role] == "system" and place > 1:
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


def is_transcript(value: object) -> bool:
    """Whether a value is text that `transcript` reads, with an answer or the cue for one."""
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None and "\n\nAssistant:" in value
