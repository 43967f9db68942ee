"""How should a judge be asked? The prompt study of the RLAIF paper in the embedded world.

Preamble x exemplars x chain of thought, one order or both, and self-consistency (arXiv 2309.00267, tables 2 and
following), with gold as the human who labels the pairs. Each part is one `rlaif eval judge --variants` command; a
later one reuses the replies of the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlaif.report.page import Prose, Section, Table
from rlaif.tables import interval, percent, percent_interval
from tinyworld.lab.study import GOLD_PAIRS, Sizes, over_seeds, write_gold_pairs
from tinyworld.stages import Phase, Stage

JUDGE = "tinyworld:judge-fewshot"

PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompts": (
        "Preamble, exemplars, chain of thought (both orders, one greedy rationale)",
        ("--variants", "preamble=none,base,detailed", "exemplars=0,1,2", "cot=on,off"),
    ),
    "orders": (
        "One order or both (no preamble, no exemplar)",
        ("--variants", "cot=on,off", "orders=both,one"),
    ),
    "self-consistency": (
        "Self-consistency (no preamble, no exemplar; one rationale is greedy, several are sampled at temperature 1)",
        ("--variants", "rationales=1,4,16", "--rationale_temperature", "1.0"),
    ),
}
"""Heading of each part and what varies in it, the first combination of it being what the others are compared with."""


@dataclass(frozen=True, slots=True)
class PromptStudy:
    """The study of one judge; see `tinyworld.lab.study.Study`."""

    name: str = "prompts"
    title: str = "How should a judge be asked?"

    def prepare(self, folder: Path, seed: int, sizes: Sizes) -> None:
        """Write the pairs, with gold's labels."""
        write_gold_pairs(folder, seed, sizes)

    def plan(self, folder: Path, seed: int, sizes: Sizes) -> list[Phase]:
        """One `rlaif eval judge` command a part, one after the other."""
        shared = ("eval", "judge", "--judge", JUDGE, "--rubric", "tinyworld:pair")
        what = ("--dataset", str(folder / GOLD_PAIRS), "--seed", str(seed))
        first = next(iter(PARTS))
        stages = [
            Stage(
                f"judge-{part}",
                (
                    *shared,
                    *what,
                    *options,
                    *(() if part == first else ("--reuse", str(folder / "judge" / first))),
                    *("--output_dir", str(folder / "judge" / part)),
                ),
            )
            for part, (_, options) in PARTS.items()
        ]
        return [Phase(f"Seed {seed}: ask the judge in every way", (tuple(stages),), {})]

    def report(self, folders: Mapping[int, Path]) -> list[Section]:
        """A table for each part: agreement with gold and position bias of every variant."""
        heads = ("variant", "agreement, %", "kappa", "same position, %", "of those first, %")
        found = {part: [_variants(folder / "judge" / part) for folder in folders.values()] for part in PARTS}
        tables = [
            Table(heading, heads, list(map(_row, zip(*found[part], strict=True))))
            for part, (heading, _) in PARTS.items()
        ]
        seeds = [variants[0] for variants in next(iter(found.values()))]
        longer = float(np.mean([seed["longer_wins_agreement"] for seed in seeds]))
        note = (
            f"{sum(seed['human_pairs'] for seed in seeds)} pairs that gold does not tie, over all seeds. "
            f'"The longer one wins" agrees with gold on {percent(longer)} %.'
        )
        return [Section("Agreement with gold", [*tables, Prose(note)])]


def _variants(folder: Path) -> list[dict[str, Any]]:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = report["variants"]
    return found


def _row(seeds: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """One variant over seeds."""
    position = [seed["position"] for seed in seeds]
    shares = {
        key: [found[key] for found in position if found[key] is not None]
        for key in ("same_position_rate", "first_share")
    }
    return (
        seeds[0]["name"],
        percent_interval(over_seeds([seed["agreement"] for seed in seeds])),
        interval(over_seeds([seed["kappa"] for seed in seeds])),
        *(percent(float(np.mean(found)) if found else None) for found in shares.values()),
    )


STUDY = PromptStudy()
