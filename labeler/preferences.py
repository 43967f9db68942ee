"""From preferences to the rows of a dataset, and to the report of what they are worth. No model is asked here."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from labeler.budget import Price
from labeler.journal import Usage
from labeler.outputs import MESSAGES
from labeler.rubric import Rubric
from rlaif.agreement import agreement, bootstrap_interval, preference_kappa, same_position, same_response
from rlaif.types import Judgment, Message, Pair, Preference, to_dicts

VOTE = pa.struct([("judge", pa.string()), ("chosen_prob", pa.float64())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_prob", pa.float64()),
        ("margin", pa.float64()),
        ("chosen_is_a", pa.bool_()),
        ("chosen_prob_raw", pa.float64()),
        ("chosen_prob_first", pa.float64()),
        ("chosen_prob_second", pa.float64()),
        ("label_mass_ab", pa.float64()),
        ("label_mass_ba", pa.float64()),
        ("censored", pa.bool_()),
        ("same_position", pa.bool_()),
        ("rationale_ab", pa.string()),
        ("rationale_ba", pa.string()),
        ("truncated", pa.bool_()),
        ("principle", pa.string()),
        ("source", pa.string()),
        ("votes", pa.list_(VOTE)),
        ("human_chosen_prob", pa.float64()),
        ("judge", pa.string()),
        ("rubric", pa.string()),
        ("rubric_hash", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
    ]
)
"""Columns of `preferences.parquet`. `ab` means the order in which the input's first response was shown first."""

TIE = 1e-6
"""Labels so close to 1/2 are ties."""


def canonical(pair: Pair) -> Pair:
    """The pair or its swap, whichever has its responses in the order that the texts decide."""
    return pair if pair.a <= pair.b else pair.swapped()


def is_tie(p: float) -> bool:
    """Whether a label prefers neither response."""
    return abs(p - 0.5) <= TIE


def tokens_of(*judgments: Judgment | None) -> dict[str, int]:
    """Token counts of judgments together, under the names that datasets use."""
    given = [j for j in judgments if j is not None]
    return {
        "prompt_tokens": sum(j.prompt_tokens for j in given),
        "completion_tokens": sum(j.completion_tokens for j in given),
        "cached_tokens": sum(j.cached_tokens for j in given),
    }


def cost_of(tokens: Mapping[str, int], price: Price | None) -> float | None:
    """USD for tokens as `tokens_of` names them; None where no price was told."""
    return None if price is None else price.cost(Usage(**tokens))


def source_of(preference: Preference) -> str:
    """How the label was had: `logprobs`, `samples`, `verdict`, several joined by `+`, or the guard that ruled."""
    if preference.reason is not None:
        return preference.reason
    said = [p for p in preference.votes if p.p_a is not None] or [preference]
    return "+".join(sorted({j.source for p in said for j in (p.ab, p.ba) if j is not None}))


def graded_margin(preference: Preference, margins: Sequence[float], values: Sequence[float]) -> float | None:
    """Expected margin of Llama 2 (arXiv 2307.09288, section 3.2.2), for the response that the label prefers.

    Args:
        preference: with the label distributions of its orders.
        margins: of each label, >= 0.
        values: P(number 1 preferred) that each label stands for.

    Returns:
        The mean over both orders of the margin, counted negative where a label prefers the other response, and at
        least 0; None without such distributions.
    """
    toward_a = [
        sign * sum(p * m * np.sign(v - 0.5) for p, m, v in zip(j.labels.probs, margins, values, strict=True))
        for j, sign in ((preference.ab, 1.0), (preference.ba, -1.0))
        if j is not None and j.labels is not None and len(j.labels.logprobs) == len(margins)
    ]
    if not toward_a or preference.p_a is None:
        return None
    toward_chosen = float(np.mean(toward_a)) * (1.0 if preference.p_a >= 0.5 else -1.0)
    return max(0.0, toward_chosen)


def dataset_row(
    preference: Preference, label: float, rubric: Rubric, price: Price | None = None
) -> dict[str, Any]:
    """A row of `SCHEMA`.

    Args:
        preference: as judged; `preference.p_a` is not None.
        label: P(A preferred) after calibration and clamping, in [0, 1].
        rubric: how the judges were asked.
        price: what tokens cost.
    """
    pair, raw = preference.pair, preference.p_a
    assert raw is not None
    chosen_is_a = label >= 0.5
    view = preference if chosen_is_a else preference.swapped()
    chosen_prob = label if chosen_is_a else 1.0 - label
    margin = (
        2.0 * chosen_prob - 1.0
        if rubric.margins is None
        else graded_margin(preference, rubric.margins, rubric.values)
    )
    said = [j for j in (preference.ab, preference.ba) if j is not None]
    tokens = tokens_of(*said)
    return {
        "id": pair.id,
        "prompt": to_dicts(pair.prompt),
        "chosen": to_dicts((Message("assistant", view.pair.a),)),
        "rejected": to_dicts((Message("assistant", view.pair.b),)),
        "chosen_prob": chosen_prob,
        "margin": margin,
        "chosen_is_a": chosen_is_a,
        "chosen_prob_raw": view.p_a,
        "chosen_prob_first": view.ab and view.ab.p_first,
        "chosen_prob_second": None if view.ba is None or view.ba.p_first is None else 1.0 - view.ba.p_first,
        "label_mass_ab": _mass(preference.ab),
        "label_mass_ba": _mass(preference.ba),
        "censored": any(j.labels is not None and j.labels.censored for j in said),
        "same_position": preference.same_position,
        "rationale_ab": preference.ab and preference.ab.rationale,
        "rationale_ba": preference.ba and preference.ba.rationale,
        "truncated": any(j.truncated for j in said),
        "principle": next((j.principle for j in said if j.principle is not None), None),
        "source": source_of(preference),
        "votes": [{"judge": vote.judge, "chosen_prob": vote.p_a} for vote in view.votes],
        "human_chosen_prob": view.pair.human_p_a,
        "judge": preference.judge,
        "rubric": preference.rubric,
        "rubric_hash": preference.rubric_hash,
        **tokens,
        "cost_usd": cost_of(tokens, price),
    }


def open_row(preference: Preference) -> dict[str, Any]:
    """A row of `unlabelled.jsonl`: the pair, and why it has no label."""
    pair = preference.pair
    return {
        "id": pair.id,
        "reason": preference.reason,
        "prompt": to_dicts(pair.prompt),
        "response_a": pair.a,
        "response_b": pair.b,
    }


def _mass(judgment: Judgment | None) -> float | None:
    return None if judgment is None or judgment.labels is None else judgment.labels.mass


class PreferenceReport:
    """What to know before trusting labels: position bias, label mass, ties, gaps, agreement with people.

    Preferences are added one by one; a few numbers are kept of each.
    """

    def __init__(self) -> None:
        self._count = self._labelled = self._ties = self._censored = self._missing_votes = 0
        self._truncated = self._different_length = 0
        self._longer_wins = 0.0
        self._unlabelled: Counter[str] = Counter()
        self._dropped: Counter[str] = Counter()
        self._guarded: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._first_ab, self._first_ba, self._masses = array("d"), array("d"), array("f")
        self._human: list[tuple[float, float]] = []
        self._tokens: Counter[str] = Counter()

    def add(self, preference: Preference, label: float | None, dropped: str | None = None) -> None:
        """Count a preference.

        Args:
            preference: as judged.
            label: the final one, P(A preferred); None where there is none.
            dropped: why it is left out of the dataset; None where it is not.
        """
        self._count += 1
        said = [j for j in (preference.ab, preference.ba) if j is not None]
        self._tokens.update(tokens_of(*said))
        self._missing_votes += sum(vote.p_a is None for vote in preference.votes)
        if label is None:
            self._unlabelled[preference.reason or "no label"] += 1
            return
        self._labelled += 1
        self._ties += is_tie(label)
        if dropped is not None:
            self._dropped[dropped] += 1
        if preference.reason is not None:
            self._guarded[preference.reason] += 1
        else:
            self._sources[source_of(preference)] += 1
            self._count_length(preference.pair, label)
        for judgment in said:
            self._truncated += judgment.truncated
            if judgment.labels is not None:
                self._masses.append(judgment.labels.mass)
                self._censored += judgment.labels.censored
        ab, ba = preference.ab, preference.ba
        if ab is not None and ba is not None and ab.p_first is not None and ba.p_first is not None:
            self._first_ab.append(ab.p_first)
            self._first_ba.append(ba.p_first)
        human = preference.pair.human_p_a
        if human is not None and human != 0.5:
            self._human.append((label, human))

    def _count_length(self, pair: Pair, label: float) -> None:
        if len(pair.a) == len(pair.b):
            return
        self._different_length += 1
        longer_is_a = len(pair.a) > len(pair.b)
        self._longer_wins += 0.5 if is_tie(label) else float((label > 0.5) == longer_is_a)

    def result(self) -> dict[str, Any]:
        """The report. Rates over no pairs are None.

        Of the pairs asked in both orders, `order_agreement` is the share in which both preferred the same response or
        both tied, `same_position_rate` that in which both preferred one position, and `first_share` the share of the
        latter that preferred number 1. `longer_preferred_share` is the share of asked pairs of different lengths (in
        characters) in which the longer response was preferred, a tie counting half.
        """
        first_ab, first_ba = np.asarray(self._first_ab), np.asarray(self._first_ba)
        locked = same_position(first_ab, first_ba)
        masses = np.asarray(self._masses, dtype=np.float64)
        report: dict[str, Any] = {
            "pairs": self._count,
            "labelled": self._labelled,
            "ties": self._ties,
            "dropped": dict(self._dropped.most_common()),
            "unlabelled": dict(self._unlabelled.most_common()),
            "guarded": dict(self._guarded.most_common()),
            "sources": dict(self._sources.most_common()),
            "order_agreement": _mean(same_response(first_ab, first_ba)),
            "same_position_rate": _mean(locked),
            "first_share": _mean(first_ab[locked] > 0.5),
            "longer_preferred_share": (
                self._longer_wins / self._different_length if self._different_length else None
            ),
            "label_mass_mean": _mean(masses),
            "label_mass_min": float(masses.min()) if len(masses) else None,
            "censored": self._censored,
            "truncated": self._truncated,
            **({"missing_votes": self._missing_votes} if self._missing_votes else {}),
            **self._tokens,
        }
        if self._human:
            report |= human_agreement(np.array(self._human, dtype=np.float64))
        return report


def human_agreement(table: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Agreement and Cohen's kappa with 95 % bootstrap intervals.

    Args:
        table: (N, 2) P(A preferred) by the judge and by people.
    """
    found: dict[str, Any] = {"human_pairs": len(table)}
    for name, statistic in (("human_agreement", agreement), ("human_kappa", preference_kappa)):
        low, high = bootstrap_interval(table, lambda t, f=statistic: f(t[:, 0], t[:, 1]))  # type: ignore[misc]
        found[name] = _finite(statistic(table[:, 0], table[:, 1]))
        found[f"{name}_95"] = [_finite(low), _finite(high)]
    return found


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
