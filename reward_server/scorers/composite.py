"""Several scorers behind one number: sums, gates and ensembles."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from reward_server.scorers.base import (
    Compared,
    CompareTask,
    Failure,
    Kind,
    Normalization,
    Outcome,
    Prepared,
    Scored,
    Scorer,
    ScoreTask,
    Task,
    TaskError,
    finite,
    preference,
)
from reward_server.scorers.rule import CompositeFile, PartSpec, evaluate
from rlaif.errors import ConfigError
from rlaif.types import content_id, with_response

SUFFIXES = (".yaml", ".yml")
"""A `--model` with one of these is the file of a composite."""


@dataclass(frozen=True, slots=True)
class _Prepared(Prepared):
    """A task for all parts: for each response, what each part reads."""

    responses: tuple[tuple[Prepared, ...], ...] = ()
    characters: tuple[int, ...] = ()


class CompositeScorer:
    """Scores by a rule over parts; compares by the sigmoid of the difference of the rule's numbers (Bradley-Terry).

    An item that one part cannot score has no score, and its failure names the part.

    Args:
        name: as the server was told.
        file: the rule and the parts' settings.
        parts: the scorers, by the names in `file`.
    """

    kind: Kind = "composite"
    parallel_batches = 1
    max_batch_items = 0

    def __init__(self, name: str, file: CompositeFile, parts: Mapping[str, Scorer]) -> None:
        self.name = name
        self._file = file
        self._parts = [(part, parts[part]) for part in file.parts]
        versions = {part: scorer.version for part, scorer in self._parts}
        self.version = content_id(file.model_dump(mode="json"), versions)
        self.normalization = _normalization(file)
        limits = [scorer.max_tokens_per_item for _, scorer in self._parts if scorer.max_tokens_per_item]
        self.max_tokens_per_item = min(limits, default=0)
        self.shares_prefixes = all(scorer.shares_prefixes for _, scorer in self._parts)

    @classmethod
    def open(cls, path: str, open_part: Callable[[PartSpec], Scorer]) -> CompositeScorer:
        """Read the file and load its parts; if one cannot be loaded, those before it are closed.

        Raises:
            ConfigError: the file is not there or not valid.
        """
        file = read_composite(path)
        parts: dict[str, Scorer] = {}
        try:
            for name, spec in file.parts.items():
                parts[name] = open_part(spec)
        except BaseException:
            with ThreadPoolExecutor(1) as elsewhere:  # this thread may have a running event loop
                elsewhere.submit(asyncio.run, _close(parts.values())).result()
            raise
        return cls(path, file, parts)

    def prepare(self, task: Task) -> Prepared:
        """Prepare the task for every part."""
        if isinstance(task, ScoreTask):
            tasks = [task]
        elif isinstance(task, CompareTask):
            pair = task.pair
            tasks = [
                ScoreTask(with_response(pair.prompt, r), task.truncation, alone=task.alone)
                for r in (pair.a, pair.b)
            ]
        else:
            raise TaskError(
                "unsupported", "a composite reads conversations: a prompt and a response, or messages"
            )
        responses = tuple(tuple(self._prepare(t, name, part) for name, part in self._parts) for t in tasks)
        members = [p for response in responses for p in response]
        return _Prepared(
            task,
            members[0].sequences if self.shares_prefixes else (),
            tokens=sum(p.tokens for p in members),
            width=max(p.width for p in members),
            truncated=any(p.truncated for p in members),
            responses=responses,
            characters=tuple(len(t.conversation[-1].content) for t in tasks),
        )

    def _prepare(self, task: Task, name: str, part: Scorer) -> Prepared:
        try:
            return part.prepare(task)
        except TaskError as err:
            raise TaskError(err.failure.problem, f"{name}: {err.failure.message}") from err

    def cost(self, batch: Sequence[Prepared]) -> int:
        """The parts' costs together."""
        return sum(part.cost(self._members(batch, i)) for i, (_, part) in enumerate(self._parts))

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        """All parts at once, each with the whole batch, and the rule for each item."""
        found = await asyncio.gather(
            *(part.score(self._members(batch, i)) for i, (_, part) in enumerate(self._parts)),
            return_exceptions=True,  # so that none is still computing when the batch is tried again
        )
        columns = []
        for column in found:
            if isinstance(column, BaseException):
                raise column
            columns.append(column)
        rows = iter(zip(*columns, strict=True))
        return [self._outcome(item, [next(rows) for _ in _own(item).responses]) for item in batch]

    async def warm_up(self) -> None:
        """Warm up the parts."""
        for _, part in self._parts:
            await part.warm_up()

    async def close(self) -> None:
        """Close the parts."""
        await _close(part for _, part in self._parts)

    def _members(self, batch: Sequence[Prepared], part: int) -> list[Prepared]:
        return [response[part] for item in batch for response in _own(item).responses]

    def _outcome(self, item: Prepared, responses: Sequence[Sequence[Outcome]]) -> Outcome:
        numbers = []
        for outcomes, characters in zip(responses, _own(item).characters, strict=True):
            values = {}
            for (name, part), outcome in zip(self._parts, map(finite, outcomes), strict=True):
                if isinstance(outcome, Failure):
                    return Failure(outcome.problem, f"{name}: {outcome.message}")
                assert isinstance(outcome, Scored)  # parts get nothing but ScoreTasks
                values[name] = self._value(name, part, outcome.raw)
            numbers.append(evaluate(self._file.rule, values, characters))
        read = [o for outcomes in responses for o in outcomes if isinstance(o, Scored)]
        tokens, cached = sum(o.tokens for o in read), sum(o.cached for o in read)
        if isinstance(item.task, CompareTask):
            p_a = preference(numbers[0] - numbers[1])
            return Compared(p_a, tokens=tokens, truncated=item.truncated, cached=cached)
        rationale = next((o.rationale for o in read if o.rationale is not None), None)
        return Scored(numbers[0], tokens=tokens, truncated=item.truncated, cached=cached, rationale=rationale)

    def _value(self, name: str, part: Scorer, raw: float) -> float:
        if self._file.parts[name].value == "raw":
            return raw
        return (raw - part.normalization.center) / part.normalization.scale


async def _close(parts: Iterable[Scorer]) -> None:
    """Close scorers, the others too where one fails at it."""
    async with AsyncExitStack() as stack:
        for part in parts:
            stack.push_async_callback(part.close)


def read_composite(path: str) -> CompositeFile:
    """Read and check the file of a composite.

    Raises:
        ConfigError: it is not there, not YAML, or not a composite; the message says what is wrong where.
    """
    try:
        return CompositeFile.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"composite {path} cannot be used: {where + ': ' if where else ''}{first['msg']}"
        ) from err
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise ConfigError(f"composite {path} cannot be read: {' '.join(str(err).split())}") from err


def _normalization(file: CompositeFile) -> Normalization:
    if file.normalization is not None:
        own = file.normalization
        return Normalization(own.center, own.scale, own.source)
    parts = ", ".join(f"{name} {spec.value}" for name, spec in file.parts.items())
    return Normalization(source=f"none: the rule's number as it is, over {parts}")


def _own(item: Prepared) -> _Prepared:
    assert isinstance(item, _Prepared)  # made by prepare
    return item
