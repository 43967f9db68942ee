"""The labeling loop: a constant number of questions open, no batch to wait for, no memory per question."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from labeler.llm import RequestFailed
from rlaif.errors import QualityError
from rlaif.runs import Progress

T = TypeVar("T")
A = TypeVar("A")

_HOPELESS = 50
"""So many failures without a single answer end the run: going on would cost and give nothing."""

_WINDOW = 4096

_CHUNK = 256
"""Questions replayed per turn of the event loop."""


async def ask_all(
    questions: Iterable[T],
    ask: Callable[[T], Awaitable[str | None]],
    *,
    max_open: int,
    progress: Progress,
    stats: Callable[[], Mapping[str, object]] = dict,
    give_up: bool = True,
) -> Counter[str]:
    """Ask every question, in order, `max_open` at a time. A slow answer delays nothing but itself.

    Args:
        questions: in the order to ask; neighbours run together, so put what shares a prompt side by side.
        ask: asks one question and keeps what it learns; gives None, or the reason why there is no answer.
        max_open: questions at a time, > 0; more than requests in flight, so that an answer being written down
            or a rationale turning into a label leaves no slot empty.
        progress: advanced once per question.
        stats: shown beside the progress: tokens, cost.
        give_up: stop when the first 50 questions all fail.

    Returns:
        How many questions stay open for each reason.

    Raises:
        QualityError: `give_up`, and the first 50 questions all failed.
        EndpointError: the endpoint is gone. What was answered is kept.
    """
    queue = iter(questions)
    reasons: Counter[str] = Counter()
    answered = 0

    async def worker() -> None:
        nonlocal answered
        for question in queue:
            reason = await ask(question)
            if reason is None:
                answered += 1
            else:
                reasons[reason] += 1
                if give_up and not answered and reasons.total() >= _HOPELESS:
                    raise QualityError(
                        f"the first {reasons.total()} questions all failed, the last with: {reason}"
                    )
            progress.advance(1, unlabelled=reasons.total(), **stats())

    workers = [asyncio.create_task(worker()) for _ in range(max_open)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return reasons


def replay(questions: Iterable[T], answer: Callable[[T], Awaitable[A]]) -> Iterator[tuple[T, A]]:
    """Every question with its answer, in order, from what is on record; nothing is sent.

    Args:
        questions: read as the answers are consumed.
        answer: answers one question without waiting for anybody.
    """

    async def answer_all(chunk: list[T]) -> list[A]:
        return [await answer(question) for question in chunk]

    queue = iter(questions)
    with asyncio.Runner() as runner:
        while chunk := list(islice(queue, _CHUNK)):
            yield from zip(chunk, runner.run(answer_all(chunk)), strict=True)


def side_by_side(
    questions: Iterable[T], shared: Callable[[T], Hashable], window: int = _WINDOW
) -> Iterator[T]:
    """Questions with those that share a prompt next to each other, so that they meet in the back end's prefix cache.

    Args:
        questions: read as they are needed, `window` at a time.
        shared: what several questions may have in common; groups keep the order in which they first occur.
        window: questions looked at together, which bounds the memory.
    """
    queue = iter(questions)
    while chunk := list(islice(queue, window)):
        groups: dict[Hashable, list[T]] = {}
        for question in chunk:
            groups.setdefault(shared(question), []).append(question)
        for group in groups.values():
            yield from group


async def reason_of(answer: Awaitable[object]) -> str | None:
    """Await an answer that raises `RequestFailed` when it cannot be had; the reason, or None."""
    try:
        await answer
    except RequestFailed as err:
        return str(err)
    return None
