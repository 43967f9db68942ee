"""A command to try the command line with: an ordinary config and run function behind the real parser."""

from __future__ import annotations

import asyncio
import atexit
import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rlaif.errors import ConfigError, DataError
from rlaif.signals import termination


@dataclass(frozen=True)
class ExampleConfig:
    """Train an example."""

    output_dir: Path
    """Where results go."""
    learning_rate: float = 1e-5
    """Step size."""
    kind: Literal["sigmoid", "hinge"] = "sigmoid"
    """Loss."""
    cot: bool = True
    """Think first."""
    names: tuple[str, ...] = ()
    """Any words."""
    eval_dataset: Path | None = None
    """Held-out data."""
    seed: int = 0
    """Seed; must not be negative."""
    do: Literal["nothing", "fail", "disk_full", "wait", "serve", "crash"] = "nothing"
    """What to do."""
    VOLATILE: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.seed < 0:
            raise ConfigError(f"--seed must not be negative, not {self.seed}")


def run(config: ExampleConfig) -> None:
    """Print the config, then end as asked."""
    print(config, flush=True)
    if config.do == "fail":
        raise DataError("in.jsonl has\nno usable row")
    if config.do == "disk_full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    if config.do == "crash":
        raise ZeroDivisionError("a bug")
    if config.do == "wait":
        time.sleep(60)
    if config.do == "serve":
        asyncio.run(_serve())
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            atexit.register(os.kill, os.getpid(), number)


async def _serve() -> None:
    asked = termination()
    print("serving", flush=True)
    await asked.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(0)
    print("drained", flush=True)
