"""What was paid for once is never asked again, failures are asked again, and a replay says what the run said."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.backends.openai import OpenAIModel
from labeler.backends.scripted import Asked, ScriptedModel
from labeler.database import Database
from labeler.journal import JOURNAL_FILE, ReplyJournal, Usage, request_key
from labeler.llm import Abilities, Generation, LabelReading, LLMOptions, Postponed, RequestFailed
from labeler.recorded import NOT_ASKED, Recorded
from rlaif.errors import EndpointError
from rlaif.models import ModelRef
from rlaif.types import Conversation, LabelDistribution, user_prompt
from tests.labeler.openai_server import ScriptedServer

Q = user_prompt("Which one?")
LABELS = ("1", "2")


class Gate:
    """Holds requests until it is opened."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        await self.open.wait()


def says(asked: Asked) -> Generation | Sequence[float]:
    if asked.labels is None:
        return Generation(f"on {asked.user} {asked.prefix}", "stop", 11, 3, 2)
    return [0.5, 0.25]


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    with ReplyJournal(tmp_path / "run") as opened:
        yield opened


async def turns(n: int = 10) -> None:
    """Let everything run that can."""
    for _ in range(n):
        await asyncio.sleep(0)


def test_equal_requests_in_flight_are_sent_once(journal: ReplyJournal) -> None:
    async def run() -> None:
        gate = Gate()
        model = ScriptedModel(says, before=gate)
        llm = Recorded(model, journal)
        asked = [asyncio.create_task(llm.generate(Q, "A:", max_tokens=9)) for _ in range(5)]
        asked.append(asyncio.create_task(llm.generate(Q, "B:", max_tokens=9)))
        await turns()
        assert (len(model.asked), llm.waiting) == (2, 2)
        gate.open.set()
        answers = await asyncio.gather(*asked)
        assert [a.text for a in answers] == ["on Which one? A:"] * 5 + ["on Which one? B:"]
        assert llm.waiting == 0
        assert llm.used == Usage(22, 6, 4)
        assert (await llm.generate(Q, "A:", max_tokens=9)).text == "on Which one? A:"
        assert len(model.asked) == 2

    asyncio.run(run())
    assert journal.totals().replies == {"generate": 2}


Ask = Callable[[Recorded], Awaitable[Generation | LabelReading]]
REQUESTS: dict[str, Ask] = {
    "plain": lambda llm: llm.generate(Q, "A:", max_tokens=9),
    "messages": lambda llm: llm.generate(user_prompt("Which?"), "A:", max_tokens=9),
    "prefix": lambda llm: llm.generate(Q, "A: ", max_tokens=9),
    "max_tokens": lambda llm: llm.generate(Q, "A:", max_tokens=10),
    "temperature": lambda llm: llm.generate(Q, "A:", max_tokens=9, temperature=1.0),
    "seed": lambda llm: llm.generate(Q, "A:", max_tokens=9, seed=1),
    "stop": lambda llm: llm.generate(Q, "A:", max_tokens=9, stop=("\n",)),
    "labels": lambda llm: llm.label_logprobs(Q, "A:", LABELS),
    "other labels": lambda llm: llm.label_logprobs(Q, "A:", ("2", "1")),
    "label prefix": lambda llm: llm.label_logprobs(Q, "A: ", LABELS),
}


def test_whatever_decides_a_reply_makes_another_request(journal: ReplyJournal) -> None:
    model = ScriptedModel(says)
    for ask in REQUESTS.values():
        asyncio.run(ask(Recorded(model, journal)))  # type: ignore[arg-type]
    assert len(model.asked) == len(REQUESTS)
    other = ScriptedModel(says, name="scripted:another")
    for ask in REQUESTS.values():
        asyncio.run(ask(Recorded(other, journal)))  # type: ignore[arg-type]
    assert len(other.asked) == len(REQUESTS)


def test_a_replay_says_what_the_run_said_and_asks_nothing(tmp_path: Path) -> None:
    with ReplyJournal(tmp_path) as journal:
        first = Recorded(ScriptedModel(says), journal)
        abilities = asyncio.run(first.probe())
        said = [asyncio.run(ask(first)) for ask in REQUESTS.values()]  # type: ignore[arg-type]
    with ReplyJournal(tmp_path) as journal:
        silent = ScriptedModel(lambda asked: pytest.fail("asked"))
        again = Recorded(silent, journal)
        again.offline = True
        assert [asyncio.run(ask(again)) for ask in REQUESTS.values()] == said  # type: ignore[arg-type]
        assert asyncio.run(again.probe()) == abilities
        assert again.used == Usage()


finite = st.floats(-1e4, 0, allow_nan=False)


@given(st.lists(finite, min_size=2, max_size=12), st.floats(0, 1), st.booleans())
def test_readings_are_replayed_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, logprobs: list[float], mass: float, censored: bool
) -> None:
    read = LabelDistribution(tuple(logprobs), mass, censored)
    labels = tuple(map(str, range(len(logprobs))))
    with ReplyJournal(tmp_path_factory.mktemp("journal")) as journal:
        llm = Recorded(ScriptedModel(lambda asked: read), journal)
        first = asyncio.run(llm.label_logprobs(Q, "", labels))
        llm.offline = True
        assert asyncio.run(llm.label_logprobs(Q, "", labels)) == first
        assert first.distribution == read


def test_offline_a_request_without_a_reply_fails_with_the_reason_on_record(journal: ReplyJournal) -> None:
    def fail(asked: Asked) -> str:
        raise RequestFailed("the endpoint answered 500")

    llm = Recorded(ScriptedModel(fail), journal)
    with pytest.raises(RequestFailed, match="500"):
        asyncio.run(llm.generate(Q, max_tokens=9))
    llm.offline = True
    with pytest.raises(RequestFailed, match="500"):
        asyncio.run(llm.generate(Q, max_tokens=9))
    with pytest.raises(RequestFailed, match=NOT_ASKED):
        asyncio.run(llm.generate(Q, max_tokens=8))


def test_failures_are_never_final(journal: ReplyJournal) -> None:
    answers: list[Any] = [
        RequestFailed("no answer within 5 s"),
        RequestFailed("the endpoint answered 500"),
        "text",
    ]

    def reply(asked: Asked) -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    llm = Recorded(ScriptedModel(reply), journal)
    for _ in range(2):
        with pytest.raises(RequestFailed):
            asyncio.run(llm.generate(Q, max_tokens=9))
    assert journal.totals().failures == {"the endpoint answered 500": 1}
    assert asyncio.run(llm.generate(Q, max_tokens=9)).text == "text"
    assert journal.totals().failures == {}


@pytest.mark.parametrize("error", [EndpointError("gone"), Postponed("later"), ValueError("a mistake")])
def test_only_a_request_that_failed_by_itself_is_noted(journal: ReplyJournal, error: Exception) -> None:
    def fail(asked: Asked) -> str:
        raise error

    llm = Recorded(ScriptedModel(fail), journal)
    with pytest.raises(type(error)):
        asyncio.run(llm.generate(Q, max_tokens=9))
    assert journal.totals().failures == {}
    assert llm.waiting == 0


def test_all_who_wait_for_a_request_learn_that_it_failed(journal: ReplyJournal) -> None:
    async def run() -> None:
        gate = Gate()

        def fail(asked: Asked) -> str:
            raise EndpointError("gone")

        model = ScriptedModel(fail, before=gate)
        llm = Recorded(model, journal)
        asked = [asyncio.create_task(llm.generate(Q, max_tokens=9)) for _ in range(3)]
        await turns()
        gate.open.set()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(a) for a in answers] == ["gone"] * 3
        assert len(model.asked) == 1

    asyncio.run(run())


def test_if_the_one_who_asks_is_cancelled_another_asks_in_its_place(journal: ReplyJournal) -> None:
    async def run() -> None:
        gate = Gate()
        model = ScriptedModel(says, before=gate)
        llm = Recorded(model, journal)
        owner, *others = [asyncio.create_task(llm.generate(Q, max_tokens=9)) for _ in range(4)]
        await turns()
        owner.cancel()
        await turns()
        assert owner.cancelled() and len(model.asked) == 2
        gate.open.set()
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*others)
        assert len({a.text for a in answers}) == 1
        assert len(model.asked) == 2 and llm.waiting == 0

    asyncio.run(run())
    assert journal.totals().replies == {"generate": 1}


def test_one_who_waits_may_be_cancelled_without_harm_to_the_others(journal: ReplyJournal) -> None:
    async def run() -> None:
        gate = Gate()
        llm = Recorded(ScriptedModel(says, before=gate), journal)
        owner, second, third = [asyncio.create_task(llm.generate(Q, max_tokens=9)) for _ in range(3)]
        await turns()
        second.cancel()
        await turns()
        gate.open.set()
        async with asyncio.timeout(10):
            assert await owner == await third
        assert second.cancelled()

    asyncio.run(run())


def test_all_cancelled_leaves_the_request_open(journal: ReplyJournal) -> None:
    async def run() -> None:
        llm = Recorded(ScriptedModel(says, before=Gate()), journal)
        asked = [asyncio.create_task(llm.generate(Q, max_tokens=9)) for _ in range(3)]
        await turns()
        for task in asked:
            task.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*asked, return_exceptions=True)
        assert llm.waiting == 0

    asyncio.run(run())
    assert journal.totals().failures == {}
    assert (
        asyncio.run(Recorded(ScriptedModel(says), journal).generate(Q, max_tokens=9)).finish_reason == "stop"
    )


def test_a_reply_that_cannot_be_kept_counts_for_nobody(journal: ReplyJournal) -> None:
    broken = LabelDistribution((float("nan"), 0.0), 1.0)
    llm = Recorded(ScriptedModel(lambda asked: broken), journal)
    with pytest.raises(ValueError):
        asyncio.run(llm.label_logprobs(Q, "", LABELS))
    assert llm.used == Usage()
    assert journal.totals().replies == {}


# ---- likeliest tokens are kept as the endpoint gave them ----


def read_top(folder: Path, labels: tuple[str, ...] = LABELS, ref: str = "") -> LabelReading:
    """Labels from an endpoint's top tokens; without a server, from the journal."""

    async def run() -> LabelReading:
        with ReplyJournal(folder) as journal:
            llm = Recorded(OpenAIModel(ModelRef.parse(ref), LLMOptions(max_retries=0)), journal)
            try:
                return await llm.label_logprobs(Q, "Better:", labels)
            finally:
                await llm.close()

    return asyncio.run(run())


def test_top_tokens_on_record_are_read_anew_without_asking(tmp_path: Path) -> None:
    probs = {"1": 0.5, " 1": 0.1, "2": 0.2, "x": 0.1}
    with ScriptedServer(lambda user, prefix, wanted: probs) as server:
        ref = server.ref
        first = read_top(tmp_path, ref=ref)
    again = read_top(tmp_path, ref=ref)  # the server is gone
    assert again == first
    # By hand: 0.5 + 0.1 and 0.2.
    assert [math.exp(x) for x in again.distribution.logprobs] == pytest.approx([0.6, 0.2])

    # The journal holds the endpoint's tokens and no conclusion from them: other tokens, another label.
    file = Database(tmp_path / JOURNAL_FILE)
    [(text,)] = file.all("SELECT reply FROM replies WHERE kind = 'label'")
    record = json.loads(text)
    assert set(record) == {"top", "tokens"}
    assert {token: math.exp(p) for token, p in record["top"]} == pytest.approx(probs)
    record["top"] = [["2", math.log(0.9)], ["1", math.log(0.05)]]
    file.write("UPDATE replies SET reply = ? WHERE kind = 'label'", (json.dumps(record),))
    file.close()
    assert [math.exp(x) for x in read_top(tmp_path, ref=ref).distribution.logprobs] == pytest.approx(
        [0.05, 0.9]
    )


class Changing(ScriptedModel):
    """A model whose abilities are what is set."""

    found: Literal["exact", "none"] = "exact"

    async def probe(self) -> Abilities:
        return Abilities(self.found, note="a note")


def test_abilities_under_which_replies_were_paid_for_are_those_of_all_runs(journal: ReplyJournal) -> None:
    model = Changing(says)
    first = Recorded(model, journal)
    assert asyncio.run(first.probe()).logprobs == "exact"
    asyncio.run(first.generate(Q, max_tokens=9))
    model.found = "none"
    assert asyncio.run(first.probe()).logprobs == "exact"
    assert asyncio.run(Recorded(model, journal).probe()) == Abilities("exact", note="a note")


def test_abilities_that_nothing_was_paid_for_under_are_asked_again(journal: ReplyJournal) -> None:
    model = Changing(says)
    model.found = "none"
    assert asyncio.run(Recorded(model, journal).probe()).logprobs == "none"
    journal.put(request_key("probe", model.version), "probe", {"logprobs": "none"})  # as older versions did
    model.found = "exact"
    again = Recorded(model, journal)
    assert asyncio.run(again.probe()).logprobs == "exact"
    again.offline = True
    assert asyncio.run(again.probe()).logprobs == "exact"


def test_readings_go_on_from_the_generation_they_are_given(journal: ReplyJournal) -> None:
    given_on: list[Generation | None] = []

    class Listening(ScriptedModel):
        async def label_logprobs(
            self,
            messages: Conversation,
            prefix: str,
            labels: Sequence[str],
            *,
            after: Generation | None = None,
        ) -> LabelReading:
            given_on.append(after)
            return await super().label_logprobs(messages, prefix, labels, after=after)

    def reply(asked: Asked) -> Generation | Sequence[float]:
        return Generation("x", "stop", context_ids=(1, 2)) if asked.labels is None else (0.5, 0.5)

    async def run() -> None:
        llm = Recorded(Listening(reply), journal)
        said = await llm.generate(Q, max_tokens=9)
        assert said.context_ids == (1, 2)
        await llm.label_logprobs(Q, "x", LABELS, after=said)
        assert (await llm.generate(Q, max_tokens=9)).context_ids == ()  # from the journal

    asyncio.run(run())
    assert [g and g.context_ids for g in given_on] == [(1, 2)]
