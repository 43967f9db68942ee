"""What a page says of one run, whatever made it, and the parts that the pages of all runs have."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif.report.page import Block, Code, Folded, Points, Prose, Section, Table, Tile
from rlaif.report.source import Source

SETTINGS_THAT_SAY_NOTHING = frozenset({"output_dir", "report_to"})


@dataclass(frozen=True, slots=True)
class Findings:
    """What there is to say of a run.

    Attributes:
        lead: paragraphs of what it is.
        tiles: its figures to see first; runs of one kind are compared by these.
        sections: in order.
        absent: what its files do not say, and why: sentences.
        warnings: what to know before believing anything.
    """

    lead: Sequence[str]
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    absent: Sequence[str] = ()
    warnings: Sequence[str] = ()


def section(title: str, *blocks: Block | None) -> list[Section]:
    """A section of the blocks that there are; none without any."""
    given = [block for block in blocks if block is not None]
    return [Section(title, given)] if given else []


def table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str | None]], note: str = ""
) -> Table | None:
    """A table; None without rows."""
    return Table(title, heads, rows, note) if rows else None


def origin(source: Source) -> list[Section]:
    """How a run was made: the command, how it ended, its settings, the versions."""
    record = source.record
    if not record:
        return []
    settings = [
        (name, _value(value))
        for name, value in source.config.items()
        if name not in SETTINGS_THAT_SAY_NOTHING and value is not None
    ]
    versions = [(name, str(value)) for name, value in (record.get("versions") or {}).items()]
    blocks: list[Block] = [Points(_course(source))]
    if record.get("command_line"):
        blocks.insert(0, Code(command_line(record["command_line"])))
    for title, rows, heads in (
        ("All settings", settings, ("setting", "value")),
        ("Versions", versions, ("library", "version")),
    ):
        if rows:
            blocks.append(Folded(title, [Table(title, heads, rows)]))
    return [Section("How it was made", blocks)]


def command_line(words: Sequence[str]) -> str:
    """The command as it was typed, whatever file the program was started from."""
    return f"rlaif {shlex.join(words[1:])}"


def _course(source: Source) -> list[str]:
    record = source.record
    lines = [f"Started {moment(record.get('started')) or 'at a time that is not on record'}."]
    if resumed := record.get("resumed"):
        lines.append(
            f"Continued {len(resumed)} time{'s' if len(resumed) > 1 else ''}, last {moment(resumed[-1])}."
        )
    lines.append(how_it_ended(source))
    if (revision := record.get("git_revision")) is not None:
        lines.append(f"Code revision {revision}.")
    return lines


def moment(iso: str | None) -> str:
    """A time of `run.json` to the minute; empty where there is none."""
    if not iso:
        return ""
    day, _, clock = iso.partition("T")
    return f"{day} {clock[:5]}{' UTC' if iso.endswith('+00:00') else clock[8:]}"


def how_it_ended(source: Source) -> str:
    """How the run ended, in a sentence."""
    ended, beat = source.record.get("ended"), source.json("progress.json")
    if ended is not None:
        reason = "all its steps are done" if ended["reason"] == "max_steps" else ended["reason"]
        step = "" if ended["step"] is None else f" after step {ended['step']},"
        return f"Ended{step} {moment(ended['at'])}: {reason.removesuffix('.')}."
    if beat is not None:
        done = f"{beat['done']:,}" + (f" of {beat['total']:,}" if beat.get("total") else "")
        return {
            "finished": "Finished.",
            "stopped": f"Stopped: {beat.get('error')}",
        }.get(beat["state"], f"Its last sign: {beat['phase']}, {done} done. It is at work, or was killed.")
    if source.command in _FINISHED_BY and any(source.has(name) for name in _FINISHED_BY[source.command]):
        return "Finished."
    return "How it ended is not on record: it is at work, or was killed."


_FINISHED_BY: Mapping[str, Sequence[str]] = {
    "train rm": ("reward_model.json", "report.md"),
    "eval rm": ("metrics.json",),
    "eval policy": ("metrics.json",),
    "eval judge": ("report.json",),
}
"""Files that a command writes last, for those that do not note their end."""


def absent(sentences: Sequence[str]) -> list[Section]:
    """What a run does not say."""
    return section("What this run does not say", Points(sentences)) if sentences else []


def unfinished(source: Source, file: str, what: str) -> Findings:
    """The findings of a run that has not written its results."""
    return Findings(
        lead=[what],
        tiles=[],
        sections=[],
        absent=[f"It has no {file}, which the command writes when it is done. {how_it_ended(source)}"],
    )


def warned(warnings: Sequence[str]) -> list[Block]:
    """Warnings as blocks."""
    return [Prose(f"{warning.rstrip('.')}.", warning=True) for warning in warnings]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
