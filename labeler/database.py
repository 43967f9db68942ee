"""SQLite files of a run directory.

In WAL mode: a statement is one commit, which outlives a kill of the process; the disk is synchronised every few hundred
commits, so a power cut may cost the last of them and never the file.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlaif.errors import DataError, StorageError


class Database:
    """A file: statements, and one line for whatever is wrong with it.

    Args:
        path: the file.
        tables: statements that make what is not there yet.
        read_only: look, and make nothing.

    Raises:
        StorageError: the file cannot be written or is damaged; as every method does.
        DataError: there is no file to read.
    """

    def __init__(self, path: Path, tables: str = "", *, read_only: bool = False) -> None:
        self._path = path
        self._read_only = read_only
        if read_only and not path.is_file():
            raise DataError(f"{path} does not exist: give the directory of a labeling run")
        with self._explained():
            if read_only:
                self._sql = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
                return
            self._sql = sqlite3.connect(path, isolation_level=None)
            self._sql.execute("PRAGMA journal_mode=WAL")
            self._sql.execute("PRAGMA synchronous=NORMAL")
            self._sql.executescript(tables)

    def all(self, statement: str, values: tuple[object, ...] = ()) -> list[Any]:
        """The rows that a statement finds."""
        with self._explained():
            return self._sql.execute(statement, values).fetchall()

    def each(self, statement: str, values: tuple[object, ...] = ()) -> Iterator[Any]:
        """The rows that a statement finds, one by one; write nothing before the last of them."""
        with self._explained():
            yield from self._sql.execute(statement, values)

    def write(self, statement: str, values: tuple[object, ...] = ()) -> int:
        """Execute a statement, and commit it outside of `together`; the number of rows changed."""
        with self._explained():
            return self._sql.execute(statement, values).rowcount

    @contextmanager
    def together(self) -> Iterator[None]:
        """Statements that all count or none: a kill or an error in between undoes them."""
        self.write("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with suppress(StorageError):  # a full disk has rolled it back already
                self.write("ROLLBACK")
            raise
        self.write("COMMIT")

    def decode(self, text: str) -> dict[str, Any]:
        """A stored reply."""
        try:
            reply: dict[str, Any] = json.loads(text)
        except ValueError as err:
            raise self._damaged(err) from err
        return reply

    def close(self) -> None:
        """Close the file; an error must not hide the one that led here."""
        with suppress(sqlite3.Error):
            self._sql.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as err:
            if "malformed" in str(err) or "not a database" in str(err):
                raise self._damaged(err) from err
            if self._read_only:
                raise StorageError(f"cannot read {self._path}: {err}") from err
            full = "full" in str(err) or "I/O" in str(err)
            advice = (
                "free some space and run the same command again" if full else "choose another --output_dir"
            )
            raise StorageError(f"cannot write {self._path}: {err}; {advice}") from err

    def _damaged(self, err: Exception) -> StorageError:
        return StorageError(
            f"{self._path} is damaged ({err}): restore it from a copy, or move it away to pay for its replies again"
        )
