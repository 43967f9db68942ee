"""What makes a label suspicious, as `validation.md` has it, for one row; and what that tells. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable

from labeler.validation import (
    CHECKS,
    MEANINGS,
    Finding,
    Row,
    censored,
    low_label_mass,
    near_identical,
    truncated,
)

NAMES = tuple(MEANINGS)
"""Names of all findings; the place of a name is its bit in `flags`."""

TELLING = frozenset({"long_beats_short"})
"""Findings that tell which response the label prefers. The others say that something is wrong, not who won."""

_UNLABELLED = (near_identical,)
_SINGLE = (low_label_mass, censored, truncated)


def find(row: Row) -> tuple[Finding, ...]:
    """Everything suspicious of a row, worst first.

    Args:
        row: with columns of `preferences.parquet`, those of a score with `label_mass` as `label_mass_ab`. Checks of
            what is not there find nothing; without a `chosen_prob` the label is not looked at.
    """
    checks = CHECKS if row.get("chosen_prob") is not None else _UNLABELLED if "chosen" in row else _SINGLE
    found = [finding for check in checks if (finding := check(row)) is not None]
    return tuple(sorted(found, key=lambda f: -f.suspicion))


def flags(findings: Iterable[Finding]) -> int:
    """The names of findings as bits."""
    return sum({1 << NAMES.index(finding.check) for finding in findings})
