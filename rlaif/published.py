"""Pairs as evaluation sets publish them, rewritten in the plain columns that `rlaif.shapes` reads; and human labels.

PandaLM, HHH alignment (BIG-bench), MT-bench's human judgments and RewardBench 2. Pure functions from rows to rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeGuard

from rlaif.fields import Row, RowError, kind_of, messages, number, plain_text, probability
from rlaif.types import Conversation, Vote, content_id

SUBSET_COLUMNS = ("subset", "category", "group")
"""Columns that name a row's subset, in order of preference."""

_CONVERSATIONS = ("conversation_a", "conversation_b")
_BEST_OF = "best_of"
_ANNOTATOR = re.compile(r"annotator\d+")
_LABELS = {
    1: 1.0, 2: 0.0, "1": 1.0, "2": 0.0, "a": 1.0, "b": 0.0, "model_a": 1.0, "model_b": 0.0, "tie": 0.5,
    "tie (bothbad)": 0.5, "tie (inconsistent)": 0.5,  # Chatbot Arena, and MT-bench of a judge's two orders
}  # fmt: skip


def subset_of(row: Row, columns: Sequence[str] = SUBSET_COLUMNS) -> str:
    """The subset that a row names in the first of these columns that it has; empty if in none."""
    return str(next((row[name] for name in columns if row.get(name) is not None), ""))


def plain_pair(row: Row, *, whole_exchanges: bool = False) -> Row:
    """A row of HHH alignment or MT-bench with a prompt and two responses; any other row as it is.

    Args:
        row: from a file.
        whole_exchanges: see `shapes.parse_pair`.

    Raises:
        RowError: the row's choices or conversations are no pair.
    """
    if _has_choices(row):
        return _choice_pair(row)
    if any(row.get(name) is not None for name in _CONVERSATIONS):
        return _conversation_pair(row, whole_exchanges=whole_exchanges)
    return row


def holds_published_pair(row: Row) -> bool:
    """Whether a row has the columns that `plain_pair` reads, usable or not."""
    return _has_choices(row) or any(row.get(name) is not None for name in _CONVERSATIONS)


def _has_choices(row: Row) -> bool:
    """Whether a row is one of HHH alignment."""
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
        raise RowError(f"target_scores must be an object of texts and scores, not {kind_of(scores)}")
    if len(choices) != 2:
        raise RowError(f"{len(choices)} choices are not a pair")
    (rejected, low), (chosen, high) = sorted(
        choices, key=lambda choice: number(choice[1], "a choice's score")
    )
    if low == high:
        raise RowError("both choices have the same score, so none is preferred")
    prompt = plain_text(row.get("input"), "input").strip()
    if "\n\nAssistant:" in prompt and not prompt.startswith("Human:"):
        prompt = f"Human: {prompt}"  # only the turns after the first are marked
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
            "conversation_a and conversation_b differ before their last turn, so they do not answer one prompt"
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


class BestOf(NamedTuple):
    """A right answer among so many wrong ones, each of which it is paired with; equal for all of these pairs."""

    id: str
    rivals: int


def best_of(extra: Row) -> BestOf | None:
    """What a pair made by `one_by_one` belongs to; None for a pair by itself."""
    known = extra.get(_BEST_OF)
    return known if isinstance(known, BestOf) else None


def one_by_one(row: Row) -> list[Row]:
    """RewardBench 2: lists of right and of wrong answers, as a row for each pair of them. Other rows as they are."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not (_are_texts(chosen) and _are_texts(rejected)):
        return [row]
    prompt, rivals = row.get("prompt"), len(rejected)
    return [
        {**row, "chosen": right, "rejected": wrong, _BEST_OF: BestOf(content_id(prompt, right), rivals)}
        for right in chosen
        for wrong in rejected
    ]


def _are_texts(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) for text in value)


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
    return tuple(Vote(_called(row, name), (0.5, 1.0, 0.0)[int(row[name])]) for name in columns)


def _called(row: Row, column: str) -> str:
    """Who annotator1, annotator2, ... are, where a column `annotators` names them in this order."""
    names, place = row.get("annotators"), int(column.removeprefix("annotator")) - 1
    if isinstance(names, list | tuple) and place < len(names) and isinstance(names[place], str):
        return str(names[place])
    return column


def votes_of(row: Row) -> tuple[Vote, ...]:
    """What single annotators said: PandaLM's columns, or the winner that one of MT-bench's judges named."""
    judge = row.get("judge")
    if judge is None or row.get("conversation_a") is None:
        return _annotators(row)
    p_a = human_label(row, "response_a")
    name = " ".join(map(str, judge)) if isinstance(judge, list | tuple) else str(judge)
    return () if p_a is None else (Vote(name, p_a),)


def _majority(votes: Sequence[Vote]) -> float | None:
    """What more annotators said than anything else; None where nothing was."""
    (label, count), *others = Counter(vote.p_a for vote in votes).most_common()
    return None if others and others[0][1] == count else label


def human_label(row: Row, first: str) -> float | None:
    """P(first response preferred) by people, as far as the row says.

    Args:
        row: with its responses in plain columns.
        first: the name of the first response's column; `chosen` is a label by itself.

    Raises:
        RowError: a label that is none.
    """
    if "human_p_a" in row:
        return None if row["human_p_a"] is None else probability(row["human_p_a"], "human_p_a")
    if first == "chosen":
        return 1.0
    given = (row.get(name) for name in ("label", "winner"))
    label = next(
        (label for label in given if label is not None and label != ""), None
    )  # "" is a gap in a CSV file
    if isinstance(label, float) and label.is_integer():  # a column of integers with gaps
        label = int(label)
    if label is None:
        votes = _annotators(row)
        return _majority(votes) if votes else None
    if isinstance(label, bool) or not isinstance(label, str | int) or _plain_label(label) not in _LABELS:
        raise RowError(f"label {label!r} is not one of 1, 2, a, b, tie")
    return _LABELS[_plain_label(label)]


def _plain_label(label: str | int) -> str | int:
    return label.strip().lower().removesuffix(".0") if isinstance(label, str) else label
