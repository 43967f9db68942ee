"""`rlaif sample`: several responses per prompt, from one policy or several -> a candidates file.

With `--all_turns`, conversations of several user turns are answered to their end -> an answers file as FastChat has it.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from labeler.card import write_card
from labeler.config import SampleConfig
from labeler.llm import Generation, RequestFailed
from labeler.loop import reason_of, replay
from labeler.outputs import (
    MESSAGES,
    print_summary,
    refuse_if_too_many_open,
    write_report,
    write_unlabelled,
)
from labeler.session import open_session
from rlaif.answers import Question, answers_row
from rlaif.records import ANSWERS_FILE, Quarantine, read_prompts, read_questions, write_parquet
from rlaif.storage import replacing, storing
from rlaif.types import content_id, to_dicts, user_prompt, with_response

COMPLETION = pa.struct(
    [
        ("response", pa.string()),
        ("model", pa.string()),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
    ]
)
SCHEMA = pa.schema([("prompt", MESSAGES), ("completions", pa.list_(COMPLETION))])
"""Columns of `candidates.parquet`."""


class Draw(NamedTuple):
    """One response to sample: its question, the number of its policy, and the seed that is its own."""

    question: Question
    policy: int
    seed: int


def run(config: SampleConfig) -> None:
    """Sample all responses, write the candidates file, print the summary.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: a policy cannot be loaded.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many responses could not be had.
    """
    with open_session(config, "sample") as session:
        policies = [session.open_model(name) for name in config.model_name_or_path]

        async def sample(draw: Draw) -> list[Generation]:
            """The replies to all turns; a later one is asked with those before it."""
            prompt, seed = draw.question.prompt, draw.seed
            said: list[Generation] = []
            for turn in (None, *draw.question.later_turns):
                if turn is not None:
                    prompt = with_response(prompt, said[-1].text) + user_prompt(turn)
                    seed = int(content_id(draw.seed, prompt), 16) % 2**31
                said.append(
                    await policies[draw.policy].generate(
                        prompt, max_tokens=config.max_new_tokens, temperature=config.temperature, seed=seed
                    )
                )
            return said

        async def look_up(draws: list[Draw]) -> list[list[Generation] | str]:
            found: list[list[Generation] | str] = []
            for draw in draws:
                try:
                    found.append(await sample(draw))
                except RequestFailed as err:
                    found.append(str(err))
            return found

        def prompts(quarantine: Quarantine) -> Iterator[list[Draw]]:
            read = (
                read_questions(config.dataset, quarantine)
                if config.all_turns
                else (Question("", prompt) for prompt in read_prompts(config.dataset, quarantine))
            )
            return plan(islice(read, config.limit), config.num_return_sequences, config.seed, len(policies))

        def draws(quarantine: Quarantine) -> Iterator[Draw]:
            return (draw for row in prompts(quarantine) for draw in row)

        total = session.ask(draws, lambda draw: reason_of(sample(draw)), "sampling")
        count: Counter[str] = Counter()
        finish: Counter[str] = Counter()
        unlabelled: Counter[str] = Counter()
        data_file = session.folder / (ANSWERS_FILE if config.all_turns else "candidates.parquet")

        def answered() -> Iterator[list[tuple[Draw, list[Generation]]]]:
            """The draws of each prompt that have their replies; the others are counted and listed."""
            with write_unlabelled(session.folder) as write_open:
                for row, found in replay(prompts(Quarantine(None)), look_up):
                    whole = []
                    for draw, done in zip(row, found, strict=True):
                        if isinstance(done, str):
                            unlabelled[done] += 1
                            write_open(
                                {"reason": done, "prompt": to_dicts(draw.question.prompt), "seed": draw.seed}
                            )
                            continue
                        count["responses"] += 1
                        for reply in done:
                            count["prompt_tokens"] += reply.prompt_tokens
                            count["completion_tokens"] += reply.completion_tokens
                            finish[reply.finish_reason] += 1
                        whole.append((draw, done))
                    count["prompts" if whole else "unanswered"] += 1
                    if whole:
                        yield whole

        names = [policy.name for policy in policies]
        if config.all_turns:
            write_answers(data_file, answered(), names)
        else:
            write_parquet(data_file, (_candidates(row, names) for row in answered()), SCHEMA)
        report: dict[str, Any] = {
            "prompts": count["prompts"],
            **({"prompts_unanswered": count["unanswered"]} if count["unanswered"] else {}),
            "responses": count["responses"],
            "unlabelled": dict(unlabelled.most_common()),
            "finish_reason": dict(finish.most_common()),
            "prompt_tokens": count["prompt_tokens"],
            "completion_tokens": count["completion_tokens"],
            **session.costs(),
            "quarantined": dict(session.quarantine.reasons),
            "seconds": session.seconds,
        }
        write_report(session.folder, report)
        if not config.all_turns:  # which another tool's shape is no dataset of ours for
            write_card(session.folder)
    print_summary(f"{count['responses']} responses of {', '.join(names)} -> {data_file}", report)
    refuse_if_too_many_open(
        report["unlabelled"], total, config.max_unlabelled, session.folder, "responses could not be sampled"
    )


def plan(questions: Iterable[Question], count: int, seed: int, policies: int = 1) -> Iterator[list[Draw]]:
    """The draws of every prompt. Seeds depend on content, so a prompt gives the same responses in any file.

    A prompt that occurs again gets further responses, not the same ones. Policies take turns.

    Args:
        questions: in order.
        count: draws per prompt.
        seed: the run's seed.
        policies: how many there are.
    """
    seen: Counter[str] = Counter()
    for question in questions:
        prompt = question.prompt
        key = content_id(prompt)
        numbers = range(seen[key] * count, (seen[key] + 1) * count)
        yield [Draw(question, i % policies, int(content_id(seed, prompt, i), 16) % 2**31) for i in numbers]
        seen[key] += 1


def _candidates(row: list[tuple[Draw, list[Generation]]], names: list[str]) -> dict[str, Any]:
    """A row of `SCHEMA`."""
    completions = [
        {
            "response": said[0].text,
            "model": names[draw.policy],
            "finish_reason": said[0].finish_reason,
            "seed": draw.seed,
        }
        for draw, said in row
    ]
    return {"prompt": to_dicts(row[0][0].question.prompt), "completions": completions}


def write_answers(
    path: Path, answered: Iterable[list[tuple[Draw, list[Generation]]]], names: list[str]
) -> None:
    """Write the replies as FastChat's `model_answer` files hold them: a line for each question and policy.

    Args:
        path: appears, whole, when everything is written.
        answered: the draws of each question in order, with the replies to all its turns.
        names: of the policies.

    Raises:
        StorageError: the file cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for number, row in enumerate(answered, 1):
            choices: dict[int, list[list[str]]] = defaultdict(list)
            for draw, said in row:
                choices[draw.policy].append([reply.text for reply in said])
            for policy, turns in choices.items():
                name, question = names[policy], row[0][0].question
                line = answers_row(question, number, name, turns, content_id(question.prompt, name, turns))
                with storing(path):
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
