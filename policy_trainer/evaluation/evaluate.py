"""`rlaif eval policy`: policies beside a baseline, by a judge, a reward server or a function, and reward against KL.

Responses and judgments are kept in the output folder, so that the same command again samples nothing and asks
nothing, and another policy or another judge costs what it adds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from policy_trainer.evaluation.assess import Findings, assess_wins
from policy_trainer.evaluation.config import EvaluatePolicyConfig
from policy_trainer.evaluation.raters import Rater, Rating, load_function, rate_all
from policy_trainer.evaluation.report import FRONTIER, draw_frontier, render
from policy_trainer.evaluation.responses import Response, answer
from policy_trainer.evaluation.sides import Side, check_found, find_sides
from rlaif.agreement import estimate_mean, finite, mean, same_position
from rlaif.errors import QualityError
from rlaif.published import SUBSET_COLUMNS
from rlaif.records import Quarantine, read_prompts, read_questions
from rlaif.runs import Run
from rlaif.storage import write_atomic
from rlaif.types import Conversation

Responses = Sequence[Response | None]

MOST_SUBSETS = 50
"""A column with more values names no subsets."""


def run(config: EvaluatePolicyConfig) -> None:
    """Sample, judge, measure; write `metrics.json`, `report.md` and the frontier's plot, and print the report.

    Raises:
        DataError: the prompts or recorded responses cannot be read.
        ConfigError: there is nothing to compare.
        ModelError: a model cannot be loaded.
        RewardServerError: a server cannot be reached or used.
        StorageError: the output cannot be written, or holds another evaluation.
        QualityError: too many comparisons are missing; the report is written all the same.
    """
    with Run.open(config.output_dir, config, command="eval policy") as opened, opened.noting_errors():
        folder = opened.directory
        quarantine = Quarantine(folder / "quarantine.jsonl")
        prompts = list(islice(dict.fromkeys(read_prompts(config.dataset, quarantine)), config.limit))
        baseline, policies = find_sides(config)
        check_found((baseline, *policies))
        if config.reward_function is not None:
            load_function(
                config.reward_function
            ).close()  # a name that is wrong is said before anything is sampled
        answers = {
            side.name: answer(side, prompts, config, folder / "responses") for side in (baseline, *policies)
        }
        raters = rate_all(config, prompts, answers, baseline.name, folder / "judgments")
        findings = measure(config, prompts, baseline, policies, answers, raters, _subsets(config, prompts))
        write_atomic(folder / "metrics.json", json.dumps(findings, indent=2, allow_nan=False) + "\n")
        drawn = draw_frontier(findings, folder / FRONTIER)
        text = render(findings, frontier=drawn)
        write_atomic(folder / "report.md", text)
        print(f"{text}\n-> {folder / 'report.md'}, {folder / 'metrics.json'}")
    _refuse_if_too_little_is_known(findings, config.max_missing)


def measure(
    config: EvaluatePolicyConfig,
    prompts: Sequence[Conversation],
    baseline: Side,
    policies: Sequence[Side],
    answers: Mapping[str, Responses],
    raters: Sequence[Rater],
    subsets: Sequence[str] = (),
) -> Findings:
    """The findings about every policy, the baseline first. `subsets` are those of the prompts, if they have several."""
    return {
        "dataset": str(config.dataset),
        "prompts": len(prompts),
        "temperature": config.temperature,
        "baseline": baseline.name,
        "raters": [{"name": r.name, "version": r.version, "compares": r.compares} for r in raters],
        "policies": [
            {
                **_of_responses(side, answers[side.name], config.resamples),
                "ratings": [
                    _of_rating(
                        rating,
                        answers[side.name],
                        None if side is baseline else answers[baseline.name],
                        subsets,
                        config.resamples,
                    )
                    if (rating := rater.ratings.get(side.name)) is not None
                    else None
                    for rater in raters
                ],
            }
            for side in (baseline, *policies)
        ],
    }


def _subsets(config: EvaluatePolicyConfig, prompts: Sequence[Conversation]) -> list[str]:
    """The subset of each prompt by the first column that tells several apart; none if there is no such column."""
    about = {q.prompt: q.about for q in read_questions(config.dataset, Quarantine(None))}
    for column in (*SUBSET_COLUMNS, "dataset"):
        found = [about.get(prompt, {}).get(column, "") for prompt in prompts]
        if 1 < len(set(found)) <= MOST_SUBSETS:
            return found
    return []


def _of_responses(side: Side, responses: Responses, resamples: int) -> Findings:
    given = [response for response in responses if response is not None]
    kls = [response.kl for response in given if response.kl is not None]
    tokens = [response.tokens for response in given if response.tokens is not None]
    return {
        "name": side.name,
        "run": side.run,
        "step": side.step,
        "reference": side.reference,
        "responses": len(given),
        "kl": estimate_mean(kls, resamples=resamples),
        "tokens": finite(_mean(tokens)),
        "characters": finite(_mean([len(response.text) for response in given])),
        "finished": finite(_mean([float(response.finished) for response in given])) if tokens else None,
    }


def _of_rating(
    rating: Rating, ours: Responses, theirs: Responses | None, subsets: Sequence[str], resamples: int
) -> Findings:
    """What one rater says of one policy, beside the baseline's responses unless it is the baseline.

    Every prompt occurs once, so each comparison is drawn by itself.
    """
    scores = [score for score in rating.scores if score is not None]
    found: Findings = {
        "score": estimate_mean(scores, resamples=resamples),
        "without_score": len(rating.scores) - len(scores),
    }
    if theirs is None:
        return found
    known = [
        (p, len(mine.text) - len(other.text), subset)
        for p, mine, other, subset in zip(rating.wins, ours, theirs, subsets or [""] * len(ours), strict=True)
        if p is not None and mine is not None and other is not None
    ]

    def wins(name: str | None = None) -> Findings:
        chosen = [(p, d) for p, d, subset in known if name in (None, subset)]
        return assess_wins([p for p, _ in chosen], [d for _, d in chosen], resamples=resamples)

    locked = same_position([a for a, _ in rating.orders], [1 - b for _, b in rating.orders])
    return {
        **found,
        **wins(),
        **({"subsets": [{"name": name, **wins(name)} for name in sorted(set(subsets))]} if subsets else {}),
        "missing": dict(Counter(rating.reasons).most_common()),
        "same_position": finite(_mean(locked.astype(float).tolist())),
    }


def _mean(values: Sequence[float]) -> float:
    return mean(np.asarray(values, dtype=np.float64))


def _refuse_if_too_little_is_known(findings: Mapping[str, Any], allowed: float) -> None:
    for policy in findings["policies"][1:]:
        for rater, found in zip(findings["raters"], policy["ratings"], strict=True):
            missing = sum(found["missing"].values())
            if missing > allowed * findings["prompts"]:
                reason = next(iter(found["missing"]))
                raise QualityError(
                    f"{missing} of {findings['prompts']} comparisons of {policy['name']} by {rater['name']} are "
                    f"missing, most because: {reason}; what a server failed to answer is asked again by the next run"
                )
