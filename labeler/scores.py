"""`rlaif label scores`: a judge scores responses on the rubric's scale -> a score dataset."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.budget import Price
from labeler.card import keep_rubric, write_card
from labeler.config import ScoresConfig
from labeler.judge import Judge
from labeler.jury import Jury
from labeler.loop import replay, side_by_side
from labeler.outputs import (
    MESSAGES,
    print_summary,
    refuse_if_too_many_open,
    warn_of_low_mass,
    write_report,
    write_unlabelled,
)
from labeler.pairs import gather_judges
from labeler.preferences import cost_of, tokens_of
from labeler.rubric import Rubric, load_rubric
from labeler.session import open_session
from labeler.tallies import Tallies, render
from rlaif.answers import Answer
from rlaif.errors import ConfigError
from rlaif.records import Quarantine, read_answers, write_parquet
from rlaif.storage import write_atomic
from rlaif.types import Judgment, Score, content_id, to_dicts

ASPECT = pa.struct(
    [
        ("rubric", pa.string()),
        ("score", pa.float64()),
        ("probs", pa.list_(pa.float64())),
        ("label_mass", pa.float64()),
        ("rationale", pa.string()),
    ]
)
VOTE = pa.struct([("judge", pa.string()), ("score", pa.float64())])
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
        ("truncated", pa.bool_()),
        ("aspects", pa.list_(ASPECT)),
        ("votes", pa.list_(VOTE)),
        ("source", pa.string()),
        ("judge", pa.string()),
        ("rubric", pa.string()),
        ("rubric_hash", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
    ]
)
"""Columns of `scores.parquet`; `probs` are over the rubric's labels in order."""


def run(config: ScoresConfig) -> None:
    """Score all responses, write the dataset, print the summary.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: the judge cannot be loaded, or no label can be read with its tokenizer.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many responses stayed without a score.
    """
    rubrics = [_rubric(name, config) for name in config.rubric]
    _check_one_scale(rubrics)
    with open_session(config, "label scores") as session:
        for file, rubric in zip(config.rubric, rubrics, strict=True):
            keep_rubric(session.folder, file, rubric)
        models = [session.open_model(name) for name in config.judge]
        judges = [
            gather_judges([Judge(model, rubric, config.recipe()) for model in models], config)
            for rubric in rubrics
        ]

        async def score(answer: Answer) -> list[Score]:
            asked = (judge.judge_score(answer.prompt, answer.response, answer.reference) for judge in judges)
            return list(await asyncio.gather(*asked))

        async def ask(answer: Answer) -> str | None:
            return _missing(await score(answer))

        async def prepare() -> None:
            for judge in judges:
                await judge.prepare()

        def answers(quarantine: Quarantine) -> Iterator[Answer]:
            read = read_answers(config.dataset, quarantine, config.questions, config.references)
            return islice(read, config.limit)

        def together(quarantine: Quarantine) -> Iterator[Answer]:
            return side_by_side(answers(quarantine), lambda answer: answer.prompt)

        total = session.ask(together, ask, "scoring responses", prepare=prepare)
        report = ScoreReport()
        tallies = Tallies(rubrics[0] if len(rubrics) == 1 else None)
        data_file = session.folder / "scores.parquet"

        def rows() -> Iterator[dict[str, Any]]:
            with write_unlabelled(session.folder) as unlabelled:
                for answer, scores in replay(answers(Quarantine(None)), score):
                    reason = _missing(scores)
                    if reason is not None:
                        report.miss(reason)
                        tallies.add(answer, None)
                        unlabelled(
                            {"reason": reason, "prompt": to_dicts(answer.prompt), "response": answer.response}
                        )
                        continue
                    row = _row(scores, rubrics, judges, session.price)
                    report.add(row)
                    tallies.add(answer, row)
                    yield row

        write_parquet(data_file, rows(), SCHEMA)
        name = judges[0].name
        facts = {
            **report.result(),
            **session.costs(),
            "quarantined": dict(session.quarantine.reasons),
            "seconds": session.seconds,
            "judge": name,
            "rubrics": {rubric.name: rubric.hash for rubric in rubrics},
        }
        tables = tallies.tables()
        write_report(session.folder, {**facts, **({"tables": tables} if tables else {})})
        write_card(session.folder)
        if tables:
            text = render(tables, f"{name}, {' + '.join(rubric.name for rubric in rubrics)}")
            write_atomic(session.folder / "report.md", text)
            print(text)
    print_summary(f"{total} responses scored by {name} -> {data_file}", facts)
    warn_of_low_mass(facts["label_mass_mean"], data_file)
    refuse_if_too_many_open(
        facts["unlabelled"], total, config.max_unlabelled, session.folder, "responses have no score"
    )


def _rubric(name: str, config: ScoresConfig) -> Rubric:
    rubric = load_rubric(name).with_options(
        cot=config.cot, num_exemplars=config.num_exemplars, preamble=config.preamble
    )
    if rubric.kind != "score":
        raise ConfigError(f"--rubric {name} is for pairs; scoring needs a score rubric")
    return rubric


def _check_one_scale(rubrics: Sequence[Rubric]) -> None:
    first = rubrics[0]
    for rubric in rubrics[1:]:
        if rubric.levels != first.levels:
            raise ConfigError(
                f"--rubric {first.name} has a scale from {first.levels[0]:g} to {first.levels[-1]:g}, {rubric.name} "
                f"one from {rubric.levels[0]:g} to {rubric.levels[-1]:g}: a mean needs one scale"
            )


def _missing(scores: Sequence[Score]) -> str | None:
    """Why a response has no score: an aspect that is missing leaves the mean of all without meaning."""
    return next((s.reason or "no score" for s in scores if s.expected is None), None)


def _row(
    scores: Sequence[Score], rubrics: Sequence[Rubric], judges: Sequence[Judge | Jury], price: Price | None
) -> dict[str, Any]:
    first, single = scores[0], len(scores) == 1
    values = [s.expected for s in scores if s.expected is not None]
    said = [j for s in scores for j in _judgments(s)]
    tokens = tokens_of(*said)
    aspects = [_aspect(s, rubric) for s, rubric in zip(scores, rubrics, strict=True)]
    names = judges[0].judges if isinstance(judges[0], Jury) else ()
    return {
        "id": content_id(first.prompt, first.response),
        "prompt": to_dicts(first.prompt),
        "response": first.response,
        "score": math.fsum(values) / len(values),
        "probs": aspects[0]["probs"] if single else None,
        "label_mass": aspects[0]["label_mass"] if single else None,
        "censored": any(j.labels is not None and j.labels.censored for j in said),
        "rationale": aspects[0]["rationale"] if single else None,
        "truncated": any(j.truncated for j in said),
        "aspects": [] if single else aspects,
        "votes": [
            {"judge": judge.name, "score": vote.expected}
            for judge, vote in zip(names, first.votes, strict=True)
        ],
        "source": first.reason or "+".join(sorted({j.source for j in said})),
        "judge": judges[0].name,
        "rubric": "+".join(rubric.name for rubric in rubrics),
        "rubric_hash": "+".join(rubric.hash for rubric in rubrics),
        **tokens,
        "cost_usd": cost_of(tokens, price),
    }


def _judgments(score: Score) -> list[Judgment]:
    """Everything that was said of a response, by one judge or by a jury."""
    return [s.judgment for s in score.votes or (score,) if s.judgment is not None]


def _aspect(score: Score, rubric: Rubric) -> dict[str, Any]:
    """One rubric's score. Only a single judge has one distribution."""
    judgment = None if score.votes else score.judgment
    labels = None if judgment is None else judgment.labels
    return {
        "rubric": rubric.name,
        "score": score.expected,
        "probs": None if labels is None else list(labels.probs),
        "label_mass": None if labels is None else labels.mass,
        "rationale": None if judgment is None else judgment.rationale,
    }


class ScoreReport:
    """What to know before trusting scores: their spread, label mass, gaps."""

    def __init__(self) -> None:
        self._unlabelled: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._scores, self._masses = array("f"), array("f")
        self._aspects: defaultdict[str, array[float]] = defaultdict(lambda: array("f"))
        self._censored = self._truncated = 0

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of `SCHEMA`."""
        self._scores.append(row["score"])
        masses = [said["label_mass"] for said in row["aspects"] or (row,)]
        self._masses.extend(mass for mass in masses if mass is not None)
        for aspect in row["aspects"]:
            self._aspects[aspect["rubric"]].append(aspect["score"])
        self._censored += row["censored"]
        self._truncated += row["truncated"]
        self._sources[row["source"]] += 1
        self._tokens.update(
            {name: row[name] for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}
        )

    def miss(self, reason: str) -> None:
        """Count a response without a score."""
        self._unlabelled[reason] += 1

    def result(self) -> dict[str, Any]:
        """The report; figures over no responses are None."""
        scores, masses = (np.asarray(a, dtype=np.float32) for a in (self._scores, self._masses))
        return {
            "responses": len(scores) + self._unlabelled.total(),
            "scored": len(scores),
            "unlabelled": dict(self._unlabelled.most_common()),
            "sources": dict(self._sources.most_common()),
            "score_mean": float(scores.mean(dtype=np.float64)) if len(scores) else None,
            "score_quartiles": np.quantile(scores, [0.25, 0.5, 0.75]).tolist() if len(scores) else None,
            **(
                {"aspect_means": {name: fmean(given) for name, given in self._aspects.items()}}
                if self._aspects
                else {}
            ),
            "label_mass_mean": float(masses.mean(dtype=np.float64)) if len(masses) else None,
            "label_mass_min": float(masses.min()) if len(masses) else None,
            "censored": self._censored,
            "truncated": self._truncated,
            **self._tokens,
        }
