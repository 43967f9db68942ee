"""The journal of a labeling run: every paid reply, on the disk before it counts.

Replies are found by key, so a million of them take no memory, and other processes may read while a run writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from labeler.database import Database
from rlaif.storage import lock_file
from rlaif.types import content_id

JOURNAL_FILE = "journal.sqlite"

ASKED_AGAIN = (
    "asks for these alone, save those whose reply is on record and says nothing; what is too long fails again"
)
"""What the next run does about rows without an answer."""

_TABLES = """
CREATE TABLE IF NOT EXISTS replies (
    id INTEGER PRIMARY KEY, key INTEGER NOT NULL UNIQUE, kind TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, reply TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS failures (key INTEGER PRIMARY KEY, reason TEXT NOT NULL, count INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lost (
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS paces (replies INTEGER NOT NULL, seconds REAL NOT NULL);
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
    """What a journal holds: replies by kind, tokens, and how often each reason keeps a request open.

    The tokens are those of the replies, and of others that were paid for and held no answer. `pace` is replies per
    second over all the time that was spent asking; None before a first run has ended.
    """

    replies: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = Usage()
    failures: Mapping[str, int] = field(default_factory=dict)
    pace: float | None = None


def request_key(*parts: object) -> int:
    """A 64-bit key of everything that decides a reply; equal on every machine."""
    return int(content_id(*parts), 16) - 2**63


class ReplyJournal:
    """The replies of one run directory. One process writes at a time.

    Args:
        folder: the run directory.
        reuse: other run directories; their replies answer the same requests without being asked again.
        read_only: look without taking the writer's lock.

    Raises:
        StorageError: the file cannot be written or is damaged, or another process writes it.
        DataError: there is no journal to read or to reuse.
    """

    def __init__(self, folder: Path, *, reuse: Sequence[Path] = (), read_only: bool = False) -> None:
        self.path = folder / JOURNAL_FILE
        self._lock: int | None = None
        self._files: list[Database] = []
        if not read_only:
            self._lock = lock_file(folder / ".journal.lock", held=folder)
        try:
            self._file = Database(self.path, _TABLES, read_only=read_only)
            self._files.append(self._file)
            self._files += [Database(other / JOURNAL_FILE, read_only=True) for other in reuse]
            self._has_failures = bool(self._file.all("SELECT 1 FROM failures LIMIT 1"))
        except BaseException:
            self.close()
            raise

    def get(self, key: int) -> dict[str, Any] | None:
        """The reply to a request, or None if there is none yet.

        Raises:
            StorageError: the file is damaged.
        """
        for file in self._files:
            if found := file.all("SELECT reply FROM replies WHERE key = ?", (key,)):
                return file.decode(found[0][0])
        return None

    def put(self, key: int, kind: str, reply: Mapping[str, Any], usage: Usage = Usage()) -> None:
        """Keep a reply; once this returns, a kill of the process cannot lose it.

        Raises:
            StorageError: the disk is full; earlier replies stay.
            ValueError: the reply holds NaN, an infinity, or a lone surrogate.
        """
        text = json.dumps(reply, ensure_ascii=False, allow_nan=False)
        self._file.write(
            "INSERT OR IGNORE INTO replies (key, kind, prompt_tokens, completion_tokens, cached_tokens, reply) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (key, kind, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, text),
        )
        if self._has_failures:
            self._file.write("DELETE FROM failures WHERE key = ?", (key,))

    def fail(self, key: int, reason: str) -> None:
        """Note why a request has no reply. It stays open: the next run asks it again."""
        self._has_failures = True
        self._file.write(
            "INSERT INTO failures VALUES (?, ?, 1) "
            "ON CONFLICT (key) DO UPDATE SET reason = excluded.reason, count = count + 1",
            (key, reason),
        )

    def lose(self, usage: Usage) -> None:
        """Note the tokens of a reply that is no answer."""
        self._file.write(
            "INSERT INTO lost VALUES (?, ?, ?)",
            (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        )

    def failure(self, key: int) -> str | None:
        """Why a request has no reply; None if it was never asked or has one."""
        found = self._file.all("SELECT reason FROM failures WHERE key = ?", (key,))
        return str(found[0][0]) if found else None

    def note_pace(self, replies: int, seconds: float) -> None:
        """Note how long it took to ask for so many replies."""
        self._file.write("INSERT INTO paces VALUES (?, ?)", (replies, seconds))

    @property
    def paid(self) -> bool:
        """Whether it holds a reply that was asked for a label or a text, not only what a probe found."""
        return bool(self._file.all("SELECT 1 FROM replies WHERE kind != 'probe' LIMIT 1"))

    def totals(self) -> Totals:
        """Counts over the whole journal of this directory."""
        kinds = dict(self._file.all("SELECT kind, COUNT(*) FROM replies GROUP BY kind ORDER BY kind"))
        usage = self._usage("replies")
        # A journal of an older version, opened to be read alone, has no such table.
        if self._file.all("SELECT 1 FROM sqlite_master WHERE name = 'lost'"):
            usage += self._usage("lost")
        reasons = dict(
            self._file.all("SELECT reason, COUNT(*) AS n FROM failures GROUP BY reason ORDER BY n DESC")
        )
        [(replies, seconds)] = self._file.all("SELECT TOTAL(replies), TOTAL(seconds) FROM paces")
        pace = replies / seconds if replies and seconds else None
        return Totals(kinds, usage, reasons, pace)

    def _usage(self, table: str) -> Usage:
        [tokens] = self._file.all(
            f"SELECT TOTAL(prompt_tokens), TOTAL(completion_tokens), TOTAL(cached_tokens) FROM {table}"
        )
        return Usage(*map(int, tokens))

    def mean_completion_tokens(self, kind: str) -> float | None:
        """Mean length of the replies of one kind, in tokens; None without any."""
        [(mean,)] = self._file.all("SELECT AVG(completion_tokens) FROM replies WHERE kind = ?", (kind,))
        return None if mean is None else float(mean)

    def close(self) -> None:
        """Write everything into the one file and release the lock."""
        for file in self._files:
            file.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> ReplyJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
