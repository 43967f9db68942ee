"""`rlaif sample`: several responses per prompt from a policy -> a candidates file."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from labeler.config import SampleConfig
from labeler.llm import LLM, LLMOptions, open_llm
from labeler.loop import Outcome, Record, Task, ask_all
from labeler.outputs import (
    MESSAGES,
    by_reason,
    print_summary,
    refuse_if_too_many_open,
    write_card,
    write_report,
    write_unlabelled,
)
from rlaif.models import ModelRef
from rlaif.records import Journal, Quarantine, read_prompts, write_parquet
from rlaif.runs import Run, progress
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

CARD = "Responses sampled from a policy, several per prompt; each is a function of its recorded seed."


class Draw(NamedTuple):
    """One response to sample: its prompt, and the seed that is its own."""

    prompt: Conversation
    seed: int


def run(config: SampleConfig) -> None:
    """Sample all responses, write the candidates file, print the summary.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: the policy cannot be loaded.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many responses could not be had.
    """
    started = time.monotonic()
    with Run.open(config.output_dir, config, command="sample") as opened:
        folder = opened.directory
        quarantine = Quarantine(folder / "quarantine.jsonl")
        prompts = list(islice(read_prompts(config.dataset, quarantine), config.limit))
        options = LLMOptions(config.max_in_flight, timeout_s=config.timeout_s, max_retries=config.max_retries)
        llm = open_llm(ModelRef.parse(config.model_name_or_path), options)
        draws = plan(prompts, config.num_return_sequences, config.seed)
        outcome = asyncio.run(_sample([d for row in draws for d in row], llm, folder, config))
        records = [[outcome.records.get(_key(d, llm, config)) for d in row] for row in draws]
        rows = [
            {"prompt": to_dicts(prompt), "completions": [_completion(r, llm) for r in row if r is not None]}
            for prompt, row in zip(prompts, records, strict=True)
            if any(r is not None for r in row)
        ]
        kept = [r for row in records for r in row if r is not None]
        report: dict[str, Any] = {
            "prompts": len(prompts),
            "responses": len(kept),
            "unlabelled": by_reason(outcome.failures.values()),
            "finish_reason": by_reason(r["finish_reason"] for r in kept),
            "prompt_tokens": sum(r["prompt_tokens"] for r in kept),
            "completion_tokens": sum(r["completion_tokens"] for r in kept),
            "quarantined": dict(quarantine.reasons),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_parquet(folder / "candidates.parquet", rows, SCHEMA)
        write_report(folder, report)
        failed = [
            (d, why) for row in draws for d in row if (why := outcome.failures.get(_key(d, llm, config)))
        ]
        write_unlabelled(
            folder, [{"reason": why, "prompt": to_dicts(d.prompt), "seed": d.seed} for d, why in failed]
        )
        write_card(folder, f"Responses of {llm.name}", "candidates.parquet", CARD, report)
    print_summary(f"{len(kept)} responses of {llm.name} -> {folder / 'candidates.parquet'}", report)
    refuse_if_too_many_open(
        report["unlabelled"],
        len(prompts) * config.num_return_sequences,
        config.max_unlabelled,
        folder,
        "responses could not be sampled",
    )


def plan(prompts: Sequence[Conversation], count: int, seed: int) -> list[list[Draw]]:
    """The draws of every prompt. Seeds depend on content, so a prompt gives the same responses in any file.

    A prompt that occurs again gets further responses, not the same ones.
    """
    seen: Counter[Conversation] = Counter()
    draws = []
    for prompt in prompts:
        numbers = range(seen[prompt] * count, (seen[prompt] + 1) * count)
        draws.append([Draw(prompt, int(content_id(seed, prompt, i), 16) % 2**31) for i in numbers])
        seen[prompt] += 1
    return draws


def _key(draw: Draw, llm: LLM, config: SampleConfig) -> str:
    return content_id("sample", *draw, llm.version, config.temperature, config.max_new_tokens)


async def _sample(draws: Sequence[Draw], llm: LLM, folder: Path, config: SampleConfig) -> Outcome:
    async def ask(draw: Draw) -> Record:
        done = await llm.generate(
            draw.prompt, max_tokens=config.max_new_tokens, temperature=config.temperature, seed=draw.seed
        )
        return {
            "response": done.text,
            "finish_reason": done.finish_reason,
            "seed": draw.seed,
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
        }

    tasks = [Task(_key(draw, llm, config), draw) for draw in draws]
    try:
        with Journal(folder / "journal.jsonl") as journal, progress(len(tasks), "sampling") as bar:
            return await ask_all(
                tasks,
                ask,
                journal=journal,
                max_in_flight=config.max_in_flight,
                progress=bar,
                give_up=config.max_unlabelled < 1,
            )
    finally:
        await llm.close()


def _completion(record: Record, llm: LLM) -> dict[str, Any]:
    return {
        "response": record["response"],
        "model": llm.name,
        "finish_reason": record["finish_reason"],
        "seed": record["seed"],
    }
