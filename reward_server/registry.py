"""The models of one server: one active, others ready beside it, and those that finish what they have begun.

A call takes hold of a model when it is admitted and keeps it to its end, so a swap in between changes nothing for
it: every answer comes from one version, and no call is refused because of a swap.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

from reward_server.batcher import Batcher
from reward_server.observe import Observer
from reward_server.scorers.base import Scorer
from rlaif.errors import RlaifError

_LOG = logging.getLogger(__name__)


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
    """A loaded model with its queue, and the calls that hold it."""

    batcher: Batcher
    state: State
    holders: int = 0
    free: asyncio.Event = field(default_factory=asyncio.Event)

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
        usable = (m for m in self._models if m.state in (State.READY, State.ACTIVE))
        return next((m for m in usable if m.version == version), None)

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

    async def load(self, load: Callable[[], Awaitable[Scorer]], *, activate: bool = False) -> Model:
        """Load, warm up and keep a model. A version that is loaded already is not kept twice.

        Raises:
            TooManyModels: there is no room.
            RlaifError: it cannot be loaded, or is not what it says it is.
        """
        if len(self._models) + self._loading >= self._max_models:
            raise TooManyModels(
                f"{self._max_models} models are loaded, which is all that this server holds: unload one"
            )
        self._loading += 1
        try:
            scorer = await load()
            await scorer.warm_up()
        finally:
            self._loading -= 1
        known = self.find(scorer.version)
        if known is not None:
            await scorer.close()
            model = known
        else:
            model = Model(self._queue(scorer), State.READY)
            model.free.set()
            self._models.append(model)
            model.batcher.start().add_done_callback(self._note)
        if activate:
            self.activate(model.version)
        return model

    def activate(self, version: str) -> Model | None:
        """Let a loaded model score for everybody, from the next call on; returns the one before.

        Raises:
            NoSuchModel: it is not loaded.
        """
        model = self.find(version)
        if model is None:
            raise NoSuchModel(f"no model of version {version} is loaded")
        before = self.active
        if before is not None:
            before.state = State.READY
        model.state = State.ACTIVE
        self._observer.activated(model.scorer.name, version)
        _LOG.info("version %s is active", version)
        return None if before is model else before

    async def unload(self, version: str) -> None:
        """Free a model once the calls that hold it are answered.

        Raises:
            NoSuchModel: it is not loaded, or it is active.
        """
        model = self.find(version)
        if model is None:
            raise NoSuchModel(f"no model of version {version} is loaded")
        if model.state is State.ACTIVE:
            raise NoSuchModel(f"version {version} is active: activate another one first")
        model.state = State.DRAINING
        await model.free.wait()
        await model.batcher.stop()
        self._models.remove(model)

    async def close(self) -> None:
        """Stop all models; what still waits is not computed."""
        for model in self._models:
            await model.batcher.stop()
        self._models.clear()
        if not self.broken.done():
            self.broken.cancel()

    def _note(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and (err := ended.exception()) is not None and not self.broken.done():
            self.broken.set_exception(err)
