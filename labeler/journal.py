"""The journal of a labeling run: every paid reply, on the disk before it counts.

SQLite in WAL mode: a reply is one commit, which outlives a kill of the process; the disk is synchronised every few
hundred replies, so a power cut may cost the last of them and never the file. Replies are found by key, so a
million of them take no memory, and other processes may read while a run writes.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rlaif.errors import DataError, StorageError
from rlaif.storage import storing
from rlaif.types import content_id

JOURNAL_FILE = "journal.sqlite"

_TABLES = """
CREATE TABLE IF NOT EXISTS replies (
    id INTEGER PRIMARY KEY, key INTEGER NOT NULL UNIQUE, kind TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS failures (key INTEGER PRIMARY KEY, reason TEXT NOT NULL, count INTEGER NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the back end counted them; cached ones are among the prompt's."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Both together."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """What a journal holds: replies by kind, their tokens, and how often each reason keeps a request open."""

    replies: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = Usage()
    failures: Mapping[str, int] = field(default_factory=dict)


def request_key(*parts: object) -> int:
    """A 64-bit key of everything that decides a reply; equal on every machine."""
    return int(content_id(*parts), 16) - 2**63


class ReplyJournal:
    """The replies of one run directory. One process writes at a time.

    Args:
        folder: the run directory.
        reuse: another run directory; its replies answer the same requests without being asked again.
        read_only: look without taking the writer's lock.

    Raises:
        StorageError: the file cannot be written, or another process writes it.
        DataError: there is no journal to read or to reuse.
    """

    def __init__(self, folder: Path, *, reuse: Path | None = None, read_only: bool = False) -> None:
        self.path = folder / JOURNAL_FILE
        self._lock: int | None = None
        if read_only:
            _check_present(self.path)
        else:
            self._lock = _lock(folder / ".journal.lock")
        self._sql = self._connect(read_only)
        self._other: sqlite3.Connection | None = None
        if reuse is not None:
            _check_present(reuse / JOURNAL_FILE)
            self._other = sqlite3.connect(f"file:{reuse / JOURNAL_FILE}?mode=ro", uri=True)
        self._has_failures = bool(self._one("SELECT EXISTS (SELECT 1 FROM failures)"))

    def _connect(self, read_only: bool) -> sqlite3.Connection:
        try:
            if read_only:
                return sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)
            sql = sqlite3.connect(self.path, isolation_level=None)
            sql.execute("PRAGMA journal_mode=WAL")
            sql.execute("PRAGMA synchronous=NORMAL")
            sql.executescript(_TABLES)
        except sqlite3.Error as err:
            raise self._failed(err) from err
        return sql

    def get(self, key: int) -> dict[str, Any] | None:
        """The reply to a request, or None if there is none yet."""
        for sql in (self._sql, self._other):
            found = sql and sql.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
            if found:
                reply: dict[str, Any] = json.loads(found[0])
                return reply
        return None

    def put(self, key: int, kind: str, reply: Mapping[str, Any], usage: Usage = Usage()) -> None:
        """Keep a reply; once this returns, a kill of the process cannot lose it.

        Raises:
            StorageError: the disk is full; earlier replies stay.
            ValueError: the reply holds NaN or an infinity.
        """
        text = json.dumps(reply, ensure_ascii=False, allow_nan=False)
        self._write(
            "INSERT OR IGNORE INTO replies (key, kind, prompt_tokens, completion_tokens, cached_tokens, reply) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (key, kind, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, text),
        )
        if self._has_failures:
            self._write("DELETE FROM failures WHERE key = ?", (key,))

    def fail(self, key: int, reason: str) -> None:
        """Note why a request has no reply. It stays open: the next run asks it again."""
        self._has_failures = True
        self._write(
            "INSERT INTO failures VALUES (?, ?, 1) "
            "ON CONFLICT (key) DO UPDATE SET reason = excluded.reason, count = count + 1",
            (key, reason),
        )

    def failure(self, key: int) -> str | None:
        """Why a request has no reply; None if it was never asked or has one."""
        found = self._sql.execute("SELECT reason FROM failures WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def totals(self) -> Totals:
        """Counts over the whole journal of this directory."""
        kinds = dict(self._sql.execute("SELECT kind, COUNT(*) FROM replies GROUP BY kind ORDER BY kind"))
        tokens = self._sql.execute(
            "SELECT TOTAL(prompt_tokens), TOTAL(completion_tokens), TOTAL(cached_tokens) FROM replies"
        ).fetchone()
        reasons = dict(
            self._sql.execute("SELECT reason, COUNT(*) AS n FROM failures GROUP BY reason ORDER BY n DESC")
        )
        return Totals(kinds, Usage(*map(int, tokens)), reasons)

    def close(self) -> None:
        """Write everything into the one file and release the lock."""
        with suppress(sqlite3.Error):  # closing must not hide the error that led here
            self._sql.close()
            if self._other is not None:
                self._other.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> ReplyJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, statement: str, values: tuple[object, ...]) -> None:
        try:
            self._sql.execute(statement, values)
        except sqlite3.Error as err:
            raise self._failed(err) from err

    def _one(self, statement: str) -> Any:
        try:
            return self._sql.execute(statement).fetchone()[0]
        except sqlite3.Error as err:
            raise self._failed(err) from err

    def _failed(self, err: sqlite3.Error) -> StorageError:
        full = "full" in str(err) or "I/O" in str(err)
        advice = "free some space and run the same command again" if full else "choose another --output_dir"
        return StorageError(f"cannot write {self.path}: {err}; {advice}")


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path} does not exist: give the directory of a labeling run")


def _lock(path: Path) -> int:
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(descriptor)
        raise StorageError(
            f"{path.parent} is being written by another process; wait for it or choose another --output_dir"
        ) from err
    return descriptor
