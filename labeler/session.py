"""What every labeling command does around its questions.

A run reads its dataset three times, each time a row at a time: to check it before anything is paid for, to ask
(in any order, journalled), and to write the labels in the order of the input from what is on record.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from labeler.config import RequestConfig
from labeler.heartbeat import Heartbeat
from labeler.journal import ReplyJournal, Usage
from labeler.llm import open_llm
from labeler.loop import ask_all
from labeler.outputs import short
from labeler.recorded import Recorded
from rlaif.models import ModelRef
from rlaif.records import Quarantine
from rlaif.runs import Progress, Run, progress

T = TypeVar("T")

_REASONS = 5
"""So many reasons are named when the asking ends; the report has all of them."""


async def _nothing() -> None:
    """Nothing to prepare."""


class Session:
    """A run of a labeling command; make it with `open_session`.

    Attributes:
        folder: the run directory.
        journal: its replies.
        quarantine: rows of the input that cannot be read.
        heartbeat: tells other processes how far the run is.
    """

    def __init__(
        self, folder: Path, config: RequestConfig, journal: ReplyJournal, heartbeat: Heartbeat
    ) -> None:
        self.folder = folder
        self.journal = journal
        self.heartbeat = heartbeat
        heartbeat.stats = self._stats
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
        self.heartbeat.enter("reading", what)
        total = sum(1 for _ in self.heartbeat.count(questions(self.quarantine)))
        self.heartbeat.enter("asking", what, total)
        asyncio.run(self._ask(questions(Quarantine(None)), ask, what, total, prepare))
        self.heartbeat.enter("writing", what, total)
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
        async def counted(question: T) -> str | None:
            reason = await ask(question)
            if reason is not None:
                self.heartbeat.unlabelled[reason] += 1
            return reason

        try:
            await prepare()
            with progress(total, what) as bar:
                await ask_all(
                    questions,
                    counted,
                    max_open=min(2 * self._config.max_in_flight, max(total, 1)),
                    progress=_Both(bar, self.heartbeat),
                    stats=self._shown,
                    give_up=self._config.max_unlabelled < 1,
                )
        finally:
            for reason, count in self.heartbeat.unlabelled.most_common(_REASONS):
                print(f"  {count} unlabelled: {reason}", file=sys.stderr)
            for model in self._models:
                await model.close()

    def _stats(self) -> dict[str, Any]:
        """What the run has used so far, for other processes to read."""
        used = sum((model.used for model in self._models), Usage())
        return {**asdict(used), "in_flight": sum(model.in_flight for model in self._models)}

    def _shown(self) -> Mapping[str, object]:
        """What stands beside the progress bar."""
        now = self._stats()
        return {
            "in_flight": now["in_flight"],
            "prompt": f"{short(now['prompt_tokens'])} tok",
            "completion": f"{short(now['completion_tokens'])} tok",
        }

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
        with (
            ReplyJournal(run.directory, reuse=reuse) as journal,
            Heartbeat(run.directory, command) as heartbeat,
        ):
            yield Session(run.directory, config, journal, heartbeat)


class _Both:
    """Progress that people see and that other processes read."""

    def __init__(self, bar: Progress, heartbeat: Heartbeat) -> None:
        self._bar = bar
        self._heartbeat = heartbeat

    def advance(self, n: int = 1, **stats: object) -> None:
        """See `rlaif.runs.Progress`."""
        self._bar.advance(n, **stats)
        self._heartbeat.advance(n)
