"""A run directory as `rlaif report` reads it: its files, and nothing else. What a file does not say is None."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif.errors import DataError
from rlaif.watch import Watched

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH = 4096
"""Rows of a data file that are held at a time."""
Facts = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """One run.

    Attributes:
        folder: the run directory, or the file of a server's metrics.
        command: that made it, such as `train ppo`.
        record: its `run.json`.
        rows: of its `metrics.jsonl`, in order of steps.
    """

    folder: Path
    command: str
    record: Facts = field(default_factory=dict)
    rows: Sequence[Row] = ()

    @classmethod
    def read(cls, folder: Path) -> Source:
        """Open a run directory.

        Raises:
            DataError: it is none, or its files are broken.
        """
        watched = Watched(folder)
        if not (folder / "run.json").is_file():
            raise DataError(f"{folder} is no run directory: it has no run.json{_inside(folder)}")
        try:
            watched.look()
        except ValueError as err:
            if isinstance(err, DataError):
                raise
            raise DataError(f"{folder / 'metrics.jsonl'} cannot be read: {err}") from err
        record = watched.record
        if not isinstance(record, Mapping) or not isinstance(record.get("command"), str):
            raise DataError(f"{folder / 'run.json'} was not written by this program")
        return cls(folder, record["command"], record, watched.rows)

    @property
    def config(self) -> Facts:
        """The settings."""
        config: Facts = self.record.get("config") or {}
        return config

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None where there is none.

        Raises:
            DataError: it cannot be read.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise DataError(f"{path} cannot be read: {err}") from err
        if not isinstance(content, dict):
            raise DataError(f"{path} was not written by this program")
        return content

    def text(self, name: str) -> str | None:
        """A text file of the run; None where there is none."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None

    def has(self, name: str) -> bool:
        """Whether the run has this file."""
        return (self.folder / name).is_file()

    def columns(self, name: str, wanted: Sequence[str]) -> dict[str, list[Any]] | None:
        """Columns of a Parquet file of the run; None where there is none. A column that it lacks is full of None.

        Raises:
            DataError: it cannot be read.
        """
        path = self.folder / name
        if not path.is_file():
            return None
        file = open_parquet(path)
        there = set(file.schema_arrow.names)
        table = file.read(columns=[column for column in wanted if column in there])
        return {
            column: table.column(column).to_pylist() if column in there else [None] * table.num_rows
            for column in wanted
        }

    def scan(self, name: str, wanted: Sequence[str]) -> Iterator[Row]:
        """Rows of a Parquet file of the run, with these columns alone, a few at a time; none where there is no file.

        Raises:
            DataError: it cannot be read.
        """
        path = self.folder / name
        if path.is_file():
            for batch in open_parquet(path).iter_batches(batch_size=BATCH, columns=list(wanted)):
                yield from batch.to_pylist()

    def picked(self, name: str, numbers: Sequence[int]) -> list[Row]:
        """Whole rows of a Parquet file by their number from 0; none where there is no file.

        Raises:
            DataError: it cannot be read.
        """
        path = self.folder / name
        if not path.is_file() or not numbers:
            return []
        found: dict[int, Row] = {}
        file, start = open_parquet(path), 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if any(start <= n < end for n in numbers):
                for batch in file.iter_batches(batch_size=BATCH, row_groups=[group]):
                    inside = {n for n in numbers if start <= n < start + batch.num_rows}
                    found.update({n: batch.slice(n - start, 1).to_pylist()[0] for n in inside})
                    start += batch.num_rows
            start = end
        return [found[n] for n in numbers if n in found]

    def samples(self) -> dict[int, Path]:
        """By step, the file with its transcripts, in order."""
        files = sorted((self.folder / "samples").glob("step-*.jsonl"))
        return {int(path.stem.removeprefix("step-")): path for path in files}

    def completions(self) -> dict[int, Path]:
        """By step, the table with all of its responses, in order."""
        files = sorted((self.folder / "completions").glob("completions_*.parquet"))
        return {int(path.stem.removeprefix("completions_")): path for path in files}


def open_parquet(path: Path) -> ParquetFile:
    """A Parquet file.

    Raises:
        DataError: it is another file, or a part of one.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (OSError, pa.ArrowException) as err:
        raise DataError(f"{path} cannot be read: {err}") from err


def read_lines(path: Path) -> Iterator[Row]:
    """Rows of a JSON lines file, without a torn last one.

    Raises:
        DataError: a line is no JSON.
    """
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError as err:
                    raise DataError(f"{path} cannot be read: {err}") from err


def _inside(folder: Path) -> str:
    """What to do instead: the runs that a folder holds."""
    if not folder.exists():
        return "; there is nothing at this path"
    runs = sorted(path.parent for path in folder.glob("*/run.json")) if folder.is_dir() else []
    return f"; it holds runs, name those: {' '.join(map(str, runs))}" if runs else ""
