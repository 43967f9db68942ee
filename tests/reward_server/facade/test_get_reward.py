"""OpenRLHF's remote reward client, replayed: what it sends, how often it tries, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from labeler.backends.scripted import Asked, ScriptedModel
from labeler.judge import Judge
from labeler.rubric import Rubric, RubricFile
from reward_server.config import ServeConfig
from reward_server.scorers.judge import JudgeScorer
from reward_server.server import load_scorer
from tests.reward_server.facade.doors import SequenceScorer, doors, until
from tests.reward_server.tiny import byte_tokenizer, save_classifier


async def openrlhf_reward(url: str, query: str, prompt: str) -> tuple[Any, int]:
    """What OpenRLHF 0.11 takes for the reward of a rollout, and how many requests that took.

    A session per request, 180 s, `raise_for_status` whatever the status, five tries; then, and for a reply that is
    falsy, there is no reward.
    """
    for attempt in range(1, 6):
        try:
            timeout = aiohttp.ClientTimeout(total=180)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                payload = {"query": [query], "prompts": [prompt], "labels": ["42"]}
                async with session.post(url + "/get_reward", json=payload) as response:
                    response.raise_for_status()
                    info = await response.json()
                    return (info.get("rewards") if info else None), attempt
        except aiohttp.ClientError:
            pass
    return None, 5


def test_a_query_gets_the_reward_that_a_grpc_trainer_would_get() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer()) as served:
            # 13 characters; center 10, scale 5
            assert await openrlhf_reward(served.url, "<s>ab hello</", "<s>ab") == ([0.6], 1)
            body = {"query": ["a" * 10, "a" * 20], "prompts": ["a", "a"], "labels": [None, {"k": 1}]}
            assert await served.post("/get_reward", body) == (
                200,
                {
                    "rewards": [0.0, 2.0],
                    "scores": [0.0, 2.0],
                    "extra_logs": {"raw_score": [10.0, 20.0], "reward_tokens": [10, 20]},
                },
            )
            # With more endpoints than rollouts, the client sends some of them nothing.
            status, empty = await served.post("/get_reward", {"query": [], "prompts": [], "labels": []})
            assert (status, empty["rewards"]) == (200, [])

    asyncio.run(scenario())


def test_the_text_is_read_with_its_own_special_tokens_and_no_others(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "rm")
    text = "<s>Why is the sky blue?Rayleigh.</s>"
    ids = byte_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == 0 and ids[0, -1] == 1
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        alone = model(input_ids=ids).logits.item()

    async def scenario() -> None:
        scorer = load_scorer(ServeConfig(model=str(folder), device="cpu"))
        async with doors(scorer) as served:
            body = {"query": [text, text + "x"]}
            status, answer = await served.post("/get_reward", body)
            assert status == 200
            assert answer["rewards"][0] == pytest.approx(alone, abs=1e-5)
            assert answer["extra_logs"]["reward_tokens"] == [ids.shape[1], ids.shape[1] + 1]

    asyncio.run(scenario())


def test_a_request_is_held_while_the_queue_is_full() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        scorer.gate.clear()
        async with doors(scorer, max_queue_tokens=10) as served:
            first = asyncio.ensure_future(openrlhf_reward(served.url, "a" * 8, ""))
            await scorer.started.wait()
            second = asyncio.ensure_future(openrlhf_reward(served.url, "b" * 8, ""))
            await until(lambda: served.server._queued_tokens() == 8)
            third = asyncio.ensure_future(openrlhf_reward(served.url, "c" * 8, ""))
            await until(lambda: served.server._service._in_flight == 3)
            status, body = await served.post("/classify", {"input": "d" * 8, "add_special_tokens": False})
            assert (status, body["error"]["type"]) == (503, "ServiceUnavailableError"), (
                "verl backs off by itself"
            )
            scorer.gate.set()
            assert [await first, await second, await third] == [([-0.4], 1)] * 3, "one request each"

    asyncio.run(scenario())


def test_patience_ends_with_a_503_that_says_when_to_come_back() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        scorer.gate.clear()
        async with doors(scorer, max_queue_tokens=10, http_wait_s=0.05, drain_timeout_s=0.1) as served:
            first = asyncio.ensure_future(openrlhf_reward(served.url, "a" * 8, ""))
            await scorer.started.wait()
            second = asyncio.ensure_future(openrlhf_reward(served.url, "b" * 8, ""))
            await until(lambda: served.server._queued_tokens() == 8)
            async with served.session.post(served.url + "/get_reward", json={"query": ["c" * 8]}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
            assert await openrlhf_reward(served.url, "c" * 8, "") == (None, 5)
            scorer.gate.set()
            await asyncio.gather(first, second)
            assert "c" * 8 not in scorer.computed

    asyncio.run(scenario())


def test_a_trainer_that_starts_before_the_model_is_loaded_is_held() -> None:
    async def scenario() -> None:
        async with doors(None) as served:
            early = asyncio.ensure_future(openrlhf_reward(served.url, "a" * 15, ""))
            assert (await served.get("/health"))[0] == 503
            await served.server.open(SequenceScorer())
            assert await early == ([1.0], 1)
            assert await served.get("/health") == (200, "")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("query", "status"), [("a" * 51, 422), ("poison", 500), ("nan", 500)], ids=["too-long", "raises", "nan"]
)
def test_a_failed_item_is_never_a_number(query: str, status: int) -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer(max_tokens_per_item=50)) as served:
            found, body = await served.post("/get_reward", {"query": ["fine", query]})
            assert (found, body["error"]["code"], body["error"]["param"]) == (status, status, "query[1]")
            assert await openrlhf_reward(served.url, query, "") == (None, 5)
            assert (await served.get("/health"))[0] == 200
        async with doors(SequenceScorer(max_tokens_per_item=50), http_drop_failed=True) as served:
            found, body = await served.post("/get_reward", {"query": ["a" * 10, query]})
            assert (found, body["rewards"]) == (200, [0.0, None])
            assert await openrlhf_reward(served.url, query, "") == (None, 1), "without four more tries"

    asyncio.run(scenario())


def test_no_text_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer(max_tokens_per_item=50)) as served:
            for query in ("secret words", "secret poison?", "secret " * 50):
                await served.post("/get_reward", {"query": [query]})
            await served.post("/get_reward", {"query": "secret"})
            await served.post("/classify", {"input": {"secret": 1}})

    with caplog.at_level(logging.DEBUG):
        asyncio.run(scenario())
    ours = [
        r
        for r in caplog.records
        if r.name.startswith(("reward_server.facade", "aiohttp", "reward_server.service"))
    ]
    assert not any("secret" in r.getMessage() for r in ours)


def test_a_judge_scores_what_follows_the_prompt() -> None:
    rubric = RubricFile.model_validate(
        {
            "name": "s",
            "kind": "score",
            "sample": "[{{ prompt }}] -> [{{ response }}]",
            "ending": "Score: ",
            "labels": ["1", "2", "3"],
        }
    )

    def reply(asked: Asked) -> tuple[float, ...]:
        assert asked.user.startswith("[Q: 2+2? A:] -> [ 4.]")
        return (0.0, 0.0, 1.0)

    async def scenario() -> None:
        judge = Judge(ScriptedModel(reply), Rubric(rubric, "hash", cot=False))
        async with doors(JudgeScorer(judge, None, max_in_flight=2)) as served:
            assert await openrlhf_reward(served.url, "Q: 2+2? A: 4.", "Q: 2+2? A:") == ([1.0], 1)
            status, body = await served.post("/get_reward", {"query": ["Q: 2+2? A: 4."]})
            assert (status, "prompts" in body["error"]["message"]) == (422, True)

    asyncio.run(scenario())
