"""The page of `rlaif eval judge`: what the labels of a judge are worth."""

from __future__ import annotations

from collections.abc import Sequence

from rlaif.report import plots
from rlaif.report.findings import Findings, section, table, unfinished
from rlaif.report.labels import gaps, mass_warnings, position_tile
from rlaif.report.page import Block, Figure, Figures, Section, Tile
from rlaif.report.public import own_scores
from rlaif.report.source import Facts, Source
from rlaif.report.wording import (
    decimal,
    estimate,
    figure,
    points,
    points_estimate,
    range_of,
    rate,
    rate_estimate,
    rate_range,
    whole,
)


def judge(source: Source) -> Findings:
    """The page of `rlaif eval judge`."""
    lead = "The labels of a judge held against those of people: agreement, biases, calibration."
    report = source.json("report.json")
    if report is None:
        return unfinished(source, "report.json", lead)
    found = report["variants"][0] if "variants" in report else report
    place, length = found["position"], found["length"]
    calibration, longer = found["calibration"], rate(found["longer_wins_agreement"])
    tiles = [
        Tile(
            rate(found["agreement"]["value"]),
            "agreement with people",
            f'on {whole(found["human_pairs"])} pairs; "the longer one wins" agrees on {longer}',
            rate_range(found["agreement"]),
        ),
        Tile(
            decimal(found["kappa"]["value"]), "Cohen's κ", "agreement beyond chance", range_of(found["kappa"])
        ),
        position_tile(place["same_position_rate"], place["first_share"]),
        Tile(
            points(length["excess"]),
            "length bias, points",
            "prefers the longer one by so much more than people",
        ),
        Tile(
            decimal(calibration["ece"]),
            "calibration error",
            f"expected, {calibration['ece_bins']} bins; Brier score {decimal(calibration['brier'])}, "
            f"a coin has {decimal(calibration.get('coin_brier'))}",
        ),
        Tile(figure(found["label_mass"]["mean"]), "label mass", "mean probability of all labels together"),
    ]
    if "variants" in report:
        tiles = [
            Tile(
                t.value,
                t.name,
                f"{found['name']}, the first variant" + (f"; {t.note}" if t.note else ""),
                t.interval,
            )
            for t in tiles
        ]
    parts = [
        *(_variants(report["variants"]) if "variants" in report else _agreement(report)),
        *_canaries(report.get("canaries")),
        *gaps(source, found, found["pairs"]),
    ]
    return Findings(
        lead=[lead, f"Judge: {report['judge']}. Data: {report.get('dataset') or report.get('labels')}."],
        tiles=tiles,
        sections=parts,
        absent=_absent(report, found),
        warnings=[*(report.get("lineage") or ()), *_mass_warnings(report)],
    )


def _mass_warnings(report: Facts) -> list[str]:
    if "variants" not in report:
        return mass_warnings(report["label_mass"]["mean"])
    named = ((f"the labels of {v['name']}", v["label_mass"]["mean"]) for v in report["variants"])
    return [warning for labels, mean in named for warning in mass_warnings(mean, labels)]


def _absent(report: Facts, found: Facts) -> list[str]:
    sentences = []
    if not found["position"]["pairs"]:
        sentences.append("Position bias: no pair was asked in both orders.")
    if found["label_mass"]["mean"] is None:
        sentences.append("Label mass: no label was read from token probabilities.")
    if "canaries" not in report:
        sentences.append("Resistance to attacks: it was not asked for (--canaries).")
    return sentences


def _agreement(report: Facts) -> list[Section]:
    subsets = [*report.get("subsets", ()), {"name": "all", **report}]
    names = [s["name"] for s in subsets]
    rows = [
        (s["name"], whole(s["human_pairs"]), rate_estimate(s["agreement"]), estimate(s["kappa"]),
         rate(s["longer_wins_agreement"]))
        for s in subsets
    ]  # fmt: skip
    longer = [{"value": s["longer_wins_agreement"]} for s in subsets]
    calibration = report["calibration"]
    figures = [
        Figure(
            "Agreement with people",
            "95 % bootstrap intervals over prompts, beside preferring the longer one. People tie "
            f"{report['human_ties']:,} pairs, which are left out."
            + (
                f" They have no majority on {report['no_majority']:,} more."
                if report.get("no_majority")
                else ""
            ),
            plots.estimates(
                names,
                [
                    plots.Group("judge", [s["agreement"] for s in subsets]),
                    plots.Group("the longer one", longer),
                ],
                "agreement",
                reference=0.5,
            ),
            plots.rows_size(len(names)),
        )
    ]
    if calibration["reliability"]:
        figures.append(
            Figure(
                "Calibration",
                "Of labels with a confidence, how often people agree; the larger the point, the more pairs.",
                plots.reliability(
                    {"judge": calibration["reliability"]}, "confidence of the judge", "people agree"
                ),
            )
        )
    leans = [
        (
            f"prefers {what}",
            whole(f["pairs"]),
            rate(f["judge"]),
            rate(f["people"]),
            points(f["excess"]),
            rate(f["errors"]),
        )
        for what, f in (
            ("the longer one", report["length"]),
            ("the more formatted one", report["formatting"]),
        )
        if f["pairs"]
    ]
    parts = section(
        "Agreement and calibration",
        Figures(figures),
        table("Agreement by subset", ("subset", "pairs", "agreement, %", "κ", "longer wins"), rows),
        *own_scores(report),
        _annotators(report.get("annotators") or ()),
        _orders(report.get("orders")),
        table("Biases", ("", "pairs", "judge", "people", "excess, points", "of its errors"), leans,
              "Excess: judge less people, on the pairs that people decided; 0 is unbiased."),
    )  # fmt: skip
    if "calibrated" in report:
        c = report["calibrated"]
        before, after = c["before"], c["after"]
        parts += section(
            "Calibrated",
            table(
                f"{c['method'].capitalize()} map, cross-validated on {c['pairs']:,} pairs",
                ("", "before", "after"),
                [
                    (name, decimal(before[key]), decimal(after[key]))
                    for name, key in (
                        ("Brier score", "brier"),
                        ("calibration error", "ece"),
                        ("log loss", "log_loss"),
                    )
                ],
            ),
        )
    return parts


def _annotators(lines: Sequence[Facts]) -> Block | None:
    """Agreement with single annotators, and of these among themselves."""
    heads = (
        "votes of", "votes", "with ties, %", "decided", "without ties, %", "people with ties, %",
        "people without ties, %",
    )  # fmt: skip
    rows = [
        (
            line["name"],
            whole(line["votes"]),
            rate_estimate(line["judge"]["with_ties"]),
            whole(line["judge"]["without_ties"]["over"]),
            rate_estimate(line["judge"]["without_ties"]),
            *(rate_estimate(line["people"][setup]) for setup in ("with_ties", "without_ties")),
        )
        for line in lines
    ]
    note = (
        "With ties, a tie must be met by a tie, and two orders that contradict each other are one; chance is 33 %. "
        "Without ties, only what both decided counts; chance is 50 %. People: pairs of annotators of the same pair."
    )
    return table("Agreement with single annotators", heads, rows, note)


def _orders(found: Facts | None) -> Block | None:
    """What averaging both orders changes."""
    if not found or not found["pairs"]:
        return None
    rows = [
        (what, rate_estimate(found[name]))
        for what, name in (
            ("both orders averaged", "both"),
            ("a single order", "one"),
            ("the order that shows the preferred response first", "preferred_first"),
            ("the order that shows it second", "preferred_second"),
        )
    ]
    return table(f"Agreement by order, on {found['pairs']:,} pairs", ("label of", "agreement, %"), rows)


def _variants(variants: Sequence[Facts]) -> list[Section]:
    names = [v["name"] for v in variants]
    rows = [
        (v["name"], rate_estimate(v["agreement"]),
         "the first" if v["difference"] is None else points_estimate(v["difference"]), estimate(v["kappa"]),
         rate(v["position"]["same_position_rate"]), whole(v["labelled"]))
        for v in variants
    ]  # fmt: skip
    return section(
        "Ways of asking",
        Figures(
            [
                Figure(
                    "Agreement with people by variant",
                    f"On {variants[0]['human_pairs']:,} pairs, 95 % bootstrap intervals over prompts. Differences "
                    "on the same pairs (in the table) vary less than these.",
                    plots.estimates(
                        names,
                        [plots.Group("agreement", [v["agreement"] for v in variants])],
                        "agreement",
                        reference=0.5,
                    ),
                    plots.rows_size(len(names)),
                )
            ]
        ),
        table(
            "Variants",
            ("variant", "agreement, %", "against the first, points", "κ", "same position", "labelled"),
            rows,
        ),
    )


def _canaries(found: Facts | None) -> list[Section]:
    if not found:
        return []
    worst = sorted(found["attacks"], key=lambda a: -(a["shift"]["value"] or 0.0))
    rows = [
        (
            a["name"],
            a["family"],
            rate(a["win_rate"]),
            points_estimate(a["shift"]),
            points(a["probability_shift"]),
            whole(a["guarded"]),
        )
        for a in worst
    ]
    shown = worst[:12]
    return section(
        "Attacks",
        Figures(
            [
                Figure(
                    "What attacks gain",
                    "Shift of the win rate of a rejected response that is made into an attack; it wins "
                    f"{rate(found['win_rate'])} of {found['pairs']:,} pairs as it is. The {len(shown)} worst of "
                    f"{len(worst)}.",
                    plots.estimates(
                        [a["name"] for a in shown],
                        [plots.Group("shift", [a["shift"] for a in shown])],
                        "shift of the win rate",
                        reference=0,
                    ),
                    plots.rows_size(len(shown)),
                )
            ]
        ),
        table(
            "All attacks",
            ("attack", "family", "win rate", "shift, points", "probability, points", "ruled by a guard"),
            rows,
        ),
    )
