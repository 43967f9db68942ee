"""The run directory: what was asked, by which code, and what came out.

`run.json` (resolved config, versions, git revision, command line, how it ended), `metrics.jsonl` (one line per step),
`samples/` (transcripts to read), `completions/` (tables of responses), `tb/` (TensorBoard).

A directory belongs to one run: opening it again continues that run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rlaif import __version__
from rlaif.errors import ConfigError, QualityError, RlaifError, StorageError
from rlaif.storage import (
    LOCK_FILE,
    cut_torn_line,
    lock_file,
    refuse_file_as_folder,
    storing,
    write_atomic,
    write_parquet,
)
from rlaif.trackers import Tracker, TrackerName, check_trackers, open_trackers

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = [
    "Progress",
    "Run",
    "clock",
    "code_revision",
    "library_versions",
    "progress",
    "short",
    "write_atomic",
]

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "grpcio", "openai", "vllm", "peft")
_PLAIN_INTERVAL_S = 10.0


class Run:
    """One run directory, open for writing and closed to other processes. Make it with `Run.open`.

    Attributes:
        directory: the run's folder.
        resumed: whether the directory already held this run.
        record: what `run.json` says.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resumed: bool,
        record: dict[str, Any],
        lock: int,
        report_to: Sequence[TrackerName] = ("tensorboard",),
    ) -> None:
        self.directory = directory
        self.resumed = resumed
        self.record = record
        self._report_to = report_to
        self._metrics_path = directory / "metrics.jsonl"
        self._trackers: list[Tracker] | None = None
        self._purge_step: int | None = None
        self._release = weakref.finalize(self, os.close, lock)

    @classmethod
    def open(cls, output_dir: str | os.PathLike[str], config: Any, *, command: str) -> Run:
        """Create the run directory, or continue the run it holds.

        Args:
            output_dir: the folder; parents are made.
            config: the command's config dataclass. Fields in its `VOLATILE: ClassVar[frozenset[str]]` (those that
                cannot change the result, such as `max_in_flight`) may differ when a run is continued. Its
                `report_to`, if it has one, says where metrics go beside `metrics.jsonl`.
            command: the command's name, such as `train ppo`.

        Raises:
            StorageError: the folder cannot be written, is being written by another process, or holds a run of another
                command or configuration.
        """
        directory = Path(output_dir)
        path = directory / "run.json"
        report_to: Sequence[TrackerName] = getattr(config, "report_to", ("tensorboard",))
        check_trackers(report_to)
        identity = cls.identity(config)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record: dict[str, Any] = {
            "command": command,
            "config": _plain(dataclasses.asdict(config)),
            "identity": identity,
            "versions": library_versions(),
            "git_revision": code_revision(),
            "command_line": sys.argv,
            "started": now,
            "resumed": [],
        }
        lock = lock_file(directory / LOCK_FILE, held=directory)
        try:
            resumed = path.is_file()
            if resumed:
                earlier = _read_record(path)
                _check_same_run(directory, earlier, command, identity, _defaults(config))
                record["started"] = earlier.get("started", now)
                record["resumed"] = [*earlier.get("resumed", []), now]
            write_atomic(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
            cut_torn_line(directory / "metrics.jsonl")
        except BaseException:
            os.close(lock)
            raise
        return cls(directory, resumed=resumed, record=record, lock=lock, report_to=report_to)

    def end(self, step: int | None, reason: str) -> None:
        """Note in `run.json` after which step the run ended, and why; opening the run again takes the note back.

        `step` is None for a command without steps.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.record["ended"] = {"step": step, "reason": reason, "at": at}
        text = json.dumps(self.record, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.directory / "run.json", text)

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """Note in `run.json` with which error a command without steps ended, if it does."""
        try:
            yield
        except BaseException as err:
            said = " ".join(str(err).split())
            reason = said if isinstance(err, RlaifError) else f"{type(err).__name__}: {said}"
            with suppress(StorageError):  # a full disk may be the error itself
                self.end(None, "interrupted" if isinstance(err, KeyboardInterrupt) else reason)
            raise

    def disown(self) -> None:
        """Let the directory go: another configuration may use it. For a run that failed before it had any result."""
        (self.directory / "run.json").unlink(missing_ok=True)

    @classmethod
    def check(cls, output_dir: str | os.PathLike[str], config: Any, *, command: str) -> None:
        """Refuse a directory that `open` would refuse for what it is or holds; nothing is written or locked.

        Raises:
            StorageError: it is a file, or holds a run of another command or configuration.
        """
        directory = Path(output_dir)
        refuse_file_as_folder(directory)
        if (directory / "run.json").is_file():
            earlier = _read_record(directory / "run.json")
            _check_same_run(directory, earlier, command, cls.identity(config), _defaults(config))

    @staticmethod
    def identity(config: Any) -> dict[str, Any]:
        """The config fields that decide the result, as JSON values: all but `output_dir` and `config.VOLATILE`."""
        skip = {"output_dir", *getattr(config, "VOLATILE", frozenset())}
        unknown = skip - {"output_dir"} - {f.name for f in dataclasses.fields(config)}
        if unknown:
            raise ConfigError(
                f"VOLATILE of {type(config).__name__} names no field: {', '.join(sorted(unknown))}"
            )
        plain: dict[str, Any] = _plain(dataclasses.asdict(config))
        return {name: value for name, value in plain.items() if name not in skip}

    def log(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Append one line `{"step": step, **metrics}` to `metrics.jsonl` and report it to the trackers.

        None means that the value could not be had at this step; trackers have no point there.

        Raises:
            QualityError: a value is NaN or infinite; nothing is written.
            StorageError: the disk is full.
        """
        values = {name: _scalar(name, value, step) for name, value in metrics.items()}
        line = json.dumps({"step": step, **values}, allow_nan=False) + "\n"
        with storing(self._metrics_path), self._metrics_path.open("a", encoding="utf-8") as file:
            file.write(line)
        if self._trackers is None:
            self._trackers = open_trackers(self._report_to, self.directory, self.record, self._purge_step)
        for tracker in self._trackers:
            tracker.log(step, {name: value for name, value in values.items() if value is not None})

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` in order; empty if there are none."""
        if not self._metrics_path.is_file():
            return []
        lines = self._metrics_path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate_metrics(self, step: int) -> None:
        """Drop what was logged after `step`, so that a run resumed from that step writes each step once."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        if self._metrics_path.is_file():
            write_atomic(self._metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        self._purge_step = step + 1

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write `samples/step-NNNNNN.jsonl`, transcripts for people to read, and return its path."""
        path = self.directory / "samples" / f"step-{step:06d}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    def completions(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write `completions/completions_NNNNN.parquet`, all responses of a step as TRL's `log_completions` has them.

        Args:
            step: the step.
            rows: as for `samples`: `prompt` (messages), `response` and `reward`, and what else is known of `advantage`,
                `raw`, `kl` and `finished`.

        Returns:
            The file.

        Raises:
            StorageError: the disk is full.
        """
        import pyarrow as pa

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        numbers = ("reward", "advantage", "raw", "kl")
        schema = pa.schema(
            [
                ("step", pa.int64()),
                ("prompt", pa.list_(message)),
                ("completion", pa.string()),
                *((name, pa.float64()) for name in numbers),
                ("finished", pa.bool_()),
            ]
        )
        path = self.directory / "completions" / f"completions_{step:05d}.parquet"
        table = ({**row, "step": step, "completion": row["response"]} for row in rows)
        write_parquet(path, ({name: row.get(name) for name in schema.names} for row in table), schema)
        return path

    def close(self) -> None:
        """Flush the trackers, and let other processes write the directory."""
        try:
            self._flush()
        finally:
            self._release()

    def _flush(self) -> None:
        trackers, self._trackers = self._trackers or (), None
        for tracker in trackers:
            tracker.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._flush()
            if isinstance(error, RlaifError) and not self.resumed and not self._has_results():
                self.disown()  # nothing to protect, so the mended command may use the same directory
        finally:
            self._release()

    def _has_results(self) -> bool:
        """Whether the directory holds more than what every run writes at its start."""
        files = (path for path in self.directory.rglob("*") if path.is_file())
        return any(
            p.name not in ("run.json", LOCK_FILE) and not p.name.endswith("quarantine.jsonl") for p in files
        )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as err:
        raise StorageError(f"{path} cannot be read ({err}); choose another --output_dir") from err
    if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
        raise StorageError(f"{path} was not written by this program; choose another --output_dir")
    return record


def _check_same_run(
    directory: Path,
    earlier: dict[str, Any],
    command: str,
    identity: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    if earlier.get("command") != command:
        raise StorageError(
            f"{directory} holds a run of `rlaif {earlier.get('command')}`, this is `rlaif {command}`; "
            "choose another --output_dir"
        )
    # A field that did not exist when the run began had no other value than its default.
    before = {**{name: value for name, value in defaults.items() if name in identity}, **earlier["identity"]}
    for name in sorted({*before, *identity}):
        if before.get(name) != identity.get(name):
            a_policy = (
                command.startswith("train ")
                and command != "train rm"
                and (directory / "config.json").is_file()
            )
            trained = a_policy and name in ("max_steps", "num_train_epochs")
            raise StorageError(
                f"{directory} holds a run with {name}={before.get(name)!r}, this one has {identity.get(name)!r}; "
                "choose another --output_dir or the same settings"
                + (f", or train on from this policy: --model_name_or_path {directory}" if trained else "")
            )


def _defaults(config: Any) -> dict[str, Any]:
    """The config's fields that have a default, with it, as JSON values."""
    given: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            given[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            given[field.name] = field.default_factory()
    plain: dict[str, Any] = _plain(given)
    return plain


def _plain(value: Any) -> Any:
    """`value` as JSON would hold it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _scalar(name: str, value: object, step: int) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {name} must be a number or None, not {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number):
        raise QualityError(
            f"{name} is {number} at step {step}; the run cannot be trusted from here: lower --learning_rate or look at "
            "the samples of the step before"
        )
    return number


def library_versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that decide results, without importing them."""
    found = {"rlaif": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_revision() -> str | None:
    """Git revision of this package's own checkout (with `-dirty` if changed); None for an installed copy."""
    folder = Path(__file__).parent
    try:
        for arguments in (
            ["ls-files", "--error-unmatch", "__init__.py"],  # an enclosing repository is not ours
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ---- progress ----


class Progress(Protocol):
    """What `progress` yields."""

    def advance(self, n: int = 1, **stats: object) -> None:
        """Count `n` finished items; `stats` are shown beside the bar until the next call changes them."""


@contextmanager
def progress(total: int | None, description: str, *, done: int = 0) -> Iterator[Progress]:
    """Show how far long work has come, on stderr, with rate and ETA.

    A bar on a terminal; elsewhere (a log file, CI) one plain line every ten seconds and one at the end.

    Args:
        total: number of items, or None if unknown.
        description: what the items are, such as `labeling pairs`.
        done: items that an earlier run has finished; they are no part of the rate.
    """
    if sys.stderr.isatty():
        with _bar() as display:
            yield _Bar(display, display.add_task(description, total=total, completed=done, stats=""))
    else:
        lines = _Lines(total, description, done)
        try:
            yield lines
        finally:
            lines.show()


def _bar() -> RichProgress:
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.table import Column
    from rich.text import Text

    class Rate(rich_progress.ProgressColumn):
        def render(self, task: rich_progress.Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.2f}/s")

    class Stats(rich_progress.ProgressColumn):
        def render(self, task: rich_progress.Task) -> Text:
            return Text(task.fields["stats"], no_wrap=True, overflow="ellipsis")

    def whole() -> Column:
        """On a narrow terminal the bar and the statistics give way first."""
        return Column(no_wrap=True)

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(table_column=whole()),
        Rate(table_column=whole()),
        rich_progress.TimeRemainingColumn(table_column=whole()),
        Stats(),
        console=Console(stderr=True),
    )


class _Bar:
    def __init__(self, display: RichProgress, task: TaskID) -> None:
        self._display = display
        self._task = task

    def advance(self, n: int = 1, **stats: object) -> None:
        text = _show(stats)
        if text:
            self._display.update(self._task, stats=text)
        self._display.advance(self._task, n)


class _Lines:
    def __init__(self, total: int | None, description: str, done: int) -> None:
        self._total = total
        self._description = description
        self._done = self._before = done
        self._stats: dict[str, object] = {}
        self._start = self._shown = time.monotonic()

    def advance(self, n: int = 1, **stats: object) -> None:
        self._done += n
        self._stats.update(stats)
        if time.monotonic() - self._shown >= _PLAIN_INTERVAL_S:
            self.show()

    def show(self) -> None:
        self._shown = time.monotonic()
        elapsed = self._shown - self._start
        rate = (self._done - self._before) / elapsed if elapsed > 0 else 0.0
        of = "" if self._total is None else f"/{self._total}"
        speed = f", {rate:.2f}/s" if rate else ""
        left = "" if self._total is None or not rate else f", {clock((self._total - self._done) / rate)} left"
        line = f"{self._description}: {self._done}{of} in {clock(elapsed)}{speed}{left} {_show(self._stats)}"
        print(
            line.rstrip(),
            file=sys.stderr,
            flush=True,
        )


def _show(stats: Mapping[str, object]) -> str:
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in stats.items())


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(count: float) -> str:
    """A count as people read it: 950, 12.3k, 4.56M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:g}"
