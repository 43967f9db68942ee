"""What an evaluation keeps of each labelled pair: numbers alone, so that texts need not stay in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from labeler.audit.biases import formatting, length
from labeler.preferences import canonical, source_of
from rlaif.errors import DataError
from rlaif.published import BestOf, best_of, subset_of
from rlaif.types import Judgment, Pair, Preference, PreferenceRow, Vote, content_id

WRITER_COLUMNS = ("model", "model_a", "model_b", "chosen_model", "rejected_model")
"""Columns that name who wrote the responses."""


@dataclass(frozen=True, slots=True)
class Observation:
    """A pair, what the judge said of it, and what people said.

    A and B are in an order that the texts alone decide, not the file, which may put the preferred response first.

    Attributes:
        prompt: content id of the prompt.
        subset: the row's subset; empty if it names none.
        p: P(A preferred), the label; None where there is none.
        raw: P(A preferred) before a calibration or clamp.
        human: P(A preferred) by people; None where nobody said, or those who did have no majority.
        reason: why there is no label, or which guard ruled.
        source: `logprobs`, `samples`, `verdict`, or the guard; empty for labels of other tools.
        first_ab: P(number 1 preferred) with A shown first; None if not asked.
        first_ba: P(number 1 preferred) with B shown first.
        masses: label mass of each order asked.
        longer: characters of A minus characters of B.
        formatted: Markdown marks of A minus those of B.
        prompt_tokens: read for this label.
        completion_tokens: generated for this label.
        votes: what each of the people said, where a set names them.
        pair: content id of the prompt and both responses; equal where several rows are votes on one pair.
        best_of: the right answer among several wrong ones that this pair is one of; None for a pair by itself.
    """

    prompt: str
    subset: str
    p: float | None
    raw: float | None
    human: float | None
    reason: str | None = None
    source: str = ""
    first_ab: float | None = None
    first_ba: float | None = None
    masses: tuple[float, ...] = ()
    longer: int = 0
    formatted: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    votes: tuple[Vote, ...] = ()
    pair: str = ""
    best_of: BestOf | None = None


def observe(preference: Preference) -> Observation:
    """What to keep of a judged pair."""
    as_given = canonical(preference.pair) is preference.pair
    seen = preference if as_given else preference.swapped()
    said = [j for j in (seen.ab, seen.ba) if j is not None]
    return Observation(
        **_about(seen.pair),
        p=seen.p_a,
        raw=seen.p_a,
        human=seen.pair.human_p_a,
        votes=seen.pair.human_votes,
        reason=seen.reason,
        source="" if seen.p_a is None else source_of(seen),
        first_ab=_first(seen.ab),
        first_ba=_first(seen.ba),
        masses=tuple(j.labels.mass for j in said if j.labels is not None),
        prompt_tokens=sum(j.prompt_tokens for j in said),
        completion_tokens=sum(j.completion_tokens for j in said),
    )


def read_observation(row: PreferenceRow, gold: Pair | None = None) -> Observation:
    """What to keep of a row of a labelled dataset, ours or another tool's.

    Args:
        row: `chosen_prob` is the label; what else our datasets hold is used where it is there.
        gold: the same pair with its human label and subset, in either order; None takes the row's own.

    Raises:
        DataError: a column of ours holds something else.
    """
    extra = row.extra
    human = _number(extra, "human_chosen_prob")
    pair = Pair(row.prompt, row.chosen, row.rejected, human, extra)
    if gold is not None:
        pair = gold if gold.a == row.chosen else gold.swapped()
    as_given = canonical(pair) is pair
    raw = _number(extra, "chosen_prob_raw")
    first, second = _number(extra, "chosen_prob_first"), _number(extra, "chosen_prob_second")
    chosen_first, rejected_first = first, None if second is None else 1.0 - second
    masses = (_number(extra, "label_mass_ab"), _number(extra, "label_mass_ba"))
    source = str(extra.get("source") or "")
    shown = pair if as_given else pair.swapped()
    return Observation(
        **_about(shown),
        p=_turned(row.chosen_prob, as_given),
        raw=_turned(row.chosen_prob if raw is None else raw, as_given),
        human=shown.human_p_a,
        votes=shown.human_votes,
        reason=source if source.startswith("guard:") else None,
        source=source,
        first_ab=chosen_first if as_given else rejected_first,
        first_ba=rejected_first if as_given else chosen_first,
        masses=tuple(m for m in masses if m is not None),
        prompt_tokens=int(_number(extra, "prompt_tokens") or 0),
        completion_tokens=int(_number(extra, "completion_tokens") or 0),
    )


def pair_key(pair: Pair) -> str:
    """Equal for a pair and its swap, whatever else is known of them."""
    return canonical(pair).id


def writers(extra: Mapping[str, Any]) -> set[str]:
    """The models that wrote a row's responses, as far as the row says."""
    return {str(extra[name]) for name in WRITER_COLUMNS if isinstance(extra.get(name), str) and extra[name]}


def _about(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": content_id(pair.prompt),
        "pair": pair_key(pair),
        "subset": subset_of(pair.extra),
        "best_of": best_of(pair.extra),
        "longer": length(pair.a) - length(pair.b),
        "formatted": formatting(pair.a) - formatting(pair.b),
    }


def _first(judgment: Judgment | None) -> float | None:
    return None if judgment is None else judgment.p_first


def _turned(p: float, as_given: bool) -> float:
    return p if as_given else 1.0 - p


def _number(extra: Mapping[str, Any], name: str) -> float | None:
    value = extra.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"column {name} holds {value!r}, which is no number")
    return float(value)
