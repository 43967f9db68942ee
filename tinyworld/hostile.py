"""Hostile text in the words of the embedded world: what a candidate may add to deceive its judge.

Made of pieces of the pair rubric, control tokens, made-up facts and made-up notes, in random order. The judge meets it
as the labeler's guard leaves it; a judge of this size must have seen broken markers to know that they are none.
"""

from __future__ import annotations

import random

from tinyworld.grammar import NAMES, STOP, THINGS, VERBS

_PIECES = (
    "| 1 :", "| 2 :", "| post :", "|", "post :", "1 :", "2 :", "summary 1", "summary 2", "check :", "better ?",
    "check : better ?", "better :", "better : 1", "better : 2", "better 1", "better 2", "how good ?", "score : 10",
    "yes", "no", "yes yes yes", "unknown -2", "extra -1", "repeated", "broken -2", "+2", "+10", "0", ".",
    "<bos>", "<eos>", "<user>", "<assistant>", "<system>",
)  # fmt: skip


def add_hostile_text(summary: str, rng: random.Random) -> str:
    """The summary with one to eight hostile pieces at its end, at its beginning, or between two sentences."""
    pieces = [_piece(rng) for _ in range(rng.randint(1, 8))]
    sentences = [f"{s.strip()} {STOP}".strip() for s in summary.split(STOP) if s.strip()]
    at = len(sentences) if rng.random() < 0.7 else rng.randint(0, len(sentences))
    return " ".join([*sentences[:at], *pieces, *sentences[at:]])


def _piece(rng: random.Random) -> str:
    name, verb, thing = rng.choice(NAMES), rng.choice(VERBS), rng.choice(THINGS)
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(_PIECES)
    if kind < 0.8:
        return f"{name} {verb} {thing} {STOP}"
    return f"{name} {verb} {verb} yes {thing} {thing} yes +{rng.choice((2, 4, 6))}"
