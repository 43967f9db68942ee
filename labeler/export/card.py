"""The dataset card of an export: what was kept of which labels, and what reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from labeler import columns
from labeler.card import DataFile, Source, column_table, facts_parts, header, how_to_load, origin_parts, table
from labeler.export.config import ExportConfig, Format

_TRAINERS: Mapping[Format, str] = {
    "trl-preference": "DPOTrainer",
    "trl-reward": "RewardTrainer",
    "trl-unpaired": "KTOTrainer",
    "jsonl": "DPOTrainer",
    "parquet": "DPOTrainer",
}
_COLUMNS: Mapping[Format, Mapping[str, str]] = {
    "trl-preference": columns.TRL_PREFERENCE,
    "trl-reward": columns.TRL_REWARD,
    "trl-unpaired": columns.TRL_UNPAIRED,
    "jsonl": columns.PREFERENCES,
    "parquet": columns.EVERYTHING,
}


def export_card(
    config: ExportConfig,
    source: Source | None,
    files: Mapping[str, str],
    facts: Mapping[str, Any],
    place: str | None,
) -> str:
    """The card of exported data files.

    Args:
        config: how they were exported.
        source: the run that made the labels; None if the dataset is a file that somebody else made.
        files: names by split.
        facts: what came out, see `labeler.export.command.Exported.facts`.
        place: the repository on the hub; None for files without one.
    """
    who = f" of {source.who}" if source is not None else f" from {Path(config.dataset).name}"
    title = f"Preferences{who}"
    data = [DataFile(path, split=split) for split, path in files.items()]
    parts = [
        header(title, data, ("preference", "synthetic"), sum(facts["rows_written"].values())),
        f"# {title}\n\nPairs of responses with soft labels, exported by `rlaif export --format {config.format}`.",
        "## What was kept\n\n" + table(_kept(config, facts)),
        *(facts_parts(source) if source is not None else ()),
        how_to_load(data, place, _TRAINERS[config.format]),
        column_table(_COLUMNS[config.format]),
        *(origin_parts(source) if source is not None else ()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _kept(config: ExportConfig, facts: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    yield "labelled pairs", f"{facts['pairs']:,}"
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
    yield "left out", dropped or None
    yield "rows", ", ".join(f"{split}: {count:,}" for split, count in facts["rows_written"].items())
    if config.split:
        yield (
            "held out",
            f"{100 * config.split:g} % of the prompts by a hash of their text, with all of their pairs",
        )
    yield "rows with something to look at", f"{facts['suspicious']:,}"
