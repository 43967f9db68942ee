"""Preference pairs from scored samples: pure functions of contents, rewards and a seed.

A group is the G samples of one prompt. A pair names two of them by their index in the group. Which ones:

    best_worst   the highest reward and the lowest among other texts than the best; one pair per group
    max_min      the highest and the lowest reward, as in RLHFlow's `max_min` and HALOs' `max`: no pair if both say the
                 same, which a scorer that gives equal texts equal rewards makes impossible; one pair per group
    random       two samples of different text; one pair per group (online DPO has G = 2)
    threshold    every two samples of different text whose rewards differ by more than the threshold; up to
                 G (G - 1) / 2 pairs per group (InstructGPT, arXiv 2203.02155, learned from all of them)

The threshold holds for all of them: at or below it, two rewards are a (near-)tie and make no pair.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

PairStrategy = Literal["best_worst", "max_min", "random", "threshold"]


class SamplePair(NamedTuple):
    """A preference between two samples of one group.

    Attributes:
        group: index of the group (the prompt).
        chosen: index, within the group, of the sample with the higher reward.
        rejected: index, within the group, of the other; its content differs.
        chosen_prob: P(chosen preferred), in [0.5, 1].
        margin: reward of chosen minus reward of rejected, > 0, in normalised units.
    """

    group: int
    chosen: int
    rejected: int
    chosen_prob: float
    margin: float


@dataclass(frozen=True, slots=True)
class PairSet:
    """The pairs of all groups, and why the groups without a pair have none.

    `skipped` counts groups by reason: `too_few_rewards` (fewer than two), `identical` (the samples to be paired
    have the same content), `tie` (no margin is above the threshold).
    """

    pairs: list[SamplePair]
    skipped: Counter[str]


def soft_label(raw_chosen: float, raw_rejected: float, temperature: float) -> float:
    """P(chosen preferred) under Bradley-Terry: sigmoid((raw_chosen - raw_rejected) / temperature).

    A reward model's raw scores are Bradley-Terry logits already (temperature 1). A judge's are levels of a
    scale, where the temperature declares how many levels make one logit.

    Raises:
        ValueError: the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError("label temperature must be positive")
    x = (raw_chosen - raw_rejected) / temperature
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


class _Scored(NamedTuple):
    """A sample that has a reward."""

    reward: float
    raw: float
    content: Hashable
    place: int


def build_pairs(
    contents: Sequence[Sequence[Hashable]],
    rewards: Sequence[Sequence[float | None]],
    raws: Sequence[Sequence[float | None]],
    *,
    strategy: PairStrategy = "best_worst",
    threshold: float = 0.0,
    soft_labels: bool = True,
    label_temperature: float = 1.0,
    seed: int = 0,
) -> PairSet:
    """The pairs of each group, in the order of the groups.

    Args:
        contents: per group, what each sample says (token ids or text); samples with equal content never pair.
        rewards: per group, the normalised reward of each sample, or None if it is missing.
        raws: per group, the scorer's raw outputs, for the soft label; None exactly where the reward is None.
        strategy: which samples to pair, see the module. The first index wins among equal rewards.
        threshold: a pair whose margin is not above it is a (near-)tie and is dropped; >= 0, normalised units.
        soft_labels: take `soft_label` of the raw scores; otherwise chosen_prob is 1.
        label_temperature: of the soft label.
        seed: of `random`; each group draws from its own stream, so that groups do not depend on each other.

    Raises:
        ValueError: lengths differ, or the threshold is negative.
    """
    if threshold < 0:
        raise ValueError("the tie threshold must not be negative")
    pairs: list[SamplePair] = []
    skipped: Counter[str] = Counter()
    for group, (said, values, raw) in enumerate(zip(contents, rewards, raws, strict=True)):
        scored = [
            _Scored(value, raw_value, content, index)
            for index, (content, value, raw_value) in enumerate(zip(said, values, raw, strict=True))
            if value is not None and raw_value is not None
        ]
        if len(scored) < 2:
            skipped["too_few_rewards"] += 1
            continue
        candidates = [
            (a, b) if a.reward >= b.reward else (b, a)
            for a, b in _candidates(strategy, scored, f"{seed}/{group}")
            if a.content != b.content
        ]
        found = [
            SamplePair(
                group,
                chosen.place,
                rejected.place,
                soft_label(chosen.raw, rejected.raw, label_temperature) if soft_labels else 1.0,
                chosen.reward - rejected.reward,
            )
            for chosen, rejected in candidates
            if chosen.reward - rejected.reward > threshold
        ]
        if not found:
            skipped["tie" if candidates else "identical"] += 1
        pairs += found
    return PairSet(pairs, skipped)


def _candidates(
    strategy: PairStrategy, scored: Sequence[_Scored], stream: str
) -> list[tuple[_Scored, _Scored]]:
    """The two or more samples `scored` as pairs; the caller drops pairs of equal content."""
    if strategy == "threshold":
        return list(combinations(scored, 2))
    if strategy == "random":
        first = random.Random(stream).choice(scored)
        others = [s for s in scored if s.content != first.content]
        return [(first, random.Random(f"{stream}/other").choice(others))] if others else []
    best = max(scored, key=lambda s: s.reward)
    others = [s for s in scored if (s is not best if strategy == "max_min" else s.content != best.content)]
    return [(best, min(others, key=lambda s: s.reward))] if others else []
