"""A model whose replies are kept: what was paid for once is never asked again.

Labels are a pure function of replies. So resuming is running the same code over the journal, exporting is
running it without asking, and another way to read, combine or calibrate costs nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from labeler.backends.labels import read_top_tokens
from labeler.budget import Budget, most_label_tokens, most_tokens
from labeler.journal import ReplyJournal, Usage, request_key
from labeler.llm import LLM, Abilities, Generation, LabelReading, NoAnswer, Postponed, RequestFailed
from rlaif.types import Conversation, LabelDistribution

R = TypeVar("R", Abilities, Generation, LabelReading)
Record = dict[str, Any]

NOT_ASKED = "not asked yet"


class Recorded:
    """An LLM in front of another one: answers from the journal, else asks and writes the reply down.

    Equal requests in flight are sent once.

    Args:
        llm: the model asked.
        journal: where replies are kept.
        budget: what asking may cost, together with all else that draws on it.

    Attributes:
        offline: answer from the journal alone; a request without a reply fails with the reason on record.
        used: tokens that this object has paid for.
        replies: how many replies it has paid for.
    """

    def __init__(self, llm: LLM, journal: ReplyJournal, budget: Budget | None = None) -> None:
        self._llm = llm
        self._journal = journal
        self._budget = budget
        self._in_flight: dict[int, asyncio.Future[Any]] = {}
        self._abilities: Abilities | None = None
        self.offline = False
        self.used = Usage()
        self.replies = 0

    @property
    def name(self) -> str:
        """The model's name as the user wrote it."""
        return self._llm.name

    @property
    def version(self) -> str:
        """See `labeler.llm.LLM.version`."""
        return self._llm.version

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See `labeler.llm.LLM.special_tokens`."""
        return self._llm.special_tokens

    @property
    def waiting(self) -> int:
        """Different requests that wait for their reply, sent or not."""
        return len(self._in_flight)

    async def probe(self) -> Abilities:
        """See `labeler.llm.LLM.probe`. On record with the first reply: a resumed run reads its labels in the same way.

        Until something is paid for, another run asks again: an endpoint may since have been given log-probabilities.
        """
        if self._abilities is None:
            self._abilities = await self._once(
                self._abilities_key, "probe", self._llm.probe, asdict, lambda record: Abilities(**record)
            )
        return self._abilities

    @property
    def _abilities_key(self) -> int:
        return request_key("abilities", self.version)

    async def generate(
        self,
        messages: Conversation,
        prefix: str = "",
        *,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Generation:
        """See `labeler.llm.LLM.generate`. A reply from the journal has no `context_ids`."""
        key = request_key(
            "generate", self.version, messages, prefix, max_tokens, temperature, seed, list(stop)
        )

        async def ask() -> Generation:
            return await self._llm.generate(
                messages, prefix, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop
            )

        return await self._once(
            key,
            "generate",
            ask,
            _from_generation,
            _to_generation,
            lambda: most_tokens(messages, prefix, max_tokens),
        )

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """See `labeler.llm.LLM.label_logprobs`. Where the endpoint gave its likeliest tokens, these are kept."""
        key = request_key("label", self.version, messages, prefix, list(labels))

        async def ask() -> LabelReading:
            return await self._llm.label_logprobs(messages, prefix, labels, after=after)

        return await self._once(
            key,
            "label",
            ask,
            _from_reading,
            lambda record: _to_reading(record, labels),
            lambda: most_label_tokens(messages, prefix, labels),
        )

    async def close(self) -> None:
        """Close the model."""
        await self._llm.close()

    async def _once(
        self,
        key: int,
        kind: str,
        ask: Callable[[], Awaitable[R]],
        to_record: Callable[[R], Record],
        from_record: Callable[[Record], R],
        most: Callable[[], Usage] | None = None,
    ) -> R:
        while True:
            if (record := self._journal.get(key)) is not None:
                return from_record(record)
            if self.offline:
                raise RequestFailed(self._journal.failure(key) or NOT_ASKED)
            if (same := self._in_flight.get(key)) is None:
                break
            # Shielded: a waiter that is cancelled leaves the answer to the others.
            if (shared := await asyncio.shield(same)) is not None:
                answer: R = shared
                return answer
        future = self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            answer = await self._pay(key, kind, ask, to_record, most)
            future.set_result(answer)
            return answer
        except Exception as err:
            future.set_exception(err)
            future.exception()  # nobody else may be waiting
            if isinstance(err, RequestFailed) and not isinstance(err, Postponed):
                self._journal.fail(key, str(err))
            raise
        finally:
            if not future.done():
                future.set_result(None)  # cancelled: one of those who wait asks in its place
            del self._in_flight[key]

    async def _pay(
        self,
        key: int,
        kind: str,
        ask: Callable[[], Awaitable[R]],
        to_record: Callable[[R], Record],
        most: Callable[[], Usage] | None,
    ) -> R:
        """Ask within the budget, and write the reply down."""
        budget = None if most is None else self._budget
        held = await budget.reserve(most()) if budget is not None and most is not None else 0.0
        usage = None
        try:
            answer = await ask()
            usage = _usage(answer)
            if not isinstance(answer, Abilities):
                if self._abilities is not None and not self.replies:
                    self._journal.put(self._abilities_key, "probe", asdict(self._abilities))
                self._journal.put(key, kind, to_record(answer), usage)
                self.used += usage
                self.replies += 1
        except NoAnswer as err:
            if err.prompt_tokens:  # a reply that was broken off may not tell
                usage = _usage(err)
                self._journal.lose(usage)
                self.used += usage
            raise
        finally:
            if budget is not None:
                budget.settle(held, usage)
        return answer


def _usage(answer: Abilities | Generation | LabelReading | NoAnswer) -> Usage:
    if isinstance(answer, Abilities):
        return Usage()
    return Usage(answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens)


def _from_generation(done: Generation) -> Record:
    return {
        "text": done.text,
        "finish_reason": done.finish_reason,
        "tokens": [done.prompt_tokens, done.completion_tokens, done.cached_tokens],
    }


def _to_generation(record: Record) -> Generation:
    return Generation(record["text"], record["finish_reason"], *record["tokens"])


def _from_reading(reading: LabelReading) -> Record:
    tokens = [reading.prompt_tokens, reading.completion_tokens, reading.cached_tokens]
    if reading.top is not None:
        return {"top": [list(t) for t in reading.top], "tokens": tokens}
    d = reading.distribution
    return {"logprobs": list(d.logprobs), "mass": d.mass, "censored": d.censored, "tokens": tokens}


def _to_reading(record: Record, labels: Sequence[str]) -> LabelReading:
    if "top" in record:
        top = tuple((str(text), float(logprob)) for text, logprob in record["top"])
        prompt_tokens, completion_tokens, cached_tokens = record["tokens"]
        return LabelReading(
            read_top_tokens(top, labels), prompt_tokens, completion_tokens, cached_tokens, top
        )
    distribution = LabelDistribution(tuple(record["logprobs"]), record["mass"], record["censored"])
    return LabelReading(distribution, *record["tokens"])
