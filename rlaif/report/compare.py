"""The page of several runs: final figures side by side, curves on the same axes, and the settings that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlaif.report import plots, training
from rlaif.report.findings import (
    SETTINGS_THAT_SAY_NOTHING,
    command_line,
    how_it_ended,
    moment,
    section,
    table,
)
from rlaif.report.kinds import KINDS, findings_of
from rlaif.report.page import Code, Figure, Figures, Folded, Page, Prose, Section, Tiles
from rlaif.report.source import Row, Source

SAME_REWARD = "Rewards compare only between runs that one reward model rewarded."
NOT_A_SETTING = "–"
"""Of a command that does not have it."""


def compare(sources: Sequence[Source]) -> Page:
    """The page of several runs, of one kind or of several.

    Raises:
        DataError: a run's files are broken.
    """
    names = distinct_names([source.folder for source in sources])
    named = dict(zip(names, sources, strict=True))
    kinds = {source.command: KINDS[source.command].title for source in sources}
    return Page(
        title=f"{len(sources)} runs compared",
        lead=[f"{', '.join(kinds.values())}. Each run has a page of its own: rlaif report --runs RUN."],
        sections=[
            *curves(named),
            *(part for group in groups(named) for part in final_figures(group)),
            *labels(named),
            *(part for group in groups(named) for part in settings(group)),
            *commands(named),
        ],
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


Named = Mapping[str, Source]

_TRAINING = dict.fromkeys(training.METHODS, "training")


def groups(named: Named) -> list[Named]:
    """Runs whose figures mean the same: those of one command, and all that train a policy."""
    found: dict[str, dict[str, Source]] = {}
    for name, source in named.items():
        found.setdefault(_TRAINING.get(source.command, source.command), {})[name] = source
    return list(found.values())


def title_of(group: Named) -> str:
    """What the runs of a group are called."""
    commands = {source.command for source in group.values()}
    return KINDS[commands.pop()].title if len(commands) == 1 else "training"


def alone(name: str, source: Source) -> list[Section]:
    """The figures and pictures of a run that is the only one of its kind."""
    found = findings_of(source)
    pictures = [block for part in found.sections for block in part.blocks if isinstance(block, Figures)]
    return section(
        f"{KINDS[source.command].title}: {name}", Tiles(found.tiles) if found.tiles else None, *pictures
    )


def final_figures(named: Named) -> list[Section]:
    """The figures that are first on each run's own page, side by side."""
    if len(named) == 1:
        return alone(*next(iter(named.items())))
    tiles = {name: {t.name: t for t in findings_of(source).tiles} for name, source in named.items()}
    order = dict.fromkeys(figure for of in tiles.values() for figure in of)
    rows: list[list[str | None]] = []
    for figure in order:
        cells: list[str | None] = []
        for of in tiles.values():
            tile = of.get(figure)
            if tile is None:
                cells.append(None)
            else:
                cells.append(
                    f"{tile.value} [{tile.interval}]" if tile.value and tile.interval else tile.value
                )
        rows.append([figure, *cells])
    trains = all(source.command in training.METHODS for source in named.values())
    note = SAME_REWARD if trains else ""
    return section(
        f"Final figures: {title_of(named)}",
        table("Final figures, with 95 % intervals where there are any", ["figure", *named], rows,
              f"Missing: the run does not have this figure. {note}".rstrip()),
    )  # fmt: skip


def curves(named: Named) -> list[Section]:
    """What runs did over their steps, on the same axes."""
    trained = {
        name: source.rows
        for name, source in named.items()
        if source.command in training.METHODS and source.rows
    }
    models = {
        name: source.rows for name, source in named.items() if source.command == "train rm" and source.rows
    }
    figures: list[Figure] = []
    if len(trained) > 1:
        across, label = _axis(list(trained.values()))
        for shown in training.PICTURES:
            figures += [f for f in (_together(shown, trained, across, label),) if f is not None]
            if shown.title == "KL to the reference":
                figures += training.against_kl(trained)
    if len(models) > 1:
        for title, metric in (
            ("Loss of the reward models", "loss"),
            ("Accuracy on training pairs", "accuracy"),
        ):
            lines = [
                line for name, rows in models.items() if (line := plots.curve(rows, metric, name)) is not None
            ]
            if lines:
                figures.append(Figure(title, "Of each logged step.", plots.curves(lines, "step", metric)))
    return section("Side by side", Figures(figures) if figures else None)


def _axis(runs: Sequence[Sequence[Row]]) -> tuple[str, str]:
    """The metric across: responses sampled where all runs count them, since a step is not the same for all methods."""
    if all(any(row.get("episode") is not None for row in rows) for rows in runs):
        return "episode", "responses sampled"
    return "step", "step"


def _together(
    shown: training.Shown, runs: Mapping[str, Sequence[Row]], across: str, label: str
) -> Figure | None:
    """A picture with a line for each run, of the first of its metrics that two of them have; None without any."""
    for metric in shown.metrics:
        lines = [
            line
            for number, (name, rows) in enumerate(runs.items())
            if (line := plots.curve(rows, metric, name, x=across, number=number)) is not None
        ]
        if len(lines) > 1 and not (
            shown.title == "Missing rewards" and not any(any(line.y) for line in lines)
        ):
            without = [name for name in runs if name not in {line.name for line in lines}]
            caption = shown.caption + (f" Missing from: {', '.join(without)}." if without else "")
            if shown.metrics.keys() & {"objective/scores", "eval/reward"}:
                caption += f" {SAME_REWARD}"
            panel = plots.curves(lines, label, shown.ylabel, reference=shown.reference)
            return Figure(shown.title, caption, panel)
    return None


def labels(named: Named) -> list[Section]:
    """Soft labels of several labeling runs."""
    probs = {}
    for name, source in named.items():
        columns = source.columns("preferences.parquet", ("chosen_prob",)) if source.folder.is_dir() else None
        if columns is not None and columns["chosen_prob"]:
            probs[name] = columns["chosen_prob"]
    if len(probs) < 2:
        return []
    return section(
        "Labels side by side",
        Figures(
            [
                Figure(
                    "How sure the labels are",
                    "Share of the rows written by their soft label: 0.5 is a coin, 1 is certain.",
                    plots.distributions(probs, "P(chosen preferred)"),
                )
            ]
        ),
    )


def settings(named: Named) -> list[Section]:
    """The settings that differ, and apart from them those that only some of the commands have."""
    configs = {name: source.config for name, source in named.items() if source.config}
    if len(configs) < 2:
        return []
    every = dict.fromkeys(key for config in configs.values() for key in config)
    shared, own = [], []
    for key in every:
        if key in SETTINGS_THAT_SAY_NOTHING:
            continue
        has = [config[key] for config in configs.values() if key in config]
        cells = [_cell(config[key]) if key in config else NOT_A_SETTING for config in configs.values()]
        if len(has) < len(configs):
            own.append([key, *cells])
        elif any(value != has[0] for value in has):
            shared.append([key, *cells])
    heads = ["setting", *configs]
    blocks = [
        table("Settings that differ", heads, shared)
        or Prose("All settings that these runs have in common are the same."),
        Folded("Settings that only some of these commands have", [found])
        if (
            found := table(
                "Settings of single commands",
                heads,
                own,
                f"{NOT_A_SETTING}: the command has no such setting.",
            )
        )
        else None,
    ]
    return section(f"What differs: {title_of(named)}", *blocks)


def _cell(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def commands(named: Named) -> list[Section]:
    """The command of each run, and how it ended."""
    runs = {name: source for name, source in named.items() if source.record}
    rows = [
        (name, f"rlaif {source.command}", moment(source.record.get("started")), how_it_ended(source))
        for name, source in runs.items()
    ]
    lines = [
        Code(command_line(source.record["command_line"]), name)
        for name, source in runs.items()
        if source.record.get("command_line")
    ]
    return section(
        "How they were made",
        table("Runs", ("run", "command", "started", "end"), rows),
        Folded("The commands as they were typed", lines) if lines else None,
    )
