"""What a study of the laboratory is, and what it reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from rlaif.agreement import estimate_mean
from rlaif.report.page import Section, Table
from rlaif.storage import write_atomic
from rlaif.tables import Found, interval, number
from tinyworld.gold import gold_prefers
from tinyworld.pairs import WRITERS, Writer, decided
from tinyworld.stages import Phase

GOLD_PAIRS = "gold-pairs.jsonl"
"""Pairs that gold has labelled, in a seed's folder; see `write_gold_pairs`."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything.

    Attributes:
        num_prompts: posts to label and to train on.
        num_eval_prompts: unseen posts on which policies are compared.
        num_pairs: pairs that gold has labelled.
        max_steps: steps of every training run of a policy, instead of those of its settings.
    """

    num_prompts: int
    num_eval_prompts: int
    num_pairs: int
    max_steps: int | None = None


class Study(Protocol):
    """One question, answered by commands. `folder` is that of a seed, shared with the other studies of a run."""

    @property
    def name(self) -> str:
        """For the command line and for files."""

    @property
    def title(self) -> str:
        """A heading."""

    def prepare(self, folder: Path, seed: int, sizes: Sizes) -> None:
        """Write the data of one seed, the same however often it is called.

        Raises:
            StorageError: what stands in the folder was begun with other settings.
        """

    def plan(self, folder: Path, seed: int, sizes: Sizes) -> list[Phase]:
        """The commands of one seed, in order."""

    def report(self, folders: Mapping[int, Path]) -> Sequence[Section]:
        """What the finished seeds found, as sections of a page; `folders` has that of each.

        Raises:
            DataError: a run's file is missing or unreadable.
        """


def beside(rows: Sequence[tuple[str, str, str]], note: str = "") -> Table:
    """A table of (what, what the paper published, what was found here); `note` says what the numbers are."""
    return Table("Beside the paper", ("", "paper", "here"), rows, note)


def over_seeds(found: Sequence[Found]) -> dict[str, Any]:
    """Mean of the seeds' estimates, with a 95 % bootstrap interval over seeds; of one seed, its own interval."""
    if len(found) == 1:
        return dict(found[0])
    values = [estimate["value"] for estimate in found]
    if None in values:
        return {"value": None, "low": None, "high": None}
    return dict(estimate_mean(values))


def mean_over_seeds(values: Sequence[float]) -> str:
    """The mean of a number that each seed has, with a 95 % bootstrap interval over seeds; of one seed, the number."""
    if len(values) == 1:
        return number(values[0])
    return interval(estimate_mean(values))


def gold_pairs(writer: Writer, n: int, seed: int) -> Iterator[dict[str, object]]:
    """`n` pairs that gold does not tie, as rows of a dataset with human labels; other pairs for every seed."""
    for post, a, b in islice(decided(writer, 1_000_000 * seed), n):
        label = 1 if gold_prefers(post, a, b) else 2
        yield {"prompt": post, "response_a": a, "response_b": b, "label": label}


def write_gold_pairs(folder: Path, seed: int, sizes: Sizes) -> None:
    """Write `GOLD_PAIRS`: summaries as the embedded policy writes them, and which of two gold prefers."""
    rows = gold_pairs(WRITERS["so_so"], sizes.num_pairs, seed)
    write_atomic(folder / GOLD_PAIRS, "".join(json.dumps(row) + "\n" for row in rows))
