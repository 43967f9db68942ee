"""Prices, and runs that stop before they cost more than they may."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labeler.backends.scripted import Asked, ScriptedModel
from labeler.budget import Budget, Price, most_label_tokens, most_tokens
from labeler.journal import ReplyJournal, Usage
from labeler.llm import Generation, NoAnswer
from labeler.recorded import Recorded
from labeler.status import read_status
from rlaif.errors import BudgetReached, EndpointError
from rlaif.types import Message, user_prompt
from tests.labeler.commands import label, pair, preferences, replies, report, scripted, write_lines
from tests.labeler.openai_server import ScriptedServer

Q = user_prompt("q")
DOLLARS = Price(1e6, 1e6)
"""A dollar per token."""


def test_cached_prompt_tokens_have_their_own_price() -> None:
    # By hand: 600 fresh at 2.5, 400 cached at 1.25, 100 written at 10 USD per million.
    used = Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=400)
    assert Price(2.5, 10.0, 1.25).cost(used) == pytest.approx((1500 + 500 + 1000) / 1e6)
    assert Price(2.5, 10.0).cost(used) == pytest.approx((2500 + 1000) / 1e6)


@given(st.floats(0, 100), st.floats(0, 100), st.none() | st.floats(0, 100), st.data(), st.integers(0, 10**6))
def test_the_most_that_tokens_cost_holds_whatever_is_cached(
    prompt: float, completion: float, cached: float | None, data: st.DataObject, tokens: int
) -> None:
    price = Price(prompt, completion, cached)
    hit = data.draw(st.integers(0, tokens))
    assert price.cost(Usage(tokens, 7, hit)) <= price.most(Usage(tokens, 7)) * (1 + 1e-12)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=4), st.text(max_size=40))
def test_no_tokenizer_needs_more_tokens_than_the_bound(texts: list[str], prefix: str) -> None:
    # The longest tokenizer has bytes; ChatML adds five tokens a message and opens the reply with three.
    turns = tuple(Message("user", text) for text in texts)
    in_bytes = sum(5 + len(text.encode()) for text in texts) + 3 + len(prefix.encode())
    most = most_tokens(turns, prefix, 5)
    assert in_bytes <= most.prompt_tokens
    assert most.completion_tokens == 5


def test_labels_of_several_tokens_are_bounded_by_one_request_for_each_beginning() -> None:
    # 1 to 9 and 10, each with and without a space: "", " ", "1", " 1".
    labels = tuple(str(i) for i in range(1, 11))
    assert most_label_tokens(Q, "Score:", labels).completion_tokens == 4
    assert most_label_tokens(Q, "Better:", ("1", "2")).completion_tokens == 2


@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.1, 1.0)), min_size=1, max_size=40),
    st.integers(1, 200),
    st.integers(1, 8),
)
def test_the_limit_holds_at_any_concurrency_and_little_of_it_is_left(
    requests: list[tuple[int, float]], limit: int, workers: int
) -> None:
    budget = Budget(DOLLARS, limit, Usage())
    refused: list[int] = []

    async def work(queue: list[tuple[int, float]]) -> None:
        while queue and not refused:
            most, share = queue.pop()
            try:
                held = await budget.reserve(Usage(most))
            except BudgetReached:
                refused.append(most)
                return
            await asyncio.sleep(0)
            budget.settle(held, Usage(max(1, int(most * share))))
            assert budget.spent <= limit

    async def run() -> None:
        queue = list(requests)
        await asyncio.gather(*(work(queue) for _ in range(workers)))

    asyncio.run(run())
    assert budget.spent <= limit
    if refused:
        assert budget.spent + max(refused) > limit


def test_a_request_that_does_not_fit_waits_for_those_in_flight() -> None:
    async def run() -> float:
        budget = Budget(DOLLARS, 10, Usage())
        held = await budget.reserve(Usage(8))
        second = asyncio.create_task(budget.reserve(Usage(7)))
        await asyncio.sleep(0)
        assert not second.done()
        budget.settle(held, Usage(3))  # took less than it could have
        return await second

    assert asyncio.run(run()) == 7


def test_a_waiting_request_that_is_cancelled_holds_nothing() -> None:
    async def run() -> None:
        budget = Budget(DOLLARS, 10, Usage())
        held = await budget.reserve(Usage(8))
        waiting = asyncio.create_task(budget.reserve(Usage(9)))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        budget.settle(held, None)
        assert await budget.reserve(Usage(10)) == 10

    asyncio.run(run())


def test_an_endpoint_that_hides_its_tokens_cannot_be_kept_to_a_limit(tmp_path: Path) -> None:
    model = ScriptedModel(lambda asked: Generation("text", "stop"))
    with ReplyJournal(tmp_path) as journal:
        recorded = Recorded(model, journal, Budget(DOLLARS, 1e6, Usage()))
        with pytest.raises(EndpointError, match="does not report the tokens"):
            asyncio.run(recorded.generate(Q, max_tokens=5))
        assert journal.totals().replies == {"generate": 1}  # paid for, so kept


def test_a_reply_that_is_no_answer_costs_what_it_says_and_is_not_forgotten(tmp_path: Path) -> None:
    def reply(asked: Asked) -> Generation:
        raise NoAnswer("cut before any text", 3, 2, 1)

    with ReplyJournal(tmp_path) as journal:
        budget = Budget(DOLLARS, 1000, Usage())
        recorded = Recorded(ScriptedModel(reply), journal, budget)
        for _ in range(2):
            with pytest.raises(NoAnswer):
                asyncio.run(recorded.generate(Q, max_tokens=5))
        assert budget.spent == 10
        assert recorded.used == Usage(6, 4, 2)
    with ReplyJournal(tmp_path, read_only=True) as journal:
        totals = journal.totals()
    assert (totals.usage, totals.replies) == (Usage(6, 4, 2), {})


def test_a_reply_that_was_broken_off_need_not_tell_its_tokens(tmp_path: Path) -> None:
    def reply(asked: Asked) -> Generation:
        raise NoAnswer("aborted")

    with ReplyJournal(tmp_path) as journal:
        budget = Budget(DOLLARS, 1000, Usage())
        with pytest.raises(NoAnswer):
            asyncio.run(Recorded(ScriptedModel(reply), journal, budget).generate(Q, max_tokens=5))
    assert budget.spent == 0


def test_replies_on_record_cost_nothing(tmp_path: Path) -> None:
    def reply(asked: Asked) -> Generation:
        return Generation("text", "stop", 3, 2)

    with ReplyJournal(tmp_path) as journal:
        asyncio.run(Recorded(ScriptedModel(reply), journal).generate(Q, max_tokens=5))
        spent = Budget(DOLLARS, 5, journal.totals().usage)
        assert spent.spent == 5
        again = Recorded(ScriptedModel(reply), journal, spent)
        assert asyncio.run(again.generate(Q, max_tokens=5)).text == "text"
        with pytest.raises(BudgetReached):
            asyncio.run(again.generate(user_prompt("another"), max_tokens=5))


# ---- as a user runs it ----


def prefers_good(user: str, prefix: str, wanted: bool) -> str | dict[str, float]:
    if not wanted:
        return " Weighing."
    return {"1": 0.8, "2": 0.1} if user.index("good") < user.index("bad") else {"1": 0.3, "2": 0.6}


@pytest.mark.parametrize("in_flight", ["1", "8"])
def test_a_run_stops_at_its_budget_keeps_what_it_has_and_goes_on_with_a_larger_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], in_flight: str
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(30)])
    out = tmp_path / "out"
    prices = ("--price_per_million", "1000", "2000", "--max_in_flight", in_flight)
    with ScriptedServer(prefers_good) as server:
        assert label(server.ref, data, tmp_path / "whole", *prices) == 0
        whole = preferences(tmp_path / "whole")
        cost = report(tmp_path / "whole")["cost_usd"]
        limit = 0.6 * cost
        capsys.readouterr()
        assert label(server.ref, data, out, *prices, "--max_cost", str(limit)) == 10
        line = [x for x in capsys.readouterr().err.splitlines() if x.startswith("rlaif: ")]
        bought = preferences(out)
        assert 0 < report(out)["cost_usd"] <= limit
        assert len(line) == 1 and f"{len(bought)} of 30 done" in line[0] and "--max_cost" in line[0]
        assert 0 < len(bought) < 30
        assert report(out)["unlabelled"] == {"not asked yet": 30 - len(bought)}
        seen = read_status(out)
        assert (seen.state, seen.unlabelled) == ("stopped", {"not asked yet": 30 - len(bought)})
        assert "larger --max_cost" in seen.next
        assert [r for r in whole if r["id"] in {b["id"] for b in bought}] == bought
        assert label(server.ref, data, out, *prices, "--max_cost", str(limit)) == 10  # that much is spent
        kept = replies(out)
        assert label(server.ref, data, out, *prices, "--max_cost", str(2 * cost)) == 0
    assert preferences(out) == whole
    assert replies(out) == 120 > kept
    assert report(out)["cost_usd"] == pytest.approx(cost)


def test_rationales_that_were_cut_before_any_text_count_in_the_budget(tmp_path: Path) -> None:
    def thinks(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if body["max_tokens"] > 1 and "bad 1" in body["messages"][0]["content"]:
            choice.update(message={"role": "assistant", "content": ""}, finish_reason="length")

    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)])
    out = tmp_path / "out"
    prices = ("--price_per_million", "1000", "2000")
    with ScriptedServer(prefers_good, amend=thinks) as server:
        assert label(server.ref, data, out, *prices) == 8
        once = report(out)["cost_usd"]
        for_labels = sum(row["cost_usd"] for row in preferences(out))
        assert once > for_labels
        assert label(server.ref, data, out, *prices) == 8  # asks for both rationales of that pair again
        assert report(out)["cost_usd"] - once == pytest.approx(once - for_labels)
        asked = len(server.asked)
        assert label(server.ref, data, out, *prices, "--max_cost", str(once)) == 10
        assert len(server.asked) == asked


def test_rows_and_report_say_what_they_cost(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(3)])
    with ScriptedServer(prefers_good) as server:
        assert label(server.ref, data, tmp_path / "a", "--price_per_million", "1", "2") == 0
        assert label(server.ref, data, tmp_path / "b") == 0
    rows = preferences(tmp_path / "a")
    for row in rows:
        assert row["cost_usd"] == pytest.approx((row["prompt_tokens"] + 2 * row["completion_tokens"]) / 1e6)
    assert report(tmp_path / "a")["cost_usd"] == pytest.approx(sum(r["cost_usd"] for r in rows))
    assert [r["cost_usd"] for r in preferences(tmp_path / "b")] == [None] * 3
    assert "cost_usd" not in report(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--max_cost", "1"), "--max_cost needs prices"),
        (("--price_per_million", "1"), "--price_per_million 1 cannot be"),
        (("--price_per_million", "1", "-2"), "--price_per_million"),
        (("--price_per_million", "1", "2", "--max_cost", "-1"), "--max_cost -1"),
    ],
)
def test_prices_that_cannot_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], says: str
) -> None:
    data = write_lines(tmp_path / "pairs.jsonl", [pair(0)])
    assert label(scripted(tmp_path), data, tmp_path / "out", *flags) == 2
    assert says in capsys.readouterr().err
