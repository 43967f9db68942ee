"""The pages of `rlaif train rm` and `rlaif eval rm`: what a reward model is worth, and how it was trained."""

from __future__ import annotations

from rlaif.report import plots
from rlaif.report.findings import Findings, section, table, unfinished
from rlaif.report.page import Block, Code, Figure, Figures, Section, Tile
from rlaif.report.public import own_scores
from rlaif.report.source import Facts, Source
from rlaif.report.wording import (
    count_rows,
    decimal,
    estimate,
    points_estimate,
    points_range,
    range_of,
    rate,
    rate_estimate,
    rate_range,
    whole,
)

CARD, FINDINGS, REPORT = "reward_model.json", "metrics.json", "report.md"
_CURVES = (
    ("Loss", "loss", "loss (nats)", "Mean over the comparisons of each logged step."),
    ("Accuracy on training pairs", "accuracy", "accuracy", "Of each logged step, before its update."),
    ("Norm of the gradient", "grad_norm", "norm", "Before clipping."),
    ("Learning rate", "learning_rate", "learning rate", ""),
)


def evaluated(source: Source) -> Findings:
    """The page of `rlaif eval rm`."""
    lead = "A reward model held against labels it was not trained on."
    found = source.json(FINDINGS)
    if found is None:
        return unfinished(source, FINDINGS, lead)
    return Findings(
        lead=[lead, _measured(found)], tiles=tiles(found), sections=worth(found), absent=_absent(found)
    )


def trained(source: Source) -> Findings:
    """The page of `rlaif train rm`: of one reward model, or of an ensemble."""
    lead = f"A reward model trained from {source.config.get('dataset', 'data that is not on record')}."
    curves = training_curves(source)
    card = source.json(CARD)
    if card is not None:
        found = card["metrics"]
        return Findings(
            lead=[lead, _measured(found)],
            tiles=[*tiles(found), Tile(whole(card.get("train_rows")), "training rows")],
            sections=[*worth(found), *curves],
            absent=_absent(found),
        )
    members = sorted(source.folder.glob("member-*/run.json"))
    if members:
        return _ensemble(source, [Source.read(path.parent) for path in members])
    unready = unfinished(source, CARD, lead)
    return Findings(lead=unready.lead, tiles=[], sections=curves, absent=unready.absent)


def _measured(found: Facts) -> str:
    return f"Version {found['version']}, measured on {found['measured_on']}."


def tiles(found: Facts) -> list[Tile]:
    """The figures to see first of a reward model."""
    calibration = found.get("calibration") or {}
    shown = []
    if "scores" in found:
        shown.append(
            Tile(
                decimal(found["scores"]["spearman"]["value"]),
                "rank correlation",
                f"Spearman, over {whole(found['scores']['answers'])} scored responses",
                range_of(found["scores"]["spearman"]),
            )
        )
    return [
        *shown,
        Tile(
            rate(found["accuracy"]["value"]),
            "held-out accuracy",
            f"on {whole(found['pairs'] - found['ties'])} pairs",
            rate_range(found["accuracy"]),
        ),
        Tile(
            points_estimate({"value": found["gain"]["value"]}),
            "points over length",
            f'more than "the longer one wins", which is right on {rate(found["longer_wins"])}',
            points_range(found["gain"]),
        ),
        Tile(
            decimal(found["log_loss"]), "log loss",
            f"nats; these labels allow {decimal(found['lowest_log_loss'])}, a coin has 0.693",
        ),
        Tile(
            decimal(calibration.get("ece")), "calibration error",
            f"expected, {calibration.get('ece_bins')} bins; Brier score {decimal(calibration.get('brier'))}, "
            f"a coin has {decimal(calibration.get('coin_brier'))}",
        ),
    ]  # fmt: skip


def _absent(found: Facts) -> list[str]:
    return (
        []
        if "subsets" in found
        else ["Accuracy by subset: the rows name no subsets (--subset_column of `rlaif eval rm`)."]
    )


def worth(found: Facts) -> list[Section]:
    """Accuracy, calibration and length of a reward model."""
    subsets = [*found.get("subsets", ()), {"name": "all", **found}]
    names = [s["name"] for s in subsets]
    figures = [
        Figure(
            "Accuracy",
            'With 95 % bootstrap intervals over prompts, beside "the longer one wins"; chance is 50 %.',
            plots.estimates(
                names,
                [
                    plots.Group("reward model", [s["accuracy"] for s in subsets]),
                    plots.Group("the longer one", [{"value": s["longer_wins"]} for s in subsets]),
                ],
                "accuracy",
                reference=0.5,
            ),
            plots.rows_size(len(names)),
        )
    ]
    bins = (found.get("calibration") or {}).get("reliability")
    if bins:
        figures.append(
            Figure(
                "Calibration",
                "Of pairs on which the model has a confidence, how often the labels agree; the larger the point, the "
                "more pairs.",
                plots.reliability(
                    {"reward model": bins}, "confidence: sigmoid of the difference", "labels agree"
                ),
            )
        )
    length = found["length"]
    sides = [
        (what, length[name])
        for what, name in (("longer", "longer_is_better"), ("shorter", "shorter_is_better"))
    ]
    if any(side["accuracy"] is not None for _, side in sides):
        figures.append(
            Figure(
                "Accuracy by length",
                "Accuracy where the preferred response is the longer one, and where it is the shorter one; a model "
                "that counts words is right on the first kind alone.",
                plots.estimates(
                    [f"the {what} one is better" for what, _ in sides],
                    [plots.Group("accuracy", [{"value": side["accuracy"]} for _, side in sides])],
                    "accuracy",
                    reference=0.5,
                ),
                plots.rows_size(2),
            )
        )
    rows = [
        (s["name"], whole(s["pairs"] - s["ties"]), rate_estimate(s["accuracy"]), rate(s["longer_wins"]),
         points_estimate(s["gain"]), decimal(s["log_loss"]), decimal(s["lowest_log_loss"]))
        for s in subsets
    ]  # fmt: skip
    correlations = [
        (what, decimal(length[name]["pearson"]), decimal(length[name]["spearman"]))
        for what, name in (
            ("score and characters, over responses", "score_characters"),
            ("difference of scores and of characters, within pairs", "pair_characters"),
            ("difference of scores and of tokens, within pairs", "pair_tokens"),
        )
    ]
    heads = (
        "subset",
        "pairs",
        "accuracy, %",
        "longer wins",
        "gain over length, points",
        "log loss",
        "lowest possible",
    )
    blocks: list[Block | None] = [
        Figures(figures) if found["pairs"] else None,
        table("Accuracy by subset", heads, rows) if found["pairs"] else None,
        *own_scores(found),
        table("Scores and length", ("correlation of", "Pearson", "Spearman"), correlations),
        table("Preferred response", ("", "pairs", "accuracy"),
              [(what, whole(side["pairs"]), rate(side["accuracy"])) for what, side in sides]),
        table("Left out: a response has no score", ("reason", "rows", "share"), count_rows(found.get("without_score"))),
    ]  # fmt: skip
    if "scores" in found:
        scores = found["scores"]
        blocks.insert(
            0,
            table(
                f"Against {scores['answers']:,} scores",
                ("", "value"),
                [
                    ("rank correlation (Spearman)", estimate(scores["spearman"])),
                    ("linear correlation (Pearson)", estimate(scores["pearson"])),
                    ("root mean squared error, points", decimal(scores["rmse"])),
                    ("of the mean score for everything", decimal(scores["label_std"])),
                ],
            ),
        )
    return section("What it is worth", *blocks)


def training_curves(source: Source) -> list[Section]:
    """How the training went."""
    figures = []
    for title, metric, label, caption in _CURVES:
        line = plots.curve(source.rows, metric)
        if line is not None:
            figures.append(Figure(title, caption, plots.curves([line], "step", label)))
    return section("Training", Figures(figures) if figures else None)


def _ensemble(source: Source, members: list[Source]) -> Findings:
    cards = {member.name: member.json(CARD) for member in members}
    names = list(cards)
    done = [None if card is None else card["metrics"] for card in cards.values()]
    rows = [
        (
            name,
            *(
                (None,) * 3
                if m is None
                else (rate_estimate(m["accuracy"]), decimal(m["log_loss"]), decimal(m["calibration"]["ece"]))
            ),
        )
        for name, m in zip(names, done, strict=True)
    ]
    losses = [
        line for member in members if (line := plots.curve(member.rows, "loss", member.name)) is not None
    ]
    figures = [
        Figure(
            "Accuracy of the members",
            "On the same held-out pairs, with 95 % bootstrap intervals.",
            plots.estimates(
                names,
                [plots.Group("accuracy", [None if m is None else m["accuracy"] for m in done])],
                "accuracy",
                reference=0.5,
            ),
            plots.rows_size(len(names)),
        )
    ]  # fmt: skip
    if losses:
        figures.append(Figure("Loss", "Of each member.", plots.curves(losses, "step", "loss (nats)")))
    report = source.text(REPORT)
    return Findings(
        lead=[f"An ensemble of {len(members)} reward models that differ in their seed, served as one."],
        tiles=[
            Tile(
                whole(sum(m is not None for m in done)),
                "members trained",
                f"of {source.config.get('num_ensemble')}",
            )
        ],
        sections=[
            *section(
                "Members",
                Figures(figures),
                table("Members", ("member", "accuracy, %", "log loss", "calibration error"), rows),
            ),
            *section("The ensemble as it is served", None if report is None else Code(report)),
        ],
        absent=[]
        if report is not None
        else ["Figures of the ensemble as a whole: they are measured once all members are trained."],
    )
