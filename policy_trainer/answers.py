"""Answers of a reward server in a journal: what was answered is never asked again, what failed is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from policy_trainer.reward_source import ServerInfo
from rlaif.errors import StorageError
from rlaif.runs import progress
from rlaif.storage import Journal

Question = TypeVar("Question")
Answer = TypeVar("Answer", bound=tuple[Any, ...])


class Kept(NamedTuple):
    """What an earlier run has left in a journal.

    Attributes:
        header: who answered, and how it was asked; None if nobody was asked yet.
        answers: by the id of their question, as lists of an answer's fields; failures are not among them.
    """

    header: dict[str, Any] | None
    answers: dict[str, list[Any]]


def read_journal(journal: Journal) -> Kept:
    """Read what is there. The first field of an answer is None where it failed."""
    records = journal.records()
    header = next(records, None)
    answers = {
        key: values
        for record in records
        for key, values in zip(record["keys"], record["answers"], strict=True)
        if values[0] is not None
    }
    return Kept(header, answers)


def same_asker(journal: Journal, kept: Kept, info: ServerInfo, **how: object) -> None:
    """Note who is going to answer, or check that it is who answered before.

    Args:
        journal: gets a header if it has none.
        kept: of that journal.
        info: of the server.
        how: it is asked.

    Raises:
        StorageError: the journal holds the answers of another model, or was asked otherwise.
    """
    mine = {"model": info.name, "version": info.version, **how}
    if kept.header is None:
        journal.append(mine)
    elif kept.header != mine:
        raise StorageError(
            f"{journal.path} holds answers of {kept.header}, this run asks {mine}; "
            "choose another --output or --output_dir, or remove that file to ask for everything again"
        )


def ask_all(
    todo: Mapping[str, Question],
    submit: Callable[[Sequence[Question]], Future[list[Answer]]],
    journal: Journal,
    answers: dict[str, Answer],
    *,
    batch_size: int,
    max_in_flight: int,
    what: str,
) -> None:
    """Ask every question of `todo`, and put its answer into `answers` once it is journalled.

    Args:
        todo: questions by their ids, without those that have an answer.
        submit: asks in the background.
        journal: with its header.
        answers: by id; grows.
        batch_size: questions that are journalled together.
        max_in_flight: requests at a time.
        what: is asked, for the progress bar.
    """
    waiting = iter(todo)
    under_way: deque[tuple[list[str], Future[list[Answer]]]] = deque()
    missing = 0
    with progress(len(todo), what) as bar:
        while True:
            while len(under_way) < 2 * max_in_flight and (keys := list(islice(waiting, batch_size))):
                under_way.append((keys, submit([todo[key] for key in keys])))
            if not under_way:
                return
            keys, future = under_way.popleft()
            batch = future.result()
            journal.append({"keys": keys, "answers": batch})
            answers.update(zip(keys, batch, strict=True))
            missing += sum(answer[0] is None for answer in batch)
            bar.advance(len(keys), missing=missing)
