"""The models of one server: one active, others ready beside it, and those that finish what they have begun.

A call takes hold of a model when it is admitted and keeps it to its end, so a swap in between changes nothing for
it: every answer comes from one version, and no call is refused because of a swap.

Loading and unloading belong to the registry, and not to the call that asked for them: a caller that leaves in the
middle leaves neither a model that nobody can free nor one that nobody counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from reward_server.batcher import Batcher
from reward_server.observe import Observer
from reward_server.scorers.base import Scorer
from rlaif.errors import RlaifError

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class State(Enum):
    """Where a model is between being asked for and being gone."""

    LOADING = "loading"
    READY = "ready"
    ACTIVE = "active"
    DRAINING = "draining"


class NoSuchModel(RlaifError):
    """No model of this version is loaded."""


class TooManyModels(RlaifError):
    """The server holds as many models as it may."""


@dataclass(slots=True, eq=False)
class Model:
    """A loaded model with its queue, the calls that hold it, and its unloading once somebody asked for that.

    `files` are those that it was read from, as they were before; None if that is not known.
    """

    batcher: Batcher
    state: State
    files: Hashable | None = None
    holders: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Task[None] | None = None

    @property
    def scorer(self) -> Scorer:
        """What scores."""
        return self.batcher.scorer

    @property
    def version(self) -> str:
        """Identity of its scores."""
        return self.scorer.version


class ModelRegistry:
    """All models of a server. Methods belong to one event loop.

    Args:
        queue: makes the queue in front of a scorer.
        max_models: most models held at the same time.
        observer: hears of activations.

    Attributes:
        broken: ends only if computing breaks in some model, with the exception.
    """

    def __init__(
        self, queue: Callable[[Scorer], Batcher], *, max_models: int, observer: Observer | None = None
    ) -> None:
        self._queue = queue
        self._observer = observer or Observer()
        self._max_models = max_models
        self._models: list[Model] = []
        self._loading = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def active(self) -> Model | None:
        """The model that scores for callers without a wish; None before the first one."""
        return next((m for m in self._models if m.state is State.ACTIVE), None)

    @property
    def models(self) -> tuple[Model, ...]:
        """All that are loaded."""
        return tuple(self._models)

    @property
    def loading(self) -> int:
        """Models being loaded."""
        return self._loading

    def find(self, version: str) -> Model | None:
        """The loaded model of this version that still takes calls."""
        return next((m for m in self._usable() if m.version == version), None)

    def _usable(self) -> Iterator[Model]:
        return (m for m in self._models if m.state in (State.READY, State.ACTIVE))

    def _no_such(self, version: str) -> NoSuchModel:
        loaded = " and ".join(m.version for m in self._usable())
        return NoSuchModel(f"no model of version {version} is loaded, only {loaded}")

    @contextmanager
    def hold(self, model: Model) -> Iterator[Batcher]:
        """Keep a model until the block ends, whatever is activated meanwhile."""
        model.holders += 1
        model.free.clear()
        try:
            yield model.batcher
        finally:
            model.holders -= 1
            if model.holders == 0:
                model.free.set()

    async def load(
        self, load: Callable[[], Awaitable[Scorer]], *, files: Hashable | None = None, activate: bool = False
    ) -> Model:
        """Load, warm up and keep a model. A version that is loaded already is not kept twice.

        One that was loaded from the same `files` is there: it is not loaded again, and needs no room. A version says
        more, but only once the weights are read.

        Cancelling this call does not stop what loads, since a thread cannot be stopped: until that has ended it counts
        as a model, and then what it made is closed.

        Raises:
            TooManyModels: there is no room.
            RlaifError: it cannot be loaded, or is not what it says it is.
        """
        same = None if files is None else next((m for m in self._usable() if m.files == files), None)
        if same is not None:
            if activate:
                self.activate(same.version)
            return same
        if len(self._models) + self._loading >= self._max_models:
            loaded = " and ".join(m.version for m in self._models)
            raise TooManyModels(
                f"{self._max_models} models are loaded, which is all that this server holds ({loaded}): "
                "unload one, or activate one of these (rlaif models activate --version VERSION)"
            )
        self._loading += 1
        left = asyncio.Event()
        loading = self._begin(self._load(load, files, activate, left), "a model could not be loaded")
        try:
            model = await asyncio.shield(loading)
        except asyncio.CancelledError:
            left.set()
            raise
        assert model is not None  # the caller is here
        return model

    async def _load(
        self,
        load: Callable[[], Awaitable[Scorer]],
        files: Hashable | None,
        activate: bool,
        left: asyncio.Event,
    ) -> Model | None:
        """See `load`; nothing is kept if the caller left meanwhile."""
        try:
            scorer = await load()
            try:
                if not left.is_set():
                    await scorer.warm_up()
            except BaseException:
                await scorer.close()
                raise
            model = self.find(scorer.version)
            if model is None and not left.is_set():
                model = self._keep(scorer, files)
            else:
                await scorer.close()
        finally:
            self._loading -= 1
        if activate and model is not None and not left.is_set():
            self.activate(model.version)
        return model

    def _keep(self, scorer: Scorer, files: Hashable | None) -> Model:
        model = Model(self._queue(scorer), State.READY, files)
        model.free.set()
        self._models.append(model)
        model.batcher.start().add_done_callback(self._note)
        return model

    def activate(self, version: str) -> Model | None:
        """Let a loaded model score for everybody, from the next call on; returns the one before.

        Raises:
            NoSuchModel: it is not loaded.
        """
        model = self.find(version)
        if model is None:
            raise self._no_such(version)
        before = self.active
        if before is not None:
            before.state = State.READY
        model.state = State.ACTIVE
        self._observer.activated(model.scorer.name, version)
        _LOG.info("version %s is active", version)
        return None if before is model else before

    async def unload(self, version: str) -> None:
        """Free a model once the calls that hold it are answered, whether or not this call is cancelled meanwhile.

        Raises:
            NoSuchModel: it is not loaded, or it is active.
        """
        model = self.find(version)
        if model is None:
            draining = (m for m in self._models if m.state is State.DRAINING)
            model = next((m for m in draining if m.version == version), None)
        if model is None:
            raise self._no_such(version)
        if model.state is State.ACTIVE:
            raise NoSuchModel(f"version {version} is active: activate another one first")
        if model.leaving is None:
            model.state = State.DRAINING
            model.leaving = self._begin(self._unload(model), "a model could not be freed")
        await asyncio.shield(model.leaving)

    async def _unload(self, model: Model) -> None:
        await model.free.wait()
        try:
            await model.batcher.stop()
        finally:
            self._models.remove(model)

    async def close(self) -> None:
        """Stop all models, those that are being loaded once they are; what still waits is not computed."""
        for model in self._models:
            model.free.set()  # nobody is waited for
        await asyncio.gather(*self._tasks, return_exceptions=True)  # `_begin` logs what fails
        while self._models:
            await self._models.pop().batcher.stop()
        if not self.broken.done():
            self.broken.cancel()

    def _begin(self, work: Coroutine[Any, Any, T], failed: str) -> asyncio.Task[T]:
        """Start what goes on if its caller leaves; how it failed is told to whoever still waits, and to the log."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio itself keeps no reference

        def end(ended: asyncio.Task[T]) -> None:
            self._tasks.discard(ended)
            if not ended.cancelled() and (err := ended.exception()) is not None:
                _LOG.warning("%s: %s", failed, err, exc_info=None if isinstance(err, RlaifError) else err)

        task.add_done_callback(end)
        return task

    def _note(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and (err := ended.exception()) is not None and not self.broken.done():
            self.broken.set_exception(err)
