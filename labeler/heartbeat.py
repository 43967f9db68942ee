"""The sign of life of a running command: `progress.json` in its run directory, rewritten every two seconds.

A process that is killed cannot say so. Its last file names the process, so that `rlaif label status` finds it gone.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rlaif.errors import StorageError
from rlaif.storage import write_atomic

T = TypeVar("T")

PROGRESS_FILE = "progress.json"
INTERVAL_S = 2.0
_WINDOW_S = 60.0
"""The rate is that of the last minute: a resumed run passes what is on record at once."""


class Heartbeat:
    """Writes the file, from a thread of its own, since a long request or a forward pass may hold the others.

    Use as a context manager. The file then ends with the state `finished`, or `stopped` and the error.

    Args:
        folder: the run directory.
        command: the command's name, such as `label pairs`.

    Attributes:
        unlabelled: how many questions stay open for each reason.
        stats: called at each beat; what it gives is stored beside the rest.
    """

    def __init__(self, folder: Path, command: str) -> None:
        self.unlabelled: Counter[str] = Counter()
        self.stats: Callable[[], Mapping[str, object]] = dict
        self._path = folder / PROGRESS_FILE
        self._command = command
        self._started = time.time()
        self._phase, self._what, self._done = "reading", "", 0
        self._total: int | None = None
        self._recent: deque[tuple[float, int]] = deque()
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def enter(self, phase: str, what: str, total: int | None = None) -> None:
        """Begin a phase of the work: `reading` the dataset, `asking`, or `writing` the labels.

        Args:
            phase: its name.
            what: what is done, such as `labeling pairs`.
            total: how many items there are, if known.
        """
        self._phase, self._what, self._done, self._total = phase, what, 0, total
        self._recent.clear()
        self._write("running")

    def advance(self, n: int = 1) -> None:
        """Count `n` finished items of the phase."""
        self._done += n

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, each counted as it is taken."""
        for item in items:
            self._done += 1
            yield item

    def __enter__(self) -> Heartbeat:
        self._write("running")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None:
            self._write("finished")
            return
        with suppress(StorageError):  # must not hide the error that led here
            self._write("stopped", " ".join(str(error).split()) or "interrupted")

    def _run(self) -> None:
        while not self._over.wait(INTERVAL_S):
            try:
                self._write("running")
            except StorageError as err:
                print(f"rlaif: {err}; the run goes on unseen by `rlaif label status`", file=sys.stderr)
                return

    def _write(self, state: str, error: str | None = None) -> None:
        record = {
            "command": self._command,
            "state": state,
            "error": error,
            "phase": self._phase,
            "what": self._what,
            "done": self._done,
            "total": self._total,
            "rate": self._rate(),
            "started": self._started,
            "updated": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process_started": process_start(os.getpid()),
            "stats": dict(self.stats()),
            "unlabelled": dict(self.unlabelled.copy().most_common()),
        }
        with self._writing:
            write_atomic(self._path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def _rate(self) -> float | None:
        """Items per second over the last minute of the phase."""
        now = time.monotonic()
        self._recent.append((now, self._done))
        while now - self._recent[0][0] > _WINDOW_S:
            self._recent.popleft()
        then, done = self._recent[0]
        return (self._done - done) / (now - then) if now > then else None


def process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since the machine did; None where the system does not tell.

    Beside its number it names a process for good: numbers are given anew.
    """
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def is_alive(pid: int, started: int | None) -> bool:
    """Whether the process still runs on this machine.

    Args:
        pid: its number.
        started: its `process_start`, if known.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's, so there is one
        pass
    fields = _stat(pid)
    if fields is None or started is None:
        return True
    return int(fields[19]) == started and fields[0] not in "ZX"


def _stat(pid: int) -> list[str] | None:
    """What Linux tells of a process after its name, state first (proc(5)); None elsewhere."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last beat of a run; None if there never was one.

    Raises:
        StorageError: the file was not written by this program.
    """
    path = folder / PROGRESS_FILE
    try:
        beat = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as err:
        raise StorageError(f"{path} cannot be read ({err})") from err
    if not isinstance(beat, dict) or "pid" not in beat:
        raise StorageError(f"{path} was not written by this program")
    return beat
