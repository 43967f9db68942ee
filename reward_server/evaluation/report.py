"""The findings about a reward model as Markdown, for people: `report.md`, and what the commands print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif.tables import best_of_scores, interval, number, percent, percent_interval, section_scores, table

Found = Mapping[str, Any]


def render(findings: Found) -> str:
    """The whole report; sections without findings are left out."""
    parts = [_head(findings)]
    if "members" in findings:
        parts.append(_members(findings))
    if "scores" in findings:
        parts.append(_scores(findings["scores"]))
    if findings["pairs"]:
        parts.append(_accuracy(findings))
        if "best_of" in findings:
            parts.append(best_of_scores(findings["best_of"]))
        if "rewardbench" in findings:
            parts.append(section_scores(findings["rewardbench"]))
        parts += [_length(findings["length"]), _calibration(findings)]
    return "\n\n".join(parts) + "\n"


def _head(found: Found) -> str:
    lines = [f"# {found['model']}", "", f"Version {found['version']}, measured on {found['measured_on']}."]
    if found["without_score"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in found["without_score"].items())
        lines.append(f"Rows left out because a response has no score: {reasons}.")
    return "\n".join(lines)


def _members(found: Found) -> str:
    heads: tuple[str, ...] = ("", "accuracy, %", "log loss")
    rows: list[tuple[str, ...]] = [
        (m["name"], percent_interval(m["accuracy"]), number(m["log_loss"])) for m in found["members"]
    ]
    if "scores" in found:
        heads = (*heads, "Spearman")
        rows = [(*row, interval(m["spearman"])) for row, m in zip(rows, found["members"], strict=True)]
    return "## Members\n\n" + table(heads, rows)


def _scores(found: Found) -> str:
    text = (
        f"## Scores\n\nOver {found['answers']} scored responses: rank correlation {interval(found['spearman'])} "
        f"(Spearman), linear {interval(found['pearson'])} (Pearson); 95 % intervals over prompts."
    )
    if found["rmse"] is not None:
        text += (
            f" Root mean squared error {number(found['rmse'])} points; the mean score for everything would have "
            f"{number(found['label_std'])}."
        )
    return text


def _accuracy(found: Found) -> str:
    rows = [*((s["name"], s) for s in found.get("subsets", ()))]
    rows.append(("**all**" if rows else "all", found))
    lines = table(
        ("subset", "pairs", "accuracy, %", "longer wins, %", "gain over longer", "log loss", "lowest possible"),
        [
            (name, f["pairs"] - f["ties"], percent_interval(f["accuracy"]), percent(f["longer_wins"]),
             percent_interval(f["gain"], sign=True), number(f["log_loss"]), number(f["lowest_log_loss"]))
            for name, f in rows
        ],
    )  # fmt: skip
    ties = f" {found['ties']} pairs with tied labels count in the log loss alone." if found["ties"] else ""
    return (
        f"## Accuracy\n\nChance is 50 % with a log loss of 0.693. 95 % intervals over prompts.{ties}\n\n{lines}\n\n"
        f"{_verdict(found)}"
    )


def _verdict(found: Found) -> str:
    accuracy, gain = found["accuracy"], found["gain"]
    if accuracy["low"] is None:
        return "No pair has a preferred side."
    if accuracy["low"] <= 0.5:
        return "**These pairs cannot tell the model from a coin**: the interval holds 50 %."
    if gain["low"] <= 0:
        return (
            "Better than a coin, but **these pairs cannot tell whether it is better than preferring the longer "
            "answer**: the interval of the gain holds 0."
        )
    return "Better than a coin, and better than preferring the longer answer."


def _length(found: Found) -> str:
    rows = [
        (what, number(found[name]["pearson"]), number(found[name]["spearman"]))
        for what, name in (
            ("score and characters, over responses", "score_characters"),
            ("difference of scores and of characters, within pairs", "pair_characters"),
            ("difference of scores and of tokens, within pairs", "pair_tokens"),
        )
    ]
    sides = "; ".join(
        f"{percent(found[name]['accuracy'])} % where the preferred response is {what} ({found[name]['pairs']} pairs)"
        for what, name in (("longer", "longer_is_better"), ("shorter", "shorter_is_better"))
    )
    return f"## Length\n\nAccuracy {sides}.\n\n{table(('correlation of', 'Pearson', 'Spearman'), rows)}"


def _calibration(findings: Found) -> str:
    found = findings["calibration"]
    rows = [
        (f"{b['low']:.2f} - {b['high']:.2f}", b["count"], percent(b["confidence"]), percent(b["agreement"]))
        for b in found["reliability"]
    ]
    return (
        f"## Calibration\n\nBrier score {number(found['brier'])}, where a coin has {number(found['coin_brier'])}; "
        f"expected calibration error {number(found['ece'])} ({found['ece_bins']} bins).\n\n"
        + table(("confidence", "pairs", "mean, %", "labels agree, %"), rows)
    )
