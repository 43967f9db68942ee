"""Between the trainer's types and protobuf: what `client` sends, and what it reads of an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.rpc import code_pb2, status_pb2

from policy_trainer.reward_source import Comparison, Reward
from protos.rlaif.reward.v1 import reward_pb2
from rlaif.types import Conversation, Pair

INVALID_TEXT = "invalid_text: lone surrogates cannot be sent as UTF-8"
_OVERHEAD_BYTES = 16  # tags, lengths and the id of one item


class Sized(Protocol):
    """A protobuf message."""

    def ByteSize(self) -> int:
        """Serialised size in bytes."""
        ...


Item = TypeVar("Item", bound=Sized)


def encode(conversation: Conversation) -> reward_pb2.Conversation | None:
    """The conversation as a protobuf message, or None if its text is not valid Unicode."""
    try:
        return reward_pb2.Conversation(
            messages=[reward_pb2.Message(role=m.role, content=m.content) for m in conversation]
        )
    except UnicodeEncodeError:
        return None


def encode_pair(pair: Pair) -> reward_pb2.CompareItem | None:
    """The pair as a protobuf message without its id, or None if its text is not valid Unicode."""
    prompt = encode(pair.prompt)
    if prompt is None:
        return None
    try:
        return reward_pb2.CompareItem(prompt=prompt, response_a=pair.a, response_b=pair.b)
    except UnicodeEncodeError:
        return None


def too_large(size: int, room: int) -> str:
    """The reason of an item that no request can hold."""
    return f"too_large: {size} bytes, the server takes {room} per request"


def split(items: Sequence[tuple[int, Item]], max_items: int, max_bytes: int) -> list[list[tuple[int, Item]]]:
    """Cut `items` into consecutive parts of at most `max_items` items and `max_bytes` bytes, none empty."""
    parts: list[list[tuple[int, Item]]] = []
    size = 0
    for item in items:
        cost = item[1].ByteSize() + _OVERHEAD_BYTES
        if not parts or len(parts[-1]) == max_items or size + cost > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += cost
    return parts


def read_outcome(outcome: reward_pb2.ScoreOutcome) -> Reward:
    """One item's outcome as a reward; an error, an empty or a non-finite outcome is missing with a reason."""
    kind = outcome.WhichOneof("outcome")
    if kind == "score":
        score = outcome.score
        if not (math.isfinite(score.raw) and math.isfinite(score.normalized)):
            return Reward(None, None, "not_finite: the server sent a score that is not a finite number")
        return Reward(score.normalized, score.raw, None, score.tokens)
    if kind == "error":
        return Reward(None, None, _reason(outcome.error))
    return Reward(None, None, "no_outcome: the server sent neither a score nor an error")


def read_comparison(outcome: reward_pb2.CompareOutcome) -> Comparison:
    """One pair's outcome; an error, an empty outcome or what is no probability is missing with a reason."""
    kind = outcome.WhichOneof("outcome")
    if kind == "comparison":
        found = outcome.comparison
        if not 0.0 <= found.p_a <= 1.0:
            return Comparison(None, reason="not_finite: the server sent a preference that is no probability")
        return Comparison(
            found.p_a,
            found.p_a_first if found.HasField("p_a_first") else None,
            found.p_a_second if found.HasField("p_a_second") else None,
        )
    if kind == "error":
        return Comparison(None, reason=_reason(outcome.error))
    return Comparison(None, reason="no_outcome: the server sent neither a comparison nor an error")


def _reason(error: status_pb2.Status) -> str:
    known = error.code in code_pb2.Code.values()
    code = code_pb2.Code.Name(error.code) if known else str(error.code)
    return f"{code.lower()}: {error.message}"
