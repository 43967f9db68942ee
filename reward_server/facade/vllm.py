"""`POST /classify` and `POST /score` as vLLM serves a sequence classifier with one output.

Shapes and defaults after vllm/entrypoints/pooling/{base,classify,scoring}/protocol.py. verl sends one `/classify`
per response and reads `data[-1].probs[-1]`.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, model_validator

from reward_server.facade.body import Items
from reward_server.facade.faults import Fault, all_scored
from reward_server.scorers.base import (
    Kind,
    Outcome,
    Scored,
    ScoreTask,
    SequenceTask,
    Task,
    Truncation,
)
from rlaif.types import Conversation, Message, user_prompt, with_response

_LABEL = "LABEL_0"  # transformers' name of an only output
_KEEP: dict[str | None, Literal["first", "last"] | None] = {"left": "last", "right": "first", None: None}


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: StrictStr


class ChatMessage(BaseModel):
    """A turn."""

    role: Literal["system", "user", "assistant"]
    content: StrictStr | Items[TextPart]

    def turn(self) -> Message:
        """The turn with its parts joined, as vLLM joins them for templates that take text."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return Message(self.role, text)


class Pooling(BaseModel):
    """What both requests have. Fields that only steer vLLM's engine are taken and change nothing."""

    model: StrictStr | None = None
    truncate_prompt_tokens: Annotated[StrictInt, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: StrictBool | None = None
    request_id: StrictStr = Field(default_factory=lambda: uuid.uuid4().hex)
    padding: Literal["do_not_pad"] | None = None
    chat_template: None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_removed_fields(cls, data: Any) -> Any:
        """Refuse what vLLM has removed, so that a request means the same to both."""
        if "normalize" in data:
            raise ValueError("normalize was removed from vLLM; use use_activation instead")
        if "task" in data:
            raise ValueError("task was removed from vLLM; the path says what is wanted")
        return data

    @model_validator(mode="after")
    def _own_template(self) -> Pooling:
        if self.chat_template_kwargs:
            raise ValueError("chat_template_kwargs cannot be set: the model's own template is applied")
        return self

    def truncation(self) -> Truncation:
        """How a conversation is shortened: from the left to what the model reads, or not at all.

        Raises:
            Fault: another wish; the end of a conversation is what is scored.
        """
        if self.truncate_prompt_tokens is None:
            return "reject"
        if self.truncate_prompt_tokens == -1 and self.truncation_side == "left":
            return "left"
        raise Fault(
            400,
            "a conversation is truncated with truncate_prompt_tokens -1 and truncation_side left, or not at all",
            param="truncate_prompt_tokens",
        )


class Classify(Pooling):
    """The request of `/classify`: `input`, or `messages` for the model's chat template."""

    input: StrictStr | Items[StrictStr] | Items[StrictInt] | Items[Items[StrictInt]] | None = None
    messages: Items[ChatMessage] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: Literal[False] = False
    continue_final_message: Literal[False] = False

    @model_validator(mode="after")
    def _one_input(self) -> Classify:
        if (self.input is None) == (self.messages is None):
            raise ValueError("give either input or messages")
        if self.input == [] or self.messages == []:
            raise ValueError("input and messages must not be empty")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens cannot be set with messages: the template writes them")
        return self

    def tasks(self) -> list[Task]:
        """One task per text, list of token ids, or conversation.

        Raises:
            Fault: the truncation wished for cannot be had.
        """
        if self.messages is not None:
            return [ScoreTask(tuple(message.turn() for message in self.messages), self.truncation())]
        return [
            SequenceTask(
                sequence,
                add_special_tokens=self.add_special_tokens is not False,
                keep_tokens=self.truncate_prompt_tokens,
                keep=_KEEP[self.truncation_side],
            )
            for sequence in _sequences(self.input)
        ]


def _sequences(value: str | list[str] | list[int] | list[list[int]] | None) -> list[str | tuple[int, ...]]:
    assert value is not None  # messages otherwise
    if isinstance(value, str):
        return [value]
    if ids := [token for token in value if isinstance(token, int)]:
        return [tuple(ids)]
    return [item if isinstance(item, str) else tuple(item) for item in value if not isinstance(item, int)]


class Score(Pooling):
    """The request of `/score`: each document is scored as the response to its query."""

    queries: StrictStr | Items[StrictStr]
    documents: StrictStr | Items[StrictStr]
    max_tokens_per_query: Literal[0] = 0
    max_tokens_per_doc: Literal[0] = 0
    instruction: None = None

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, data: Any) -> Any:
        """The pairs of names that vLLM knows for queries and documents."""
        for first, second in (("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")):
            if first in data and second in data:
                rest = {k: v for k, v in data.items() if k not in (first, second)}
                return {**rest, "queries": data[first], "documents": data[second]}
        return data

    def tasks(self) -> list[Task]:
        """One task per document; a single query is that of all.

        Raises:
            Fault: the numbers do not match.
        """
        queries = [self.queries] if isinstance(self.queries, str) else self.queries
        documents = [self.documents] if isinstance(self.documents, str) else self.documents
        if not queries or not documents or len(queries) not in (1, len(documents)):
            raise Fault(
                400,
                f"{len(queries)} queries and {len(documents)} documents: give one query or one per document",
                param="queries",
            )
        if len(queries) == 1:
            queries = queries * len(documents)
        truncation = self.truncation()
        conversations: list[Conversation] = [
            with_response(user_prompt(query), document)
            for query, document in zip(queries, documents, strict=True)
        ]
        return [ScoreTask(conversation, truncation) for conversation in conversations]


def classify_answer(request: Classify, outcomes: Sequence[Outcome], kind: Kind, model: str) -> dict[str, Any]:
    """The `ClassificationResponse` of vLLM; `probs` is the model's output, its sigmoid with activation.

    Raises:
        Fault: an item has no score.
    """
    scored = all_scored(outcomes, "messages" if request.messages is not None else "input", callers_own=400)
    label = _LABEL if kind == "reward_model" else None
    data = [
        {"index": i, "label": label, "probs": [value], "num_classes": 1}
        for i, value in enumerate(_values(request, scored, kind))
    ]
    return _listed(f"classify-{request.request_id}", data, scored, model)


def score_answer(request: Score, outcomes: Sequence[Outcome], kind: Kind, model: str) -> dict[str, Any]:
    """The `ScoreResponse` of vLLM.

    Raises:
        Fault: an item has no score.
    """
    scored = all_scored(outcomes, "documents", callers_own=400)
    data = [
        {"index": i, "object": "score", "score": value}
        for i, value in enumerate(_values(request, scored, kind))
    ]
    return _listed(f"score-{request.request_id}", data, scored, model)


def _values(request: Pooling, scored: Sequence[Scored], kind: Kind) -> list[float]:
    """The pooler of vLLM applies the sigmoid to an only output unless `use_activation` is false.

    Only a reward model's output is a logit: other scores are as they are, and cannot be activated.
    """
    if kind == "reward_model" and request.use_activation is not False:
        return [sigmoid(s.raw) for s in scored]
    if request.use_activation:
        raise Fault(
            400, f"the score of a {kind} is no logit: leave out use_activation", param="use_activation"
        )
    return [s.raw for s in scored]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    if x >= 0:
        return 1.0 / (1.0 + math.exp(-x))
    return math.exp(x) / (1.0 + math.exp(x))


def _listed(name: str, data: list[dict[str, Any]], scored: Sequence[Scored], model: str) -> dict[str, Any]:
    tokens = sum(s.tokens for s in scored)
    usage = {
        "prompt_tokens": tokens,
        "total_tokens": tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    return {
        "id": name,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": usage,
    }
