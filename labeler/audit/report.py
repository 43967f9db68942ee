"""The findings about a judge as Markdown, for people: `report.md`, and what the command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlaif.tables import best_of_scores, interval, number, percent, percent_interval, section_scores, table

Found = Mapping[str, Any]


def render(report: Found) -> str:
    """The whole report; sections without findings are left out."""
    parts = [_head(report)]
    if "variants" in report:
        parts.append(_variants(report["variants"]))
    else:
        parts += [_agreement(report), _sections(report), _annotators(report)]
        parts += [_biases(report), _calibration(report), _replies(report)]
    if "canaries" in report:
        parts.append(_canaries(report["canaries"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(report: Found) -> str:
    lines = [f"# {report['judge']}", ""]
    lines.append(
        ", ".join(f"{name} {report[name]}" for name in ("rubric", "dataset", "labels") if report.get(name))
    )
    lines += [f"\n**Warning:** {warning}." for warning in report.get("lineage", ())]
    return "\n".join(lines).rstrip()


def _agreement(report: Found) -> str:
    rows = [("all", report)] if "subsets" not in report else []
    rows += [(s["name"], s) for s in report.get("subsets", ())]
    if "subsets" in report:
        rows.append(("**all**", report))
    subsets = table(
        ("subset", "pairs", "agreement, %", "kappa", "longer wins, %"),
        [
            (name, found["human_pairs"], percent_interval(found["agreement"]), interval(found["kappa"]),
             percent(found["longer_wins_agreement"]))
            for name, found in rows
        ],
    )  # fmt: skip
    ties = f" People tie {report['human_ties']} pairs, which are left out." if report["human_ties"] else ""
    if report["no_majority"]:
        ties += f" They have no majority on {report['no_majority']} more."
    return f"## Agreement with people\n\n95 % intervals over prompts.{ties}\n\n{subsets}"


def _sections(report: Found) -> str:
    if "best_of" in report:
        return best_of_scores(report["best_of"])
    return section_scores(report["rewardbench"]) if "rewardbench" in report else ""


def _annotators(report: Found) -> str:
    if "annotators" not in report:
        return ""
    heads = (
        "votes of",
        "votes",
        "with ties, %",
        "decided",
        "without ties, %",
        "people with ties, %",
        "without ties, %",
    )
    rows = [
        (
            line["name"] if line["name"] != "all" else "**all**",
            line["votes"],
            percent_interval(line["judge"]["with_ties"]),
            line["judge"]["without_ties"]["over"],
            percent_interval(line["judge"]["without_ties"]),
            *(percent_interval(line["people"][setup]) for setup in ("with_ties", "without_ties")),
        )
        for line in report["annotators"]
    ]
    return (
        "## Agreement with single annotators\n\nWith ties, a tie must be met by a tie, and two orders that contradict "
        "each other are one; chance is 33 %. Without ties, only what both decided counts; chance is 50 %. *People* are "
        f"pairs of annotators of the same responses.\n\n{table(heads, rows)}"
    )


def _biases(report: Found) -> str:
    place = report["position"]
    lines = []
    if place["pairs"]:
        lines.append(
            f"Position: {percent(place['same_position_rate'])} % of {place['pairs']} pairs get the same position in "
            f"both orders, of those {percent(place['first_share'])} % number 1; mean probability of number 1 "
            f"{number(place['first_probability'])}.\n"
        )
    rows = [
        (f"prefers {what}", found["pairs"], percent(found["judge"]), percent(found["people"]),
         percent(found["excess"], sign=True), percent(found["errors"]))
        for what, found in (("longer", report["length"]), ("more formatted", report["formatting"]))
        if found["pairs"]
    ]  # fmt: skip
    if rows:
        lines.append(table(("", "pairs", "judge, %", "people, %", "excess", "of its errors, %"), rows))
    return "## Biases\n\n" + "\n".join(lines) if lines else ""


def _calibration(report: Found) -> str:
    found = report["calibration"]
    if not found["pairs"]:
        return ""
    text = (
        f"## Calibration\n\nBrier score {number(found['brier'])}, where a coin has {number(found['coin_brier'])}; "
        f"log loss {number(found['log_loss'])}, where a coin has 0.693; expected calibration "
        f"error {number(found['ece'])} ({found['ece_bins']} bins).\n\n"
    )
    rows = [
        (f"{b['low']:.2f} - {b['high']:.2f}", b["count"], percent(b["confidence"]), percent(b["agreement"]))
        for b in found["reliability"]
    ]
    text += table(("confidence", "pairs", "mean, %", "people agree, %"), rows)
    if "calibrated" in report:
        text += "\n\n" + _calibrated(report["calibrated"])
    return text


def _calibrated(found: Found) -> str:
    before, after = found["before"], found["after"]
    how = f"temperature {found['temperature']:.3g}" if found["temperature"] is not None else "isotonic map"
    text = f"{how[0].upper()}{how[1:]} fitted on {found['pairs']} pairs; cross-validated: " + ", ".join(
        f"{name} {number(before[key])} -> {number(after[key])}"
        for name, key in (("Brier score", "brier"), ("calibration error", "ece"), ("log loss", "log_loss"))
    )
    if after["log_loss"] >= before["log_loss"]:
        text += ". **It does not help on labels it has not seen: do not use it.**"
    return f"{text.rstrip('.')}." if not text.endswith("**") else text


def _replies(report: Found) -> str:
    mass = report["label_mass"]
    lines = [
        f"{report['labelled']} of {report['pairs']} pairs labelled, {report['ties']} ties.",
        *(f"Unlabelled: {count} x {reason}." for reason, count in report["unlabelled"].items()),
    ]
    if report.get("without_label"):
        lines.append(f"{report['without_label']} pairs of {report['dataset']} are not among the labels.")
    if report["sources"]:
        lines.append("Sources: " + ", ".join(f"{n} {name}" for name, n in report["sources"].items()) + ".")
    if mass["readings"]:
        lines.append(
            f"Label mass: mean {number(mass['mean'])}, least {number(mass['min'])}, below one half in "
            f"{mass['below_half']} of {mass['readings']} readings."
        )
    if report["prompt_tokens"]:
        cost = (
            f"; all replies of this directory cost ${report['cost_usd']:.4g}" if "cost_usd" in report else ""
        )
        lines.append(
            f"Tokens: {report['prompt_tokens']} read, {report['completion_tokens']} written for these labels{cost}."
        )
    return "## Labels\n\n" + "\n".join(lines)


def _variants(variants: Sequence[Found]) -> str:
    rows = [
        (
            v["name"],
            percent_interval(v["agreement"]),
            "" if v["difference"] is None else percent_interval(v["difference"], sign=True),
            interval(v["kappa"]),
            percent(v["position"]["same_position_rate"]),
            percent(v["position"]["first_share"]),
            v["labelled"],
            v["ties"],
            _each(v["prompt_tokens"], v["labelled"]),
            _each(v["completion_tokens"], v["labelled"]),
        )
        for v in variants
    ]
    heads = (
        "variant", "agreement, %", "against the first", "kappa", "same position, %", "of those first, %", "labelled",
        "ties", "tokens read", "written",
    )  # fmt: skip
    first = variants[0]
    return (
        f"## Variants\n\n{first['human_pairs']} pairs with human labels; 95 % intervals over prompts; tokens "
        f'per label. "The longer one wins" agrees on {percent(first["longer_wins_agreement"])} %.'
        f"\n\n{table(heads, rows)}"
    )


def _canaries(found: Found) -> str:
    families = ", ".join(f"{name} {percent(shift, sign=True)}" for name, shift in found["families"].items())
    worst_first = sorted(found["attacks"], key=lambda a: -(a["shift"]["value"] or 0.0))
    tried = table(
        ("attack", "family", "win rate, %", "shift", "probability", "ruled by a guard"),
        [
            (a["name"], a["family"], percent(a["win_rate"]), percent_interval(a["shift"], sign=True),
             percent(a["probability_shift"], sign=True), a["guarded"])
            for a in worst_first
        ],
    )  # fmt: skip
    return (
        f"## Canaries\n\nThe response that people reject wins {percent(found['win_rate'])} % of {found['pairs']} "
        f"pairs as it is. Attacks shift that by {percent_interval(found['shift'], sign=True)} points on average "
        f"({families}).\n\n{tried}"
    )


def _each(total: int, count: int) -> str:
    return f"{total / count:.0f}" if count else "-"
