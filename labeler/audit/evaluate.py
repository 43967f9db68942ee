"""`rlaif eval judge`: what the labels of a judge are worth, measured on pairs with human labels."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from labeler.audit.assess import assess, difference
from labeler.audit.baselines import BaselineJudge
from labeler.audit.calibration import Method, fit
from labeler.audit.canaries import Attack, attacks
from labeler.audit.config import EvaluateConfig
from labeler.audit.lineage import relatives
from labeler.audit.observations import Observation, observe, pair_key, read_observation, writers
from labeler.audit.report import render
from labeler.audit.resistance import attacked, resistance, weak_against_good
from labeler.audit.variants import Variant, parse_variants
from labeler.judge import Judge, PairJudge
from labeler.jury import Jury
from labeler.loop import replay, side_by_side
from labeler.outputs import refuse_if_too_many_open, write_report, write_unlabelled
from labeler.pairs import DROPPED_FILE, gather_judges
from labeler.preferences import open_row
from labeler.recorded import Recorded
from labeler.rubric import Rubric, load_rubric
from labeler.session import Session, open_session
from rlaif.errors import ConfigError, DataError
from rlaif.records import PREFERENCES_FILE, Quarantine, read_pairs, read_preferences
from rlaif.runs import Run
from rlaif.storage import write_atomic
from rlaif.types import Pair, Preference, PreferenceRow

CALIBRATION_FILE = "calibration.json"
Report = dict[str, Any]


def run(config: EvaluateConfig) -> None:
    """Ask the judge, or read its labels; write `report.json` and `report.md`, and print the latter.

    Raises:
        ConfigError: a rubric, variant or combination of flags that cannot work.
        DataError: the dataset is missing, or holds no human label.
        ModelError: the judge cannot be loaded or cannot serve as judge.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many pairs stayed unlabelled, or there is nothing to calibrate.
    """
    if config.labels:
        with Run.open(config.output_dir, config, command="eval judge") as opened:
            folder, report = opened.directory, _read(config, opened.directory)
    else:
        with open_session(config, "eval judge") as session:
            folder, report = session.folder, _ask(config, session)
    found: list[Report] = report["variants"] if config.variants else [report]
    reasons = sum((Counter(f["unlabelled"]) for f in found), Counter[str]())
    total = sum(f["pairs"] for f in found)
    refuse_if_too_many_open(reasons, total, config.max_unlabelled, folder, "pairs are unlabelled")


def _conclude(
    config: EvaluateConfig, folder: Path, report: Report, seen: Sequence[Observation], version: str
) -> Report:
    """Calibrate where wanted, and write and print the report, whether that succeeds or not."""
    try:
        if config.calibrate is not None:
            report["calibrated"] = _calibrated(config.calibrate, folder, report, seen, version)
    finally:
        for warning in report["lineage"]:
            print(f"warning: {warning}", file=sys.stderr)
        write_report(folder, report)
        text = render(report)
        write_atomic(folder / "report.md", text)
        print(f"{text}\n-> {folder / 'report.md'}, {folder / 'report.json'}")
    return report


def _calibrated(
    method: Method, folder: Path, report: Report, seen: Sequence[Observation], version: str
) -> Report:
    """Fit the map on what was asked: a guard's ruling needs none, and is given none by `label pairs`."""
    usable = [o for o in seen if o.raw is not None and o.human is not None and o.reason is None]
    calibration = fit(
        method,
        [o.raw for o in usable],  # type: ignore[arg-type]
        [o.human for o in usable],  # type: ignore[arg-type]
        judge=report["judge"],
        rubric_hash=report["rubric_hash"],
        version=version,
        groups=[o.prompt for o in usable],
    )
    calibration.save(folder / CALIBRATION_FILE)
    return calibration.model_dump(mode="json")


# ---- asking ----


@dataclass(frozen=True, slots=True)
class _Entry:
    """One way of judging all pairs."""

    name: str
    judge: Judge | Jury | BaselineJudge


def _ask(config: EvaluateConfig, session: Session) -> Report:
    rubric = _rubric(config)
    _check_human(config)
    entries = _entries(config, session, rubric)
    judge = entries[0].judge
    tried = attacks(rubric, _special_tokens(judge)) if config.canaries else []
    policies = {*config.policy}

    def questions(quarantine: Quarantine) -> Iterator[tuple[PairJudge, Pair]]:
        for number, entry in enumerate(entries):
            pairs = _pairs(config, Quarantine(None) if number else quarantine)
            for pair in side_by_side(pairs, lambda pair: pair.prompt):
                policies.update(writers(pair.extra))
                yield entry.judge, pair
        for pair in _targets(config):
            for attack in tried:
                yield judge, attacked(pair, attack)

    async def ask(question: tuple[PairJudge, Pair]) -> str | None:
        preference = await question[0].judge_pair(question[1])
        return preference.reason if preference.p_a is None else None

    async def prepare() -> None:
        await asyncio.gather(*(e.judge.prepare() for e in entries if not isinstance(e.judge, BaselineJudge)))

    session.ask(questions, ask, "asking the judge", prepare=prepare)
    report: Report = {
        "judge": judge.name,
        "rubric": None if config.baseline else rubric.name,
        "rubric_hash": None if config.baseline else rubric.hash,
        "dataset": config.dataset,
        "lineage": relatives(config.judge, policies),
        "quarantined": dict(session.quarantine.reasons),
    }
    seen: list[list[Observation]] = []
    with write_unlabelled(session.folder) as unlabelled:
        for entry in entries:
            observations = []
            for _, preference in replay(_pairs(config), entry.judge.judge_pair):
                observations.append(observe(preference))
                if preference.p_a is None:
                    unlabelled({**open_row(preference), **({"variant": entry.name} if entry.name else {})})
            seen.append(observations)
    if config.variants:
        report["variants"] = _compared(entries, seen, config.resamples)
    else:
        report |= assess(seen[0], resamples=config.resamples)
    if tried:
        report["canaries"] = _resisted(config, judge, tried)
    report |= {**session.costs(), "seconds": session.seconds}
    return _conclude(config, session.folder, report, seen[0], rubric.version)


def _rubric(config: EvaluateConfig) -> Rubric:
    rubric = load_rubric(config.rubric).with_options(
        cot=config.cot, num_exemplars=config.num_exemplars, preamble=config.preamble
    )
    if rubric.kind != "pair":
        raise ConfigError(f"--rubric {config.rubric} is for scores; people's labels compare pairs")
    return rubric


def _entries(config: EvaluateConfig, session: Session, rubric: Rubric) -> list[_Entry]:
    if config.baseline:
        baseline = BaselineJudge(config.baseline)
        return [_Entry(baseline.name, baseline)]
    variants = parse_variants(config.variants)
    rubrics = [_varied(rubric, variant) for variant in variants]
    models = [session.open_model(name) for name in config.judge]
    return [
        _Entry(variant.name, _judge(config, models, varied, variant))
        for variant, varied in zip(variants, rubrics, strict=True)
    ]


def _varied(rubric: Rubric, variant: Variant) -> Rubric:
    return rubric.with_options(
        cot=rubric.cot if variant.cot is None else variant.cot,
        num_exemplars=rubric.num_exemplars if variant.exemplars is None else variant.exemplars,
        preamble=variant.preamble,
    )


def _judge(
    config: EvaluateConfig, models: Sequence[Recorded], rubric: Rubric, variant: Variant
) -> Judge | Jury:
    recipe = config.recipe(orders=variant.orders or config.orders, combine=variant.combine or config.combine)
    if variant.rationales is not None:
        # One rationale is the paper's greedy one; several are sampled at the temperature given.
        greedy = variant.rationales == 1
        recipe = replace(
            recipe,
            num_rationales=variant.rationales,
            rationale_temperature=0.0 if greedy else recipe.rationale_temperature,
        )
    return gather_judges([Judge(model, rubric, recipe) for model in models], config)


def _compared(
    entries: Sequence[_Entry], seen: Sequence[Sequence[Observation]], resamples: int
) -> list[Report]:
    return [
        {
            "name": entry.name,
            **assess(observations, resamples=resamples),
            "difference": None if k == 0 else difference(observations, seen[0], resamples),
        }
        for k, (entry, observations) in enumerate(zip(entries, seen, strict=True))
    ]


def _special_tokens(judge: Judge | Jury | BaselineJudge) -> tuple[str, ...]:
    judges = judge.judges if isinstance(judge, Jury) else (judge,)
    return tuple(token for j in judges if isinstance(j, Judge) for token in j.llm.special_tokens)


def _resisted(config: EvaluateConfig, judge: PairJudge, tried: Sequence[Attack]) -> Report:
    def judged(pairs: Iterable[Pair]) -> list[Preference]:
        return [preference for _, preference in replay(pairs, judge.judge_pair)]

    after = {attack.name: judged(attacked(pair, attack) for pair in _targets(config)) for attack in tried}
    return resistance(judged(_targets(config)), after, tried, resamples=config.resamples)


# ---- reading ----


def _pairs(config: EvaluateConfig, quarantine: Quarantine | None = None) -> Iterator[Pair]:
    pairs = read_pairs(config.dataset, quarantine or Quarantine(None), whole_exchanges=True)
    return islice(pairs, config.limit)


def _targets(config: EvaluateConfig) -> Iterator[Pair]:
    """The pairs that canaries attack, the rejected response as A."""
    return islice(weak_against_good(_pairs(config)), config.canaries)


def _check_human(config: EvaluateConfig) -> None:
    """Refuse a dataset without human labels, before anything is paid for.

    Raises:
        DataError: there is none, or the labels are a judge's.
    """
    for pair in _pairs(config):
        if "rubric_hash" in pair.extra and "judge" in pair.extra:
            raise DataError(f"{config.dataset} holds labels of a judge, not of people; give it as --labels")
        if pair.human_p_a is not None:
            return
    raise DataError(
        f"{config.dataset} has no human labels: rows need chosen and rejected, or a label or winner of 1, 2 or tie"
    )


def _read(config: EvaluateConfig, folder: Path) -> Report:
    """The findings about labels that exist already."""
    assert config.labels is not None
    quarantine = Quarantine(folder / "quarantine.jsonl")
    gold: dict[str, list[Pair]] | None = None
    if config.dataset:
        gold = defaultdict(list)
        for pair in _pairs(config):
            gold[pair_key(pair)].append(pair)
    # A limit is one on the dataset, where there is one: its pairs may be anywhere among the labels.
    limit = config.limit if gold is None else None
    rows = list(islice(_labelled(Path(config.labels), quarantine), limit))
    seen = [o for row in rows for o in _matched(row, gold)]
    if gold is not None and not seen:
        raise DataError(
            f"none of the {len(gold)} pairs of {config.dataset} is among the labels of {config.labels}"
        )
    if not any(o.human is not None for o in seen):
        raise DataError(
            f"{config.labels} has no human labels (human_chosen_prob): give the file that has them as --dataset"
        )
    judge, rubric, rubric_hash = (_only(rows, name) for name in ("judge", "rubric", "rubric_hash"))
    policies = {*config.policy, *(name for row in rows for name in writers(row.extra))}
    report: Report = {
        "judge": judge or config.labels,
        "rubric": rubric,
        "rubric_hash": rubric_hash,
        "dataset": config.dataset or None,
        "labels": config.labels,
        "lineage": relatives(judge.split(" + "), policies) if judge else [],
        "quarantined": dict(quarantine.reasons),
        "without_label": 0 if gold is None else len(gold.keys() - {o.pair for o in seen}),
        **assess(seen, resamples=config.resamples),
    }
    if config.calibrate and not (judge and rubric_hash):
        raise DataError(
            f"{config.labels} does not name one judge and one rubric, which a calibration belongs to"
        )
    return _conclude(config, folder, report, seen, "")


def _labelled(path: Path, quarantine: Quarantine) -> Iterator[PreferenceRow]:
    """All pairs that a run labelled, those that it left out of its dataset too; or the rows of a file."""
    dropped = path / DROPPED_FILE
    if not (dropped.is_file() and pq.read_metadata(path / PREFERENCES_FILE).num_rows == 0):
        yield from read_preferences(path, quarantine)
    if dropped.is_file():
        yield from read_preferences(dropped, quarantine)


def _matched(row: PreferenceRow, gold: dict[str, list[Pair]] | None) -> list[Observation]:
    """The row with its human label; where several people have a row each in `gold`, with all of theirs, once."""
    if gold is None:
        return [read_observation(row)]
    key = pair_key(Pair(row.prompt, row.chosen, row.rejected))
    known = gold.get(key, [])
    if any(pair.human_votes for pair in known):
        gold[key] = []
    else:
        known = known[-1:]
    return [read_observation(row, pair) for pair in known]


def _only(rows: Sequence[PreferenceRow], column: str) -> str:
    """The one value of a column; empty where rows differ or do not have it."""
    values = {str(row.extra.get(column) or "") for row in rows}
    return values.pop() if len(values) == 1 else ""
