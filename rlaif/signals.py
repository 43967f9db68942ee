"""How a command that serves is asked to end."""

from __future__ import annotations

import asyncio
import signal

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
