"""Answers as benchmarks and commands leave them, each with its prompt: pure functions from rows.

FastChat's `model_answer` files (`question_id, model_id, choices[].turns[]`) name their questions by number, so that
answers and questions are two files; AlpacaEval's outputs (`instruction, output, generator`), candidates of `rlaif
sample`, and rows with a prompt and a response bring theirs along. The questions' file adds what a table is made by, and
reference answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rlaif import shapes
from rlaif.fields import Row, RowError, plain_text
from rlaif.types import Conversation, user_prompt, with_response

ABOUT_COLUMNS = ("category", "label", "type", "subset", "group", "dataset", "final_label")
"""Columns of answers or questions that answers are compared by; the last is people's class in XSTest's completions."""

ANSWER_SHAPES = (
    f"{shapes.CONVERSATION_SHAPES}; {shapes.CANDIDATE_SHAPES}; or, with a file of questions, question_id with choices "
    "[{turns}] (FastChat)"
)


class Answer(NamedTuple):
    """A response to a prompt.

    Attributes:
        prompt: what came before, answers to earlier turns included.
        response: the answer.
        about: what is known of it: `model`, `turn`, and columns of `ABOUT_COLUMNS`.
        reference: a right answer to show a judge; empty if there is none.
    """

    prompt: Conversation
    response: str
    about: Mapping[str, str] = {}
    reference: str = ""


class Question(NamedTuple):
    """A row of a benchmark's questions: one user turn or several, and a reference answer to each or to none."""

    id: str
    prompt: Conversation
    later_turns: tuple[str, ...] = ()
    about: Mapping[str, str] = {}
    references: tuple[str, ...] = ()


def parse_question(row: Row) -> Question:
    """A question in any of `shapes.PROMPT_SHAPES`, with `question_id` or `id` where it has one.

    Raises:
        RowError: no prompt, or a later turn that is no text.
    """
    prompt, turns = shapes.parse_prompt(row), row.get("turns")
    listed_turns = turns[1:] if isinstance(turns, list | tuple) else ()
    later = tuple(plain_text(turn, "turns") for turn in listed_turns if turn is not None)
    given = row.get("reference", row.get("reference_gpt4"))
    listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
    number = row.get("question_id", row.get("id"))
    return Question(
        "" if number is None else str(number),
        prompt,
        later,
        _about(row),
        tuple(text if isinstance(text, str) else "" for text in listed),
    )


def parse_references(row: Row) -> tuple[str, tuple[str, ...]]:
    """The number of a question, and right answers to its turns, of FastChat's `reference_answer` files.

    Raises:
        RowError: another shape, or a turn that is no text.
    """
    choices = row.get("choices")
    turns = (
        choices[0].get("turns")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict)
        else None
    )
    if row.get("question_id") is None or not isinstance(turns, list):
        raise RowError("a reference answer needs question_id and choices [{turns}]")
    return str(row["question_id"]), tuple(plain_text(turn, "a reference turn") for turn in turns)


class Questions:
    """The questions of a benchmark, found by their number or by their prompt."""

    def __init__(self, questions: Iterable[Question] = ()) -> None:
        self._by_id: dict[str, Question] = {}
        self._by_prompt: dict[Conversation, Question] = {}
        for number, question in enumerate(questions, 1):
            self._by_prompt.setdefault(question.prompt, question)
            self._by_id[question.id or str(number)] = question

    def numbered(self, number: object) -> Question:
        """The question with this `question_id` or `id`, or at this place from 1 if questions have neither.

        Raises:
            RowError: there is none.
        """
        if not self._by_id:
            raise RowError("the row names its question by question_id alone: give the file of questions")
        if str(number) not in self._by_id:
            raise RowError(f"no question has the question_id {number!r}")
        return self._by_id[str(number)]

    def describe(self, answer: Answer) -> Answer:
        """The answer with what its question says; its own columns count first."""
        question = self._by_prompt.get(answer.prompt)
        if question is None:
            return answer
        return answer._replace(
            about={**question.about, **answer.about}, reference=_nth(question.references, 0)
        )


def parse_answers(row: Row, questions: Questions) -> list[Answer]:
    """All answers of a row: every turn of every choice, every candidate, or the one that it holds.

    Raises:
        RowError: none in any known shape (`ANSWER_SHAPES`), or its question is unknown.
    """
    if row.get("choices") is not None and row.get("question_id") is not None:
        return _of_choices(row, questions.numbered(row["question_id"]))
    about = _about(row)
    if row.get("completions") is not None or row.get("responses") is not None:
        found = shapes.parse_candidates(row)
        return [
            questions.describe(Answer(found.prompt, c.response, _named(about, c.model)))
            for c in found.candidates
        ]
    turns = shapes.parse_conversation(row)
    about = _named(about, row.get("generator") or row.get("model"))
    return [questions.describe(Answer(turns[:-1], turns[-1].content, about))]


def _of_choices(row: Row, question: Question) -> list[Answer]:
    asked = (None, *question.later_turns)
    about = _named({**question.about, **_about(row)}, row.get("model_id"))
    answers = []
    for number, choice in enumerate(row["choices"] if isinstance(row["choices"], list) else [None], 1):
        replies = choice.get("turns") if isinstance(choice, dict) else None
        if not isinstance(replies, list | tuple) or not 0 < len(replies) <= len(asked):
            raise RowError(
                f"choice {number} must have turns, at most {len(asked)} of them as its question has"
            )
        prompt = question.prompt
        for turn, reply in enumerate(replies):
            text = plain_text(reply, f"choice {number} turn {turn + 1}")
            known = {**about, "turn": str(turn + 1)} if question.later_turns else about
            answers.append(Answer(prompt, text, known, _nth(question.references, turn)))
            if turn + 1 < len(replies):
                prompt = with_response(prompt, text) + user_prompt(question.later_turns[turn])
    return answers


def answers_row(
    question: Question, number: int, model: str, choices: list[list[str]], answer_id: str
) -> dict[str, Any]:
    """A row of FastChat's `model_answer` files.

    Args:
        question: what was asked.
        number: what to call a question that has no number of its own.
        model: who answered.
        choices: the replies to all turns, once or several times.
        answer_id: of this row.
    """
    known = question.id or str(number)
    return {
        "question_id": int(known) if known.isdecimal() else known,
        "answer_id": answer_id,
        "model_id": model,
        "choices": [{"index": i, "turns": turns} for i, turns in enumerate(choices)],
    }


def topic(prompt: Conversation) -> Conversation:
    """A prompt up to its first user turn: what the turns of one question have in common."""
    first = next((i for i, message in enumerate(prompt, 1) if message.role == "user"), len(prompt))
    return prompt[:first]


def _about(row: Row) -> dict[str, str]:
    return {
        name: str(row[name])
        for name in ABOUT_COLUMNS
        if isinstance(row.get(name), str | int) and row[name] != ""
    }


def _named(about: Mapping[str, str], model: object) -> dict[str, str]:
    return {"model": model, **about} if isinstance(model, str) and model else dict(about)


def _nth(references: tuple[str, ...], turn: int) -> str:
    return references[turn] if turn < len(references) else ""
