"""Judges without a model: what a label costs nothing to beat."""

from __future__ import annotations

from typing import Literal

from labeler.audit.biases import formatting, length
from rlaif.types import Pair, Preference

Baseline = Literal["longer", "shorter", "formatted"]


class BaselineJudge:
    """Prefers the longer, the shorter or the more formatted response; equal ones are a tie.

    Args:
        kind: which of them.
    """

    def __init__(self, kind: Baseline) -> None:
        self.kind: Baseline = kind

    @property
    def name(self) -> str:
        """The rule's name, e.g. `baseline:longer`."""
        return f"baseline:{self.kind}"

    async def judge_pair(self, pair: Pair) -> Preference:
        """A sure label, or 1/2; no model is asked."""
        measure = formatting if self.kind == "formatted" else length
        more = measure(pair.a) - measure(pair.b)
        if self.kind == "shorter":
            more = -more
        return Preference(pair, 0.5 if more == 0 else float(more > 0), judge=self.name)
