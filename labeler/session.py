"""What every labeling command does around its questions.

A run reads its dataset three times, each time a row at a time: to check it before anything is paid for, to ask
(in any order, journalled), and to write the labels in the order of the input from what is on record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from labeler.config import RequestConfig
from labeler.journal import ReplyJournal, Usage
from labeler.llm import open_llm
from labeler.loop import ask_all
from labeler.recorded import Recorded
from rlaif.models import ModelRef
from rlaif.records import Quarantine
from rlaif.runs import Run, progress

T = TypeVar("T")


async def _nothing() -> None:
    """Nothing to prepare."""


class Session:
    """A run of a labeling command; make it with `open_session`.

    Attributes:
        folder: the run directory.
        journal: its replies.
        quarantine: rows of the input that cannot be read.
    """

    def __init__(self, folder: Path, config: RequestConfig, journal: ReplyJournal) -> None:
        self.folder = folder
        self.journal = journal
        self.quarantine = Quarantine(folder / "quarantine.jsonl")
        self._config = config
        self._models: list[Recorded] = []
        self._started = time.monotonic()

    def open_model(self, name: str) -> Recorded:
        """A model by its name, behind the journal.

        Raises:
            ModelError: the model cannot be loaded.
            ConfigError: the name cannot be used.
        """
        model = Recorded(open_llm(ModelRef.parse(name), self._config.llm_options()), self.journal)
        self._models.append(model)
        return model

    def ask(
        self,
        questions: Callable[[Quarantine], Iterable[T]],
        ask: Callable[[T], Awaitable[str | None]],
        what: str,
        *,
        prepare: Callable[[], Awaitable[None]] = _nothing,
    ) -> int:
        """Read and check all questions, ask those without an answer on record, and take the models offline.

        Args:
            questions: reads them anew on every call; unreadable rows go into the quarantine given.
            ask: asks one; gives the reason if there is no answer.
            what: for the progress line, e.g. `labeling pairs`.
            prepare: done before the first question.

        Returns:
            The number of questions.

        Raises:
            DataError: the dataset is missing or has no usable row.
            EndpointError: the endpoint is gone. Replies so far are kept.
            QualityError: nothing at all succeeds.
        """
        total = sum(1 for _ in questions(self.quarantine))
        asyncio.run(self._ask(questions(Quarantine(None)), ask, what, total, prepare))
        for model in self._models:
            model.offline = True
        return total

    async def _ask(
        self,
        questions: Iterable[T],
        ask: Callable[[T], Awaitable[str | None]],
        what: str,
        total: int,
        prepare: Callable[[], Awaitable[None]],
    ) -> None:
        try:
            await prepare()
            with progress(total, what) as bar:
                await ask_all(
                    questions,
                    ask,
                    max_open=min(2 * self._config.max_in_flight, max(total, 1)),
                    progress=bar,
                    stats=self._stats,
                    give_up=self._config.max_unlabelled < 1,
                )
        finally:
            for model in self._models:
                await model.close()

    def _stats(self) -> Mapping[str, object]:
        used = sum((model.used for model in self._models), Usage())
        return {"tokens": used.prompt_tokens + used.completion_tokens}

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the run began, to a tenth."""
        return round(time.monotonic() - self._started, 1)


@contextmanager
def open_session(config: RequestConfig, command: str) -> Iterator[Session]:
    """Open or continue the run directory of a command, with its journal.

    Raises:
        StorageError: the directory cannot be written, is in use, or holds another run.
        DataError: there is no journal to reuse.
    """
    with Run.open(config.output_dir, config, command=command) as run:
        reuse = None if config.reuse is None else Path(config.reuse)
        with ReplyJournal(run.directory, reuse=reuse) as journal:
            yield Session(run.directory, config, journal)
