"""Several scorers behind one number: by hand what the rules say, and never a number where a part has none."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from protos.rlaif.reward.v1 import reward_pb2 as pb
from reward_server.config import ServeConfig
from reward_server.scorers.base import (
    Compared,
    CompareTask,
    Failure,
    Kind,
    Normalization,
    Outcome,
    OutOfMemory,
    Prepared,
    Scored,
    ScoreTask,
    Task,
    TaskError,
    padded,
)
from reward_server.scorers.composite import CompositeScorer, read_composite
from reward_server.scorers.rule import CompositeFile, PartSpec, Rule, evaluate
from reward_server.server import load_scorer
from rlaif.errors import ConfigError
from rlaif.types import Message, Pair, user_prompt
from tests.reward_server import tiny
from tests.reward_server.fakes import score_request, serving


def rule(text: str) -> Rule:
    parsed: Rule = TypeAdapter(Rule).validate_python(yaml.safe_load(text))
    return parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", 3.0),
        ("weighted_sum: {a: 2, b: -0.5}", 6.5),
        ("mean: [a, b, c]", 2.0),
        ("min: [a, b, c]", -1.0),
        # a, b, c are 1, -3, 2 from their mean: variance (1 + 9 + 4) / 3
        ("pessimistic: {of: [a, b, c], deviations: 2}", 2.0 - 2 * math.sqrt(14 / 3)),
        ("pessimistic: {of: [a, a], deviations: 5}", 3.0),
        ("scaled: {of: {mean: [a, b, c]}, by: 2.5}", 5.0),
        ("gate: {score: b, below: -0.5, otherwise: a}", -1.0),
        ("gate: {score: b, below: -1, otherwise: a}", 3.0),  # not below its threshold
        ("length_penalty: {of: a, per_1000_characters: 2, above: 500}", 3.0 - 2 * 0.7),
        ("length_penalty: {of: a, per_1000_characters: 2, above: 1300}", 3.0),
        ("gate: {score: b, below: 0, otherwise: {mean: [a, c]}}", -1.0),
        ("mean: [{min: [a, c]}, {weighted_sum: {b: 3}}]", 0.0),
    ],
)
def test_rules_by_hand(text: str, expected: float) -> None:
    assert evaluate(rule(text), {"a": 3.0, "b": -1.0, "c": 4.0}, characters=1200) == pytest.approx(expected)


@given(safety=st.floats(-10, 10), helpfulness=st.floats(-10, 10))
def test_the_gate_of_llama_2(safety: float, helpfulness: float) -> None:
    """Its condition is on the sigmoid: safety where that is below 0.15, else helpfulness."""
    threshold = math.log(0.15 / 0.85)
    gate = rule(f"gate: {{score: safety, below: {threshold!r}, otherwise: helpfulness}}")
    expected = safety if 1 / (1 + math.exp(-safety)) < 0.15 else helpfulness
    if abs(safety - threshold) > 1e-9:
        assert evaluate(gate, {"safety": safety, "helpfulness": helpfulness}, 0) == expected


class Part:
    """A scorer whose score is a function of the response."""

    kind: Kind = "reward_model"
    parallel_batches = 1
    max_batch_items = 0
    shares_prefixes = False

    def __init__(
        self, name: str, score: Callable[[str], float], center: float = 0.0, scale: float = 1.0
    ) -> None:
        self.name = name
        self.version = f"{name}-1"
        self.normalization = Normalization(center, scale, "a rule")
        self.max_tokens_per_item = 100
        self._score = score

    def prepare(self, task: Task) -> Prepared:
        assert isinstance(task, ScoreTask)
        text = task.conversation[-1].content
        if text == "refused":
            raise TaskError("too_long", "too long for this part")
        return Prepared(task, ((1,) * len(text),), len(text), len(text))

    def cost(self, batch: Sequence[Prepared]) -> int:
        return padded(batch)

    async def score(self, batch: Sequence[Prepared]) -> list[Outcome]:
        return [self._outcome(item) for item in batch]

    def _outcome(self, item: Prepared) -> Outcome:
        assert isinstance(item.task, ScoreTask)
        text = item.task.conversation[-1].content
        if text == "no reading":
            return Failure("no_score", "the judge gave no reading")
        if text == "memory":
            raise OutOfMemory("no room")
        return Scored(self._score(text), tokens=item.tokens, cached=1)

    async def warm_up(self) -> None:
        return

    async def close(self) -> None:
        return


def length(text: str) -> float:
    return float(len(text))


def vowels(text: str) -> float:
    return math.nan if text == "nan" else float(sum(text.count(v) for v in "aeiou"))


def composite(text: str, **parts: Part) -> CompositeScorer:
    specs = {name: {"model": name} for name in parts}
    content = {"parts": specs, **yaml.safe_load(text)}
    return CompositeScorer("both", CompositeFile.model_validate(content), parts)


GATE = "rule: {gate: {score: vowels, below: 1, otherwise: length}}"


def both(text: str = GATE) -> CompositeScorer:
    return composite(text, length=Part("length", length, center=10, scale=5), vowels=Part("vowels", vowels))


def test_a_served_composite_is_the_rule_on_the_parts_own_normalised_scores() -> None:
    async def scenario() -> None:
        async with serving(both()) as served:
            info = await served.stub.GetInfo(pb.GetInfoRequest())
            assert info.kind == pb.SCORER_KIND_COMPOSITE
            assert "length normalized" in info.normalization.source
            assert info.limits.max_tokens_per_item == 100
            answer = await served.stub.Score(score_request("banana", "rhythm", "queue"))
            assert [o.score.raw for o in answer.outcomes] == pytest.approx([(6 - 10) / 5, 0.0, (5 - 10) / 5])
            assert [o.score.tokens for o in answer.outcomes] == [12, 12, 10]  # both parts read it
            assert answer.usage.cached_tokens == 6

    asyncio.run(scenario())


def test_a_part_without_a_score_leaves_none_and_says_which() -> None:
    async def scenario() -> None:
        async with serving(both()) as served:
            answer = await served.stub.Score(score_request("no reading", "refused", "nan", "banana"))
            kinds = [o.WhichOneof("outcome") for o in answer.outcomes]
            assert kinds == ["error", "error", "error", "score"]
            messages = [o.error.message for o in answer.outcomes[:3]]
            # a NaN is not below 1: without a check the gate would give the other part's number
            assert [m.partition(":")[0] for m in messages] == ["length", "length", "vowels"]

    asyncio.run(scenario())


def test_out_of_memory_of_a_part_is_that_of_the_composite() -> None:
    scorer = both()
    item = scorer.prepare(ScoreTask((*user_prompt("q"), Message("assistant", "memory"))))
    with pytest.raises(OutOfMemory):
        asyncio.run(scorer.score([item]))


@given(st.text("abcde ", max_size=30), st.text("abcde ", max_size=30))
def test_swapping_the_responses_of_a_comparison_swaps_the_answer(a: str, b: str) -> None:
    scorer = both("rule: {weighted_sum: {length: 1, vowels: 40}}")  # far apart: the sigmoid saturates

    def compare(first: str, second: str) -> float:
        item = scorer.prepare(CompareTask(Pair(user_prompt("q"), first, second)))
        outcome = asyncio.run(scorer.score([item]))[0]
        assert isinstance(outcome, Compared)
        return outcome.p_a

    assert compare(a, b) + compare(b, a) == pytest.approx(1.0, abs=1e-12)
    assert compare(a, a) == 0.5


def test_the_version_follows_the_rule_and_every_part() -> None:
    versions = {
        both().version,
        both(GATE.replace("1", "2")).version,
        both(GATE + "\nnormalization: {center: 1, scale: 1, source: by hand}").version,
    }
    other = Part("vowels", vowels)
    other.version = "vowels-2"
    versions.add(composite(GATE, length=Part("length", length), vowels=other).version)
    assert len(versions) == 4 and both().version in versions


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("parts: {a: {model: x}}\nrule: b", "reads b, which is no part"),
        ("parts: {a: {model: x}, b: {model: y}}\nrule: a", "does not read b"),
        ("parts: {a: {}}\nrule: a", "either model or judge"),
        ("parts: {a: {model: x}}\nrule: {max: [a]}", "'max'"),
        ("parts: {a: {model: x, weight: 2}}\nrule: a", "weight"),
        ("parts: {a: {model: x}}\nrule: {weighted_sum: {a: .nan}}", "finite"),
        ("parts: [", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "composite.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_composite(str(path))


@pytest.mark.parametrize("inside", [True, False], ids=["in an event loop", "outside"])
def test_parts_that_are_open_are_closed_when_one_after_them_cannot_be(tmp_path: Path, inside: bool) -> None:
    class Closable(Part):
        closed = 0

        async def close(self) -> None:
            self.closed += 1
            if self.name == "b":
                raise OSError("the connection is gone already")

    opened: list[Closable] = []

    def open_part(spec: PartSpec) -> Closable:
        assert spec.model is not None
        if spec.model == "c":
            raise ConfigError("there is no c")
        opened.append(Closable(spec.model, length))
        return opened[-1]

    path = tmp_path / "composite.yaml"
    path.write_text("parts: {a: {model: a}, b: {model: b}, c: {model: c}}\nrule: {mean: [a, b, c]}")

    async def open_inside() -> None:
        CompositeScorer.open(str(path), open_part)

    with pytest.raises(OSError, match="gone already") as failed:
        asyncio.run(open_inside()) if inside else CompositeScorer.open(str(path), open_part)
    assert isinstance(failed.value.__context__, ConfigError), "both are told"
    assert [part.closed for part in opened] == [1, 1]


def test_real_reward_models_from_a_file(tmp_path: Path) -> None:
    folders = [tiny.save_classifier(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    path = tmp_path / "composite.yaml"
    parts = {name: {"model": str(folder)} for name, folder in zip("ab", folders, strict=True)}
    path.write_text(yaml.safe_dump({"parts": parts, "rule": {"mean": ["a", "b"]}}))
    task = ScoreTask((*user_prompt("q"), Message("assistant", "yes")))

    async def raw(model: str) -> float:
        scorer = load_scorer(ServeConfig(model=model, device="cpu"))
        outcome = (await scorer.score([scorer.prepare(task)]))[0]
        await scorer.close()
        assert isinstance(outcome, Scored)
        return outcome.raw

    async def scenario() -> None:
        a, b = [await raw(str(folder)) for folder in folders]
        assert a != b
        assert await raw(str(path)) == pytest.approx((a + b) / 2)

    asyncio.run(scenario())
    nested = tmp_path / "nested.yaml"
    nested.write_text(yaml.safe_dump({"parts": {"a": {"model": str(path)}}, "rule": "a"}))
    with pytest.raises(ConfigError, match="composite itself"):
        load_scorer(ServeConfig(model=str(nested)))
