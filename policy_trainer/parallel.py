"""Data parallelism: the processes of a run, and what they tell each other.

Every process has the whole models and knows all of a step's prompts, responses and rewards; each samples, reads and
learns from its share of the micro-batches. Micro-batches, seeds, moments and denominators are those of the whole
batch, so a run with several processes is the run with one, up to the order in which floating-point numbers are summed.
In one process every operation here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from policy_trainer.config import TrainingConfig
from policy_trainer.reward_source import Comparison, Reward, RewardSource, ServerInfo
from rlaif.errors import RlaifError
from rlaif.runs import Run
from rlaif.types import Conversation, Pair

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: the main one may be waiting for a reward server. A process that dies is
noticed at once, by its connections."""


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and asks for rewards."""
        return self.rank == 0

    def file(self, name: str) -> str | None:
        """The name of a file that the main process alone writes; None in the others."""
        return name if self.is_main else None

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Those of the items that are this process's to work on; sorted by size, all shares weigh about the same."""
        return items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; they are pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in any process."""
        return any(self.gather(flag))

    def add(self, values: Tensor) -> Tensor:
        """Sum over processes, in place; where each filled its share of zeros, the result is exact."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def total(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sum by name over processes; a name may be missing in some."""
        totals: dict[str, float] = {}
        for part in self.gather(dict(sums)):
            for name, value in part.items():
                totals[name] = totals.get(name, 0.0) + value
        return totals

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over processes, in place; a parameter that has none in any process keeps none.

        Not a mean: losses are divided by a count of the whole batch already.
        """
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            return
        has = self.add(torch.tensor([float(p.grad is not None) for p in trained])).tolist()
        trained = [p for p, known in zip(trained, has, strict=True) if known]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        if not trained:
            return
        together = self.add(torch.cat([g.float().flatten() for g in gradients]))
        for p, part in zip(trained, torch.split(together, [p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p).to(p.dtype)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in the main process, in all of them.

        Raises:
            RlaifError: `make` raised it; it is raised in all processes.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except RlaifError as err:
                box[1] = err
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        made: T = box[0]
        return made


ALONE = World()
"""A run with one process."""


@contextmanager
def joined() -> Iterator[World]:
    """The processes that torchrun started, or those of a group that exists already, or this one alone."""
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size())
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Python objects travel by gloo, tensors on GPUs by NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def run_directory(world: World, config: TrainingConfig, *, command: str) -> Iterator[Run | None]:
    """The run directory, in the main process; None in the others, which write nothing.

    Raises:
        StorageError: it cannot be written, or holds another run.
    """
    if not world.is_main:
        yield None
        return
    with Run.open(config.output_dir, config, command=command) as run:
        yield run


class SharedReward:
    """A reward source that the main process asks and all processes hear."""

    def __init__(self, source: RewardSource, world: World) -> None:
        """Wrap `source`; every process must make the same calls in the same order.

        Raises:
            RewardServerError: the server cannot be reached or used.
        """
        self._source = source
        self._world = world
        self._info = world.from_main(source.info)

    def info(self) -> ServerInfo:
        """See `RewardSource.info`."""
        return self._info

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """See `RewardSource.score`."""
        return self._world.from_main(lambda: self._source.score(conversations))

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        """See `RewardSource.submit`; all processes must call the future's `result`."""
        return _Heard(self._world, self._source.submit(conversations) if self._world.is_main else None)

    def submit_pairs(self, pairs: Sequence[Pair]) -> Future[list[Comparison]]:
        """See `RewardSource.submit_pairs`; all processes must call the future's `result`."""
        return _Heard(self._world, self._source.submit_pairs(pairs) if self._world.is_main else None)

    def close(self) -> None:
        """See `RewardSource.close`."""
        self._source.close()


class _Heard(Future[T]):
    def __init__(self, world: World, pending: Future[T] | None) -> None:
        super().__init__()
        self._world = world
        self._pending = pending

    def result(self, timeout: float | None = None) -> T:
        def wait() -> T:
            assert self._pending is not None
            return self._pending.result(timeout)

        return self._world.from_main(wait)
