"""What a judge prefers besides quality: a position, length, formatting. Pure functions; numpy only.

Each is measured on the pairs that differ in it, and beside what people prefer there: longer answers are often
better, so a judge is biased only where it leans further than they do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlaif.agreement import agreements, mean

Floats = NDArray[np.float64]

_MARKDOWN = re.compile(
    r"^ {0,3}#{1,6} "  # heading
    r"|^\s*(?:[-*+]|\d{1,3}[.)]) "  # list item
    r"|^ {0,3}> "  # quotation
    r"|^\s*\|.*\|\s*$"  # row of a table
    r"|^ {0,3}```"  # code fence
    r"|\*\*[^*\n]+\*\*|__[^_\n]+__"  # bold
    r"|`[^`\n]+`",  # code
    re.MULTILINE,
)


def length(text: str) -> int:
    """Characters, without white space around the text."""
    return len(text.strip())


def formatting(text: str) -> int:
    """Marks of Markdown: headings, list items, quotations, table rows, code, bold."""
    return len(_MARKDOWN.findall(text))


@dataclass(frozen=True, slots=True)
class Lean:
    """How far a judge leans towards responses that have more of something.

    Attributes:
        pairs: pairs whose responses differ in it.
        judge: share of them in which the judge prefers the one with more, ties half.
        people: the same of people, over the pairs that people decided; NaN without such pairs.
        excess: judge minus people over the pairs that people decided; 0 for an unbiased judge.
        errors: of the pairs in which judge and people disagree, the share in which the judge took the one with more;
            1/2 for errors that have nothing to do with it. NaN without such pairs.
    """

    pairs: int
    judge: float
    people: float
    excess: float
    errors: float


def lean(p: ArrayLike, more: ArrayLike, human: ArrayLike) -> Lean:
    """Preference for responses that have more of something.

    Args:
        p: (N,) P(A preferred) by the judge.
        more: (N,) how much more A has than B; only the sign counts, 0 leaves a pair out.
        human: (N,) P(A preferred) by people; NaN where nobody said, 1/2 where they tie.
    """
    sign = np.sign(np.asarray(more, dtype=np.float64))
    differ = sign != 0
    toward = np.where(sign > 0, p, 1 - np.asarray(p, dtype=np.float64))[differ]
    theirs = np.where(sign > 0, human, 1 - np.asarray(human, dtype=np.float64))[differ]
    mine = agreements(toward, np.ones(len(toward)))
    decided = ~np.isnan(theirs) & (theirs != 0.5)
    people = (theirs[decided] > 0.5).astype(np.float64)
    wrong = decided & (toward != 0.5) & ((toward > 0.5) != (theirs > 0.5))
    return Lean(
        int(differ.sum()),
        mean(mine),
        mean(people),
        mean(mine[decided]) - mean(people),
        mean((toward[wrong] > 0.5).astype(np.float64)),
    )
