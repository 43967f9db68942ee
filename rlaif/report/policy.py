"""The page of `rlaif eval policy`: policies beside a baseline, and reward against KL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rlaif.errors import DataError
from rlaif.records import Quarantine, read_prompts
from rlaif.report import plots
from rlaif.report.findings import Findings, section, table, unfinished
from rlaif.report.page import Example, Figure, Figures, Section, Text, Tile
from rlaif.report.source import Facts, Source, read_lines
from rlaif.report.wording import (
    count_rows,
    estimate,
    figure,
    rate,
    rate_estimate,
    rate_range,
    text_of,
    whole,
)
from rlaif.types import Conversation, content_id, to_dicts

EXAMPLES = 4


def evaluated(source: Source) -> Findings:
    """The page of `rlaif eval policy`."""
    lead = "Policies beside a baseline, one response each to the same prompts."
    found = source.json("metrics.json")
    if found is None:
        return unfinished(source, "metrics.json", lead)
    policies = found["policies"]
    tiles = []
    for index, rater in enumerate(found["raters"]):
        for policy in policies[1:]:
            rating = policy["ratings"][index]
            if rating is not None:
                lc = rating["length_controlled"]
                tiles.append(
                    Tile(
                        rate(rating["win_rate"]["value"]),
                        policy["name"] + (f", by {rater['name']}" if len(found["raters"]) > 1 else ""),
                        f"win rate by {rater['name']}"
                        + ("" if lc["value"] is None else f"; {rate(lc['value'])} length-controlled"),
                        rate_range(rating["win_rate"]),
                    )
                )
    return Findings(
        lead=[
            f"{lead} The baseline is {found['baseline']}; {found['prompts']:,} prompts of {found['dataset']}, sampled "
            f"at temperature {found['temperature']:g}. Ties count half."
        ],
        tiles=tiles,
        sections=[
            *(part for index in range(len(found["raters"])) for part in _win_rates(found, index)),
            *_frontier(found),
            *_responses(source, found),
        ],
        absent=[
            f"KL of {policy['name']}: it has no reference, or its responses are recorded ones."
            for policy in policies[1:]
            if policy["kl"]["value"] is None
        ],
    )


def _win_rates(found: Facts, index: int) -> list[Section]:
    rater = found["raters"][index]
    rated = [
        (p["name"], p["ratings"][index]) for p in found["policies"][1:] if p["ratings"][index] is not None
    ]
    if not rated:
        return []
    names = [name for name, _ in rated]
    rows = [
        (name, rate_estimate(r["win_rate"]), rate_estimate(r["length_controlled"]), rate(r["ties"]),
         rate(r["longer_wins"]), whole(r["comparisons"]), whole(sum(r["missing"].values())),
         *((rate(r["same_position"]),) if rater["compares"] else ()))
        for name, r in rated
    ]  # fmt: skip
    heads = ["policy", "win rate, %", "length-controlled, %", "ties", "longer wins", "comparisons", "missing"]
    if rater["compares"]:
        heads.append("same position")
    how = "It compares pairs, in both orders." if rater["compares"] else "It scores: the higher score wins."
    return section(
        f"Win rates by {rater['name']}",
        Figures(
            [
                Figure(
                    f"Win rates over {found['baseline']}",
                    f"{how} 95 % bootstrap intervals over prompts; length-controlled: what would be left if responses "
                    "were equally long.",
                    plots.estimates(
                        names,
                        [
                            plots.Group("win rate", [r["win_rate"] for _, r in rated]),
                            plots.Group("length-controlled", [r["length_controlled"] for _, r in rated]),
                        ],
                        "win rate",
                        reference=0.5,
                    ),
                    plots.rows_size(len(names)),
                )
            ]
        ),
        table("Win rates", heads, rows),
        table(
            "Win rates by subset",
            ("policy", "subset", *heads[1:6]),
            [
                (name, subset["name"] or "–", rate_estimate(subset["win_rate"]),
                 rate_estimate(subset["length_controlled"]), rate(subset["ties"]), rate(subset["longer_wins"]),
                 whole(subset["comparisons"]))
                for name, r in rated
                for subset in r.get("subsets", ())
            ],
        ),
        *(
            table(f"Comparisons of {name} that are missing", ("reason", "comparisons", "share"),
                  count_rows(r["missing"], found["prompts"]))
            for name, r in rated
        ),
    )  # fmt: skip


def _frontier(found: Facts) -> list[Section]:
    figures = []
    for index, rater in enumerate(found["raters"]):
        what = "win_rate" if rater["compares"] else "score"
        lines: dict[str, list[tuple[float, Facts]]] = {}
        for policy in found["policies"]:
            rating = policy["ratings"][index]
            gained = (rating or {}).get(what)
            if policy["kl"]["value"] is not None and gained is not None and gained["value"] is not None:
                lines.setdefault(policy["run"] or policy["name"], []).append((policy["kl"]["value"], gained))
        if sum(map(len, lines.values())) < 2:
            continue
        curves = [
            plots.Curve(
                plots.short_name(name),
                [kl for kl, _ in line],
                [gained["value"] for _, gained in line],
                [gained["low"] for _, gained in line],
                [gained["high"] for _, gained in line],
            )
            for name, line in lines.items()
        ]
        label = f"win rate over {plots.short_name(found['baseline'])}" if rater["compares"] else "score"
        figures.append(
            Figure(
                f"Frontier by {rater['name']}",
                "What was gained, with 95 % intervals, against how far the policy moved to gain it. Checkpoints of a "
                "run are joined, from hollow (first) to filled (last).",
                plots.path(curves, "KL to the reference (nats per response)", label),
            )
        )
    scoring = [i for i, rater in enumerate(found["raters"]) if not rater["compares"]]
    heads = [
        "policy",
        "step",
        "KL, nats",
        *(f"score by {found['raters'][i]['name']}" for i in scoring),
        "tokens",
        "characters",
        "finished",
    ]
    rows: list[Sequence[str | None]] = [
        (
            p["name"],
            "–" if p["step"] is None else whole(p["step"]),
            estimate(p["kl"]),
            *(None if p["ratings"][i] is None else estimate(p["ratings"][i]["score"]) for i in scoring),
            figure(p["tokens"]),
            figure(p["characters"]),
            rate(p["finished"]),
        )
        for p in found["policies"]
    ]
    return section(
        "Reward against KL",
        Figures(figures) if figures else None,
        table(
            "Policies",
            heads,
            rows,
            "KL to the reference, per response, at the sampling temperature; scores are raw means.",
        ),
    )


def _responses(source: Source, found: Facts) -> list[Section]:
    """What the policies that were sampled in this run answer to the first prompts, if these are still to be had."""
    kept: dict[str, list[Any]] = {}
    prompts = None
    for path in sorted((source.folder / "responses").glob("*.jsonl")):
        header, *chunks = read_lines(path)
        prompts = prompts or _prompts(source, header.get("prompts"))
        name, _, _ = path.stem.rpartition("-")
        kept[name] = [response for chunk in chunks for response in chunk["responses"]]
    if not kept:
        return []
    return section(
        "Side by side",
        *(
            Example(
                f"Prompt {number + 1}",
                [
                    Text("prompt", text_of(to_dicts(prompts[number])))
                    if prompts is not None
                    else Text("prompt", "", "its dataset is gone or has changed"),
                    *(
                        Text(name, responses[number][0], _length(responses[number]))
                        for name, responses in kept.items()
                        if number < len(responses)
                    ),
                ],
                open=number == 0,
            )
            for number in range(min(EXAMPLES, found["prompts"]))
        ),
    )


def _prompts(source: Source, key: str | None) -> list[Conversation] | None:
    """The prompts of the evaluation, if their file still holds them."""
    dataset = source.config.get("dataset")
    if dataset is None or not Path(dataset).exists():
        return None
    try:
        read = dict.fromkeys(read_prompts(dataset, Quarantine(None)))
    except DataError:
        return None
    prompts = list(islice(read, source.config.get("limit")))
    return prompts if content_id([[m.content for m in prompt] for prompt in prompts]) == key else None


def _length(response: Sequence[Any]) -> str:
    _, finished, tokens, kl = response
    notes = [
        "" if tokens is None else f"{tokens} tokens",
        "" if kl is None else f"KL {kl:.2f}",
        "" if finished else "cut at its greatest length",
    ]
    return ", ".join(note for note in notes if note)
