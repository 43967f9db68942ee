"""`POST /v1/decisions` as OpenAI's clients send it (openai-python 3.52, `types/decision*.py`), answered by a judge.

Each question is one task of the judge: the options are shown as letters, and the answer is read from the
probabilities of the letters. `confidence` is the probability of the likeliest option times that of all letters
together, as in vLLM: low when the judge hesitates, and when it would rather have written something else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, StrictStr, field_validator

from reward_server.facade.body import Items
from reward_server.facade.faults import Fault, failed
from reward_server.scorers.base import DecisionTask, Failure, LevelReading, Outcome, Scored, Scorer

_MAX_OPTIONS = 26
"""One letter each."""
_PREDICATE = ("yes, that is true", "no, that is not true")


class Part(BaseModel):
    """Text, JSON or a refusal in a message; pictures are not read."""

    type: Literal["input_text", "output_text", "input_json", "refusal"]
    text: StrictStr = ""
    data: dict[str, Any] | list[dict[str, Any]] | None = None
    refusal: StrictStr = ""

    def read(self) -> str:
        """The part as text."""
        if self.type == "input_json":
            return json.dumps(self.data, ensure_ascii=False)
        return self.refusal if self.type == "refusal" else self.text


Text = StrictStr | Items[Part]


def _text(value: str | list[Part]) -> str:
    return value if isinstance(value, str) else "\n".join(part.read() for part in value)


class InputMessage(BaseModel):
    """A turn of the input."""

    type: Literal["message"] = "message"
    role: Literal["user", "developer", "system", "assistant"]
    content: Text

    def read(self) -> str:
        """The turn as a line of a transcript."""
        return f"{self.role.capitalize()}: {_text(self.content)}"


class ToolCall(BaseModel):
    """A call of a function or tool."""

    type: Literal["function_call", "custom_tool_call"]
    name: StrictStr
    arguments: StrictStr = ""
    input: StrictStr = ""

    def read(self) -> str:
        """The call as a line of a transcript."""
        return f"Call of {self.name}: {self.arguments or self.input}"


class ToolOutput(BaseModel):
    """What a call gave."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    output: Text

    def read(self) -> str:
        """The output as a line of a transcript."""
        return f"Output: {_text(self.output)}"


class Level(BaseModel):
    """A level of a scale, the lowest first."""

    label: StrictStr
    description: StrictStr | None = None


class Choice(BaseModel):
    """An option."""

    value: StrictStr | StrictBool
    description: StrictStr | None = None


class Predicate(BaseModel):
    """How likely is it that a statement about the input is true?"""

    type: Literal["predicate"]
    instructions: Text
    name: StrictStr | None = None

    def options(self) -> tuple[str, ...]:
        """What is offered to the judge."""
        return _PREDICATE

    def answer(self, reading: LevelReading) -> dict[str, Any]:
        """`AnswerResourcePredicate`."""
        return {"type": "predicate", "name": self.name, "probability": reading.probability[0]}


class Choose(BaseModel):
    """Which of some options?"""

    type: Literal["choice"]
    instructions: Text
    choices: Annotated[Items[Choice], Field(min_length=2, max_length=_MAX_OPTIONS)]
    name: StrictStr | None = None

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: list[Choice]) -> list[Choice]:
        if len({(type(c.value), c.value) for c in choices}) != len(choices):
            raise ValueError("choices must be distinct")
        return choices

    def options(self) -> tuple[str, ...]:
        """What is offered to the judge."""
        return tuple(_option(json.dumps(c.value, ensure_ascii=False), c.description) for c in self.choices)

    def answer(self, reading: LevelReading) -> dict[str, Any]:
        """`AnswerResourceChoice`."""
        shares = list(zip(self.choices, reading.probability, strict=True))
        return {
            "type": "choice",
            "name": self.name,
            "choice": max(shares, key=lambda share: share[1])[0].value,
            "probabilities": [{"value": c.value, "probability": p} for c, p in shares],
            "confidence": confidence(reading),
        }


class Rate(BaseModel):
    """Where on a scale?"""

    type: Literal["score"]
    instructions: Text
    levels: Annotated[Items[Level], Field(min_length=2, max_length=10)]
    name: StrictStr | None = None

    @field_validator("levels")
    @classmethod
    def _distinct(cls, levels: list[Level]) -> list[Level]:
        if len({level.label for level in levels}) != len(levels) or not all(v.label.strip() for v in levels):
            raise ValueError("labels must be distinct, and not blank")
        return levels

    def options(self) -> tuple[str, ...]:
        """What is offered to the judge."""
        return tuple(_option(level.label, level.description) for level in self.levels)

    def answer(self, reading: LevelReading) -> dict[str, Any]:
        """`AnswerResourceScore`: the expected index of the level, from 0."""
        shares = list(zip(self.levels, reading.probability, strict=True))
        return {
            "type": "score",
            "name": self.name,
            "score": sum(i * p for i, (_, p) in enumerate(shares)),
            "probabilities": [
                {"value": i, "label": level.label, "probability": p} for i, (level, p) in enumerate(shares)
            ],
            "confidence": confidence(reading),
        }


def _option(label: str, description: str | None) -> str:
    return label if description is None else f"{label} ({description})"


def confidence(reading: LevelReading) -> float:
    """Probability of the likeliest option times that of all options' letters together, in [0, 1]."""
    return min(1.0, max(reading.probability) * reading.mass)


class Decide(BaseModel):
    """The request. Caching hints are taken and change nothing."""

    model: StrictStr
    input: StrictStr | Items[InputMessage | ToolCall | ToolOutput]
    questions: Annotated[
        Items[Annotated[Predicate | Choose | Rate, Field(discriminator="type")]], Field(min_length=1)
    ]

    def text(self) -> str:
        """What all questions are about: a bare text, or a transcript."""
        if isinstance(self.input, str):
            return self.input
        if len(self.input) == 1 and isinstance(only := self.input[0], InputMessage):
            return _text(only.content)
        return "\n\n".join(item.read() for item in self.input)

    def tasks(self, scorer: Scorer) -> list[DecisionTask]:
        """One task per question.

        Raises:
            Fault: who is served answers no questions.
        """
        if scorer.kind != "judge":
            raise Fault(
                400,
                f"{scorer.name} is a {scorer.kind} and answers no questions: serve a judge (--judge), or ask "
                "/classify or /score",
                param="model",
            )
        text = self.text()
        return [DecisionTask(text, _text(q.instructions), q.options()) for q in self.questions]


def answer(request: Decide, outcomes: Sequence[Outcome], model: str) -> dict[str, Any]:
    """`Decision`: one answer per question, in order; a question without a reading is a refusal.

    Raises:
        Fault: the judge cannot be reached, or gave a number that is none.
    """
    answers: list[dict[str, Any]] = []
    for index, (question, outcome) in enumerate(zip(request.questions, outcomes, strict=True)):
        if isinstance(outcome, Failure):
            if outcome.problem in ("unavailable", "not_finite", "unsupported"):
                raise failed(outcome, f"questions[{index}]", callers_own=400)
            answers.append({"type": "refusal", "name": question.name})
            continue
        assert isinstance(outcome, Scored) and outcome.distribution is not None  # a decision has a reading
        answers.append(question.answer(outcome.distribution))
    scored = [o for o in outcomes if isinstance(o, Scored)]
    tokens = sum(o.tokens for o in scored)
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": sum(o.cached for o in scored), "cache_write_tokens": 0},
        "output_tokens": 0,  # an answer is read from probabilities
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }
    return {"model": model, "answers": answers, "usage": usage}
