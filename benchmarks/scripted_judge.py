"""The judge behind the scripted server: exact probabilities that are a pure function of the text judged.

Every candidate response of a benchmark carries a tag such as `[#09af3c21]`. What the judge thinks of a response is a
function of its tag alone, so a benchmark knows every label beforehand, whichever template the tags arrive in.
Standard library only: the server runs it in an environment of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b

TAG = re.compile(r"\[#([0-9a-f]{8})\]")
POSITION_BIAS = 0.4
"""Log-odds by which the judge prefers what it is shown first."""

FILLER = ("The", "Both", "I", "A", "Neither", "Well", "It", "Hmm")
"""Other tokens a judge may begin with; they hold the probability mass that the labels leave."""

RATIONALE = (
    "The one shown first answers the question but leaves a part of it open, while the one shown second says more "
    "about the reasons and is easier to follow, though it repeats itself at the end."
)


def fraction(*parts: object) -> float:
    """A number in [0, 1) that looks random and depends on the parts alone."""
    digest = blake2b("\x1f".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2.0**56


def tag(row: int, number: int) -> str:
    """The tag of response `number` of a row: 8 hexadecimal digits."""
    return blake2b(f"{row}:{number}".encode(), digest_size=4).hexdigest()


def tags_in(text: str) -> list[str]:
    """The distinct tags of a text in order of their first appearance."""
    return list(dict.fromkeys(TAG.findall(text)))


def first_wins(first: str, second: str) -> float:
    """P(the response shown first is preferred), from the two tags."""
    gap = 4.0 * (fraction("utility", first) - fraction("utility", second))
    return 1.0 / (1.0 + math.exp(-(gap + POSITION_BIAS)))


def pair_label(a: str, b: str) -> float:
    """P(A preferred): the mean of both orders, un-swapped (arXiv 2309.00267, section 2.1.1)."""
    return 0.5 * (first_wins(a, b) + 1.0 - first_wins(b, a))


def score_probs(only: str, levels: int = 10) -> list[float]:
    """Probabilities of the levels of a scale; they sum to 1."""
    centre = (levels - 1) * fraction("quality", only)
    weights = [math.exp(-0.5 * (level - centre) ** 2) for level in range(levels)]
    total = math.fsum(weights)
    return [w / total for w in weights]


def expected_score(only: str, levels: int = 10) -> float:
    """The expectation over levels 1, 2, ..., `levels`."""
    return math.fsum((i + 1) * p for i, p in enumerate(score_probs(only, levels)))


def unlucky(kind: str, key: object, share: float) -> bool:
    """Whether a row or request is among the share that a fault is to hit."""
    return share > 0.0 and fraction("fault", kind, key) < share


def row_key(tags: Sequence[str]) -> str:
    """What both orders of a pair have in common."""
    return "+".join(sorted(tags))


def service_time(judged: str, latency_s: float, straggler_share: float, straggler_factor: float) -> float:
    """Seconds in service of a judgement, whatever the request looks like."""
    return latency_s * (straggler_factor if unlucky("straggler", judged, straggler_share) else 1.0)


def label_probs(tags: Sequence[str], pair_labels: Sequence[str], levels: int) -> dict[str, float]:
    """The probabilities of the labels among themselves.

    Args:
        tags: two of a pair in the order shown, one of a single response; none for a probe.
        pair_labels: what stands for "the first" and "the second".
        levels: size of the scale for single responses.
    """
    if len(tags) >= 2:
        p = first_wins(tags[0], tags[1])
        return {pair_labels[0]: p, pair_labels[1]: 1.0 - p}
    if tags:
        return {str(i + 1): p for i, p in enumerate(score_probs(tags[0], levels))}
    return {label: 1.0 / len(pair_labels) for label in pair_labels}


def next_tokens(labels: Mapping[str, float], seed: object) -> dict[str, float]:
    """The distribution of the next token where a label is wanted; sums to 1.

    Each label is spelled in two ways, alone and after a space, and together they hold 90 to 99 % of the mass.
    """
    mass = 0.90 + 0.09 * fraction("mass", seed)
    tokens: dict[str, float] = {}
    for label, p in labels.items():
        tokens[label] = 0.75 * mass * p
        tokens[f" {label}"] = 0.25 * mass * p
    for i, word in enumerate(FILLER):
        tokens[word] = (1.0 - mass) * (2.0**-i if i == len(FILLER) - 1 else 2.0 ** -(i + 1))
    return tokens


def next_digit(labels: Mapping[str, float], written: str) -> dict[str, float]:
    """The distribution of the next token of a model with one token per digit; sums to 1.

    Args:
        labels: probabilities of the labels, which are numbers of one or two digits.
        written: the digit that stands already, or nothing.
    """
    if not written:
        first: dict[str, float] = {}
        for label, p in labels.items():
            first[label[0]] = first.get(label[0], 0.0) + p
        return next_tokens(first, "".join(labels))
    begun = math.fsum(p for label, p in labels.items() if label[0] == written)
    second = {label[1]: p / begun for label, p in labels.items() if label[0] == written and len(label) == 2}
    return {**second, "\n": 1.0 - math.fsum(second.values())}
