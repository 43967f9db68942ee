"""What the demo measured: read from the files that its stages wrote, held against gold utility."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rlaif.agreement import agreements, bootstrap_interval, cohen_kappa, same_position
from rlaif.records import Quarantine, read_candidates
from tinyworld.gold import gold_prefers, gold_utility, review

SAMPLES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity over the steps of a training run."""

    steps: list[int]
    values: list[float]


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """A policy on the unseen posts; `win_rate` is against the start, ties counting half (None for the start)."""

    name: str
    title: str
    mean_gold: float
    gold: Estimate
    mean_words: float
    win_rate: Estimate | None
    ties: float
    gold_curve: Curve
    curves: Mapping[str, Curve]


@dataclass(frozen=True, slots=True)
class LabelResult:
    """Labels against gold, over pairs that gold does not tie; a label of exactly 1/2 counts half.

    Attributes:
        agreement: of the averaged label with gold.
        kappa: Cohen's kappa of the same.
        one_order: agreement of the label that a single order would have given.
        same_position: share of pairs on which both orders preferred the same position.
        same_position_averaged: the same for the averaged label, judged as (A, B) and as (B, A).
        label_mass: mean probability of the two labels together.
    """

    title: str
    pairs: int
    agreement: Estimate
    kappa: Estimate
    one_order: Estimate
    same_position: float
    same_position_averaged: float
    label_mass: float


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Held-out pairs whose predicted confidence in the preferred response, in [0.5, 1], fell into one bin."""

    predicted: float
    observed: float
    count: int


@dataclass(frozen=True, slots=True)
class RewardModelResult:
    """The reward model on held-out pairs, as `rlaif train rm` measured it, and against gold."""

    accuracy: float
    log_loss: float
    ece: float
    bins: list[CalibrationBin]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a summary and how it is to be marked: `good`, `bad` or nothing."""

    text: str
    mark: str


@dataclass(frozen=True, slots=True)
class SampleResponse:
    """What one policy wrote for a post."""

    title: str
    parts: list[Part]
    gold: float


@dataclass(frozen=True, slots=True)
class Sample:
    """One unseen post and every policy's summary of it."""

    post: str
    responses: list[SampleResponse]


@dataclass(frozen=True, slots=True)
class StageResult:
    """A command of the demo and how long it took."""

    name: str
    command: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Results:
    """Everything the report shows."""

    seed: int
    date: str
    machine: str
    num_eval_prompts: int
    start: PolicyResult
    policies: list[PolicyResult]
    labels: list[LabelResult]
    reward_model: RewardModelResult
    samples: list[Sample]
    judgment: str
    stages: list[StageResult]

    @property
    def seconds(self) -> float:
        """All stages together, in seconds."""
        return sum(s.seconds for s in self.stages)

    def text(self) -> str:
        """The result in a few lines for the terminal."""
        lines = [f"gold utility of the start: {self.start.mean_gold:+.3f}"]
        for p in self.policies:
            assert p.win_rate is not None
            lines.append(
                f"{p.title:<14} gold {p.mean_gold:+.3f}   wins {100 * p.win_rate.value:.1f} % over the start "
                f"(95 % interval {100 * p.win_rate.low:.1f} to {100 * p.win_rate.high:.1f})"
            )
        for r in self.labels:
            lines.append(
                f"labels {r.title:<12} agree with gold on {100 * r.agreement.value:.1f} %, kappa {r.kappa.value:.2f}; "
                f"one order {100 * r.one_order.value:.1f} %; "
                f"same position {100 * r.same_position:.1f} % of {r.pairs} pairs"
            )
        rm = self.reward_model
        lines.append(
            f"reward model   held-out accuracy {100 * rm.accuracy:.1f} %, log loss {rm.log_loss:.3f}, ECE {rm.ece:.3f}"
        )
        lines.append(f"stages         {self.seconds:.0f} s in all, two side by side")
        return "\n".join(lines)


def collect_results(out: Path, policies: Mapping[str, str]) -> Results:
    """Read a finished demo; `policies` maps run directories to titles.

    Raises:
        DataError: a stage's file is missing or unreadable.
    """
    settings = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    responses = {name: _responses(out / "eval" / name) for name in ("start", *policies)}
    posts = list(responses["start"])
    gold = {
        name: np.array([gold_utility(post, by[post]) for post in posts]) for name, by in responses.items()
    }
    words = {
        name: float(np.mean([len(by[post].split()) for post in posts])) for name, by in responses.items()
    }
    titles = {"start": "start", **policies}

    def result(name: str) -> PolicyResult:
        wins = None if name == "start" else (gold[name] > gold["start"]) + 0.5 * (gold[name] == gold["start"])
        return PolicyResult(
            name=name,
            title=titles[name],
            mean_gold=float(gold[name].mean()),
            gold=_estimate(gold[name]),
            mean_words=words[name],
            win_rate=None if wins is None else _estimate(wins),
            ties=0.0 if wins is None else float(np.mean(wins == 0.5)),
            gold_curve=Curve([], []) if name == "start" else gold_curve(out / name),
            curves={} if name == "start" else _training_curves(out / name),
        )

    rows = pq.read_table(out / "labels" / "preferences.parquet").to_pylist()
    return Results(
        seed=settings["seed"],
        date=date.today().isoformat(),
        machine=machine(),
        num_eval_prompts=len(posts),
        start=result("start"),
        policies=[result(name) for name in policies],
        labels=[
            label_result("with CoT", rows),
            label_result(
                "without CoT", pq.read_table(out / "labels-no-cot" / "preferences.parquet").to_pylist()
            ),
        ],
        reward_model=_reward_model(out / "rm"),
        samples=[
            Sample(
                p,
                [
                    SampleResponse(titles[n], _parts(p, by[p]), gold_utility(p, by[p]))
                    for n, by in responses.items()
                ],
            )
            for p in posts[:SAMPLES_SHOWN]
        ],
        judgment=_one_judgment(rows),
        stages=_stages(out),
    )


def machine() -> str:
    """Where this runs, for a report."""
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}"


def _estimate(
    values: np.ndarray[Any, np.dtype[np.float64]], statistic: Callable[..., float] | None = None
) -> Estimate:
    pick = statistic or (lambda v: float(np.mean(v)))
    low, high = bootstrap_interval(values, pick, seed=0)
    return Estimate(float(pick(values)), float(low), float(high))


def _responses(folder: Path) -> dict[str, str]:
    sets = read_candidates(folder, Quarantine(None))
    return {s.prompt[-1].content: s.candidates[0].response for s in sets}


def gold_curve(run: Path) -> Curve:
    """Mean gold utility of the training samples that the run wrote down, by step."""
    steps, values = [], []
    for path in sorted((run / "samples").glob("step-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps.append(int(path.stem.removeprefix("step-")))
        values.append(float(np.mean([gold_utility(_post(row["prompt"]), row["response"]) for row in rows])))
    return Curve(steps, values)


def _post(prompt: str | Sequence[Mapping[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _training_curves(run: Path) -> dict[str, Curve]:
    return {"reward": metric_curve(run, "objective/scores"), "kl": metric_curve(run, "objective/kl")}


def metric_curve(run: Path, key: str) -> Curve:
    """A metric by step, without the steps at which it could not be had."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row.get(key) is not None]
    return Curve([r["step"] for r in rows], [r[key] for r in rows])


def label_result(title: str, rows: Sequence[Mapping[str, Any]]) -> LabelResult:
    """Hold the rows of a preference dataset against gold."""
    asked = [r for r in rows if r["source"] == "logprobs"]  # a guard's ruling says nothing about the judge
    judged = []
    for row in asked:
        post, chosen, rejected = (
            _post(row["prompt"]),
            row["chosen"][-1]["content"],
            row["rejected"][-1]["content"],
        )
        truth = gold_prefers(post, chosen, rejected)
        if truth != 0.5:
            given = (truth, row["chosen_prob"], row["chosen_prob_first"], row["chosen_prob_second"])
            judged.append(given if row["chosen_is_a"] else tuple(1 - p for p in given))
    table = np.array(judged, dtype=np.float64)
    # Each column is P(A preferred): gold, averaged over both orders, with the chosen one shown first, and second.
    truth, averaged, first, second = table.T
    return LabelResult(
        title=title,
        pairs=len(table),
        agreement=_estimate(agreements(averaged, truth)),
        kappa=_estimate(table, lambda t: cohen_kappa(t[:, 1], t[:, 0])),
        one_order=_estimate((agreements(first, truth) + agreements(second, truth)) / 2),
        same_position=float(np.mean(same_position(first, 1 - second))),
        same_position_averaged=float(np.mean(same_position(averaged, 1 - averaged))),
        label_mass=float(np.mean([(r["label_mass_ab"] + r["label_mass_ba"]) / 2 for r in asked])),
    )


def _reward_model(folder: Path) -> RewardModelResult:
    metrics = json.loads((folder / "reward_model.json").read_text(encoding="utf-8"))["metrics"]
    calibration = metrics["calibration"]
    return RewardModelResult(
        accuracy=metrics["accuracy"]["value"],
        log_loss=metrics["log_loss"],
        ece=calibration["ece"],
        bins=[
            CalibrationBin(b["confidence"], b["agreement"], b["count"]) for b in calibration["reliability"]
        ],
    )


def _parts(post: str, summary: str) -> list[Part]:
    marks = {"covered": "good", "distorted": "bad", "invented": "bad", "broken": "bad"}
    return [
        Part(f.said.text if f.said else f.word or "(no sentence)", marks.get(f.verdict, ""))
        for f in review(post, summary)
    ]


def _one_judgment(rows: Sequence[Mapping[str, Any]]) -> str:
    asked = [r for r in rows if r["rationale_ab"] is not None]  # a guard's ruling has no rationale
    row = max(asked, key=lambda r: r["chosen_prob"])
    return "\n".join(
        [
            f"post      {_post(row['prompt'])}",
            f"chosen    {row['chosen'][-1]['content']}",
            f"rejected  {row['rejected'][-1]['content']}",
            f"rationale {row['rationale_ab']}",
            f"P(chosen preferred), both orders averaged: {row['chosen_prob']:.4f}",
        ]
    )


def _stages(out: Path) -> list[StageResult]:
    files = sorted((out / "stages").glob("*.json"), key=lambda p: p.stat().st_mtime)
    read = [(p.stem, json.loads(p.read_text(encoding="utf-8"))) for p in files]
    return [StageResult(name, record["command"], record["seconds"]) for name, record in read]
