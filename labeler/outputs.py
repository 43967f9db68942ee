"""What a labeling run leaves behind beside its data file: the report, and the list of what stays open."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from labeler.journal import ASKED_AGAIN
from rlaif.errors import QualityError
from rlaif.storage import replacing, storing, write_atomic
from rlaif.types import LOW_LABEL_MASS

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
"""A conversation in the form that chat templates and TRL read."""


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `report.json`."""
    write_atomic(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def write_unlabelled(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Write `unlabelled.jsonl`, row by row: what has no answer, each with its reason. No file if nothing ever was.

    Yields:
        A function that takes the next row. The file appears, whole, when the block ends without an error.

    Raises:
        StorageError: the disk is full.
    """
    path = folder / "unlabelled.jsonl"
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def write(row: Mapping[str, Any]) -> None:
            nonlocal count
            count += 1
            with storing(path):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write
    if count == 0:
        path.unlink()


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_cell(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_cell, value)) + "]"
    return str(value)


def print_summary(title: str, report: Mapping[str, Any]) -> None:
    """Print the report on standard output, one fact per line."""
    print(title)
    width = max(map(len, report))
    for name, value in report.items():
        print(f"  {name:<{width}}  {_cell(value)}")


def warn_of_low_mass(mass: float | None, read: Path) -> None:
    """Say on stderr that a judge wanted to say something else than the labels.

    Args:
        mass: mean label mass, in [0, 1]; None where no label was read.
        read: where the rows can be seen.
    """
    if mass is not None and mass < LOW_LABEL_MASS:
        print(
            f"warning: the labels hold {mass:.2g} of the judge's probability on average: it wanted to say something "
            f"else; read {read} before using them",
            file=sys.stderr,
        )


def refuse_if_too_many_open(
    reasons: Mapping[str, int], total: int, allowed: float, folder: Path, what: str
) -> None:
    """Raise if too many rows stayed without an answer; everything is written by then.

    Args:
        reasons: number of open rows by reason.
        total: rows in all.
        allowed: share of `total` in [0, 1] that may stay open.
        folder: the run's directory.
        what: e.g. `pairs are unlabelled`.

    Raises:
        QualityError: the share is larger.
    """
    count = sum(reasons.values())
    if total and count / total > allowed:
        first = next(iter(reasons))
        raise QualityError(
            f"{count} of {total} {what} (most often: {first}); see {folder / 'unlabelled.jsonl'}. "
            f"The same command again {ASKED_AGAIN}; --max_unlabelled allows for more"
        )
