"""How the scores of several parts become one: a small language in YAML, and its arithmetic.

    parts:
      helpfulness: {model: runs/helpful}
      safety: {model: runs/safe, value: raw}
    rule:
      gate: {score: safety, below: -1.735, otherwise: {weighted_sum: {helpfulness: 1.0, safety: 0.2}}}

A rule is the name of a part or one of `weighted_sum`, `mean`, `min`, `pessimistic`, `scaled`, `gate` and
`length_penalty`, over parts or further rules. Every rule gives one number for finite parts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PartSpec(_Strict):
    """One scorer of a composite.

    Attributes:
        model: reward model, as for `--model`, or `./FOLDER` for one that lies beside the file; or
        judge: LLM, as for `--judge`.
        rubric: of the judge.
        cot: whether the judge writes a rationale.
        value: which of the part's numbers the rule reads: its reward by its own normalisation, or its raw score.
    """

    model: str | None = None
    judge: str | None = None
    rubric: str = "helpfulness-score"
    cot: bool = True
    value: Literal["normalized", "raw"] = "normalized"

    @model_validator(mode="after")
    def _one(self) -> PartSpec:
        if (self.model is None) == (self.judge is None):
            raise ValueError("give either model or judge")
        return self


class WeightedSum(_Strict):
    """Sum of weight times part."""

    weighted_sum: dict[str, float] = Field(min_length=1)


class Mean(_Strict):
    """Mean of an ensemble."""

    mean: tuple[Rule, ...] = Field(min_length=1)


class Min(_Strict):
    """The least: worst-case optimisation over an ensemble (Coste et al., arXiv 2310.02743)."""

    min: tuple[Rule, ...] = Field(min_length=1)


class Disagreeing(_Strict):
    """What `Pessimistic` reads: the members, and how many standard deviations are taken off."""

    of: tuple[Rule, ...] = Field(min_length=2)
    deviations: float = Field(ge=0)


class Pessimistic(_Strict):
    """Mean less a multiple of the standard deviation between the members, over n, not n - 1.

    Uncertainty-weighted optimisation (Coste et al., arXiv 2310.02743) takes off a multiple of the variance instead.
    """

    pessimistic: Disagreeing


class ScaledSpec(_Strict):
    """What `Scaled` reads."""

    of: Rule
    by: float = Field(gt=0)


class Scaled(_Strict):
    """A multiple of another rule's number.

    A comparison takes the difference of two numbers for log-odds, which a difference of normalised scores is not: their
    standard deviation brings it back.
    """

    scaled: ScaledSpec


class GateSpec(_Strict):
    """What `Gate` reads."""

    score: Rule
    below: float
    otherwise: Rule


class Gate(_Strict):
    """`score` itself where it is below the threshold, `otherwise` elsewhere.

    Llama 2 (arXiv 2307.09288, section 3.2.3) takes the safety score where its sigmoid is below 0.15, which is a raw
    score below -1.735, and the helpfulness score elsewhere.
    """

    gate: GateSpec


class LengthPenaltySpec(_Strict):
    """What `LengthPenalty` reads. Characters, since the parts' tokenizers differ."""

    of: Rule
    per_1000_characters: float = Field(ge=0)
    above: int = Field(default=0, ge=0)


class LengthPenalty(_Strict):
    """A score less a price for every character of the response beyond a free length."""

    length_penalty: LengthPenaltySpec


def _which(value: object) -> str | None:
    """Name of the rule, for error messages that speak of that rule alone."""
    if isinstance(value, str):
        return "part"
    keys = list(value) if isinstance(value, dict) else list(getattr(type(value), "model_fields", ()))
    return str(keys[0]) if len(keys) == 1 else None


Rule = Annotated[
    Annotated[str, Tag("part")]
    | Annotated[WeightedSum, Tag("weighted_sum")]
    | Annotated[Mean, Tag("mean")]
    | Annotated[Min, Tag("min")]
    | Annotated[Pessimistic, Tag("pessimistic")]
    | Annotated[Scaled, Tag("scaled")]
    | Annotated[Gate, Tag("gate")]
    | Annotated[LengthPenalty, Tag("length_penalty")],
    Discriminator(_which),
]

for _model in (
    Mean, Min, Disagreeing, Pessimistic, ScaledSpec, Scaled, GateSpec, Gate, LengthPenaltySpec, LengthPenalty,
):  # fmt: skip
    _model.model_rebuild()


class Scale(_Strict):
    """Normalisation of the composite's number; `source` says where it comes from."""

    center: float
    scale: float = Field(gt=0)
    source: str


class CompositeFile(_Strict):
    """The file behind a composite scorer."""

    parts: dict[str, PartSpec] = Field(min_length=1)
    rule: Rule
    normalization: Scale | None = None

    @model_validator(mode="after")
    def _known(self) -> CompositeFile:
        read = set(names(self.rule))
        if unknown := read - set(self.parts):
            raise ValueError(f"the rule reads {', '.join(sorted(unknown))}, which is no part")
        if unused := set(self.parts) - read:
            raise ValueError(f"the rule does not read {', '.join(sorted(unused))}")
        return self


def names(rule: Rule) -> Iterator[str]:
    """The parts that a rule reads."""
    if isinstance(rule, str):
        yield rule
    elif isinstance(rule, WeightedSum):
        yield from rule.weighted_sum
    else:
        for inner in _inner(rule):
            yield from names(inner)


def _inner(rule: Mean | Min | Pessimistic | Scaled | Gate | LengthPenalty) -> tuple[Rule, ...]:
    match rule:
        case Mean():
            return rule.mean
        case Min():
            return rule.min
        case Pessimistic():
            return rule.pessimistic.of
        case Scaled():
            return (rule.scaled.of,)
        case Gate():
            return (rule.gate.score, rule.gate.otherwise)
        case LengthPenalty():
            return (rule.length_penalty.of,)


def evaluate(rule: Rule, values: Mapping[str, float], characters: int) -> float:
    """The number that a rule makes.

    Args:
        rule: what to do.
        values: of every part that the rule reads, finite.
        characters: length of the response.
    """
    match rule:
        case str():
            return values[rule]
        case WeightedSum():
            return math.fsum(weight * values[name] for name, weight in rule.weighted_sum.items())
        case Scaled():
            return rule.scaled.by * evaluate(rule.scaled.of, values, characters)
        case Gate():
            gated = evaluate(rule.gate.score, values, characters)
            if gated < rule.gate.below:
                return gated
            return evaluate(rule.gate.otherwise, values, characters)
        case LengthPenalty():
            penalty = rule.length_penalty
            beyond = max(0, characters - penalty.above)
            return evaluate(penalty.of, values, characters) - penalty.per_1000_characters * beyond / 1000
    members = [evaluate(member, values, characters) for member in _inner(rule)]
    match rule:
        case Mean():
            return statistics.fmean(members)
        case Min():
            return min(members)
        case Pessimistic():
            return statistics.fmean(members) - rule.pessimistic.deviations * statistics.pstdev(members)
