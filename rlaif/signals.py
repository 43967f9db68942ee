"""How a command that serves or trains is asked to end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDINGS = (signal.SIGTERM, signal.SIGINT)


def termination() -> asyncio.Event:
    """An event of the running loop, in the main thread, that the first SIGTERM or SIGINT sets.

    From then on both are ignored until the process has ended. asyncio gives them back their defaults when its loop
    closes, and a supervisor's second SIGTERM would then kill a process that has answered everything, with the exit code
    of one that has not.
    """
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def end() -> None:
        for number in _ENDINGS:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        asked.set()

    for number in _ENDINGS:
        loop.add_signal_handler(number, end)
    return asked


class StopRequest:
    """Whether somebody asked this process to end."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn SIGTERM and SIGINT into a request that a loop reads between steps; a second one acts at once.

    The loop saves a checkpoint and raises KeyboardInterrupt, which the command line reports.
    """
    request = StopRequest()
    previous: dict[signal.Signals, Any] = {}

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.received = signal.Signals(number)
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    for signum in (signal.SIGTERM, signal.SIGINT):
        previous[signum] = signal.signal(signum, on_signal)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
