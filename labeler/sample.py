"""`rlaif sample`: several responses per prompt, from one policy or several -> a candidates file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
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
from rlaif.records import Quarantine, read_prompts, write_parquet
from rlaif.types import Conversation, content_id, to_dicts

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
    """One response to sample: its prompt, the number of its policy, and the seed that is its own."""

    prompt: Conversation
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

        async def sample(draw: Draw) -> Generation:
            return await policies[draw.policy].generate(
                draw.prompt, max_tokens=config.max_new_tokens, temperature=config.temperature, seed=draw.seed
            )

        async def look_up(draws: list[Draw]) -> list[Generation | str]:
            found: list[Generation | str] = []
            for draw in draws:
                try:
                    found.append(await sample(draw))
                except RequestFailed as err:
                    found.append(str(err))
            return found

        def prompts(quarantine: Quarantine) -> Iterator[list[Draw]]:
            read = islice(read_prompts(config.dataset, quarantine), config.limit)
            return plan(read, config.num_return_sequences, config.seed, len(policies))

        def draws(quarantine: Quarantine) -> Iterator[Draw]:
            return (draw for row in prompts(quarantine) for draw in row)

        total = session.ask(draws, lambda draw: reason_of(sample(draw)), "sampling")
        count: Counter[str] = Counter()
        finish: Counter[str] = Counter()
        unlabelled: Counter[str] = Counter()
        data_file = session.folder / "candidates.parquet"

        def rows() -> Iterator[dict[str, Any]]:
            with write_unlabelled(session.folder) as write_open:
                for row, found in replay(prompts(Quarantine(None)), look_up):
                    count["prompts"] += 1
                    completions = []
                    for draw, done in zip(row, found, strict=True):
                        if isinstance(done, str):
                            unlabelled[done] += 1
                            write_open({"reason": done, "prompt": to_dicts(draw.prompt), "seed": draw.seed})
                            continue
                        count["responses"] += 1
                        count["prompt_tokens"] += done.prompt_tokens
                        count["completion_tokens"] += done.completion_tokens
                        finish[done.finish_reason] += 1
                        completions.append(_completion(draw, done, policies[draw.policy].name))
                    if completions:
                        yield {"prompt": to_dicts(row[0].prompt), "completions": completions}

        write_parquet(data_file, rows(), SCHEMA)
        report: dict[str, Any] = {
            "prompts": count["prompts"],
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
        names = ", ".join(policy.name for policy in policies)
        write_card(session.folder)
    print_summary(f"{count['responses']} responses of {names} -> {data_file}", report)
    refuse_if_too_many_open(
        report["unlabelled"], total, config.max_unlabelled, session.folder, "responses could not be sampled"
    )


def plan(prompts: Iterator[Conversation], count: int, seed: int, policies: int = 1) -> Iterator[list[Draw]]:
    """The draws of every prompt. Seeds depend on content, so a prompt gives the same responses in any file.

    A prompt that occurs again gets further responses, not the same ones. Policies take turns.

    Args:
        prompts: in order.
        count: draws per prompt.
        seed: the run's seed.
        policies: how many there are.
    """
    seen: Counter[str] = Counter()
    for prompt in prompts:
        key = content_id(prompt)
        numbers = range(seen[key] * count, (seen[key] + 1) * count)
        yield [Draw(prompt, i % policies, int(content_id(seed, prompt, i), 16) % 2**31) for i in numbers]
        seen[key] += 1


def _completion(draw: Draw, done: Generation, model: str) -> dict[str, Any]:
    return {"response": done.text, "model": model, "finish_reason": done.finish_reason, "seed": draw.seed}
