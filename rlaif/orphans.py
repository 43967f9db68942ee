"""Ends the processes of a process that was killed before it could end them itself.

A watcher, `python -m rlaif.orphans`, holds the reading end of a pipe whose other end the kernel closes when the process
is gone, whatever ended it. It keeps a file descriptor for each child that it has seen, so that a number used again
cannot mislead it.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

_LOOK_S = 0.5
"""Between two looks for new children."""


@cache
def end_children_with_this_process() -> subprocess.Popen[bytes]:
    """Kill the children of this process, present and later ones, once it is gone; once is enough. Linux only."""
    command = [sys.executable, "-m", "rlaif.orphans"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # out of Ctrl-C's reach


def _children(pid: int) -> Iterator[int]:
    """What it has started from whichever thread; without Python's resource tracker, which ends itself after it."""
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child


def _watch(parent: int) -> None:
    held: dict[int, int] = {}
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        try:
            for child in _children(parent):
                if child not in held and child != os.getpid():
                    held[child] = os.pidfd_open(child)
        except OSError:
            continue  # one has ended while it was looked at
    for process in held.values():
        with suppress(ProcessLookupError):  # it was ended in order
            signal.pidfd_send_signal(process, signal.SIGKILL)


if __name__ == "__main__":
    _watch(os.getppid())
