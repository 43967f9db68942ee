"""`/classify` and `/score` against the shapes of vLLM and a plain transformers forward; verl's request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from labeler.backends.scripted import Asked, ScriptedModel
from labeler.judge import Judge
from labeler.rubric import Rubric, RubricFile
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.config import ServeConfig
from reward_server.scorers.base import Scorer
from reward_server.scorers.judge import JudgeScorer
from reward_server.server import load_scorer
from tests.reward_server.facade.doors import SequenceScorer, doors, until
from tests.reward_server.fakes import score_request
from tests.reward_server.tiny import byte_tokenizer, save_classifier


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "rm")


@pytest.fixture
def learned(classifier: Path) -> Iterator[Scorer]:
    yield load_scorer(ServeConfig(model=str(classifier), device="cpu"))


def logit(folder: Path, ids: list[int]) -> float:
    """The output for these ids alone, by transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return float(model(input_ids=torch.tensor([ids])).logits.item())


def encode(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def test_the_reply_has_the_shape_of_vllm() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer()) as served:
            body = {
                "model": "length",
                "input": ["abc", "abcdef"],
                "use_activation": False,
                "request_id": "r1",
            }
            status, answer = await served.post("/classify", body)
            assert (status, answer.pop("created") > 1.7e9) == (200, True)
            assert answer == {
                "id": "classify-r1",
                "object": "list",
                "model": "length",
                "data": [
                    {"index": 0, "label": "LABEL_0", "probs": [4.0], "num_classes": 1},
                    {"index": 1, "label": "LABEL_0", "probs": [7.0], "num_classes": 1},
                ],
                "usage": {
                    "prompt_tokens": 11,
                    "total_tokens": 11,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                    "completion_tokens_details": None,
                },
            }
            body = {"model": "length", "queries": "q", "documents": ["abc", "a"], "use_activation": False}
            status, answer = await served.post("/score", body)
            assert (status, answer.pop("created") > 1.7e9) == (200, True)
            assert answer.pop("id").startswith("score-")
            assert answer == {
                "object": "list",
                "model": "length",
                "data": [
                    {"index": 0, "object": "score", "score": 3.0},
                    {"index": 1, "object": "score", "score": 1.0},
                ],
                "usage": {
                    "prompt_tokens": 4,
                    "total_tokens": 4,
                    "completion_tokens": 0,
                    "prompt_tokens_details": None,
                    "completion_tokens_details": None,
                },
            }

    asyncio.run(scenario())


def test_verls_request_gives_the_logit(classifier: Path, learned: Scorer) -> None:
    text = "<s>user: hi</s>assistant: hello</s>"

    async def scenario() -> None:
        async with doors(learned) as served:
            # verl's reward loop: the chat template's text, without its BOS where the server would add one.
            payload = {"model": learned.name, "input": text, "use_activation": False}
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
                session.post(served.url + "/classify", json=payload) as response,
            ):
                response.raise_for_status()
                output = await response.json()
            assert output["data"][-1]["probs"][-1] == pytest.approx(logit(classifier, encode(text)), abs=1e-5)

    asyncio.run(scenario())


def test_inputs_are_text_or_ids_and_truncated_as_asked(classifier: Path, learned: Scorer) -> None:
    text = "What is the capital of France? Paris."
    ids = encode(text)
    asked: list[tuple[dict[str, Any], list[list[int]]]] = [
        ({"input": text}, [ids]),
        ({"input": [text, "b"]}, [ids, encode("b")]),
        ({"input": ids}, [ids]),
        ({"input": [ids, ids[:5]]}, [ids, ids[:5]]),
        ({"input": text, "truncate_prompt_tokens": 7}, [ids[:7]]),
        ({"input": text, "truncate_prompt_tokens": 7, "truncation_side": "right"}, [ids[:7]]),
        ({"input": text, "truncate_prompt_tokens": 7, "truncation_side": "left"}, [ids[-7:]]),
        ({"input": text * 9, "truncate_prompt_tokens": -1, "truncation_side": "left"}, [(ids * 9)[-128:]]),
    ]

    async def scenario() -> None:
        async with doors(learned) as served:
            for body, read in asked:
                status, answer = await served.post("/classify", {**body, "use_activation": False})
                assert status == 200
                found = [d["probs"][0] for d in answer["data"]]
                assert found == pytest.approx([logit(classifier, r) for r in read], abs=1e-5)
                assert answer["usage"]["prompt_tokens"] == sum(map(len, read))
            body = {"input": text * 9, "use_activation": False}
            status, answer = await served.post("/classify", body)
            assert (status, "more than the limit of 128" in answer["error"]["message"]) == (400, True)
            status, answer = await served.post("/classify", {"input": [5, 259]})
            assert (status, answer["error"]["param"]) == (400, "input[0]")

    asyncio.run(scenario())


def test_without_a_word_on_it_the_sigmoid_is_applied() -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer()) as served:
            # sigmoid(2) = 0.8807970779778823
            for body in ({"input": "ab"}, {"input": "ab", "use_activation": True}):
                _, answer = await served.post("/classify", {**body, "add_special_tokens": False})
                assert answer["data"][0]["probs"] == [pytest.approx(0.8807970779778823, abs=1e-15)]
            _, answer = await served.post("/score", {"text_1": "q", "text_2": "ab"})
            assert answer["data"][0]["score"] == pytest.approx(0.8807970779778823, abs=1e-15)

    asyncio.run(scenario())


def test_messages_and_pairs_are_written_by_the_models_own_template(classifier: Path, learned: Scorer) -> None:
    ids = [0, *encode("2+2?4."), 1]  # the template `plain`: BOS, contents, EOS
    parts = [{"type": "text", "text": "4."}]
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": parts}]

    async def scenario() -> None:
        async with doors(learned) as served:
            expected = pytest.approx(logit(classifier, ids), abs=1e-5)
            _, answer = await served.post("/classify", {"messages": messages, "use_activation": False})
            assert answer["data"][0]["probs"] == [expected]
            for names in (
                ("queries", "documents"),
                ("queries", "items"),
                ("data_1", "data_2"),
                ("text_1", "text_2"),
            ):
                for path in ("/score", "/v1/score"):
                    body = {names[0]: "2+2?", names[1]: ["4."], "use_activation": False}
                    _, answer = await served.post(path, body)
                    assert [d["score"] for d in answer["data"]] == [expected]
            _, answer = await served.post("/score", {"queries": ["1", "2"], "documents": ["1", "2"]})
            assert [d["index"] for d in answer["data"]] == [0, 1]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/classify", {}, "either input or messages"),
        (
            "/classify",
            {"input": "a", "messages": [{"role": "user", "content": "a"}]},
            "either input or messages",
        ),
        ("/classify", {"input": []}, "must not be empty"),
        ("/classify", {"input": ["a", 1]}, "input"),
        ("/classify", {"input": True}, "input"),
        ("/classify", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ("/classify", {"input": "a", "truncation_side": "middle"}, "truncation_side"),
        ("/classify", {"input": "a", "normalize": True}, "use use_activation instead"),
        ("/score", {"queries": "a", "documents": "b", "task": "score"}, "task was removed"),
        ("/classify", {"messages": [{"role": "user", "content": "a"}]}, "end with the assistant turn"),
        ("/classify", {"messages": [{"role": "assistant", "content": "a"}]}, "no prompt"),
        ("/classify", {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ("/score", {"queries": ["a", "b"], "documents": ["c", "d", "e"]}, "2 queries and 3 documents"),
        ("/score", {"queries": [], "documents": []}, "0 queries"),
        ("/score", {"queries": "a"}, "documents"),
    ],
)
def test_bad_input_is_a_400_in_vllms_error_shape(path: str, body: dict[str, Any], says: str) -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        async with doors(scorer) as served:
            status, answer = await served.post(path, body)
            assert (status, scorer.batches) == (400, [])
            error = answer["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("BadRequestError", 400)
            assert says in error["message"]

    asyncio.run(scenario())


def test_another_model_is_a_404() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        async with doors(scorer, served_model_name="my-rm") as served:
            status, answer = await served.post("/classify", {"model": "other", "input": "a"})
            assert (status, answer["error"]["type"], scorer.batches) == (404, "NotFoundError", [])
            for name in ("my-rm", "length", None):
                status, answer = await served.post("/classify", {"model": name, "input": "a"})
                assert (status, answer["model"]) == (200, "my-rm")

    asyncio.run(scenario())


@pytest.mark.parametrize(("text", "status"), [("poison", 500), ("nan", 500), ("a" * 60, 400)])
def test_one_failed_item_fails_the_request_as_in_vllm(text: str, status: int) -> None:
    async def scenario() -> None:
        async with doors(SequenceScorer(max_tokens_per_item=50)) as served:
            found, answer = await served.post("/classify", {"input": ["fine", text]})
            assert (found, answer["error"]["param"]) == (status, "input[1]")
            assert (await served.get("/health"))[0] == 200

    asyncio.run(scenario())


def test_a_judges_score_is_no_logit() -> None:
    rubric = RubricFile.model_validate(
        {
            "name": "s",
            "kind": "score",
            "sample": "{{ prompt }} {{ response }}",
            "ending": "Score: ",
            "labels": ["1", "2", "3"],
        }
    )

    def reply(asked: Asked) -> tuple[float, ...]:
        return (0.0, 0.5, 0.5)

    async def scenario() -> None:
        judge = Judge(ScriptedModel(reply), Rubric(rubric, "hash", cot=False))
        async with doors(JudgeScorer(judge, None, max_in_flight=2)) as served:
            body = {"queries": "q", "documents": ["a"]}
            _, answer = await served.post("/score", body)
            assert answer["data"][0]["score"] == pytest.approx(2.5)
            assert (await served.post("/score", {**body, "use_activation": True}))[0] == 400
            status, answer = await served.post("/classify", {"input": "bare text"})
            assert (status, "conversations" in answer["error"]["message"]) == (400, True)

    asyncio.run(scenario())


def test_both_doors_lead_to_one_queue() -> None:
    async def scenario() -> None:
        scorer = SequenceScorer()
        scorer.gate.clear()
        async with doors(scorer) as served, grpc.aio.insecure_channel(served.address) as channel:
            stub: Any = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            first = asyncio.ensure_future(stub.Score(score_request("first")))
            await scorer.started.wait()
            by_grpc = asyncio.ensure_future(stub.Score(score_request("bb")))
            by_http = asyncio.ensure_future(served.post("/score", {"queries": "q", "documents": "cc"}))
            await until(lambda: served.server._queued_tokens() == 4)
            scorer.gate.set()
            await asyncio.gather(first, by_grpc, by_http)
            assert [sorted(batch) for batch in scorer.batches] == [["first"], ["bb", "cc"]]

    asyncio.run(scenario())
