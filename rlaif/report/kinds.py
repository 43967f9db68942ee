"""From a run to its page: which module reads which command's runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from rlaif.errors import DataError
from rlaif.report import judge, labels, policy, responses, reward_model, server, training
from rlaif.report.findings import Findings, absent, moment, origin, warned
from rlaif.report.page import Page, Section
from rlaif.report.source import Source


class Kind(NamedTuple):
    """What a command's runs are called, and who reads them."""

    title: str
    read: Callable[[Source], Findings]


KINDS: Mapping[str, Kind] = {
    "sample": Kind("Responses", responses.candidates),
    "label pairs": Kind("Preference labels", labels.preferences),
    "label rank": Kind("Rankings", labels.preferences),
    "label scores": Kind("Score labels", responses.scores),
    "label revise": Kind("Revisions", responses.revisions),
    "eval judge": Kind("What a judge is worth", judge.judge),
    "train rm": Kind("Reward model", reward_model.trained),
    "eval rm": Kind("What a reward model is worth", reward_model.evaluated),
    "eval policy": Kind("Policies compared", policy.evaluated),
    "train sft": Kind("Supervised fine-tuning", training.trained),
    "train ppo": Kind("PPO", training.trained),
    "train dpo": Kind("DPO", training.trained),
    "train best_of_n": Kind("Best of n", training.trained),
    server.COMMAND: Kind("Reward server", server.load),
}
"""By command."""


def open_source(path: Path) -> Source:
    """A run directory, or a file with a reward server's metrics.

    Raises:
        DataError: it is neither, or of a command that has no page.
    """
    source = server.read(path) if path.is_file() else Source.read(path)
    if source.command not in KINDS:
        raise DataError(
            f"{path} holds a run of `rlaif {source.command}`, which has no report; there are reports of: "
            f"{', '.join(KINDS)}"
        )
    return source


def findings_of(source: Source) -> Findings:
    """What there is to say of one run.

    Raises:
        DataError: its files are broken, or lack what the command writes today.
    """
    try:
        return KINDS[source.command].read(source)
    except (KeyError, TypeError, AttributeError, IndexError) as err:
        raise DataError(
            f"{source.folder} lacks something that `rlaif {source.command}` writes today "
            f"({type(err).__name__}: {err}); run its command again"
        ) from err


def page_of(source: Source) -> Page:
    """The page of one run.

    Raises:
        DataError: its files are broken, or lack what the command writes today.
    """
    found = findings_of(source)
    notes = [Section("Before you believe it", warned(found.warnings))] if found.warnings else []
    return Page(
        title=f"{KINDS[source.command].title}: {source.name}",
        origin=" · ".join(part for part in (str(source.folder), _when(source)) if part),
        lead=found.lead,
        tiles=found.tiles,
        sections=[*notes, *found.sections, *absent(found.absent), *origin(source)],
    )


def _when(source: Source) -> str:
    started = moment(source.record.get("started"))
    return started and f"rlaif {source.command}, started {started}"
