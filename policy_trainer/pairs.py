"""Preference pairs from scored samples: pure functions of contents, rewards and a seed.

A group is the G samples of one prompt. A pair names two of them by their index in the group.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

PairStrategy = Literal["best_worst", "random"]


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
    """The pairs of all groups, at most one per group, and why the other groups have none.

    `skipped` counts groups by reason: `too_few_rewards` (fewer than two), `identical` (all rewarded samples
    have the same content), `tie` (the margin is not above the threshold).
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
    """At most one pair per group.

    Args:
        contents: per group, what each sample says (token ids or text); samples with equal content never pair.
        rewards: per group, the normalised reward of each sample, or None if it is missing.
        raws: per group, the scorer's raw outputs, for the soft label; None exactly where the reward is None.
        strategy: `best_worst` pairs the highest with the lowest reward; `random` two samples drawn with
            `seed`. The first index wins among equal rewards.
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
            (value, raw_value, content, index)
            for index, (content, value, raw_value) in enumerate(zip(said, values, raw, strict=True))
            if value is not None and raw_value is not None
        ]
        if len(scored) < 2:
            skipped["too_few_rewards"] += 1
            continue
        if strategy == "random":
            first = random.Random(f"{seed}/{group}").choice(scored)
            others = [s for s in scored if s[2] != first[2]]
            second = random.Random(f"{seed}/{group}/other").choice(others) if others else None
        else:
            first = max(scored, key=lambda s: s[0])
            others = [s for s in scored if s[2] != first[2]]
            second = min(others, key=lambda s: s[0]) if others else None
        if second is None:
            skipped["identical"] += 1
            continue
        chosen, rejected = (first, second) if first[0] >= second[0] else (second, first)
        margin = chosen[0] - rejected[0]
        if margin <= threshold:
            skipped["tie"] += 1
            continue
        p = soft_label(chosen[1], rejected[1], label_temperature) if soft_labels else 1.0
        pairs.append(SamplePair(group, chosen[3], rejected[3], p, margin))
    return PairSet(pairs, skipped)
