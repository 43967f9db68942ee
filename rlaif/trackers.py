"""Where the metrics of a run go beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlaif.errors import ConfigError
from rlaif.storage import storing
from rlaif.types import content_id

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TrackerName = Literal["tensorboard", "wandb", "trackio", "none"]
PROJECT = "rlaif"
"""Project of a run with W&B and trackio, unless WANDB_PROJECT or TRACKIO_PROJECT says another."""


class Tracker(Protocol):
    """Something that shows metrics while a run goes on."""

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Take the values of one step; steps come in order, but a resumed run may repeat some."""
        ...

    def close(self) -> None:
        """Flush what is buffered."""
        ...


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse what cannot work before a run begins.

    Raises:
        ConfigError: `none` beside others, or a tracker whose package is not installed.
    """
    if "none" in names and len(names) > 1:
        raise ConfigError("--report_to none cannot stand beside others")
    for name in names:
        if name in ("wandb", "trackio") and find_spec(name) is None:
            raise ConfigError(f"--report_to {name} needs its package: pip install 'rlaif[{name}]'")


def open_trackers(
    names: Sequence[TrackerName], directory: Path, record: Mapping[str, Any], purge_step: int | None
) -> list[Tracker]:
    """Begin to report, or go on with what an earlier part of the same run reported.

    Args:
        names: as in `--report_to`.
        directory: of the run.
        record: its `run.json`.
        purge_step: first step that will be logged again; None for a fresh run.

    Raises:
        ConfigError: a service does not accept the run.
        StorageError: the disk is full.
    """
    found: list[Tracker] = []
    for name in dict.fromkeys(names):
        if name == "tensorboard":
            found.append(TensorBoard(directory / "tb", purge_step))
        elif name == "wandb":
            found.append(WandB(directory, record))
        elif name == "trackio":
            found.append(Trackio(directory, record))
    return found


class TensorBoard:
    """Event files in the run directory."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        with storing(folder):
            self._board: SummaryWriter = SummaryWriter(str(folder), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker`."""
        with storing(self._folder):
            self._board.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run directory.

    The step is a metric of its own, because W&B's counter refuses the steps that a resumed run repeats.
    """

    def __init__(self, directory: Path, record: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=directory.name,
                id=_id(directory, record),
                resume="allow",
                dir=str(directory),
                config=dict(record["config"]),
            )
        except wandb.Error as err:
            reason = " ".join(str(err).split())[:200]
            raise ConfigError(
                f"W&B does not take the run ({reason}): log in, set WANDB_MODE=offline, or leave wandb out of "
                "--report_to"
            ) from err
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Trackio:
    """trackio, whose data are in TRACKIO_DIR, or in the cache of Hugging Face; `trackio show` serves its dashboard."""

    def __init__(self, directory: Path, record: Mapping[str, Any]) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{directory.name}-{_id(directory, record)}",
            resume="allow",
            config=dict(record["config"]),
            embed=False,
        )

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _id(directory: Path, record: Mapping[str, Any]) -> str:
    """The same for every part of one run."""
    return content_id(str(directory.absolute()), record["started"])[:8]
