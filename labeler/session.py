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
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from labeler.budget import Budget
from labeler.config import RequestConfig
from labeler.dry_run import DryRun
from labeler.heartbeat import Heartbeat
from labeler.journal import JOURNAL_FILE, ReplyJournal, Totals, Usage
from labeler.llm import open_llm
from labeler.loop import ask_all
from labeler.recorded import Recorded
from rlaif.errors import BudgetReached, QualityError, RlaifError
from rlaif.models import ModelRef
from rlaif.records import Quarantine
from rlaif.runs import Progress, Run, progress, short

if TYPE_CHECKING:
    from labeler.batch import Batches

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
        price: what tokens cost; None where it was not told.
        stopped: the budget was reached, so that some questions were not asked.
    """

    def __init__(
        self,
        folder: Path,
        config: RequestConfig,
        journal: ReplyJournal,
        heartbeat: Heartbeat,
        dry_run: DryRun | None = None,
    ) -> None:
        self.folder = folder
        self.journal = journal
        self.heartbeat = heartbeat
        self.quarantine = Quarantine(folder / "quarantine.jsonl")
        self.price = config.price()
        self.stopped: BudgetReached | None = None
        self._config = config
        self._models: list[Recorded] = []
        self._started = time.monotonic()
        self._dry_run = dry_run
        self._batches: Batches | None = None
        self._done = 0
        self._paid = Usage() if self.price is None else journal.totals().usage
        self._budget = (
            None
            if self.price is None or config.max_cost is None
            else Budget(self.price, config.max_cost, self._paid)
        )
        heartbeat.stats = self._stats
        heartbeat.stats = self._stats  # last: another thread calls it

    def open_model(self, name: str) -> Recorded:
        """A model by its name, behind the journal.

        Raises:
            ModelError: the model cannot be loaded.
            ConfigError: the name cannot be used.
        """
        ref, options = ModelRef.parse(name), self._config.llm_options()
        if self._dry_run is not None:
            model = Recorded(self._dry_run.open_model(ref, options), self.journal)
        elif self._config.batch:
            from labeler.backends.batched import BatchedEndpoint

            model = Recorded(BatchedEndpoint(ref, options, self._open_batches()), self.journal)
        else:
            model = Recorded(open_llm(ref, options), self.journal, self._budget)
        self._models.append(model)
        return model

    def _open_batches(self) -> Batches:
        from labeler.batch import Batches, BatchStore, Spending

        if self._batches is None:
            price, limit = self.price, self._config.max_cost
            self._batches = Batches(
                BatchStore(self.folder),
                interval_s=self._config.batch_interval_s,
                spending=None
                if price is None or limit is None
                else Spending(price, limit, lambda: price.cost(self.journal.totals().usage)),
                most_requests=self._config.batch_size,
            )
        return self._batches

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
            DryRunEnded: this was a dry run, and its findings are printed.
        """
        if self._dry_run is not None:
            what = f"dry run of {what}"
        self.heartbeat.enter("reading", what)
        total = sum(1 for _ in self.heartbeat.count(questions(self.quarantine)))
        if self.quarantine.count and self._dry_run is None:
            reason, often = self.quarantine.reasons.most_common(1)[0]
            print(
                f"warning: {self.quarantine.count} rows cannot be used, {often} of them because: {reason}; they are in "
                f"{self.quarantine.path}",
                file=sys.stderr,
            )
        self.heartbeat.enter("asking", what, total)
        asyncio.run(self._ask(lambda: questions(Quarantine(None)), ask, what, total, prepare))
        if self._dry_run is not None:
            self._dry_run.end(total, what, self.quarantine.count)
        self.heartbeat.enter("writing", what, total)
        for model in self._models:
            model.offline = True
        return total

    async def _ask(
        self,
        questions: Callable[[], Iterable[T]],
        ask: Callable[[T], Awaitable[str | None]],
        what: str,
        total: int,
        prepare: Callable[[], Awaitable[None]],
    ) -> None:
        began = time.monotonic()
        try:
            await prepare()
            await self._ask_once(questions(), ask, what, total)
            while self._batches is not None and await self._batches.exchange(self._show_batches(what)):
                self.heartbeat.enter("asking", what, total)
                await self._ask_once(questions(), ask, what, total)
        except BudgetReached as err:
            self.stopped = BudgetReached(
                f"{what}: {self._done} of {total} done; {err}. "
                "Run the same command with a larger --max_cost to go on"
            )
        finally:
            if replies := sum(model.replies for model in self._models):
                self.journal.note_pace(replies, time.monotonic() - began)
            for reason, count in self.heartbeat.unlabelled.most_common(_REASONS):
                print(f"  {count} unlabelled: {reason}", file=sys.stderr)
            for model in self._models:
                await model.close()
            if self._batches is not None:
                self._batches.store.close()

    async def _ask_once(
        self, questions: Iterable[T], ask: Callable[[T], Awaitable[str | None]], what: str, total: int
    ) -> None:
        """Ask all questions once; with batches, some answers come later."""
        self._done = 0
        self.heartbeat.unlabelled.clear()

        async def counted(question: T) -> str | None:
            reason = await ask(question)
            if reason is None:
                self._done += 1
            else:
                self.heartbeat.unlabelled[reason] += 1
            return reason

        with progress(total, what) as bar:
            await ask_all(
                questions,
                counted,
                max_open=min(2 * self._config.max_in_flight, max(total, 1)),
                progress=_Both(bar, self.heartbeat),
                stats=self._shown,
                give_up=self._config.max_unlabelled < 1 and self._dry_run is None and self._batches is None,
            )

    def _show_batches(self, what: str) -> Callable[[int, int], None]:
        """Shows how far the batches are, whenever they are further."""
        last: int | None = None

        def show(answered: int, sent: int) -> None:
            nonlocal last
            if last is None:
                self.heartbeat.enter("asking", f"{what}, in batches", sent)
            if answered != last:
                print(f"{what}, in batches: {answered}/{sent} requests answered", file=sys.stderr, flush=True)
                self.heartbeat.advance(answered - (last or 0))
            last = answered

        return show

    def _stats(self) -> dict[str, Any]:
        """What the run has used so far, for other processes to read."""
        used = sum((model.used for model in self._models), Usage())
        waiting = sum(model.waiting for model in self._models)
        return {**asdict(used), "waiting": waiting, **self.costs()}

    def _shown(self) -> Mapping[str, object]:
        """What stands beside the progress bar."""
        now = self._stats()
        return {
            "waiting": now["waiting"],
            "prompt": f"{short(now['prompt_tokens'])} tok",
            "completion": f"{short(now['completion_tokens'])} tok",
            **({} if self.price is None else {"cost": f"${self.costs()['cost_usd']:.4g}"}),
        }

    def costs(self) -> dict[str, float]:
        """`cost_usd`: USD for all replies of this run directory; nothing where no price was told."""
        if self.price is None:
            return {}
        return {"cost_usd": self.price.cost(sum((model.used for model in self._models), self._paid))}

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
    if config.dry_run:
        with _scratch_session(config, command) as session:
            yield session
        return
    with (
        Run.open(config.output_dir, config, command=command) as run,
        ReplyJournal(run.directory, reuse=_reused(config)) as journal,
        Heartbeat(run.directory, command) as heartbeat,
    ):
        session = Session(run.directory, config, journal, heartbeat)
        try:
            yield session
        except QualityError:  # with part of the questions asked there may be nothing to conclude
            if session.stopped is None:
                raise
        except RlaifError:
            if not run.resumed and not journal.paid:
                run.disown()  # nothing to protect, so the mended command may use the same directory
            raise
        if session.stopped is not None:
            raise session.stopped


@contextmanager
def _scratch_session(config: RequestConfig, command: str) -> Iterator[Session]:
    """A session for a dry run. It knows the replies on record and writes in a folder that vanishes.

    Raises:
        StorageError: the directory holds another run.
    """
    folder = Path(config.output_dir)
    Run.check(folder, config, command=command)
    on_record, written = Totals(), None
    earlier = []
    if (folder / JOURNAL_FILE).is_file():
        earlier.append(folder)
        with ReplyJournal(folder, read_only=True) as journal:
            on_record, written = journal.totals(), journal.mean_completion_tokens("generate")
    with (
        TemporaryDirectory(prefix="rlaif-dry-run-") as scratch,
        ReplyJournal(Path(scratch), reuse=[*earlier, *_reused(config)]) as journal,
        Heartbeat(Path(scratch), command) as heartbeat,
    ):
        yield Session(Path(scratch), config, journal, heartbeat, DryRun(config, command, on_record, written))


def _reused(config: RequestConfig) -> list[Path]:
    return [] if config.reuse is None else [Path(config.reuse)]


class _Both:
    """Progress that people see and that other processes read."""

    def __init__(self, bar: Progress, heartbeat: Heartbeat) -> None:
        self._bar = bar
        self._heartbeat = heartbeat

    def advance(self, n: int = 1, **stats: object) -> None:
        """See `rlaif.runs.Progress`."""
        self._bar.advance(n, **stats)
        self._heartbeat.advance(n)
