"""`rlaif watch`: a training run, or several side by side, from another terminal, while they run or after.

Reads what runs write (`run.json`, `metrics.jsonl`, `samples/`) and touches nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTHS = (6, 32)
"""Bars of a curve, at least and at most."""
BESIDE_THE_BARS = 14
"""Characters of a run's column that are no bars: the number, and the gap to the next column."""
TITLES_WIDTH = 18
SAMPLE_CHARACTERS = 400
ROWS = (
    ("reward", ("objective/scores",)),
    ("KL, nats", ("objective/kl",)),
    ("entropy, nats", ("objective/entropy",)),
    ("length, tokens", ("response/length",)),
    ("held-out win rate", ("eval/win_rate",)),
    ("held-out reward", ("eval/reward",)),
    ("loss", ("loss/policy_avg", "loss/dpo", "loss/sft", "loss")),
    ("learning rate", ("lr", "learning_rate")),
    ("missing rewards", ("reward/missing",)),
)
"""What is shown, and the first of these metrics that the run has."""
PARTS = ("rollout", "forward", "reward", "update")
"""Parts of a step as `time/PART` in seconds."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Watch training runs: reward, KL, entropy, learning rate, where the time goes, and one sample."""

    runs: tuple[Path, ...]
    """Run directories of `rlaif train`; several are shown side by side."""
    once: bool = False
    """Print the state and leave, as it happens anyway where the output is no terminal."""
    refresh_s: float = 2.0
    """Seconds between looks."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: no run, or no time between looks.
        """
        if not self.runs:
            raise ConfigError("say which run: rlaif watch --runs RUN_DIR [RUN_DIR ...]")
        if self.refresh_s <= 0:
            raise ConfigError(f"--refresh_s must be positive, not {self.refresh_s}")


@dataclass
class Watched:
    """One run as its files tell it; `look` reads what has been added.

    Attributes:
        directory: of the run.
        record: its `run.json`.
        rows: its metrics so far, one per step.
    """

    directory: Path
    record: Mapping[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    _read: int = 0

    def look(self) -> None:
        """Read what is there.

        Raises:
            DataError: the directory is not that of a run.
        """
        try:
            self.record = json.loads((self.directory / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise DataError(f"{self.directory} is no run directory: it has no readable run.json") from err
        path = self.directory / "metrics.jsonl"
        if not path.is_file():
            return
        if path.stat().st_size < self._read:  # a resumed run has dropped the steps that it does again
            self._read, self.rows = 0, []
        with path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self.rows.append(json.loads(line))

    @property
    def last(self) -> Mapping[str, Any]:
        """Metrics of the last step."""
        return self.rows[-1] if self.rows else {}

    @property
    def ended(self) -> str | None:
        """Why the run ended; None while it runs, or if it was killed."""
        note = self.record.get("ended")
        return None if note is None else str(note["reason"])

    def series(self, names: Sequence[str]) -> list[float]:
        """The values of the first of these metrics that the run has, without gaps."""
        for name in names:
            values = [float(row[name]) for row in self.rows if row.get(name) is not None]
            if values:
                return values
        return []

    def shares(self) -> dict[str, float]:
        """Share of each part in the time of the last ten steps, in [0, 1]; `rest` is what the parts leave."""
        rows = [row for row in self.rows[-10:] if row.get("time/step")]
        total = math.fsum(row["time/step"] for row in rows)
        if not total:
            return {}
        found = {
            part: math.fsum(row.get(f"time/{part}") or 0.0 for row in rows) / total
            for part in PARTS
            if any(f"time/{part}" in row for row in rows)
        }
        return {**found, "rest": max(0.0, 1 - math.fsum(found.values()))}

    def sample(self) -> Mapping[str, Any] | None:
        """The first transcript of the last step that has any."""
        files = sorted((self.directory / "samples").glob("step-*.jsonl"))
        for path in reversed(files):
            with path.open(encoding="utf-8") as file:
                line = file.readline()
            if line:
                sample: Mapping[str, Any] = json.loads(line)
                return sample
        return None


def run(config: WatchConfig) -> None:
    """Show the runs until they have ended or Ctrl-C.

    Raises:
        DataError: a directory is not that of a run.
    """
    from rich.console import Console

    watched = [Watched(path) for path in config.runs]
    console = Console()
    if config.once or not console.is_terminal:
        for one in watched:
            one.look()
        console.print(view(watched, console.width))
        return
    from rich.live import Live

    with Live(console=console, screen=False, auto_refresh=False) as live:
        while True:
            for one in watched:
                if one.record or (one.directory / "run.json").is_file():
                    one.look()
            live.update(view(watched, console.width), refresh=True)
            if all(one.ended is not None for one in watched):
                return
            time.sleep(config.refresh_s)


def view(watched: Sequence[Watched], width: int) -> RenderableType:
    """What is shown of the runs on `width` characters."""
    from rich.console import Group

    parts: list[RenderableType] = [_table(watched, width)]
    for one in watched:
        sample = one.sample()
        if sample is not None:
            parts.append(_sample(one, sample, named=len(watched) > 1))
    return Group(*parts)


def _table(watched: Sequence[Watched], width: int) -> Table:
    from rich.table import Table

    least, most = SPARK_WIDTHS
    bars = min(most, max(least, (width - TITLES_WIDTH) // len(watched) - BESIDE_THE_BARS))
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("")
    for one in watched:
        table.add_column(str(one.directory), overflow="fold")
    table.add_row("command", *(str(one.record.get("command", "")) for one in watched))
    table.add_row("step", *(_progress(one) for one in watched))
    for title, names in ROWS:
        series = [one.series(names) for one in watched]
        if any(series):
            table.add_row(
                title,
                *(f"{values[-1]:<11.4g} {sparkline(values, bars)}" if values else "-" for values in series),
            )
    table.add_row("time of a step", *(_time(one) for one in watched))
    return table


def _progress(one: Watched) -> str:
    if not one.record:
        return "not started yet"
    total = one.record.get("config", {}).get("max_steps")
    done = f"{one.last.get('step', 0)}" + (f" of {total}" if total else "")
    return done if one.ended is None else f"{done}, ended: {one.ended}"


def _time(one: Watched) -> str:
    shares = one.shares()
    if not shares:
        return "-"
    seconds = one.last.get("time/step")
    return (f"{seconds:.3g} s: " if seconds else "") + ", ".join(
        f"{p} {100 * s:.0f} %" for p, s in shares.items()
    )


def _sample(one: Watched, sample: Mapping[str, Any], *, named: bool) -> RenderableType:
    from rich.panel import Panel
    from rich.text import Text

    prompt = sample["prompt"]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    reward = sample.get("reward")
    title = "a sample" + (f" of {one.directory}" if named else "")
    # Plain text: what a policy writes is no markup.
    body = Text(f"{_cut(asked)}\n", style="dim") + Text(_cut(str(sample["response"])), style="default")
    return Panel(body, title=title, subtitle="no reward" if reward is None else f"reward {reward:.4g}")


def _cut(text: str) -> str:
    plain = "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
    return plain if len(plain) <= SAMPLE_CHARACTERS else plain[:SAMPLE_CHARACTERS] + " ..."


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as bars of eighths from their least to their greatest, means of equal stretches if there are many."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(values), max(values)
    spread = high - low
    top = len(BARS) - 1
    return "".join(BARS[round((v - low) / spread * top) if spread else top // 2] for v in values)
