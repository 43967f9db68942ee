"""The findings about a judge, from observations: agreement, biases, calibration, gaps. Pure functions.

A finding that cannot be had (no pairs, chance agreement certain) is None. Rates lie in [0, 1].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from labeler.audit.annotators import by_annotator
from labeler.audit.biases import lean
from labeler.audit.observations import Observation
from labeler.preferences import is_tie
from rlaif import rewardbench
from rlaif.agreement import agreement, agreements, estimate_mean, finite, mean, same_position
from rlaif.measures import ECE_BINS, brier, expected_calibration_error, log_loss, reliability

Floats = NDArray[np.float64]
Findings = dict[str, Any]


def assess(observations: Sequence[Observation], *, resamples: int = 1000) -> Findings:
    """Everything `rlaif eval judge` reports about one judge.

    Args:
        observations: in any order.
        resamples: of the 95 % bootstrap intervals; whole prompts are drawn.
    """
    labelled = [o for o in observations if o.p is not None]
    found: Findings = {
        "pairs": len(observations),
        "labelled": len(labelled),
        "ties": sum(o.p is not None and is_tie(o.p) for o in labelled),
        "unlabelled": _counts(o.reason or "no label" for o in observations if o.p is None),
        "sources": _counts(o.source for o in labelled if o.source),
        **agreement_with_people(labelled, resamples),
        "position": position(labelled),
        "orders": orders(labelled, resamples),
        "length": _lean(labelled, "longer"),
        "formatting": _lean(labelled, "formatted"),
        "calibration": calibration(labelled),
        "label_mass": label_mass(labelled),
        "prompt_tokens": sum(o.prompt_tokens for o in observations),
        "completion_tokens": sum(o.completion_tokens for o in observations),
    }
    subsets = sorted({o.subset for o in labelled if o.subset})
    if len(subsets) > 1:
        found["subsets"] = [
            {"name": name, **agreement_with_people([o for o in labelled if o.subset == name], resamples)}
            for name in subsets
        ]
        if rewardbench.names(subsets):
            decided = [o for o in labelled if o.human not in (None, 0.5)]
            table = _table(decided)
            found["rewardbench"] = rewardbench.sections(
                agreements(table[:, 0], table[:, 1]),
                [o.subset for o in decided],
                groups=[o.prompt for o in decided],
                resamples=resamples,
            )
    alone = [o for o in labelled if o.best_of is not None and o.human is not None]
    if alone:
        table = _table(alone)
        found["best_of"] = rewardbench.best_of(
            agreements(table[:, 0], table[:, 1]),
            [o.best_of for o in alone],  # type: ignore[misc]
            [o.subset for o in alone],
            groups=[o.prompt for o in alone],
            resamples=resamples,
        )
    if any(o.votes for o in labelled):
        found["annotators"] = by_annotator(labelled, resamples)
    return found


def agreement_with_people(labelled: Sequence[Observation], resamples: int = 1000) -> Findings:
    """Agreement beside Cohen's kappa, with intervals, and the agreement of "the longer one wins".

    Pairs that people tie are left out; they are counted as `human_ties`. Kappa is `preference_kappa`.
    """
    judged = [o for o in labelled if o.human is not None]
    decided = [o for o in judged if o.human != 0.5]
    table = _table(decided)
    found = estimate_mean(
        agreements(table[:, 0], table[:, 1]), groups=[o.prompt for o in decided], resamples=resamples
    )
    longer = (np.sign([o.longer for o in decided]) + 1) / 2
    return {
        "human_pairs": len(decided),
        "human_ties": len(judged) - len(decided),
        "no_majority": sum(o.human is None and bool(o.votes) for o in labelled),
        "agreement": found,
        "kappa": {name: None if value is None else 2 * value - 1 for name, value in found.items()},
        "longer_wins_agreement": finite(agreement(longer, table[:, 1])),
    }


def difference(ours: Sequence[Observation], base: Sequence[Observation], resamples: int = 1000) -> Findings:
    """How much more often one way of asking agrees with people than another, on the pairs that both labelled.

    Args:
        ours: of the same pairs as `base`, in the same order.
        base: what is compared with.
        resamples: of the interval; differences on the same pairs vary far less than their means.

    Returns:
        `value`, `low`, `high`: of the difference in agreement.
    """
    both = [
        (a, b)
        for a, b in zip(ours, base, strict=True)
        if a.p is not None and b.p is not None and a.human is not None and a.human != 0.5
    ]
    mine, theirs = _table([a for a, _ in both]), _table([b for _, b in both])
    gain = agreements(mine[:, 0], mine[:, 1]) - agreements(theirs[:, 0], theirs[:, 1])
    return estimate_mean(gain, groups=[a.prompt for a, _ in both], resamples=resamples)


def position(labelled: Sequence[Observation]) -> Findings:
    """Position bias, over the pairs asked in both orders.

    `same_position_rate`: both orders preferred one position. `first_share`: of those, number 1. `first_probability`:
    mean probability of number 1, over both orders; 1/2 without bias.
    """
    asked = [(o.first_ab, o.first_ba) for o in labelled if o.first_ab is not None and o.first_ba is not None]
    first = np.array(asked, dtype=np.float64).reshape(-1, 2)
    locked = same_position(first[:, 0], first[:, 1])
    return {
        "pairs": len(asked),
        "same_position_rate": finite(mean(locked.astype(np.float64))),
        "first_share": finite(mean((first[locked, 0] > 0.5).astype(np.float64))),
        "first_probability": finite(mean(first.ravel())),
    }


def orders(labelled: Sequence[Observation], resamples: int = 1000) -> Findings:
    """Agreement with people before the two orders are averaged and after, over the pairs asked in both.

    `both`: of the averaged label. `one`: of a single order, the mean of the two; `preferred_first` and
    `preferred_second`: of the order that shows the response that people prefer as number 1, or as number 2. `locked`:
    of the averaged label on the pairs whose orders preferred the same position, where it is all that is left to go by;
    `locked_pairs` are so many, `same_position` their share. Pairs that people tie are left out.
    """
    asked = [
        o
        for o in labelled
        if o.first_ab is not None and o.first_ba is not None and o.human is not None and o.human != 0.5
    ]
    columns = np.array([(o.p, o.first_ab, 1.0 - o.first_ba, o.human) for o in asked], dtype=np.float64)  # type: ignore[operator]
    averaged, ab, ba, human = columns.reshape(-1, 4).T
    groups = np.array([o.prompt for o in asked], dtype=object)
    right_ab, right_ba = agreements(ab, human), agreements(ba, human)
    prefers_a = human > 0.5
    locked = same_position(ab, 1.0 - ba)

    def estimate(values: Floats, of: NDArray[np.bool_] | None = None) -> dict[str, float | None]:
        kept = slice(None) if of is None else of
        return estimate_mean(values[kept], groups=list(groups[kept]), resamples=resamples)

    right = agreements(averaged, human)
    return {
        "pairs": len(asked),
        "both": estimate(right),
        "one": estimate((right_ab + right_ba) / 2),
        "preferred_first": estimate(np.where(prefers_a, right_ab, right_ba)),
        "preferred_second": estimate(np.where(prefers_a, right_ba, right_ab)),
        "same_position": estimate(locked.astype(np.float64)),
        "locked_pairs": int(locked.sum()),
        "locked": estimate(right, locked),
    }


def calibration(labelled: Sequence[Observation]) -> Findings:
    """Brier score, expected calibration error, log loss and the reliability table; pairs that people tie count."""
    table = _table([o for o in labelled if o.human is not None])
    p, human = table[:, 0], table[:, 1]
    return {
        "pairs": len(table),
        "brier": finite(brier(p, human)),
        "coin_brier": finite(brier(np.full_like(human, 0.5), human)),
        "ece": finite(expected_calibration_error(p, human)),
        "ece_bins": ECE_BINS,
        "log_loss": finite(log_loss(p, human)),
        "reliability": [asdict(b) for b in reliability(p, human)],
    }


def label_mass(labelled: Sequence[Observation]) -> Findings:
    """How much probability the judge gave to the labels rather than to other text."""
    masses = [mass for o in labelled for mass in o.masses]
    return {
        "readings": len(masses),
        "mean": finite(mean(np.array(masses))),
        "min": min(masses, default=None),
        "below_half": sum(mass < 0.5 for mass in masses),
    }


def _lean(labelled: Sequence[Observation], name: str) -> Findings:
    more = [getattr(o, name) for o in labelled]
    human = [np.nan if o.human is None else o.human for o in labelled]
    found = asdict(lean([o.p for o in labelled], more, human))  # type: ignore[arg-type]
    return {key: value if key == "pairs" else finite(value) for key, value in found.items()}


def _table(labelled: Sequence[Observation]) -> Floats:
    """(N, 2) P(A preferred) by the judge and by people."""
    return np.array([(o.p, o.human) for o in labelled], dtype=np.float64).reshape(-1, 2)


def _counts(names: Any) -> dict[str, int]:
    return dict(Counter(names).most_common())
