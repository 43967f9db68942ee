"""The pages of `rlaif label pairs` and `rlaif label rank`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.measures import expected_calibration_error, reliability
from rlaif.report import plots
from rlaif.report.findings import Findings, section, table, unfinished
from rlaif.report.page import Block, Example, Figure, Figures, Section, Text, Tile
from rlaif.report.reviewed import reviewed
from rlaif.report.source import Facts, Row, Source, read_lines
from rlaif.report.wording import (
    count_rows,
    decimal,
    figure,
    rate,
    rate_range,
    text_of,
    tokens,
    usd,
    whole,
)
from rlaif.types import LOW_LABEL_MASS

NO_PRICE = "Cost: no price was told (--price_per_million)."
SUSPECTS, EXAMPLES, OPEN_ROWS = 10, 4, 5
PREFERENCES, RANKINGS = "preferences.parquet", "rankings.parquet"


def preferences(source: Source) -> Findings:
    """The page of a run that compared pairs."""
    lead = (
        "Soft preferences of a judge between two responses: the probability that the chosen one is preferred, read "
        "in both orders and averaged."
    )
    report = source.json("report.json")
    if report is None:
        return unfinished(source, "report.json", lead)
    validation = source.json("validation.json")
    wanted = ("chosen_prob", "chosen_prob_first", "chosen_prob_second", "label_mass_ab", "label_mass_ba",
              "human_chosen_prob", "source")  # fmt: skip
    columns = source.columns(PREFERENCES, wanted)
    absent = []
    if report.get("human_agreement") is None:
        absent.append(
            "Agreement with people: the input had no labels of people. `rlaif eval judge` measures it."
        )
    if report.get("cost_usd") is None:
        absent.append(NO_PRICE)
    if validation is None:
        absent.append("Suspicious rows: the run has no validation.json.")
    if columns is None:
        absent.append(f"Single labels: the run has no {PREFERENCES}.")
    return Findings(
        lead=[lead, f"Judge: {report.get('judge')}. Data: {source.config.get('dataset', 'not on record')}."],
        tiles=preference_tiles(report),
        sections=[
            *section("What the labels look like", _preference_figures(columns, report)),
            *_leaderboard(report.get("leaderboard")),
            *reviewed(source),
            *gaps(source, report, report.get("pairs")),
            *_suspects(source, validation),
            *_judgments(source, columns),
            *_rankings(source),
        ],
        absent=absent,
        warnings=[*(report.get("lineage") or ()), *mass_warnings(report.get("label_mass_mean"))],
    )


def preference_tiles(report: Facts) -> list[Tile]:
    """The figures to see first of preferences."""
    unlabelled = sum((report.get("unlabelled") or {}).values())
    tiles = [
        Tile(
            whole(report.get("labelled")),
            "pairs labelled",
            f"of {whole(report.get('pairs'))}; {unlabelled:,} have no label",
        ),
        Tile(rate(report.get("order_agreement")), "orders agree", "both orders prefer the same response"),
        position_tile(report.get("same_position_rate"), report.get("first_share")),
        Tile(figure(report.get("label_mass_mean")), "label mass", least_mass(report)),
        Tile(
            rate(report.get("longer_preferred_share")),
            "longer one preferred",
            "of pairs that differ in length",
        ),
    ]
    if report.get("human_agreement") is not None:
        low, high = report["human_agreement_95"]
        found = {"low": low, "high": high}
        tiles.append(
            Tile(
                rate(report["human_agreement"]),
                "agreement with people",
                f"on {whole(report['human_pairs'])} pairs; Cohen's κ {decimal(report['human_kappa'])}",
                rate_range(found),
            )
        )
    tiles.append(Tile(usd(report.get("cost_usd")), "cost", tokens_used(report)))
    if report.get("suspicious") is not None:
        tiles.append(
            Tile(
                whole(report["suspicious"]),
                "rows to look at",
                f"of {whole(report.get('rows_written'))} written",
            )
        )
    return tiles


def position_tile(same: float | None, first: float | None) -> Tile:
    """Position bias: how often both orders prefer the same position, and how often that is the first."""
    of_these = "" if first is None else f", of these the first one in {rate(first)}"
    return Tile(rate(same), "position bias", f"both orders prefer the same position{of_these}")


def mass_warnings(mean: float | None, labels: str = "the labels") -> list[str]:
    """What to know of labels that hold little of the judge's probability on average."""
    if mean is None or mean >= LOW_LABEL_MASS:
        return []
    return [
        f"{labels[0].upper()}{labels[1:]} hold {figure(mean)} of the judge's probability on average: it wanted to "
        "say something else"
    ]


def least_mass(report: Facts) -> str:
    """What stands under the mean label mass."""
    least = report.get("label_mass_min")
    return "probability of all labels together" + ("" if least is None else f", at least {figure(least)}")


def tokens_used(report: Facts) -> str:
    """What stands under the cost."""
    cached = report.get("cached_tokens")
    note = f"{tokens(report.get('prompt_tokens'))} tokens read, {tokens(report.get('completion_tokens'))} written"
    return note + (f", {tokens(cached)} from a cache" if cached else "")


def _preference_figures(columns: Mapping[str, list[Any]] | None, report: Facts) -> Figures | None:
    if columns is None or not columns["chosen_prob"]:
        return None
    probs = columns["chosen_prob"]
    edges, counts = plots.counted(probs, 20, min(0.5, *probs), 1.0)
    figures = [
        Figure(
            "How sure the labels are",
            f"Soft labels of the {len(probs):,} rows written: 0.5 is a coin, 1 is certain.",
            plots.histogram(edges, [counts], "P(chosen preferred)"),
        )
    ]
    both = [
        (a, b)
        for a, b in zip(columns["chosen_prob_first"], columns["chosen_prob_second"], strict=True)
        if a is not None and b is not None
    ]
    if both:
        figures.append(
            Figure(
                "Agreement of both orders",
                "Each square is a group of pairs: the larger, the more of them (logarithmic). On the dotted "
                "diagonal both orders say the same; below it the response shown first gains.",
                plots.density(
                    [a for a, _ in both],
                    [b for _, b in both],
                    "P(chosen), shown first",
                    "P(chosen), shown second",
                ),
            )
        )
    masses = [m for name in ("label_mass_ab", "label_mass_ba") for m in columns[name] if m is not None]
    if masses:
        edges, counts = plots.counted(masses, 20, min(0.0 if min(masses) < 0.9 else 0.9, *masses), 1.0)
        figures.append(
            Figure(
                "Label mass",
                "Probability of all labels together, in each order: the rest is what the judge wanted to say instead. "
                f"{sum(m < 0.5 for m in masses):,} of {len(masses):,} readings lie below one half.",
                plots.histogram(edges, [counts], "probability of all labels", "readings"),
            )
        )
    judged = [
        (p, human)
        for p, human in zip(probs, columns["human_chosen_prob"], strict=True)
        if p is not None and human is not None
    ]
    if judged:
        p, human = [a for a, _ in judged], [b for _, b in judged]
        figures.append(
            Figure(
                "Calibration against people",
                f"Of labels with a confidence, how often people agree ({len(judged):,} rows; the larger the point, the "
                f"more of them). Expected calibration error {decimal(expected_calibration_error(p, human))}.",
                plots.reliability(
                    {"labels": [_bin(b) for b in reliability(p, human)]}, "confidence", "people agree"
                ),
            )
        )
    return Figures(figures)


def _bin(found: Any) -> dict[str, Any]:
    return {"confidence": found.confidence, "agreement": found.agreement, "count": found.count}


def _leaderboard(board: Sequence[Facts] | None) -> list[Section]:
    if not board:
        return []
    rows = [
        (s["name"], f"{s['elo']:.0f}", f"{s['elo_95'][0]:.0f} to {s['elo_95'][1]:.0f}", rate(s["win_rate"]),
         whole(s["comparisons"]))
        for s in board
    ]  # fmt: skip
    elo = [{"value": s["elo"], "low": s["elo_95"][0], "high": s["elo_95"][1]} for s in board]
    return section(
        "Leaderboard",
        Figures(
            [
                Figure(
                    "Elo of the models",
                    "From the soft labels, with 95 % bootstrap intervals over prompts.",
                    plots.estimates([s["name"] for s in board], [plots.Group("Elo", elo)], "Elo"),
                    plots.rows_size(len(board)),
                )
            ]
        ),
        table("Models", ("model", "Elo", "95 % interval", "wins", "comparisons"), rows),
    )


def gaps(source: Source, report: Facts, total: int | None) -> list[Section]:
    """What has no label and why, and how the labels were had."""
    rows = [
        (what, name, f"{count:,}", rate(count / total) if total else None)
        for what, counts in (
            ("labelled", report.get("sources")),
            ("ruled by a guard, without asking", report.get("guarded")),
            ("without a label", report.get("unlabelled")),
        )
        for name, count in (counts or {}).items()
    ]
    odd = {
        "ties": report.get("ties"),
        "rationales cut at their greatest length": report.get("truncated"),
        "readings whose probability is a bound": report.get("censored"),
        "votes missing from the jury": report.get("missing_votes"),
    }
    blocks: list[Block | None] = [
        table("What became of the input", ("", "how or why", "rows", "share"), rows),
        table(
            "Input rows that could not be read",
            ("reason", "rows", "share"),
            count_rows(report.get("quarantined")),
        ),
        table("Among the labels", ("", "count"), [(k, whole(v)) for k, v in odd.items() if v is not None]),
    ]
    path = source.folder / "unlabelled.jsonl"
    if path.is_file():
        for _, row in zip(range(OPEN_ROWS), read_lines(path), strict=False):
            blocks.append(_open_example(row))
    return section("Labels and gaps", *blocks)


def _open_example(row: Row) -> Example:
    names = {"response_a": "response A", "response_b": "response B", "response": "response"}
    texts = [Text("prompt", text_of(row.get("prompt")))]
    texts += [Text(title, str(row[name])) for name, title in names.items() if row.get(name) is not None]
    return Example(f"Without a label: {row.get('reason')}", texts, open=False)


def _suspects(source: Source, validation: Facts | None) -> list[Section]:
    """The rows to look at first, worst first."""
    if not validation or not validation.get("checks"):
        return []
    n = validation["rows"]
    checks = [
        (name, whole(check["rows"]), rate(check["share"]), check["meaning"])
        for name, check in validation["checks"].items()
    ]
    worst = validation["worst"][:SUSPECTS]
    whole_rows = dict(
        zip(
            [w["row"] for w in worst], source.picked(PREFERENCES, [w["row"] - 1 for w in worst]), strict=False
        )
    )
    examples = [
        Example(
            f"Row {w['row']}: " + ", ".join(f["check"].replace("_", " ") for f in w["findings"]),
            _judgment_texts(whole_rows.get(w["row"], w)),
            f"Suspicion {w['suspicion']:.2f}: " + "; ".join(f["why"] for f in w["findings"]) + ".",
            open=False,
        )
        for w in worst
    ]
    return section(
        "Look at these first",
        table(
            f"Found in {validation['suspicious']:,} of {n:,} rows",
            ("check", "rows", "share", "meaning"),
            checks,
        ),
        *examples,
    )


def _judgments(source: Source, columns: Mapping[str, list[Any]] | None) -> list[Section]:
    """Some judgments as the judge wrote them, from the surest to the least sure."""
    if columns is None:
        return []
    asked = [
        (p, k)
        for k, (p, how) in enumerate(zip(columns["chosen_prob"], columns["source"], strict=True))
        if p is not None and not str(how or "").startswith("guard:")
    ]
    chosen = spread_out(sorted(asked, reverse=True), EXAMPLES)
    rows = source.picked(PREFERENCES, [k for _, k in chosen])
    return section(
        "Judgments as they were written",
        *(
            Example(f"P(chosen preferred) {row['chosen_prob']:.3f}", _judgment_texts(row), open=k == 0)
            for k, row in enumerate(rows)
        ),
    )


def spread_out(items: Sequence[Any], most: int) -> list[Any]:
    """So many items at equal distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def _judgment_texts(row: Row) -> list[Text]:
    first, second = row.get("chosen_prob_first"), row.get("chosen_prob_second")
    human = row.get("human_chosen_prob")
    notes = [f"label {row['chosen_prob']:.3f}"]
    if first is not None and second is not None:
        notes.append(f"shown first {first:.3f}, shown second {second:.3f}")
    if human is not None:
        notes.append(f"people {human:.2f}")
    texts = [
        Text("prompt", text_of(row.get("prompt"))),
        Text("chosen", text_of(row.get("chosen")), "; ".join(notes)),
        Text("rejected", text_of(row.get("rejected"))),
    ]
    for order, which in (("ab", "first"), ("ba", "second")):
        if row.get(f"rationale_{order}") is not None:
            shown = "chosen" if row.get("chosen_is_a", True) == (order == "ab") else "rejected"
            texts.append(
                Text("rationale", row[f"rationale_{order}"], f"{which} order, the {shown} one is number 1")
            )
    return texts


def _rankings(source: Source) -> list[Section]:
    rows = source.picked(RANKINGS, [0, 1])
    return section(
        "Rankings",
        *(
            Example(
                "Best to worst",
                [
                    Text("prompt", text_of(row["prompt"])),
                    *(
                        Text(
                            f"{r['rank']}.",
                            r["response"],
                            f"{r['model'] or 'model not on record'}, strength {figure(r['strength'])}",
                        )
                        for r in row["ranking"]
                    ),
                ],
                open=False,
            )
            for row in rows
        ),
    )
