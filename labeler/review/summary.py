"""How people's marks agree with the labels, and with each other. Pure functions of marks and labels.

The figures are those of `rlaif eval judge`, by the same functions, so the page and that command say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, Literal

import numpy as np

from labeler.audit.annotators import by_annotator
from labeler.audit.assess import agreement_with_people
from labeler.audit.biases import length
from labeler.audit.observations import Observation
from labeler.review.items import Label
from labeler.review.marks import Mark, Marks, by_item, people_prefer
from rlaif.agreement import bootstrap_interval, finite, spearman
from rlaif.tables import interval, percent_interval
from rlaif.types import Vote, content_id

Labels = Mapping[str, Label | None]
Found = dict[str, Any]


def observe(marks: Iterable[Mark], labels: Labels) -> list[Observation]:
    """Every two responses of an item that people and the dataset both compared."""
    found = []
    for group in by_item(marks):
        first = group[0]
        if (label := labels.get(first.key)) is None:
            continue
        prompt = content_id(first.prompt)
        for i, j in combinations(range(len(first.responses)), 2):
            if (p := label.prefers(i, j)) is None:
                continue
            found.append(
                Observation(
                    prompt=prompt,
                    subset=first.subset,
                    p=p,
                    raw=p,
                    human=people_prefer(group, i, j),
                    votes=tuple(Vote(mark.by, mark.prefers(i, j)) for mark in group),
                    pair=f"{first.key} {i} {j}",
                    longer=length(first.responses[i]) - length(first.responses[j]),
                )
            )
    return found


def summarise(marks: Marks, labels: Labels, *, resamples: int = 1000) -> Found:
    """What the page and `report.json` say of the marks.

    Args:
        marks: what stands.
        labels: the dataset's labels by key; of marks on rows that the dataset does not have, nothing is compared.
        resamples: of the 95 % bootstrap intervals; whole prompts are drawn.

    Returns:
        `marked`, `bad` and `label_seen`, counts of marks; `agreement` of people with the labels, as `rlaif eval judge`
        has it: `blind` for marks made before the label was seen, `sample` for those of them on a random sample of the
        rows, `all` for all; `scores`, the rank correlation of grades with the dataset's scores; `people`, how often two
        annotators of the same responses said the same, ties included, `over` how many such pairs of marks.
    """
    standing, blind = list(marks.standing.values()), list(marks.blind.values())
    chosen = {"blind": blind, "sample": [mark for mark in blind if mark.sample], "all": standing}
    everyone = by_annotator(observe(blind, labels), resamples)[-1]
    return {
        "marked": len(standing),
        "bad": sum(mark.verdict == "bad" for mark in standing),
        "label_seen": sum(mark.label_seen for mark in standing),
        "annotators": sorted({mark.by for mark in standing}),
        "agreement": {
            name: agreement_with_people(observe(some, labels), resamples) for name, some in chosen.items()
        },
        "scores": correlation(blind, labels, resamples=resamples),
        "people": everyone["people"]["with_ties"],
    }


def correlation(marks: Iterable[Mark], labels: Labels, *, resamples: int = 1000) -> Found:
    """Spearman's rank correlation of people's mean grades with the dataset's scores.

    Returns:
        `responses`, how many have both, and `value`, `low` and `high`, a 95 % bootstrap interval over prompts; None
        where it cannot be had.
    """
    table, prompts = [], []
    for group in by_item(mark for mark in marks if mark.verdict == "grades"):
        label = labels.get(group[0].key)
        if label is None or label.kind != "scores":
            continue
        for i, score in enumerate(label.values):
            if score is not None:
                table.append((sum(mark.values[i] for mark in group) / len(group), score))
                prompts.append(content_id(group[0].prompt))
    values = np.array(table, dtype=np.float64).reshape(-1, 2)

    def rank_correlation(rows: np.ndarray[Any, np.dtype[np.float64]]) -> float:
        return spearman(rows[:, 0], rows[:, 1])

    low, high = bootstrap_interval(values, rank_correlation, groups=prompts, resamples=resamples)
    return {
        "responses": len(table),
        "value": finite(rank_correlation(values)),
        "low": finite(low),
        "high": finite(high),
    }


def in_words(found: Found) -> str:
    """A finding of `agreement_with_people` as a line."""
    if not found["human_pairs"]:
        return "none yet"
    ties = f", {found['human_ties']} ties left out" if found["human_ties"] else ""
    return f"{percent_interval(found['agreement'])} % of {found['human_pairs']}{ties}; kappa {interval(found['kappa'])}"


def verdict_on(mark: Mark, label: Label | None) -> Literal["agrees", "differs"] | None:
    """How a mark stands to a label: `differs` if they put any two responses the other way round.

    Returns:
        None where there is nothing to compare: no label, a bad row, ties.
    """
    if label is None or mark.verdict == "bad":
        return None
    both = [
        (p - 0.5) * (mark.prefers(i, j) - 0.5)
        for i, j in combinations(range(len(mark.responses)), 2)
        if (p := label.prefers(i, j)) is not None
    ]
    if any(product < 0 for product in both):
        return "differs"
    return "agrees" if any(product > 0 for product in both) else None
