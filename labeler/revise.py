"""`rlaif label revise`: critique and revision by principles -> data for supervised fine-tuning.

The supervised phase of Constitutional AI (arXiv 2212.08073, section 3). In each round a principle is drawn, the model
criticises the response by it, and then writes the response as it should have been; the next round goes on from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from labeler.card import keep_rubric, write_card
from labeler.config import ReviseConfig
from labeler.guard import is_content_free, neutralise
from labeler.llm import LLM, Generation, RequestFailed
from labeler.loop import reason_of, replay
from labeler.outputs import (
    MESSAGES,
    print_summary,
    refuse_if_too_many_open,
    write_report,
    write_unlabelled,
)
from labeler.preferences import cost_of
from labeler.rubric import Question, Rubric, load_rubric
from labeler.session import open_session
from rlaif.answers import Answer
from rlaif.errors import ConfigError
from rlaif.records import Quarantine, read_answers, write_parquet
from rlaif.types import Conversation, Message, content_id, to_dicts, user_prompt

ROUND = pa.struct([("principle", pa.string()), ("critique", pa.string()), ("revision", pa.string())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("initial", pa.string()),
        ("rounds", pa.list_(ROUND)),
        ("model", pa.string()),
        ("rubric", pa.string()),
        ("rubric_hash", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
    ]
)
"""Columns of `revisions.parquet`; `completion` is the revision of the last of `rounds`. Tokens are of these rounds."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of critique and revision; `critique` is None where none was asked for."""

    principle: str | None
    critique: str | None
    revision: str
    replies: tuple[Generation, ...]


class Reviser:
    """A model that criticises and revises responses. Calls may run concurrently.

    Args:
        llm: the model asked.
        rubric: how it is asked; of kind `revision`. Its `cot` says whether a critique comes first.
        num_revisions: rounds.
        temperature: of critiques and revisions; 0 is greedy.
        max_critique_tokens: a longer critique is cut.
        max_revision_tokens: a longer revision fails.
        seed: draws principles and seeds sampling, both together with the content.

    Raises:
        ConfigError: the rubric is of another kind.
    """

    def __init__(
        self,
        llm: LLM,
        rubric: Rubric,
        *,
        num_revisions: int = 1,
        temperature: float = 0.0,
        max_critique_tokens: int = 512,
        max_revision_tokens: int = 1024,
        seed: int = 0,
    ) -> None:
        if rubric.kind != "revision":
            raise ConfigError(
                f"--rubric {rubric.name} is a {rubric.kind} rubric; revising needs one of kind revision"
            )
        self.llm = llm
        self.rubric = rubric
        self._num_revisions = num_revisions
        self._temperature = temperature
        self._max_critique_tokens = max_critique_tokens
        self._max_revision_tokens = max_revision_tokens
        self._seed = seed
        self._markers = (*llm.special_tokens, *rubric.markers)

    async def revise(self, prompt: Conversation, response: str) -> list[Round]:
        """All rounds for one response.

        Args:
            prompt: what was asked for; ends with a user turn.
            response: the initial response.

        Raises:
            RequestFailed: a request failed, or a revision is cut short or says nothing.
            ModelError: the model is unknown.
            EndpointError: the endpoint is gone.
        """
        shown = tuple(Message(m.role, neutralise(m.content, self._markers)) for m in prompt)
        rounds: list[Round] = []
        for number in range(self._num_revisions):
            safe = neutralise(response, self._markers)
            question = self.rubric.ask_score(shown, safe, seed=self._seed, draw=number)
            rounds.append(await self._round(question))
            response = rounds[-1].revision
        return rounds

    async def _round(self, question: Question) -> Round:
        messages = user_prompt(question.user)
        continues = (await self.llm.probe()).continues
        seed = int(content_id(self._seed, question.user), 16) % 2**31
        critique, paid = None, []
        prefix = question.ending
        if (cue := question.rationale_cue) is not None:
            written = await self.llm.generate(
                messages,
                cue if continues else "",
                max_tokens=self._max_critique_tokens,
                temperature=self._temperature,
                seed=seed,
                stop=(question.ending,),
            )
            paid.append(written)
            critique = _without_cue(written.text, cue)
            prefix = question.label_prefix(f" {critique}")
            if not continues:
                messages = (*messages, Message("assistant", critique), Message("user", question.ending))
        revised = await self.llm.generate(
            messages,
            prefix if continues else "",
            max_tokens=self._max_revision_tokens,
            temperature=self._temperature,
            seed=seed,
            stop=self.rubric.markers[:1],
        )
        paid.append(revised)
        revision = _without_cue(revised.text, question.ending)
        if revised.finish_reason == "length":
            raise RequestFailed(
                f"the revision was cut after {self._max_revision_tokens} tokens (--max_new_tokens)"
            )
        if is_content_free(revision):
            raise RequestFailed("the revision says nothing")
        return Round(question.principle, critique, revision, tuple(paid))


def run(config: ReviseConfig) -> None:
    """Revise all responses, write the dataset, print the summary.

    Raises:
        ConfigError: the rubric is of another kind.
        DataError: the dataset is missing or has no usable row.
        ModelError: the model cannot be loaded.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many responses could not be revised.
    """
    rubric = load_rubric(config.rubric).with_options(
        cot=config.cot, num_exemplars=config.num_exemplars, preamble=config.preamble
    )
    with open_session(config, "label revise") as session:
        keep_rubric(session.folder, config.rubric, rubric)
        reviser = Reviser(
            session.open_model(config.model_name_or_path),
            rubric,
            num_revisions=config.num_revisions,
            temperature=config.temperature,
            max_critique_tokens=config.max_rationale_tokens,
            max_revision_tokens=config.max_new_tokens,
            seed=config.seed,
        )

        async def look_up(answer: Answer) -> list[Round] | str:
            try:
                return await reviser.revise(answer.prompt, answer.response)
            except RequestFailed as err:
                return str(err)

        def answers(quarantine: Quarantine) -> Iterator[Answer]:
            return islice(read_answers(config.dataset, quarantine), config.limit)

        total = session.ask(
            answers,
            lambda answer: reason_of(reviser.revise(answer.prompt, answer.response)),
            "revising responses",
        )
        count: Counter[str] = Counter()
        unlabelled: Counter[str] = Counter()
        data_file = session.folder / "revisions.parquet"

        def rows() -> Iterator[dict[str, Any]]:
            with write_unlabelled(session.folder) as write_open:
                for answer, rounds in replay(answers(Quarantine(None)), look_up):
                    prompt, response = answer.prompt, answer.response
                    if isinstance(rounds, str):
                        unlabelled[rounds] += 1
                        write_open({"reason": rounds, "prompt": to_dicts(prompt), "response": response})
                        continue
                    _count(count, response, rounds)
                    for last in range(len(rounds) if config.keep == "last" else 1, len(rounds) + 1):
                        row = _row(prompt, response, rounds[:last], reviser)
                        tokens = {name: row[name] for name in _TOKENS}
                        yield row | {"cost_usd": cost_of(tokens, session.price)}

        rows_written = write_parquet(data_file, rows(), SCHEMA)
        revised = count["revised"]
        report: dict[str, Any] = {
            "responses": revised + unlabelled.total(),
            "revised": revised,
            "unlabelled": dict(unlabelled.most_common()),
            "rows_written": rows_written,
            "unchanged": count["unchanged"],
            "initial_chars_mean": count["initial_chars"] / revised if revised else None,
            "revision_chars_mean": count["revision_chars"] / revised if revised else None,
            "critiques_cut": count["critiques_cut"],
            **{name: count[name] for name in _TOKENS},
            **session.costs(),
            "quarantined": dict(session.quarantine.reasons),
            "seconds": session.seconds,
            "rubrics": {rubric.name: rubric.hash},
        }
        write_report(session.folder, report)
        name = reviser.llm.name
        write_card(session.folder)
    print_summary(f"{total} responses revised by {name} -> {data_file}", report)
    refuse_if_too_many_open(
        report["unlabelled"], total, config.max_unlabelled, session.folder, "responses could not be revised"
    )


_TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")


def _row(prompt: Conversation, initial: str, rounds: Sequence[Round], reviser: Reviser) -> dict[str, Any]:
    completion = rounds[-1].revision
    return {
        "id": content_id(prompt, initial, completion),
        "prompt": to_dicts(prompt),
        "completion": to_dicts((Message("assistant", completion),)),
        "initial": initial,
        "rounds": [
            {"principle": r.principle, "critique": r.critique, "revision": r.revision} for r in rounds
        ],
        "model": reviser.llm.name,
        "rubric": reviser.rubric.name,
        "rubric_hash": reviser.rubric.hash,
        **_tokens(rounds),
    }


def _tokens(rounds: Sequence[Round]) -> dict[str, int]:
    return {name: sum(getattr(g, name) for r in rounds for g in r.replies) for name in _TOKENS}


def _count(count: Counter[str], initial: str, rounds: Sequence[Round]) -> None:
    """Add one revised response to the report's figures."""
    final = rounds[-1].revision
    count["revised"] += 1
    count["unchanged"] += final == initial.strip()
    count["initial_chars"] += len(initial)
    count["revision_chars"] += len(final)
    count["critiques_cut"] += sum(
        r.critique is not None and r.replies[0].finish_reason == "length" for r in rounds
    )
    count.update(_tokens(rounds))


def _without_cue(text: str, cue: str) -> str:
    """The text alone, where a model that opens a turn of its own repeats the cue."""
    return text.strip().removeprefix(cue.strip()).strip()
