"""A kill at a chosen moment, within this process and with certainty.

What a killed process leaves behind is what it had put on the disk. `Death` watches a trainer at work and numbers its
moments: each file operation in the run directory (by Python's audit events), the calls for rewards, the steps of the
optimisers, and the forwards between them. At the chosen moment it raises `Killed`, and from then on every operation in
the run directory raises as well, that of any clean-up included: the directory stays as a kill would have left it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from policy_trainer.reward_source import FunctionReward, Reward
from rlaif.types import Conversation

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OPERATIONS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


class Killed(BaseException):
    """The process has been killed."""


class Death:
    """Numbers the moments of a trainer that works in `folder`, and kills it at number `at` (None: never).

    Attributes:
        moments: what has been about to happen, in order.
    """

    def __init__(self, folder: Path, at: int | None = None) -> None:
        self.moments: list[str] = []
        self._folder, self._at, self._dead = str(folder), at, False

    def moment(self, name: str) -> None:
        """`name` is about to happen."""
        if self._at == len(self.moments):
            self._dead = True
        if self._dead:
            raise Killed(name)
        self.moments.append(name)

    def file_operation(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take an audit event; those that change nothing in the folder are no moments."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str) or not flags & WRITES:
                return
        elif event in OPERATIONS:
            path, directory = str(arguments[0]), arguments[-1]
            if isinstance(directory, int) and directory >= 0 and not path.startswith("/"):
                path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        else:
            return
        if event == "os.mkdir" and os.path.isdir(path):
            return
        if path.startswith(self._folder) and "/tb/" not in path and not path.endswith("/tb"):
            self.moment(f"{event} {path.removeprefix(self._folder)}")

    def distinct(self) -> list[int]:
        """The numbers of the moments, of several operations of one kind on files of one folder the first two alone."""
        kinds = [os.path.dirname(name) or name for name in self.moments]
        return [i for i, kind in enumerate(kinds) if i < 2 or kinds[i - 2 : i] != [kind, kind]]


_watching: Death | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and threading.current_thread() is threading.main_thread():
        _watching.file_operation(event, arguments)


sys.addaudithook(_audit)  # for the life of the process; it does nothing unless a Death watches


@contextmanager
def watching(death: Death) -> Iterator[None]:
    """Let `death` see what this process does."""
    global _watching

    def forward(module: nn.Module, _: object) -> None:
        if isinstance(module, PreTrainedModel) and (death.moments or [""])[-1] != "forward":
            death.moment("forward")

    def step(optimizer: torch.optim.Optimizer, _: object, __: object) -> None:
        death.moment("optimiser step")

    handles = [
        nn.modules.module.register_module_forward_pre_hook(forward),
        register_optimizer_step_pre_hook(step),
    ]
    _watching = death
    try:
        yield
    finally:
        _watching = None
        for handle in handles:
            handle.remove()


class MortalReward(FunctionReward):
    """A function's rewards; asking for them and waiting for them are moments."""

    def __init__(self, death: Death, function: Callable[..., Sequence[float | None]]) -> None:
        super().__init__(function)
        self._death = death

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """See `FunctionReward`; computed at once, so that moments have an order."""
        self._death.moment("rewards are asked for")
        awaited = Awaited(self._death)
        awaited.set_result(self.score(conversations))
        return awaited


class Awaited(Future[list[Reward]]):
    """Waiting for it is a moment."""

    def __init__(self, death: Death) -> None:
        super().__init__()
        self._death = death

    def result(self, timeout: float | None = None) -> list[Reward]:
        """See `Future`."""
        self._death.moment("rewards are awaited")
        return super().result(timeout)
