"""The findings about a reward model, from scores and labels. Pure functions; numpy only.

A finding that cannot be had (no pairs, nothing varies) is None. Rates lie in [0, 1], losses are in nats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlaif import rewardbench
from rlaif.agreement import agreements, bootstrap_interval, estimate_mean, finite, mean, pearson, spearman
from rlaif.measures import ECE_BINS, brier, expected_calibration_error, reliability
from rlaif.published import BestOf

Floats = NDArray[np.float64]
Findings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """A response and what the model gave it.

    Attributes:
        prompt: content id of its prompt.
        score: raw.
        characters: length of the response.
        tokens: length of prompt and response, as the model counts; only differences within a prompt mean something.
    """

    prompt: str
    score: float
    characters: int
    tokens: int


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two answers to one prompt.

    Attributes:
        chosen: one of them.
        rejected: the other.
        label: P(chosen preferred).
        subset: empty where the row names none.
        best_of: the right answer among several wrong ones that this pair is one of; None for a pair by itself.
    """

    chosen: Answer
    rejected: Answer
    label: float
    subset: str = ""
    best_of: BestOf | None = None


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """An answer and the score that somebody else gave it."""

    answer: Answer
    label: float
    subset: str = ""


def assess_pairs(pairs: Sequence[LabelledPair], *, resamples: int = 1000) -> Findings:
    """Everything that pairs tell.

    Args:
        pairs: in any order.
        resamples: of the 95 % bootstrap intervals; whole prompts are drawn.
    """
    found: Findings = {
        **ranking(pairs, resamples),
        "calibration": calibration(pairs),
        "length": length(pairs),
    }
    subsets = sorted({p.subset for p in pairs if p.subset})
    if len(subsets) > 1:
        found["subsets"] = [
            {"name": name, **ranking([p for p in pairs if p.subset == name], resamples)} for name in subsets
        ]
        if rewardbench.names(subsets):
            found["rewardbench"] = rewardbench.sections(
                _right([p.chosen.score - p.rejected.score for p in pairs], pairs),
                [p.subset for p in pairs],
                groups=[p.chosen.prompt for p in pairs],
                resamples=resamples,
            )
    alone = [p for p in pairs if p.best_of is not None]
    if alone:
        found["best_of"] = rewardbench.best_of(
            _right([p.chosen.score - p.rejected.score for p in alone], alone),
            [p.best_of for p in alone],  # type: ignore[misc]
            [p.subset for p in alone],
            groups=[p.chosen.prompt for p in alone],
            resamples=resamples,
        )
    return found


def assess_scores(
    answers: Sequence[LabelledAnswer],
    *,
    scale: tuple[float, float] | None = None,
    resamples: int = 1000,
) -> Findings:
    """How well scores predict other scores, and which of two answers to a prompt got the higher one.

    Args:
        answers: in any order.
        scale: (mean, standard deviation) that turn a raw score into a prediction on the labels' scale, for a model
            that was trained by regression; None for others, which have no error in points.
        resamples: of the 95 % bootstrap intervals; whole prompts are drawn.
    """
    table = np.array([(a.answer.score, a.label) for a in answers], dtype=np.float64).reshape(-1, 2)
    groups = [a.answer.prompt for a in answers]

    def estimate(statistic: Callable[[Floats, Floats], float]) -> Findings:
        low, high = bootstrap_interval(
            table, lambda t: statistic(t[:, 0], t[:, 1]), groups=groups, resamples=resamples
        )
        value = statistic(table[:, 0], table[:, 1])
        return {"value": finite(value), "low": finite(low), "high": finite(high)}

    found: Findings = {
        "answers": len(answers),
        "pearson": estimate(pearson),
        "spearman": estimate(spearman),
        "label_std": finite(float(table[:, 1].std())) if len(answers) else None,
        "rmse": None,
    }
    if scale is not None and answers:
        predicted = table[:, 0] * scale[1] + scale[0]
        found["rmse"] = finite(float(np.sqrt(np.mean((predicted - table[:, 1]) ** 2))))
    return {"scores": found, **assess_pairs(pairs_of(answers), resamples=resamples)}


def pairs_of(answers: Sequence[LabelledAnswer]) -> list[LabelledPair]:
    """All pairs of answers to one prompt with different labels, the better one chosen."""
    by_prompt: dict[str, list[LabelledAnswer]] = defaultdict(list)
    for answer in answers:
        by_prompt[answer.answer.prompt].append(answer)
    found = []
    for same in by_prompt.values():
        for pair in combinations(same, 2):
            worse, better = sorted(pair, key=lambda a: a.label)
            if worse.label < better.label:
                found.append(LabelledPair(better.answer, worse.answer, 1.0, better.subset))
    return found


def ranking(pairs: Sequence[LabelledPair], resamples: int = 1000) -> Findings:
    """Accuracy and log loss, beside what is had without a model.

    Pairs with a tied label have no right order: they are counted, and only the log loss reads them. A tied score (or
    length) is half right. `gain` is accuracy less that of "the longer answer wins", on the same pairs.
    """
    decided = [p for p in pairs if p.label != 0.5]
    groups = [p.chosen.prompt for p in decided]
    right = _right([p.chosen.score - p.rejected.score for p in decided], decided)
    longer = _right([p.chosen.characters - p.rejected.characters for p in decided], decided)
    d, y = _differences(pairs)
    return {
        "pairs": len(pairs),
        "ties": len(pairs) - len(decided),
        "accuracy": estimate_mean(right, groups=groups, resamples=resamples),
        "longer_wins": finite(mean(longer)),
        "gain": estimate_mean(right - longer, groups=groups, resamples=resamples),
        "log_loss": finite(mean(np.logaddexp(0, -d) * y + np.logaddexp(0, d) * (1 - y))),
        "lowest_log_loss": finite(mean(_entropy(y))),
    }


def calibration(pairs: Sequence[LabelledPair]) -> Findings:
    """Brier score, expected calibration error and the reliability table of sigmoid(difference of scores)."""
    d, y = _differences(pairs)
    p = 1 / (1 + np.exp(-np.clip(d, -700, 700)))
    return {
        "brier": finite(brier(p, y)),
        "coin_brier": finite(brier(np.full_like(y, 0.5), y)),
        "ece": finite(expected_calibration_error(p, y)),
        "ece_bins": ECE_BINS,
        "reliability": [asdict(b) for b in reliability(p, y)],
    }


def length(pairs: Sequence[LabelledPair]) -> Findings:
    """How scores go with length, in characters of the response and, within a pair, in tokens too.

    `score_characters` correlates over all distinct answers; the other correlations are of differences within pairs,
    which a prompt that asks for long answers does not move.
    """
    answers = list(dict.fromkeys(a for p in pairs for a in (p.chosen, p.rejected)))
    d, _ = _differences(pairs)
    decided = [p for p in pairs if p.label != 0.5]
    better = [(p.chosen, p.rejected) if p.label > 0.5 else (p.rejected, p.chosen) for p in decided]
    right = _right([p.chosen.score - p.rejected.score for p in decided], decided)
    sign = np.sign([good.characters - bad.characters for good, bad in better])
    return {
        "score_characters": _correlations([a.score for a in answers], [a.characters for a in answers]),
        "pair_characters": _correlations(d, [p.chosen.characters - p.rejected.characters for p in pairs]),
        "pair_tokens": _correlations(d, [p.chosen.tokens - p.rejected.tokens for p in pairs]),
        "longer_is_better": {"pairs": int((sign > 0).sum()), "accuracy": finite(mean(right[sign > 0]))},
        "shorter_is_better": {"pairs": int((sign < 0).sum()), "accuracy": finite(mean(right[sign < 0]))},
    }


def _correlations(x: Floats | Sequence[float], y: Sequence[float]) -> Findings:
    return {"pearson": finite(pearson(x, y)), "spearman": finite(spearman(x, y))}


def _right(differences: Sequence[float], pairs: Sequence[LabelledPair]) -> Floats:
    """(N,) 1 where a difference prefers what the label prefers, 1/2 where it is 0."""
    return agreements(0.5 + 0.5 * np.sign(np.asarray(differences, np.float64)), [p.label for p in pairs])


def _differences(pairs: Sequence[LabelledPair]) -> tuple[Floats, Floats]:
    """(N,) score of the chosen minus that of the rejected, and (N,) labels."""
    table = [(p.chosen.score - p.rejected.score, p.label) for p in pairs]
    d, y = np.array(table, dtype=np.float64).reshape(-1, 2).T
    return d, y


def _entropy(y: Floats) -> Floats:
    """(N,) entropy of labels in nats."""
    inside = np.clip(y, 1e-300, 1.0), np.clip(1 - y, 1e-300, 1.0)
    return -(y * np.log(inside[0]) + (1 - y) * np.log(inside[1]))
