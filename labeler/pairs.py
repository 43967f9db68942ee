"""`rlaif label pairs`: a judge compares responses -> a preference dataset with soft labels."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.agreement import agreement, bootstrap_interval, cohen_kappa, same_position
from labeler.config import PairsConfig
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
from labeler.rubric import load_rubric
from rlaif.models import ModelRef
from rlaif.records import Journal, Quarantine, read_candidates, read_pairs, read_rows, write_parquet
from rlaif.runs import Run, progress
from rlaif.types import CandidateSet, LabelDistribution, Message, Pair, Preference, content_id, to_dicts

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_prob", pa.float64()),
        ("margin", pa.float64()),
        ("chosen_is_a", pa.bool_()),
        ("chosen_prob_first", pa.float64()),
        ("chosen_prob_second", pa.float64()),
        ("label_mass_ab", pa.float64()),
        ("label_mass_ba", pa.float64()),
        ("censored", pa.bool_()),
        ("same_position", pa.bool_()),
        ("rationale_ab", pa.string()),
        ("rationale_ba", pa.string()),
        ("source", pa.string()),
        ("human_chosen_prob", pa.float64()),
        ("judge", pa.string()),
        ("rubric", pa.string()),
        ("rubric_hash", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
    ]
)
"""Columns of `preferences.parquet`. `ab` means the order in which the input's first response was shown first."""

CARD = """Preferences of an AI judge, in TRL's conversational preference format.

`chosen_prob` is the soft label, P(chosen preferred), averaged over both orders; `margin` = 2 `chosen_prob` - 1.
`chosen_prob_first` and `chosen_prob_second` are the label with the chosen response shown first and second.
TRL's losses read `margin` (reward) or the hard label (DPO); `rlaif train rm` and `rlaif train dpo` read
`chosen_prob`. `source` says `logprobs`, or which guard ruled without asking."""

TIE = 1e-6


def run(config: PairsConfig) -> None:
    """Label all pairs, write the dataset, print the summary.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ModelError: the judge cannot be loaded or cannot serve as judge.
        EndpointError: the endpoint is gone; the same command goes on from the journal.
        StorageError: the output cannot be written.
        QualityError: too many pairs stayed unlabelled.
    """
    rubric = load_rubric(config.rubric).with_options(cot=config.cot, num_exemplars=config.num_exemplars)
    started = time.monotonic()
    with Run.open(config.output_dir, config, command="label pairs") as opened:
        folder = opened.directory
        quarantine = Quarantine(folder / "quarantine.jsonl")
        pairs = list(islice(load_pairs(config, quarantine), config.limit))
        options = LLMOptions(
            2 * config.max_in_flight, timeout_s=config.timeout_s, max_retries=config.max_retries
        )
        judge = Judge(
            open_llm(ModelRef.parse(config.judge), options),
            rubric,
            max_rationale_tokens=config.max_rationale_tokens,
            combine=config.combine,
        )
        outcome = asyncio.run(_label(pairs, judge, folder, config))
        preferences = [_from_record(pair, judge, outcome) for pair in pairs]
        report = summarise(preferences)
        report["quarantined"] = dict(quarantine.reasons)
        report["seconds"] = round(time.monotonic() - started, 1)
        rows = (_row(p) for p in preferences if _kept(p, config.ties))
        report["rows_written"] = write_parquet(folder / "preferences.parquet", rows, SCHEMA)
        write_report(folder, report)
        write_unlabelled(folder, [_open_row(p) for p in preferences if p.p_a is None])
        write_card(folder, f"Preferences by {judge.name}", "preferences.parquet", CARD, report)
    print_summary(f"{len(pairs)} pairs judged by {judge.name} -> {folder / 'preferences.parquet'}", report)
    refuse_if_too_many_open(
        report["unlabelled"], len(pairs), config.max_unlabelled, folder, "pairs are unlabelled"
    )


def load_pairs(config: PairsConfig, quarantine: Quarantine) -> Iterator[Pair]:
    """Pairs of the dataset in input order; candidates of one prompt are paired with each other.

    Raises:
        DataError: the dataset is missing or has no usable row.
    """
    if not holds_candidates(config.dataset):
        yield from read_pairs(config.dataset, quarantine)
        return
    for candidates in read_candidates(config.dataset, quarantine):
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


async def _label(pairs: Sequence[Pair], judge: Judge, folder: Path, config: PairsConfig) -> Outcome:
    async def ask(pair: Pair) -> Record:
        preference = await judge.judge_pair(pair)
        if preference.p_a is None:
            raise RequestFailed(preference.reason or "no label")
        return {
            "p_a": preference.p_a,
            "reason": preference.reason,
            "ab": judgment_to_dict(preference.ab),
            "ba": judgment_to_dict(preference.ba),
            **tokens_of(preference.ab, preference.ba),
        }

    tasks = [Task(_key(pair, judge), _canonical(pair)) for pair in pairs]
    try:
        with (
            Journal(folder / "journal.jsonl") as journal,
            progress(len({t.key for t in tasks}), "labeling pairs") as bar,
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


def _canonical(pair: Pair) -> Pair:
    return pair if pair.a <= pair.b else pair.swapped()


def _key(pair: Pair, judge: Judge) -> str:
    """Equal for a pair and its swap: they are one question."""
    return content_id("pair", _canonical(pair).id, judge.version)


def _from_record(pair: Pair, judge: Judge, outcome: Outcome) -> Preference:
    key = _key(pair, judge)
    record = outcome.records.get(key)
    about = {"judge": judge.name, "rubric": judge.rubric.name, "rubric_hash": judge.rubric.hash}
    if record is None:
        return Preference(pair, None, outcome.failures[key], None, None, **about)
    canonical = _canonical(pair)
    preference = Preference(
        canonical,
        record["p_a"],
        record["reason"],
        judgment_from_dict(record["ab"]),
        judgment_from_dict(record["ba"]),
        **about,
    )
    return preference if canonical is pair else preference.swapped()


def _is_tie(preference: Preference) -> bool:
    return preference.p_a is not None and abs(preference.p_a - 0.5) <= TIE


def _kept(preference: Preference, ties: str) -> bool:
    if preference.p_a is None or preference.pair.a == preference.pair.b:
        return False
    return ties == "keep" or not _is_tie(preference)


def _row(preference: Preference) -> dict[str, Any]:
    p = preference.p_a
    assert p is not None
    pair = preference.pair
    chosen_is_a = p >= 0.5
    view = preference if chosen_is_a else preference.swapped()
    assert view.p_a is not None
    ab, ba = _labels(preference, "ab"), _labels(preference, "ba")
    first, second = _labels(view, "ab"), _labels(view, "ba")
    return {
        "id": pair.id,
        "prompt": to_dicts(pair.prompt),
        "chosen": to_dicts((Message("assistant", view.pair.a),)),
        "rejected": to_dicts((Message("assistant", view.pair.b),)),
        "chosen_prob": view.p_a,
        "margin": 2.0 * view.p_a - 1.0,
        "chosen_is_a": chosen_is_a,
        "chosen_prob_first": first and first.probs[0],
        "chosen_prob_second": second and second.probs[1],
        "label_mass_ab": ab and ab.mass,
        "label_mass_ba": ba and ba.mass,
        "censored": bool((ab and ab.censored) or (ba and ba.censored)),
        "same_position": preference.same_position,
        "rationale_ab": preference.ab and preference.ab.rationale,
        "rationale_ba": preference.ba and preference.ba.rationale,
        "source": preference.reason or "logprobs",
        "human_chosen_prob": view.pair.human_p_a,
        "judge": preference.judge,
        "rubric": preference.rubric,
        "rubric_hash": preference.rubric_hash,
        **tokens_of(preference.ab, preference.ba),
    }


def _labels(preference: Preference, order: str) -> LabelDistribution | None:
    judgment = preference.ab if order == "ab" else preference.ba
    return None if judgment is None else judgment.labels


def _open_row(preference: Preference) -> dict[str, Any]:
    pair = preference.pair
    return {
        "id": pair.id,
        "reason": preference.reason,
        "prompt": to_dicts(pair.prompt),
        "response_a": pair.a,
        "response_b": pair.b,
    }


def summarise(preferences: Sequence[Preference]) -> dict[str, Any]:
    """What to know before trusting the labels: position bias, label mass, ties, gaps, agreement with people.

    Rates over no pairs are None. `same_position_rate` is the share of asked pairs in which both orders
    preferred one position, `first_share` the share of those that preferred number 1.
    """
    labelled = [p for p in preferences if p.p_a is not None]
    asked = [
        (p.ab.labels, p.ba.labels)
        for p in labelled
        if p.ab is not None and p.ba is not None and p.ab.labels is not None and p.ba.labels is not None
    ]
    first_ab = np.array([ab.probs[0] for ab, _ in asked])
    first_ba = np.array([ba.probs[0] for _, ba in asked])
    locked = same_position(first_ab, first_ba)
    masses = [reading.mass for both in asked for reading in both]
    judgments = [j for p in labelled for j in (p.ab, p.ba)]
    report: dict[str, Any] = {
        "pairs": len(preferences),
        "labelled": len(labelled),
        "ties": sum(map(_is_tie, labelled)),
        "unlabelled": by_reason(p.reason or "no label" for p in preferences if p.p_a is None),
        "guarded": by_reason(p.reason for p in labelled if p.reason),
        "order_agreement": _mean(~locked),
        "same_position_rate": _mean(locked),
        "first_share": _mean(first_ab[locked] > 0.5),
        "label_mass_mean": _mean(masses),
        "label_mass_min": min(masses, default=None),
        "censored": sum(reading.censored for both in asked for reading in both),
        **tokens_of(*judgments),
    }
    # Files of human labels put the preferred response first, and a rater who always says "A" leaves kappa nothing
    # to correct for. So each pair is turned to an order that its texts alone decide.
    turned = [p if p.pair == _canonical(p.pair) else p.swapped() for p in labelled]
    human = [(p.p_a, p.pair.human_p_a) for p in turned if p.pair.human_p_a not in (None, 0.5)]
    if human:
        table = np.array(human, dtype=np.float64)
        report["human_pairs"] = len(table)
        for name, statistic in (("human_agreement", agreement), ("human_kappa", cohen_kappa)):
            low, high = bootstrap_interval(table, lambda t, f=statistic: f(t[:, 0], t[:, 1]))  # type: ignore[misc]
            value = statistic(table[:, 0], table[:, 1])
            report[name] = _finite(value)
            report[f"{name}_95"] = [_finite(low), _finite(high)]
    return report


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
