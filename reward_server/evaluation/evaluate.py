"""`rlaif eval rm`: what a reward model is worth, measured on labelled data by the code that serves it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from reward_server.batcher import Batcher, Priority
from reward_server.config import ServeConfig
from reward_server.evaluation.assess import (
    Answer,
    Findings,
    LabelledAnswer,
    LabelledPair,
    assess_pairs,
    assess_scores,
)
from reward_server.evaluation.config import EvaluateConfig
from reward_server.evaluation.report import render
from reward_server.model import read_card
from reward_server.scorers.base import Outcome, Scored, Scorer, ScoreTask
from reward_server.scorers.composite import SUFFIXES
from reward_server.server import load_scorer
from rlaif.errors import DataError, QualityError
from rlaif.models import ModelRef
from rlaif.published import best_of, subset_of
from rlaif.records import Quarantine, holds_scores, read_preferences, read_scored
from rlaif.runs import Run, progress
from rlaif.storage import write_atomic
from rlaif.types import Conversation, PreferenceRow, ScoredRow, content_id, with_response

Row = PreferenceRow | ScoredRow
_CHUNK = 1024
"""Conversations queued at a time: enough to find neighbours in length and prompts in common."""


def run(config: EvaluateConfig) -> None:
    """Score, measure, write `metrics.json` and `report.md`, and print the latter.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: the model cannot be loaded, or does not give the scores of its golden set.
        QualityError: no row could be scored.
        StorageError: the output cannot be written.
    """
    with Run.open(config.output_dir, config, command="eval rm") as opened, opened.noting_errors():
        rows = _read(config, Quarantine(opened.directory / "quarantine.jsonl"))
        scorer = load_scorer(
            ServeConfig(
                model=config.model, device=config.device, dtype=config.dtype, max_length=config.max_length
            )
        )
        outcomes = score(scorer, conversations(rows), config.max_batch_tokens)
        findings = {
            "model": config.model,
            "version": scorer.version,
            "measured_on": f"{len(rows)} rows of {config.dataset}",
            **measure(
                rows,
                outcomes,
                scale=_score_scale(config.model),
                subset_column=config.subset_column,
                resamples=config.resamples,
            ),
        }
        write_atomic(
            opened.directory / "metrics.json", json.dumps(findings, indent=2, allow_nan=False) + "\n"
        )
        text = render(findings)
        write_atomic(opened.directory / "report.md", text)
        print(f"{text}\n-> {opened.directory / 'report.md'}, {opened.directory / 'metrics.json'}")


def _read(config: EvaluateConfig, quarantine: Quarantine) -> list[Row]:
    read: Callable[..., Iterable[Row]] = read_scored if holds_scores(config.dataset) else read_preferences
    rows = list(islice(read(config.dataset, quarantine), config.limit))
    if quarantine.count:
        print(f"{quarantine.count} rows could not be used: {quarantine.path} says why", flush=True)
    column = config.subset_column
    if column is not None and all(row.extra.get(column) is None for row in rows):
        raise DataError(f"no row of {config.dataset} has the column {column!r} of --subset_column")
    return rows


def _score_scale(model: str) -> tuple[float, float] | None:
    """(mean, standard deviation) of the scores that a model was trained on by regression; None for others."""
    if model.endswith(SUFFIXES):
        return None
    scale = read_card(Path(ModelRef.parse(model).pretrained_path())).get("score_scale")
    return (scale["mean"], scale["std"]) if scale else None


def conversations(rows: Iterable[Row]) -> list[Conversation]:
    """The distinct conversations to score, in order of appearance."""
    found = (
        with_response(row.prompt, response)
        for row in rows
        for response in ((row.response,) if isinstance(row, ScoredRow) else (row.chosen, row.rejected))
    )
    return list(dict.fromkeys(found))


def score(
    scorer: Scorer, wanted: Sequence[Conversation], max_batch_tokens: int
) -> dict[Conversation, Outcome]:
    """The outcome of each conversation, in the batches that a server would make; closes the scorer.

    Too long conversations lose the oldest tokens of their prompt.
    """

    async def all_of_them() -> dict[Conversation, Outcome]:
        unlimited = 1 << 62
        batcher = Batcher(
            scorer,
            max_batch_tokens=max_batch_tokens,
            max_queue_tokens=unlimited,
            max_queue_items=unlimited,
        )
        broken = batcher.start()
        found: dict[Conversation, Outcome] = {}
        try:
            with progress(len(wanted), "scoring responses") as bar:
                for start in range(0, len(wanted), _CHUNK):
                    chunk = wanted[start : start + _CHUNK]
                    tasks = [ScoreTask(conversation, "left") for conversation in chunk]
                    submitted = asyncio.ensure_future(batcher.submit(tasks, priority=Priority.BULK))
                    ends: tuple[asyncio.Future[Any], ...] = (submitted, broken)
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    if not submitted.done():
                        broken.result()  # nobody will answer any more; this raises why
                    found.update(zip(chunk, (await submitted).outcomes, strict=True))
                    bar.advance(len(chunk))
        finally:
            await batcher.stop()
            broken.cancel()
        return found

    return asyncio.run(all_of_them())


def measure(
    rows: Sequence[Row],
    outcomes: Mapping[Conversation, Outcome],
    *,
    scale: tuple[float, float] | None = None,
    subset_column: str | None = None,
    resamples: int = 1000,
) -> Findings:
    """The findings about rows of one kind; a row with a response that has no score is left out and counted.

    Raises:
        QualityError: no row is left.
    """
    missing: Counter[str] = Counter()
    pairs: list[LabelledPair] = []
    answers: list[LabelledAnswer] = []
    for row in rows:
        responses = (row.response,) if isinstance(row, ScoredRow) else (row.chosen, row.rejected)
        found = [outcomes[with_response(row.prompt, response)] for response in responses]
        scored = [outcome for outcome in found if isinstance(outcome, Scored)]
        if len(scored) < len(found):
            missing[next(getattr(o, "message", "no score") for o in found if not isinstance(o, Scored))] += 1
            continue
        prompt = content_id(row.prompt)
        given = [
            Answer(prompt, outcome.raw, len(response.strip()), outcome.tokens)
            for response, outcome in zip(responses, scored, strict=True)
        ]
        subset = subset_of(row.extra) if subset_column is None else subset_of(row.extra, (subset_column,))
        if isinstance(row, ScoredRow):
            answers.append(LabelledAnswer(given[0], row.score, subset))
        else:
            pairs.append(LabelledPair(given[0], given[1], row.chosen_prob, subset, best_of(row.extra)))
    if not pairs and not answers:
        raise QualityError(f"none of {len(rows)} rows could be scored: {missing.most_common(1)[0][0]}")
    findings = (
        assess_scores(answers, scale=scale, resamples=resamples)
        if answers
        else assess_pairs(pairs, resamples=resamples)
    )
    return {"without_score": dict(missing.most_common()), **findings}
