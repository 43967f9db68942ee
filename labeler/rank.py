"""`rlaif label rank`: several responses per prompt -> rankings, a preference dataset, a leaderboard of models."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import combinations, product
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.card import write_card
from labeler.config import RankConfig
from labeler.loop import replay
from labeler.outputs import MESSAGES, write_report
from labeler.pairs import INCONSISTENT, Labels, holds_candidates, label, pair_up
from labeler.ranking import bradley_terry, leaderboard
from labeler.session import open_session
from rlaif.errors import DataError
from rlaif.records import Quarantine, read_candidates, write_parquet
from rlaif.types import CandidateSet, Preference, content_id, to_dicts

RANKINGS_FILE = "rankings.parquet"
RANKED = pa.struct(
    [
        ("response", pa.string()),
        ("model", pa.string()),
        ("rank", pa.int64()),
        ("strength", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [("id", pa.string()), ("prompt", MESSAGES), ("ranking", pa.list_(RANKED)), ("comparisons", pa.int64())]
)
"""Columns of `rankings.parquet`: responses from best to worst, with Bradley-Terry strengths in log-odds."""


def run(config: RankConfig) -> None:
    """Compare the responses of every prompt in pairs, rank them, and rank the models that wrote them.

    Raises:
        DataError: the dataset is missing or does not hold candidates.
        ModelError: the judge cannot be loaded or cannot serve as judge.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many pairs stayed unlabelled.
    """
    if not holds_candidates(config.dataset):
        raise DataError(f"{config.dataset} has no candidates: a row needs `completions` or `responses`")
    with open_session(config, "label rank") as session:
        labels = label(config, session)
        models = _Models()
        written = write_parquet(session.folder / RANKINGS_FILE, _rankings(config, labels, models), SCHEMA)
        labels.facts["rankings_written"] = written
        standings = models.standings(config.resamples, config.seed)
        write_report(session.folder, {**labels.facts, "leaderboard": standings})
        write_card(session.folder)
    labels.conclude(config)
    for place, standing in enumerate(standings, 1):
        low, high = standing["elo_95"]
        print(
            f"  {place:>2}. {standing['name']}  Elo {standing['elo']:.0f} [{low:.0f}, {high:.0f}]"
            f"  wins {100 * standing['win_rate']:.1f} % of {standing['comparisons']}"
        )


def _rankings(config: RankConfig, labels: Labels, models: _Models) -> Iterator[dict[str, Any]]:
    async def judge_all(candidates: CandidateSet) -> list[Preference]:
        pairs = pair_up(candidates, config.pairs_per_prompt, config.seed)
        return [await labels.judge.judge_pair(pair) for pair in pairs]

    left = config.limit
    for candidates, preferences in replay(read_candidates(config.dataset, Quarantine(None)), judge_all):
        if left == 0:
            return
        preferences = preferences[:left]  # `limit` counts pairs
        left = None if left is None else left - len(preferences)
        settled = [(p, *labels.settle(p)) for p in preferences]
        labelled = [
            (p, label_of) for p, label_of, why in settled if label_of is not None and why != INCONSISTENT
        ]
        writers = _writers(candidates)
        models.add(
            [(writers[p.pair.a], writers[p.pair.b], label_of) for p, label_of in labelled], writers.values()
        )
        if not labelled:
            continue
        responses = list(writers)
        place = {response: i for i, response in enumerate(responses)}
        games = [(place[p.pair.a], place[p.pair.b], label_of) for p, label_of in labelled]
        strengths = bradley_terry(len(responses), games)
        order = sorted(range(len(responses)), key=lambda i: (np.isnan(strengths[i]), -strengths[i], i))
        yield {
            "id": content_id(candidates.prompt, sorted(responses)),
            "prompt": to_dicts(candidates.prompt),
            "ranking": [
                {
                    "response": responses[i],
                    "model": " + ".join(writers[responses[i]]),
                    "rank": rank,
                    "strength": None if np.isnan(strengths[i]) else float(strengths[i]),
                }
                for rank, i in enumerate(order, 1)
            ],
            "comparisons": len(games),
        }


def _writers(candidates: CandidateSet) -> dict[str, list[str]]:
    """The known models that wrote each different response."""
    writers: dict[str, list[str]] = {}
    for candidate in candidates.candidates:
        wrote = writers.setdefault(candidate.response, [])
        if candidate.model and candidate.model not in wrote:
            wrote.append(candidate.model)
    return writers


class _Models:
    """Who beat whom, over all prompts: a few numbers per comparison."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._left, self._right, self._prompts, self._labels = array("i"), array("i"), array("i"), array("f")
        self._prompt = 0

    def add(self, games: Iterable[tuple[list[str], list[str], float]], writers: Iterable[list[str]]) -> None:
        """Count the comparisons of one prompt between different models. Those that wrote the same text tie.

        Args:
            games: the models that wrote A, those that wrote B, and P(A preferred).
            writers: the models that wrote each of the responses.
        """
        self._prompt += 1
        met = [(a, b, p) for of_a, of_b, p in games for a, b in product(of_a, of_b) if a != b]
        met += [(a, b, 0.5) for wrote in writers for a, b in combinations(wrote, 2)]
        for a, b, p in met:
            for numbers, name in ((self._left, a), (self._right, b)):
                numbers.append(self._numbers.setdefault(name, len(self._numbers)))
            self._labels.append(p)
            self._prompts.append(self._prompt)

    def standings(self, resamples: int, seed: int) -> list[dict[str, Any]]:
        """The leaderboard; prompts are resampled, since comparisons of one prompt are not independent."""
        if not self._labels:
            return []
        games = np.column_stack([self._left, self._right, self._labels])
        board = leaderboard(list(self._numbers), games, groups=self._prompts, resamples=resamples, seed=seed)
        return [asdict(standing) for standing in board]
