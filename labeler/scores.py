"""`rlaif label scores`: a judge scores responses on the rubric's scale -> a score dataset."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.config import ScoresConfig
from labeler.judge import Judge
from labeler.llm import LLMOptions, RequestFailed, open_llm
from labeler.loop import Outcome, Record, Task, ask_all
from labeler.outputs import (
    MESSAGES,
    by_reason,
    judgment_from_dict,
    judgment_to_dict,
    print_summary,
    refuse_if_too_many_open,
    tokens_of,
    write_card,
    write_report,
    write_unlabelled,
)
from labeler.pairs import holds_candidates
from labeler.rubric import load_rubric
from rlaif.models import ModelRef
from rlaif.records import Journal, Quarantine, read_candidates, read_conversations, write_parquet
from rlaif.runs import Run, progress
from rlaif.types import Conversation, content_id, to_dicts

Answer = tuple[Conversation, str]
"""A prompt and a response to it."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", MESSAGES),
        ("response", pa.string()),
        ("score", pa.float64()),
        ("probs", pa.list_(pa.float64())),
        ("label_mass", pa.float64()),
        ("censored", pa.bool_()),
        ("rationale", pa.string()),
        ("source", pa.string()),
        ("judge", pa.string()),
        ("rubric", pa.string()),
        ("rubric_hash", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ]
)
"""Columns of `scores.parquet`; `probs` are over the rubric's labels in order."""

CARD = """Scores by an AI judge. `score` is the expectation over the rubric's scale under `probs`, the judge's
probabilities of the score tokens (arXiv 2309.00267, section 2.2.2). `source` says `logprobs`, or which guard ruled
without asking."""


def run(config: ScoresConfig) -> None:
    """Score all responses, write the dataset, print the summary.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: the judge cannot be loaded, or splits a label into several tokens.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many responses stayed without a score.
    """
    rubric = load_rubric(config.rubric).with_options(cot=config.cot, num_exemplars=config.num_exemplars)
    started = time.monotonic()
    with Run.open(config.output_dir, config, command="label scores") as opened:
        folder = opened.directory
        quarantine = Quarantine(folder / "quarantine.jsonl")
        answers = list(islice(load_answers(config.dataset, quarantine), config.limit))
        options = LLMOptions(config.max_in_flight, timeout_s=config.timeout_s, max_retries=config.max_retries)
        judge = Judge(
            open_llm(ModelRef.parse(config.judge), options),
            rubric,
            max_rationale_tokens=config.max_rationale_tokens,
            seed=config.seed,
        )
        outcome = asyncio.run(_score(answers, judge, folder, config))
        scored = [(a, outcome.records[k]) for a in answers if (k := _key(a, judge)) in outcome.records]
        unscored = [(a, outcome.failures[k]) for a in answers if (k := _key(a, judge)) in outcome.failures]
        rows = [_row(answer, record, judge) for answer, record in scored]
        report = {
            "responses": len(answers),
            "scored": len(rows),
            "unlabelled": by_reason(reason for _, reason in unscored),
            "guarded": by_reason(r["source"] for r in rows if r["source"] != "logprobs"),
            **_spread([row["score"] for row in rows]),
            **_masses([row["label_mass"] for row in rows if row["label_mass"] is not None]),
            "censored": sum(row["censored"] for row in rows),
            "prompt_tokens": sum(row["prompt_tokens"] for row in rows),
            "completion_tokens": sum(row["completion_tokens"] for row in rows),
            "quarantined": dict(quarantine.reasons),
            "seconds": round(time.monotonic() - started, 1),
        }
        write_parquet(folder / "scores.parquet", rows, SCHEMA)
        write_report(folder, report)
        write_unlabelled(
            folder, [{"reason": why, "prompt": to_dicts(a[0]), "response": a[1]} for a, why in unscored]
        )
        write_card(folder, f"Scores by {judge.name}", "scores.parquet", CARD, report)
    print_summary(f"{len(answers)} responses scored by {judge.name} -> {folder / 'scores.parquet'}", report)
    refuse_if_too_many_open(
        report["unlabelled"], len(answers), config.max_unlabelled, folder, "responses have no score"
    )


def load_answers(path: str, quarantine: Quarantine) -> Iterator[Answer]:
    """(prompt, response) of every row; of every candidate where rows list several.

    Raises:
        DataError: the dataset is missing or has no usable row.
    """
    if holds_candidates(path):
        for candidates in read_candidates(path, quarantine):
            for candidate in candidates.candidates:
                yield candidates.prompt, candidate.response
        return
    for _, conversation in read_conversations(path, quarantine):
        yield conversation[:-1], conversation[-1].content


def _key(answer: Answer, judge: Judge) -> str:
    return content_id("score", *answer, judge.version)


async def _score(answers: Sequence[Answer], judge: Judge, folder: Path, config: ScoresConfig) -> Outcome:
    async def ask(answer: Answer) -> Record:
        score = await judge.judge_score(*answer)
        if score.expected is None:
            raise RequestFailed(score.reason or "no score")
        return {
            "score": score.expected,
            "reason": score.reason,
            "judgment": judgment_to_dict(score.judgment),
            **tokens_of(score.judgment),
        }

    tasks = [Task(_key(answer, judge), answer) for answer in answers]
    try:
        with (
            Journal(folder / "journal.jsonl") as journal,
            progress(len({t.key for t in tasks}), "scoring responses") as bar,
        ):
            return await ask_all(
                tasks,
                ask,
                journal=journal,
                max_in_flight=config.max_in_flight,
                progress=bar,
                give_up=config.max_unlabelled < 1,
            )
    finally:
        await judge.llm.close()


def _row(answer: Answer, record: Record, judge: Judge) -> dict[str, Any]:
    judgment = judgment_from_dict(record["judgment"])
    labels = None if judgment is None else judgment.labels
    return {
        "id": content_id(*answer),
        "prompt": to_dicts(answer[0]),
        "response": answer[1],
        "score": record["score"],
        "probs": None if labels is None else list(labels.probs),
        "label_mass": None if labels is None else labels.mass,
        "censored": labels is not None and labels.censored,
        "rationale": None if judgment is None else judgment.rationale,
        "source": record["reason"] or "logprobs",
        "judge": judge.name,
        "rubric": judge.rubric.name,
        "rubric_hash": judge.rubric.hash,
        **tokens_of(judgment),
    }


def _spread(scores: Sequence[float]) -> dict[str, Any]:
    if not scores:
        return {"score_mean": None, "score_quartiles": None}
    quartiles = np.quantile(scores, [0.25, 0.5, 0.75])
    return {"score_mean": float(np.mean(scores)), "score_quartiles": [float(q) for q in quartiles]}


def _masses(masses: Sequence[float]) -> dict[str, Any]:
    mean = float(np.mean(masses)) if masses else None
    return {"label_mass_mean": mean, "label_mass_min": min(masses, default=None)}
