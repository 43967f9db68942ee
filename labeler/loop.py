"""The labeling loop: a constant number of questions in flight, each answer journalled before it counts.

A failure is never journalled, so the next run of the same command asks exactly the failed questions again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from labeler.llm import RequestFailed
from rlaif.errors import QualityError
from rlaif.runs import Progress
from rlaif.storage import Journal

T = TypeVar("T")
Record = dict[str, Any]

_HOPELESS = 50
"""So many failures without a single answer end the run: going on would cost and give nothing."""


@dataclass(frozen=True, slots=True)
class Task(Generic[T]):
    """A question: equal keys are the same question and are asked once."""

    key: str
    item: T


@dataclass(slots=True)
class Outcome:
    """What a pass over the tasks gave.

    Attributes:
        records: the journalled answer of each key, from this run and earlier ones.
        failures: why the other keys have none.
        asked: questions answered in this run.
        tokens: prompt and completion tokens of this run, as the records count them.
    """

    records: dict[str, Record] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    tokens: int = 0


async def ask_all(
    tasks: Sequence[Task[T]],
    ask: Callable[[T], Awaitable[Record]],
    *,
    journal: Journal,
    max_in_flight: int,
    progress: Progress,
    give_up: bool = True,
) -> Outcome:
    """Ask every question that the journal does not answer yet, in order, `max_in_flight` at a time.

    A slow answer delays nothing but itself: there are no batches to wait for.

    Args:
        tasks: in the order to ask; neighbours run together, so put what shares a prompt side by side.
        ask: gives the record to keep (JSON values; `prompt_tokens` and `completion_tokens` are counted), or
            raises `RequestFailed` for this question alone.
        journal: of this run's directory; answers for other questions in it are left alone.
        max_in_flight: questions at a time, > 0.
        progress: advanced once per question.
        give_up: stop when the first 50 questions all fail.

    Raises:
        QualityError: `give_up`, and the first 50 questions all failed.
        EndpointError: the endpoint is gone. Answers so far are in the journal.
    """
    outcome = Outcome()
    wanted = {task.key: task for task in tasks}
    for record in journal.records():
        if record.get("key") in wanted:
            outcome.records[record["key"]] = record
    open_tasks = [task for key, task in wanted.items() if key not in outcome.records]
    progress.advance(len(outcome.records))
    queue = iter(open_tasks)

    async def worker() -> None:
        for task in queue:
            try:
                record = {"key": task.key, **await ask(task.item)}
            except RequestFailed as err:
                outcome.failures[task.key] = str(err)
                if give_up and outcome.asked == 0 and len(outcome.failures) >= _HOPELESS:
                    raise QualityError(
                        f"the first {len(outcome.failures)} questions all failed, the last with: {err}"
                    ) from err
            else:
                journal.append(record)
                outcome.records[task.key] = record
                outcome.asked += 1
                outcome.tokens += _tokens(record)
            progress.advance(1, unlabelled=len(outcome.failures), tokens=outcome.tokens)

    workers = [asyncio.create_task(worker()) for _ in range(min(max_in_flight, len(open_tasks)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return outcome


def _tokens(record: Mapping[str, Any]) -> int:
    return int(record.get("prompt_tokens", 0)) + int(record.get("completion_tokens", 0))
