"""A judge behind the service, answering from a script."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from google.rpc import code_pb2

from labeler.backends.openai import OpenAIModel
from labeler.backends.scripted import Asked, ScriptedModel
from labeler.judge import Judge
from labeler.llm import LLMOptions, RequestFailed
from labeler.rubric import Rubric, RubricFile
from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server.config import ServeConfig
from reward_server.scorers.judge import JudgeScorer
from rlaif.errors import ConfigError, EndpointError
from rlaif.models import ModelRef
from tests.labeler.openai_server import ScriptedServer
from tests.labeler.tiny import WORDS, save_tiny, tiny_model, tiny_tokenizer
from tests.reward_server.fakes import conversation, score_request, serving

SCORE = RubricFile(
    name="score",
    kind="score",
    sample="{{ prompt }} -> {{ response }}",
    ask_rationale="Why?",
    rationale_cue="Because ",
    ending="Score: ",
    labels=tuple(str(i) for i in range(1, 11)),
)
PAIR = RubricFile(
    name="pair",
    kind="pair",
    sample="{{ prompt }}: (1) {{ response_1 }} (2) {{ response_2 }}",
    ending="Preferred: ",
    labels=("1", "2"),
)


GRADED = RubricFile(
    name="graded",
    kind="pair",
    sample="{{ prompt }}: (1) {{ response_1 }} (2) {{ response_2 }}",
    ending="Grade: ",
    labels=("A", "B", "C"),
    preferences=(0.9, 0.5, 0.1),
)


def reply(asked: Asked) -> str | tuple[float, ...]:
    """Answers `fine` for a good reason with 8 or 9, fails on `fail`; in pairs likes `good`, and the first place."""
    if "fail" in asked.user:
        raise RequestFailed("the endpoint returned 500")
    if asked.labels is None:
        return "it is fine."
    if len(asked.labels) == 2:
        good_first = asked.user.index("good") < asked.user.index("bad")
        return (0.9, 0.1) if good_first else (0.4, 0.6)
    return (0.0,) * 7 + (0.2, 0.6, 0.0)  # mass 0.8


def scorer(*, cot: bool = True, pair: bool = True) -> JudgeScorer:
    model = ScriptedModel(reply)
    judge = Judge(model, Rubric(SCORE, "hash-of-score", cot=cot))
    pair_judge = Judge(model, Rubric(PAIR, "hash-of-pair", cot=False)) if pair else None
    return JudgeScorer(judge, pair_judge, max_in_flight=4)


def test_a_score_is_the_expectation_over_the_levels_with_its_distribution() -> None:
    async def scenario() -> None:
        async with serving(scorer()) as served:
            answer = await served.stub.Score(score_request("fine", "fail", with_rationale=True))
            score = answer.outcomes[0].score
            assert score.raw == pytest.approx(0.25 * 8 + 0.75 * 9)
            assert score.normalized == pytest.approx((8.75 - 5.5) / 4.5)
            assert list(score.distribution.probability) == pytest.approx([0] * 7 + [0.25, 0.75, 0], abs=1e-9)
            assert list(score.distribution.level) == list(range(1, 11))
            assert score.distribution.mass == pytest.approx(0.8)
            assert score.rationale == "it is fine."
            assert answer.outcomes[1].error.code == code_pb2.INTERNAL
            assert "500" in answer.outcomes[1].error.message
            info = await served.stub.GetInfo(pb.GetInfoRequest())
            assert info.kind == pb.SCORER_KIND_JUDGE
            assert (info.normalization.center, info.normalization.scale) == (5.5, 4.5)

    asyncio.run(scenario())


def test_an_empty_response_has_the_lowest_score_without_a_question() -> None:
    async def scenario() -> None:
        async with serving(scorer()) as served:
            (empty,) = (await served.stub.Score(score_request(""))).outcomes
            assert (empty.score.raw, empty.score.tokens) == (1.0, 0)

    asyncio.run(scenario())


def test_an_endpoint_that_is_gone_is_in_the_log_once_and_once_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gone = True

    def answer(asked: Asked) -> str | tuple[float, ...]:
        if gone:
            raise EndpointError("no connection to http://a/v1", advice="Run the same command again.")
        return reply(asked)

    async def scenario() -> None:
        nonlocal gone
        judge = Judge(ScriptedModel(answer), Rubric(SCORE, "hash-of-score", cot=False))
        async with serving(JudgeScorer(judge, None, max_in_flight=4)) as served:
            for responses in (("a", "b"), ("c", "")):  # nobody is asked about an empty one
                outcomes = (await served.stub.Score(score_request(*responses))).outcomes
                failed = [o.error for o in outcomes if o.HasField("error")]
                assert {(e.code, e.message) for e in failed} == {
                    (code_pb2.UNAVAILABLE, "no connection to http://a/v1")
                }
            (said,) = caplog.messages
            assert "cannot be asked: no connection to http://a/v1; until it answers" in said
            assert "Run the same" not in said
            gone = False
            for response in ("d", "e"):
                (outcome,) = (await served.stub.Score(score_request(response))).outcomes
                assert outcome.HasField("score")
            assert len(caplog.messages) == 2 and caplog.messages[1].endswith("answers again")

    with caplog.at_level("WARNING", logger="reward_server"):
        asyncio.run(scenario())


def test_an_endpoint_whose_probe_was_filtered_is_probed_again_by_the_next_request() -> None:
    filters = iter((True,))

    def amend(body: dict[str, Any], choice: dict[str, Any]) -> None:
        if next(filters, False):
            choice |= {"finish_reason": "content_filter", "logprobs": None}

    async def scenario(ref: str) -> None:
        model = OpenAIModel(ModelRef.parse(ref), LLMOptions(max_retries=0))
        judge = Judge(model, Rubric(SCORE, "hash-of-score", cot=False))
        async with serving(JudgeScorer(judge, None, max_in_flight=4)) as served:
            refused = (await served.stub.Score(score_request("fine"))).outcomes[0].error
            assert refused.code == code_pb2.UNAVAILABLE and "content_filter" in refused.message
            outcome = (await served.stub.Score(score_request("fine"))).outcomes[0]
            assert outcome.score.raw == pytest.approx(8)

    with ScriptedServer(lambda *asked: {"8": 1.0 - 1e-9}, vllm=True, amend_probe=amend) as server:
        asyncio.run(scenario(server.ref))


def test_a_direct_score_is_that_of_the_full_softmax_of_transformers(tmp_path: Path) -> None:
    """A real model through the whole server: the expectation over the ten labels by hand from its logits."""
    folder = save_tiny(tmp_path / "lm")
    rubric = tmp_path / "score.yaml"
    written = SCORE.model_copy(update={"ask_rationale": "", "rationale_cue": "", "ending": "w5 :"})
    rubric.write_text(yaml.safe_dump(written.model_dump(mode="json", exclude_defaults=True)))
    responses = [" ".join(f"w{(7 * i + j) % 40}" for j in range(1 + 5 * i % 13)) for i in range(40)]

    async def scenario() -> pb.ScoreResponse:
        config = ServeConfig(judge=f"hf:{folder}", rubric=str(rubric), cot=False, device="cpu")
        async with serving(JudgeScorer.open(config)) as served:
            answer: pb.ScoreResponse = await served.stub.Score(score_request(*responses))
            return answer

    answer = asyncio.run(scenario())
    tokenizer, model = tiny_tokenizer(), tiny_model()
    label_ids = [WORDS.index(str(i)) for i in range(1, 11)]
    found = []
    for response, outcome in zip(responses, answer.outcomes, strict=True):
        ids = tokenizer(f"<s> q -> {response} | w5 :", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            p = model(**ids).logits[0, -1].double().softmax(-1)[label_ids]
        expected = float((p * torch.arange(1, 11)).sum() / p.sum())
        assert outcome.score.raw == pytest.approx(expected, abs=1e-4)
        assert outcome.score.distribution.mass == pytest.approx(float(p.sum()), abs=1e-4)
        assert list(outcome.score.distribution.probability) == pytest.approx((p / p.sum()).tolist(), abs=1e-4)
        found.append(expected)
    assert max(found) - min(found) > 2


def test_the_rationale_is_sent_only_when_asked_for() -> None:
    async def scenario() -> None:
        async with serving(scorer()) as served:
            answer = await served.stub.Score(score_request("fine"))
            assert not answer.outcomes[0].score.HasField("rationale")

    asyncio.run(scenario())


def test_a_comparison_is_the_mean_of_both_orders() -> None:
    async def scenario() -> None:
        async with serving(scorer()) as served:
            items = [
                pb.CompareItem(id=1, prompt=conversation("q"), response_a="good", response_b="bad"),
                pb.CompareItem(id=2, prompt=conversation("q"), response_a="bad", response_b="good"),
            ]
            good_bad, bad_good = (
                o.comparison for o in (await served.stub.Compare(pb.CompareRequest(items=items))).outcomes
            )
            assert (good_bad.p_a_first, good_bad.p_a_second) == pytest.approx((0.9, 0.6))
            assert good_bad.p_a == pytest.approx(0.75)
            assert bad_good.p_a == pytest.approx(1 - good_bad.p_a)

    asyncio.run(scenario())


def test_the_orders_of_a_graded_comparison_are_preferences_and_no_shares_of_grades() -> None:
    def grade(asked: Asked) -> tuple[float, ...]:
        good_first = asked.user.index("good") < asked.user.index("bad")
        return (0.5, 0.3, 0.2) if good_first else (0.1, 0.2, 0.7)

    async def scenario() -> None:
        model = ScriptedModel(grade)
        judges = (Judge(model, Rubric(file, "a hash", cot=False)) for file in (SCORE, GRADED))
        async with serving(JudgeScorer(*judges, max_in_flight=4)) as served:
            items = [
                pb.CompareItem(id=1, prompt=conversation("q"), response_a="good", response_b="bad"),
                pb.CompareItem(id=2, prompt=conversation("q"), response_a="bad", response_b="good"),
            ]
            good_bad, bad_good = (
                o.comparison for o in (await served.stub.Compare(pb.CompareRequest(items=items))).outcomes
            )
            # P(number 1 preferred): 0.5 * 0.9 + 0.3 * 0.5 + 0.2 * 0.1 with the good one first,
            # 0.1 * 0.9 + 0.2 * 0.5 + 0.7 * 0.1 with the bad one first
            assert (good_bad.p_a_first, good_bad.p_a_second) == pytest.approx((0.62, 1 - 0.26))
            assert (bad_good.p_a_first, bad_good.p_a_second) == pytest.approx((0.26, 1 - 0.62))
            assert (good_bad.p_a, bad_good.p_a) == pytest.approx((0.68, 0.32))

    asyncio.run(scenario())


def test_a_judge_without_a_pair_rubric_says_so_per_item() -> None:
    async def scenario() -> None:
        async with serving(scorer(pair=False)) as served:
            item = pb.CompareItem(id=1, prompt=conversation("q"), response_a="a", response_b="b")
            outcome = (await served.stub.Compare(pb.CompareRequest(items=[item]))).outcomes[0]
            assert outcome.error.code == code_pb2.UNIMPLEMENTED
            assert "--pair_rubric" in outcome.error.message

    asyncio.run(scenario())


def test_the_version_follows_rubric_and_chain_of_thought() -> None:
    async def scenario() -> None:
        scorers = [scorer(), scorer(), scorer(cot=False), scorer(pair=False)]
        versions = [s.version for s in scorers]
        assert versions[0] == versions[1]
        assert len(set(versions)) == 3
        for s in scorers:
            await s.close()

    asyncio.run(scenario())


def test_a_pair_rubric_cannot_score() -> None:
    with pytest.raises(ConfigError, match="scores one response"):
        JudgeScorer(Judge(ScriptedModel(reply), Rubric(PAIR, "x")), None, max_in_flight=1)


def test_the_scale_of_another_rubric_maps_to_minus_one_to_one() -> None:
    five = SCORE.model_copy(update={"labels": ("1", "2", "3", "4", "5")})
    judge = JudgeScorer(Judge(ScriptedModel(reply), Rubric(five, "x")), None, max_in_flight=1)
    scale = judge.normalization
    assert [(level - scale.center) / scale.scale for level in (1, 3, 5)] == [-1, 0, 1]
    assert math.isfinite(scale.scale)
    asyncio.run(judge.close())
