"""The pages of `rlaif label scores`, `rlaif label revise` and `rlaif sample`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from rlaif.report import plots
from rlaif.report.findings import Findings, section, table, unfinished
from rlaif.report.labels import EXAMPLES, NO_PRICE, gaps, least_mass, mass_warnings, spread_out, tokens_used
from rlaif.report.page import Block, Example, Figure, Figures, Text, Tile
from rlaif.report.reviewed import reviewed
from rlaif.report.source import Facts, Source
from rlaif.report.wording import (
    count_rows,
    decimal,
    estimate,
    figure,
    rate,
    rate_estimate,
    text_of,
    usd,
    whole,
)

SCORES, CANDIDATES, REVISIONS = "scores.parquet", "candidates.parquet", "revisions.parquet"


def scores(source: Source) -> Findings:
    """The page of a run that scored responses."""
    lead = "Scores of a judge: the expectation over the probabilities of the rubric's levels."
    report = source.json("report.json")
    if report is None:
        return unfinished(source, "report.json", lead)
    values, lengths, masses = array("d"), array("d"), array("d")
    for row in source.scan(SCORES, ("score", "label_mass", "response")):
        values.append(row["score"])
        lengths.append(len(row["response"]))
        if row["label_mass"] is not None:
            masses.append(row["label_mass"])
    quartiles = report.get("score_quartiles")
    tiles = [
        Tile(whole(report.get("scored")), "responses scored",
             f"of {whole(report.get('responses'))}; {sum((report.get('unlabelled') or {}).values()):,} have no score"),
        Tile(decimal(report.get("score_mean")), "mean score",
             "" if not quartiles else f"quartiles {', '.join(f'{q:.2f}' for q in quartiles)}"),
        Tile(figure(report.get("label_mass_mean")), "label mass", least_mass(report)),
        Tile(usd(report.get("cost_usd")), "cost", tokens_used(report)),
    ]  # fmt: skip
    figures, examples = [], []
    if values:
        edges, counts = plots.counted(values)
        figures.append(
            Figure(
                "Distribution of scores",
                f"Of {len(values):,} responses.",
                plots.histogram(edges, [counts], "score", "responses"),
            )
        )
        bands = _bands(lengths, values)
        figures.append(
            Figure(
                "Score by length",
                "Mean score of responses in ten groups of equal size, from the shortest to the longest.",
                plots.curves(
                    [plots.Curve("score", *bands)], "characters of the response (mean)", "mean score"
                ),
            )
        )
        if masses:
            edges, counts = plots.counted(masses, 20, min(0.0 if min(masses) < 0.9 else 0.9, *masses), 1.0)
            figures.append(
                Figure(
                    "Label mass",
                    "Probability of all levels together: the rest is what the judge wanted to say instead.",
                    plots.histogram(edges, [counts], "probability of all levels", "responses"),
                )
            )
        order = sorted(range(len(values)), key=lambda k: -values[k])
        for k, row in enumerate(source.picked(SCORES, spread_out(order, EXAMPLES))):
            texts = [
                Text("prompt", text_of(row["prompt"])),
                Text("response", row["response"], f"score {row['score']:.3f}"),
            ]
            if row.get("rationale") is not None:
                texts.append(Text("rationale", row["rationale"]))
            examples.append(Example(f"Score {row['score']:.2f}", texts, open=k == 0))
    return Findings(
        lead=[lead, f"Judge: {report.get('judge')}. Data: {source.config.get('dataset', 'not on record')}."],
        tiles=tiles,
        sections=[
            *section("What the scores look like", Figures(figures) if figures else None),
            *section("By who answered, and what was asked", *_tallies(report.get("tables") or ())),
            *reviewed(source),
            *gaps(source, report, report.get("responses")),
            *section("From the highest to the lowest", *examples),
        ],
        absent=[] if report.get("cost_usd") is not None else [NO_PRICE],
        warnings=mass_warnings(report.get("label_mass_mean")),
    )


def _tallies(entries: Sequence[Facts]) -> list[Block | None]:
    """Means, and shares of the classes that a rubric names, a table for each column of the questions."""
    blocks: list[Block | None] = []
    for column in dict.fromkeys(entry["column"] for entry in entries):
        rows = [entry for entry in entries if entry["column"] == column]
        names = list(rows[0]["shares"])
        heads = (
            "model",
            column or "of",
            "answers",
            "without a score",
            *(f"{n}, %" for n in names),
            "mean score",
        )
        cells = [
            (
                entry["model"] or "all",
                entry["name"] or "all questions",
                whole(entry["answers"]),
                whole(entry["unscored"]),
                *(rate_estimate(entry["shares"][name]) for name in names),
                estimate(entry["score"]),
            )
            for entry in rows
        ]
        title = f"By {column}" if column else "All answers"
        blocks.append(table(title, heads, cells, "95 % intervals over questions."))
    return blocks


def _bands(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float | None]]:
    """Means of x and of y in ten groups of equal size by x."""
    order = sorted(range(len(x)), key=lambda k: x[k])
    n = min(10, len(order))
    groups = [order[k * len(order) // n : (k + 1) * len(order) // n] for k in range(n)]
    return (
        [sum(x[k] for k in group) / len(group) for group in groups],
        [sum(y[k] for k in group) / len(group) for group in groups],
    )


def candidates(source: Source) -> Findings:
    """The page of a run that sampled responses."""
    lead = "Several responses to each prompt, sampled from a policy. Each is a function of its recorded seed."
    report = source.json("report.json")
    if report is None:
        return unfinished(source, "report.json", lead)
    by_model: dict[str, array[float]] = {}
    distinct, groups = array("d"), 0
    for row in source.scan(CANDIDATES, ("completions",)):
        groups += 1
        texts = [one["response"] for one in row["completions"]]
        if len(texts) > 1:
            distinct.append(len(set(texts)) / len(texts))
        for one in row["completions"]:
            by_model.setdefault(one["model"] or "not on record", array("d")).append(len(one["response"]))
    tiles = [
        Tile(whole(report.get("responses")), "responses", f"to {whole(report.get('prompts'))} prompts"),
        Tile(
            rate(sum(distinct) / len(distinct)) if distinct else None, "distinct",
            "share of different responses among those to one prompt",
        ),
        Tile(whole(sum((report.get("unlabelled") or {}).values())), "could not be had"),
        Tile(usd(report.get("cost_usd")), "cost", tokens_used(report)),
    ]  # fmt: skip
    figures = []
    if by_model:
        figures.append(
            Figure(
                "Length of the responses",
                "Share of responses by their characters"
                + (", a line for each policy." if len(by_model) > 1 else "."),
                plots.distributions(by_model, "characters"),
            )
        )
    examples = [
        Example(
            f"{len(row['completions'])} responses to one prompt",
            [
                Text("prompt", text_of(row["prompt"])),
                *(
                    Text("response", c["response"], f"{c['model']}, ended by {c['finish_reason']}")
                    for c in row["completions"]
                ),
            ],
            open=k == 0,
        )
        for k, row in enumerate(source.picked(CANDIDATES, spread_out(range(groups), EXAMPLES)))
    ]
    heads = ("reason", "responses", "share")
    total = report.get("responses")
    return Findings(
        lead=[lead],
        tiles=tiles,
        sections=[
            *section(
                "What the responses look like",
                Figures(figures) if figures else None,
                table("Ended by", heads, count_rows(report.get("finish_reason"), total)),
                table("Could not be had", heads, count_rows(report.get("unlabelled"))),
                table("Prompts that could not be read", heads, count_rows(report.get("quarantined"))),
            ),
            *section("Responses", *examples),
        ],
        absent=[
            *(
                []
                if source.has(CANDIDATES)
                else [f"Responses: there is no {CANDIDATES}; answers to all turns are in answers.jsonl."]
            ),
            *([] if report.get("cost_usd") is not None else [NO_PRICE]),
        ],
    )


def revisions(source: Source) -> Findings:
    """The page of a run that had responses criticised and revised."""
    lead = "Responses criticised by a principle and revised, round by round."
    report = source.json("report.json")
    if report is None:
        return unfinished(source, "report.json", lead)
    before, after = array("d"), array("d")
    for row in source.scan(REVISIONS, ("initial", "completion")):
        before.append(len(row["initial"]))
        after.append(len(text_of(row["completion"])))
    tiles = [
        Tile(whole(report.get("revised")), "responses revised",
             f"of {whole(report.get('responses'))}; {sum((report.get('unlabelled') or {}).values()):,} could not be"),
        Tile(whole(report.get("unchanged")), "unchanged", "the revision is the initial response"),
        Tile(whole(report.get("revision_chars_mean")), "characters after",
             f"mean; {whole(report.get('initial_chars_mean'))} before"),
        Tile(usd(report.get("cost_usd")), "cost", tokens_used(report)),
    ]  # fmt: skip
    figures, examples = [], []
    if before:
        lengths = {"before": before, "after": after}
        figures.append(
            Figure(
                "Length before and after",
                "Share of responses by their characters.",
                plots.distributions(lengths, "characters"),
            )
        )
        picked = source.picked(REVISIONS, spread_out(range(len(before)), EXAMPLES))
        for k, row in enumerate(picked):
            texts = [Text("prompt", text_of(row["prompt"])), Text("initial response", row["initial"])]
            for number, one in enumerate(row["rounds"], 1):
                if one["critique"] is not None:
                    texts.append(Text(f"critique {number}", one["critique"], one["principle"] or ""))
                texts.append(Text(f"revision {number}", one["revision"]))
            examples.append(Example("A revision", texts, open=k == 0))
    return Findings(
        lead=[lead],
        tiles=tiles,
        sections=[
            *section("What changed", Figures(figures) if figures else None),
            *gaps(source, report, report.get("responses")),
            *section("Revisions", *examples),
        ],
        absent=[] if report.get("cost_usd") is not None else [NO_PRICE],
    )
