"""`--dry_run`: what a run has still to ask, and what that costs. Nothing is sent that costs.

The judge runs as ever, over what the journal already holds, but in front of a model that only counts. So every first
request is the one that the run would send, and its tokens are exact where the model's tokenizer is at hand. A text
that is still to be generated is stood in for by its bound, `max_tokens`, and by an expected length.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from labeler.budget import Price
from labeler.config import RequestConfig
from labeler.journal import Totals, Usage
from labeler.llm import LLM, Abilities, Generation, LabelReading, LLMOptions, RequestFailed
from labeler.outputs import print_summary
from rlaif.errors import RlaifError
from rlaif.models import HOSTED, ModelRef
from rlaif.runs import clock
from rlaif.types import Conversation, Message

EXPECTED_TOKENS = 128
"""Expected length of a generated text where nothing is known of it."""

_REQUEST_S, _TOKEN_S = 0.5, 0.02
"""What a hosted endpoint takes for a request and for each token that it generates, where nothing is on record."""

_BATCH_S = 24 * 3600.0

_STAND_IN = re.compile("\ue000([0-9]+)\ue001")
"""A text that is still to be generated, with its bound in tokens; private-use characters, which no prompt holds."""


class DryRunEnded(RlaifError):
    """The dry run has printed what it found; the command ends here, and nothing is wrong."""

    exit_code = 0


@dataclass(slots=True)
class Tally:
    """What would be sent and come back.

    Attributes:
        expected_tokens: expected length of a generated text.
        requests: to send, by kind.
        refused: requests that cannot be sent, by reason.
        counted: prompt tokens of known text, and those of them that a prefix cache is expected to hold; completion
            tokens of label readings.
        written: tokens of generated texts, (expected, at most).
        read_again: of these, what later prompts repeat, (expected, at most).
        cached_again: of the latter, what a prefix cache is expected to hold.
    """

    expected_tokens: float = EXPECTED_TOKENS
    requests: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    counted: Usage = field(default_factory=Usage)
    written: tuple[int, int] = (0, 0)
    read_again: tuple[int, int] = (0, 0)
    cached_again: int = 0

    def add(self, kind: str, counted: Usage, *, written: Sequence[int], read_again: Sequence[int]) -> None:
        """Count a request.

        Args:
            kind: `generate` or `label`.
            counted: its known tokens.
            written: bounds of the texts that it generates, in tokens.
            read_again: bounds of the generated texts in its prompt, in tokens.
        """
        self.requests[kind] += 1
        self.counted += counted
        expected, most = self.written
        self.written = (expected + self._expect(written), most + sum(written))
        again = self._expect(read_again)
        expected, most = self.read_again
        self.read_again = (expected + again, most + sum(read_again))
        self.cached_again += again if counted.cached_tokens else 0

    def _expect(self, bounds: Sequence[int]) -> int:
        return sum(min(bound, round(self.expected_tokens)) for bound in bounds)

    @property
    def expected(self) -> Usage:
        """Tokens if generated texts have the expected length and shared prefixes are cached."""
        return self.counted + Usage(self.read_again[0], self.written[0], self.cached_again)

    @property
    def most(self) -> Usage:
        """Tokens if every generated text is as long as it may be and nothing is cached."""
        return replace(self.counted, cached_tokens=0) + Usage(self.read_again[1], self.written[1])


class Counting:
    """An LLM that is never asked: counts requests and answers with stand-ins.

    Args:
        model: tells the tokens of a request without computing a reply; its texts and probabilities are not used.
        tally: where requests are counted.
    """

    def __init__(self, model: LLM, tally: Tally) -> None:
        self._model = model
        self._tally = tally

    @property
    def name(self) -> str:
        """The model's name as the user wrote it."""
        return self._model.name

    @property
    def version(self) -> str:
        """As of the model that a run asks, so that its replies on record are found."""
        return self._model.version

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """See `labeler.llm.LLM.special_tokens`."""
        return self._model.special_tokens

    async def probe(self) -> Abilities:
        """See `labeler.llm.LLM.probe`."""
        return await self._model.probe()

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
        """A stand-in of `max_tokens` tokens."""
        known, begun, again = _without_stand_ins(messages, prefix)
        try:
            done = await self._model.generate(
                known, begun, max_tokens=max_tokens, temperature=temperature, seed=seed, stop=stop
            )
        except RequestFailed as err:
            self._tally.refused[str(err)] += 1
            raise
        counted = Usage(done.prompt_tokens, 0, done.cached_tokens)
        self._tally.add("generate", counted, written=[max_tokens], read_again=again)
        return Generation(f"\ue000{max_tokens}\ue001", "stop", done.prompt_tokens)

    async def label_logprobs(
        self,
        messages: Conversation,
        prefix: str,
        labels: Sequence[str],
        *,
        after: Generation | None = None,
    ) -> LabelReading:
        """A distribution that means nothing."""
        known, begun, again = _without_stand_ins(messages, prefix)
        try:
            reading = await self._model.label_logprobs(known, begun, labels)
        except RequestFailed as err:
            self._tally.refused[str(err)] += 1
            raise
        counted = Usage(reading.prompt_tokens, reading.completion_tokens, reading.cached_tokens)
        self._tally.add("label", counted, written=[], read_again=again * max(1, reading.completion_tokens))
        return reading

    async def close(self) -> None:
        """See `labeler.llm.LLM.close`."""
        await self._model.close()


def _without_stand_ins(messages: Conversation, prefix: str) -> tuple[Conversation, str, list[int]]:
    """The known text, and the bounds of the generated texts that stood in it."""
    texts = [m.content for m in messages] + [prefix]
    bounds = [int(bound) for text in texts for bound in _STAND_IN.findall(text)]
    if not bounds:
        return messages, prefix, []
    known = tuple(Message(m.role, _STAND_IN.sub("", m.content)) for m in messages)
    return known, _STAND_IN.sub("", prefix), bounds


class PrefixCache:
    """What a server's prefix cache saves: whole blocks of tokens that an earlier prompt began with, too.

    Args:
        block: tokens of a block; vLLM has 16, OpenAI 128.
        least: shortest prefix that is cached at all; OpenAI has 1024.
        capacity: blocks that are held; those used longest ago give way.
    """

    def __init__(self, block: int, least: int = 0, capacity: int = 2**16) -> None:
        self._block = block
        self._least = least
        self._capacity = capacity
        self._held: OrderedDict[int, None] = OrderedDict()

    def meet(self, ids: Sequence[object]) -> int:
        """Tokens of a prompt that are in the cache; afterwards all of it is."""
        found, chain, unbroken = 0, 0, True
        for start in range(0, len(ids) - self._block + 1, self._block):
            chain = hash((chain, *ids[start : start + self._block]))
            unbroken = unbroken and chain in self._held
            found += self._block * unbroken
            self._held[chain] = None
            self._held.move_to_end(chain)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)
        found = min(
            found, max(len(ids) - 1, 0) // self._block * self._block
        )  # one token at least is computed
        return found if found >= self._least else 0


def seconds_left(
    tally: Tally, config: RequestConfig, pace: float | None, *, hosted: bool
) -> tuple[float, str] | None:
    """How long the requests take, and from what this is known; None if it cannot be.

    Args:
        tally: the requests.
        config: the run's limits.
        pace: replies per second of earlier runs.
        hosted: behind an endpoint, where requests run side by side.
    """
    requests, tokens = tally.requests.total(), tally.expected
    if config.batch:
        rounds = min(len(tally.requests), 2)
        return (_BATCH_S * rounds, "at most: a day for each round of batches")
    bounds = []
    if pace:
        bounds.append((requests / pace, f"at {pace:.3g} replies/s as on record"))
    elif hosted:
        slots = min(config.max_in_flight, max(requests, 1))
        each = f"{_REQUEST_S:g} s and {_TOKEN_S:g} s per generated token"
        work = requests * _REQUEST_S + tokens.completion_tokens * _TOKEN_S
        bounds.append((work / slots, f"if a request takes {each}, {slots} at a time"))
    if config.requests_per_minute:
        bounds.append((60 * requests / config.requests_per_minute, "by --requests_per_minute"))
    if config.tokens_per_minute:
        total = tokens.prompt_tokens + tokens.completion_tokens
        bounds.append((60 * total / config.tokens_per_minute, "by --tokens_per_minute"))
    return max(bounds, default=None)


def findings(
    tally: Tally, on_record: Totals, price: Price | None, left: tuple[float, str] | None, counted_by: str
) -> Mapping[str, Any]:
    """What the dry run prints, one fact per line."""
    expected, most = tally.expected, tally.most
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in sorted(tally.requests.items()))
    facts: dict[str, Any] = {
        "on record": f"{sum(n for kind, n in on_record.replies.items() if kind != 'probe'):,} replies",
        "requests": f"{tally.requests.total():,} ({kinds})" if kinds else "0",
        "prompt tokens": f"{expected.prompt_tokens:,}{_at_most(most.prompt_tokens, expected.prompt_tokens)}",
        "  counted": f"{tally.counted.prompt_tokens:,} {counted_by}",
        "  shared": f"{expected.cached_tokens:,} expected in the prefix cache",
        "completion tokens": f"{expected.completion_tokens:,}"
        f"{_at_most(most.completion_tokens, expected.completion_tokens)}",
    }
    if tally.written[1]:
        facts["expected text"] = f"{tally.expected_tokens:.0f} tokens each, where so many are allowed"
    if price is not None:
        facts["cost, USD"] = f"{price.cost(expected):.4g}{_at_most(price.most(most), price.cost(expected))}"
    facts["time"] = (
        "unknown; label a first part (--limit 100)" if left is None else f"{clock(left[0])} {left[1]}"
    )
    if tally.refused:
        facts["cannot be sent"] = dict(tally.refused.most_common())
    return facts


def _at_most(most: float, expected: float) -> str:
    if most == expected:
        return ""
    return f" expected, at most {most:,}" if isinstance(most, int) else f" expected, at most {most:.4g}"


class DryRun:
    """The dry run of a command.

    Args:
        config: the run's settings.
        command: its name.
        on_record: what its journal holds.
        written: mean tokens of the generated texts on record; None without any.
    """

    def __init__(self, config: RequestConfig, command: str, on_record: Totals, written: float | None) -> None:
        self.tally = Tally(config.expected_tokens or written or EXPECTED_TOKENS)
        self._config = config
        self._command = command
        self._on_record = on_record
        self._counted_by: list[Callable[[], str]] = []
        self._hosted = False

    def open_model(self, ref: ModelRef, options: LLMOptions | None = None) -> LLM:
        """What stands in for a model; see `labeler.llm.open_llm`.

        Raises:
            ModelError: there is no such model.
        """
        from labeler.backends.unasked import open_unasked

        model, counted_by = open_unasked(ref, options or LLMOptions(), self._config.tokenizer)
        self._counted_by.append(counted_by)
        self._hosted = self._hosted or ref.backend in HOSTED
        return Counting(model, self.tally)

    def end(self, total: int, what: str, quarantined: int) -> NoReturn:
        """Print the findings.

        Args:
            total: number of questions.
            what: what the run would do with them.
            quarantined: rows that cannot be read.

        Raises:
            DryRunEnded: always; the command ends here.
        """
        left = seconds_left(self.tally, self._config, self._on_record.pace, hosted=self._hosted)
        how = "; ".join(dict.fromkeys(counted_by() for counted_by in self._counted_by))
        facts = findings(self.tally, self._on_record, self._config.price(), left, how)
        unread = {"quarantined": f"{quarantined:,} rows"} if quarantined else {}
        print_summary(f"{what} with `rlaif {self._command}`: {total:,} questions", {**unread, **facts})
        raise DryRunEnded("this was a dry run: nothing was sent")
