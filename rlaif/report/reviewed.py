"""What people said of a run's labels in `rlaif review`, whose figures lie in a folder of the run."""

from __future__ import annotations

from rlaif.report.findings import section, table
from rlaif.report.page import Block, Prose, Section
from rlaif.report.source import Facts, Source
from rlaif.report.wording import estimate, rate_estimate, whole

MODES = {"review": "preferences", "review-grades": "grades", "review-ranking": "rankings"}
"""Folders of the marks of each mode, by default."""

_MARKS = {
    "blind": "made without seeing the label",
    "sample": "of these, on a random sample of the rows",
    "all": "all marks",
}


def reviewed(source: Source) -> list[Section]:
    """Agreement of people with the labels, for each mode of review that the run has; none without."""
    blocks: list[Block | None] = []
    for folder, what in MODES.items():
        if (found := source.json(f"{folder}/report.json")) is not None:
            heads = ("marks", "pairs", "agreement with the labels, %", "Cohen's κ")
            blocks += [_summary(found, what), table(f"Marks: {what}", heads, _agreement(found))]
    return section("What people said of the labels", *blocks)


def _summary(found: Facts, what: str) -> Prose:
    sentences = [
        f"At the end of the last `rlaif review` there were {found['marked']:,} {what} of "
        f"{', '.join(found['annotators']) or 'nobody'}, {found['bad']:,} of them rows marked as bad."
    ]
    scores, people = found["scores"], found["people"]
    if scores["responses"]:
        sentences.append(
            f"Rank correlation with the scores: {estimate(scores)}, {scores['responses']:,} responses."
        )
    if people["over"]:
        sentences.append(f"Annotators said the same in {rate_estimate(people)} % of {people['over']:,}.")
    return Prose(" ".join(sentences))


def _agreement(found: Facts) -> list[tuple[str | None, ...]]:
    return [
        (name, whole(one["human_pairs"]), rate_estimate(one["agreement"]), estimate(one["kappa"]))
        for key, name in _MARKS.items()
        if (one := found["agreement"][key])["human_pairs"]
    ]
