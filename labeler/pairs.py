"""`rlaif label pairs`: a judge compares responses -> a preference dataset with soft labels."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any, NamedTuple

from labeler.audit.calibration import Calibration
from labeler.audit.lineage import relatives
from labeler.card import keep_rubric, write_card
from labeler.config import JudgeConfig, PairsConfig
from labeler.judge import Judge
from labeler.jury import Jury
from labeler.loop import replay, side_by_side
from labeler.outputs import (
    print_summary,
    refuse_if_too_many_open,
    warn_of_low_mass,
    write_report,
    write_unlabelled,
)
from labeler.preferences import SCHEMA, PreferenceReport, dataset_row, is_tie, open_row
from labeler.row_files import open_rows
from labeler.rubric import Rubric, load_rubric
from labeler.session import Session, open_session
from labeler.validation import Validation, write_validation
from rlaif.errors import ConfigError
from rlaif.records import PREFERENCES_FILE, Quarantine, read_candidates, read_pairs, read_rows, write_parquet
from rlaif.types import CandidateSet, Pair, Preference, content_id

DROPPED_FILE = "dropped.parquet"
"""Pairs that were labelled and left out of the dataset, as `--ties` and `--on_inconsistent` ask; its columns."""

INCONSISTENT = "both orders prefer the same position"
SAME_TEXT = "both responses are the same text"
TIE = "tie"


def run(config: PairsConfig) -> None:
    """Label all pairs, write the dataset, print the summary.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: the judge cannot be loaded or cannot serve as judge.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many pairs stayed unlabelled.
    """
    with open_session(config, "label pairs") as session:
        labels = label(config, session)
    labels.conclude(config)


@dataclass(frozen=True, slots=True)
class Labels:
    """A labelled dataset: who judged, by which rules, and what to know of it."""

    judge: Judge | Jury
    settle: Settlement
    folder: Path
    facts: dict[str, Any]

    def conclude(self, config: PairsConfig) -> None:
        """Print the report.

        Raises:
            QualityError: too many pairs stayed unlabelled.
        """
        total = self.facts["pairs"]
        print_summary(
            f"{total} pairs judged by {self.judge.name} -> {self.folder / PREFERENCES_FILE}", self.facts
        )
        warn_of_low_mass(self.facts["label_mass_mean"], self.folder / "validation.md")
        refuse_if_too_many_open(
            self.facts["unlabelled"], total, config.max_unlabelled, self.folder, "pairs are unlabelled"
        )


def label(config: PairsConfig, session: Session) -> Labels:
    """Ask about all pairs of the dataset and write `preferences.parquet`, report and card."""
    rubric = _rubric(config)
    keep_rubric(session.folder, config.rubric, rubric)
    judge = open_judge(config, session, rubric)
    settle = Settlement(config, judge.name, rubric)

    async def ask(pair: Pair) -> str | None:
        preference = await judge.judge_pair(pair)
        return preference.reason if preference.p_a is None else None

    writers: set[str] = set()

    def pairs(quarantine: Quarantine) -> Iterator[Pair]:
        return islice(load_pairs(config, quarantine, writers), config.limit)

    async def prepare() -> None:
        for warning in relatives(config.judge, writers):
            print(f"warning: {warning}", file=sys.stderr)
        await judge.prepare()

    def together(quarantine: Quarantine) -> Iterator[Pair]:
        return side_by_side(pairs(quarantine), lambda pair: pair.prompt)

    session.ask(together, ask, "labeling pairs", prepare=prepare)
    report = PreferenceReport()

    def rows() -> Iterator[dict[str, Any]]:
        with write_unlabelled(session.folder) as unlabelled, _write_dropped(session.folder) as drop:
            for _, judged in replay(pairs(Quarantine(None)), judge.judge_pair):
                label, dropped = settle(judged)
                report.add(judged, label, dropped)
                if label is None:
                    unlabelled(open_row(judged))
                    continue
                row = dataset_row(judged, label, rubric, session.price)
                if dropped is None:
                    yield row
                elif dropped != SAME_TEXT:
                    drop(row)

    with Validation() as validation:
        written = write_parquet(session.folder / PREFERENCES_FILE, validation.watch(rows()), SCHEMA)
        write_validation(session.folder, validation)
    facts = {
        **report.result(),
        "rows_written": written,
        "suspicious": validation.suspicious,
        "lineage": relatives(config.judge, writers),
        **session.costs(),
        "quarantined": dict(session.quarantine.reasons),
        "seconds": session.seconds,
        "judge": judge.name,
        "rubrics": {rubric.name: rubric.hash},
    }
    write_report(session.folder, facts)
    write_card(session.folder)
    return Labels(judge, settle, session.folder, facts)


@contextmanager
def _write_dropped(folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write `dropped.parquet`, row by row; no file if there is none.

    Yields:
        A function that takes the next row.
    """
    path = folder / DROPPED_FILE
    with open_rows(path, SCHEMA) as file:
        yield file.write
    if file.rows == 0:
        path.unlink()


def _rubric(config: PairsConfig) -> Rubric:
    rubric = load_rubric(config.rubric).with_options(
        cot=config.cot, num_exemplars=config.num_exemplars, preamble=config.preamble
    )
    if rubric.kind != "pair":
        raise ConfigError(f"--rubric {config.rubric} is for scores; comparing pairs needs a pair rubric")
    return rubric


def open_judge(config: PairsConfig, session: Session, rubric: Rubric) -> Judge | Jury:
    """The judge of a run, or the jury where several are named."""
    recipe = config.recipe(combine=config.combine, orders=config.orders)
    return gather_judges([Judge(session.open_model(name), rubric, recipe) for name in config.judge], config)


def gather_judges(judges: Sequence[Judge], config: JudgeConfig) -> Judge | Jury:
    """One judge as it is, several as a jury."""
    return judges[0] if len(judges) == 1 else Jury(judges, config.jury, config.quorum)


class Settled(NamedTuple):
    """What the rules of a run make of a preference.

    Attributes:
        label: P(A preferred); None where there is none.
        dropped: why a labelled pair is left out of the dataset; None where it is not.
    """

    label: float | None
    dropped: str | None


class Settlement:
    """The rules that turn what judges said into a run's label: consistency, then calibration, then the clamp.

    Args:
        config: the run's settings.
        judge: the judge's name.
        rubric: how the judges are asked.

    Raises:
        DataError: the calibration cannot be read.
        ConfigError: the calibration was made for another judge, rubric or way of asking.
    """

    def __init__(self, config: PairsConfig, judge: str, rubric: Rubric) -> None:
        self._on_inconsistent = config.on_inconsistent
        self._ties = config.ties
        self._clamp = config.clamp
        self._calibration = None if config.calibration is None else Calibration.load(config.calibration)
        if self._calibration is not None:
            self._calibration.require(judge=judge, rubric_hash=rubric.hash, version=rubric.version)

    def __call__(self, preference: Preference) -> Settled:
        """The label, and whether a rule of the run leaves the pair out of the dataset."""
        label = self._label(preference)
        return Settled(label, None if label is None else self._reason_to_drop(preference, label))

    def _label(self, preference: Preference) -> float | None:
        p = preference.p_a
        if p is None or preference.reason is not None:  # unlabelled, or a guard ruled
            return p
        if preference.same_position and self._on_inconsistent == "tie":
            return 0.5
        if self._calibration is not None:
            p = self._calibration.apply(p)
        if self._clamp is not None:
            p = min(max(p, self._clamp[0]), self._clamp[1])
        return p

    def _reason_to_drop(self, preference: Preference, label: float) -> str | None:
        if preference.pair.a == preference.pair.b:
            return SAME_TEXT
        if preference.same_position and self._on_inconsistent == "drop":
            return INCONSISTENT
        return TIE if self._ties == "drop" and is_tie(label) else None


def load_pairs(
    config: PairsConfig, quarantine: Quarantine, writers: set[str] | None = None
) -> Iterator[Pair]:
    """Pairs of the dataset in input order; candidates of one prompt are paired with each other.

    Args:
        config: names the dataset, and how many pairs of candidates are drawn.
        quarantine: takes the rows that cannot be read.
        writers: takes the names of the models that wrote the candidates.

    Raises:
        DataError: the dataset is missing or has no usable row.
    """
    if not holds_candidates(config.dataset):
        yield from read_pairs(config.dataset, quarantine)
        return
    for candidates in read_candidates(config.dataset, quarantine):
        if writers is not None:
            writers.update(c.model for c in candidates.candidates if c.model)
        yield from pair_up(candidates, config.pairs_per_prompt, config.seed)


def holds_candidates(path: str) -> bool:
    """Whether the first readable row of a dataset lists several responses to one prompt."""
    for _, row in read_rows(path, Quarantine(None)):
        return row.get("completions") is not None or row.get("responses") is not None
    return False


def pair_up(candidates: CandidateSet, count: int, seed: int) -> list[Pair]:
    """Pairs of different responses to one prompt.

    Args:
        candidates: equal responses count once.
        count: so many pairs, drawn without replacement by a seed made of `seed` and the content; 0 for all.
        seed: the run's seed.
    """
    responses = list(dict.fromkeys(c.response for c in candidates.candidates))
    pairs = [Pair(candidates.prompt, a, b) for a, b in combinations(responses, 2)]
    if not 0 < count < len(pairs):
        return pairs
    chance = random.Random(content_id(seed, candidates.prompt, responses))
    return [pairs[i] for i in sorted(chance.sample(range(len(pairs)), count))]
