"""vLLM's engine in this process, beside transformers' own forward and beside the transformers back end."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from labeler.judge import Judge, Recipe
from labeler.llm import LLM, LLMOptions, RequestFailed, open_llm
from labeler.rubric import load_rubric
from rlaif.errors import ModelError
from rlaif.models import ModelRef
from rlaif.types import Pair, Preference, user_prompt
from tinyworld import WORLD_DIR
from tinyworld.grammar import SO_SO, make_post, make_summary

from .conftest import needs_vllm
from .oracle import label_probs, prompt_ids

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]

BLOCK = 32
QUESTIONS = [
    user_prompt(f"{text} " * 20)
    for text in ("How do I bake bread?", "Name a rhyme for light.", "Why is the sky blue?")
]
TEN = tuple(str(i) for i in range(1, 11))


class Running(NamedTuple):
    """An engine, and the event loop that it belongs to."""

    llm: LLM
    loop: asyncio.Runner


def running(model: Path) -> Iterator[Running]:
    before = set(multiprocessing.active_children())
    with asyncio.Runner() as loop:
        llm = open_llm(ModelRef.parse(f"vllm:{model}"), LLMOptions(max_in_flight=32))
        yield Running(llm, loop)
        loop.run(llm.close())
    assert set(multiprocessing.active_children()) <= before, "the engine is still there after close()"


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[Running]:
    yield from running(tiny_llama)


@pytest.fixture(scope="module")
def world_judge() -> Iterator[Running]:
    yield from running(WORLD_DIR / "weights" / "judge")


def test_labels_of_several_tokens_equal_the_full_softmax_of_transformers(
    engine: Running, tiny_llama: Path
) -> None:
    """The tokenizer splits 10 into 1, 0 and a space from the digit after it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    for question in QUESTIONS:
        reading = engine.loop.run(engine.llm.label_logprobs(question, "Score:", TEN))
        expected = label_probs(model, tokenizer, prompt_ids(tokenizer, question, "Score:"), TEN)
        assert reading.distribution.logprobs == pytest.approx(list(map(math.log, expected)), abs=1e-3)
        assert reading.distribution.mass == pytest.approx(sum(expected), rel=1e-3)
        assert not reading.distribution.censored


def test_a_reading_goes_on_from_the_tokens_that_the_model_wrote(engine: Running, tiny_llama: Path) -> None:
    """A model of random weights writes words in pieces that its tokenizer would join."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    rewritten = 0
    for question in QUESTIONS:
        written = engine.loop.run(engine.llm.generate(question, "Thoughts:", max_tokens=48))
        prefix = f"Thoughts:{written.text}\n\nScore:"
        reading = engine.loop.run(engine.llm.label_logprobs(question, prefix, ("1", "2"), after=written))

        end = tokenizer("\n\nScore:", add_special_tokens=False)["input_ids"]
        ids = [*written.context_ids, *end]
        own = prompt_ids(tokenizer, question, prefix)
        if not written.context_ids or tokenizer.decode(ids) != tokenizer.decode(own):
            continue
        rewritten += ids != own
        expected = label_probs(model, tokenizer, ids, ("1", "2"))
        assert reading.distribution.logprobs == pytest.approx(list(map(math.log, expected)), abs=1e-3)
        requests = reading.completion_tokens
        computed = reading.prompt_tokens - reading.cached_tokens
        assert computed <= requests * (BLOCK + len(end) + 2), "more than the tail was computed"
    assert rewritten, "no rationale was written in other tokens than the tokenizer's"


def test_a_sample_is_a_function_of_its_seed(engine: Running) -> None:
    async def sample() -> list[str]:
        tasks = (
            engine.llm.generate(QUESTIONS[0], max_tokens=12, temperature=1.0, seed=i % 4) for i in range(8)
        )
        return [g.text for g in await asyncio.gather(*tasks)]

    texts = engine.loop.run(sample())
    assert texts[:4] == texts[4:]
    assert len(set(texts)) == 4


def test_a_stop_string_ends_the_text_before_it(engine: Running) -> None:
    free = engine.loop.run(engine.llm.generate(QUESTIONS[1], max_tokens=40))
    stop = free.text[20:24]
    cut = engine.loop.run(engine.llm.generate(QUESTIONS[1], max_tokens=40, stop=(stop,)))
    assert cut.text == free.text[: free.text.index(stop)]
    assert (free.finish_reason, cut.finish_reason) == ("length", "stop")


def test_a_context_that_is_too_long_fails_that_request_alone(engine: Running) -> None:
    async def ask() -> list[object]:
        tasks = (
            engine.llm.label_logprobs(p, ":", ("1", "2")) for p in (user_prompt("w " * 9000), QUESTIONS[2])
        )
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    failed, fine = engine.loop.run(ask())
    assert isinstance(failed, RequestFailed) and "context too long" in str(failed)
    assert not isinstance(fine, Exception)


def test_an_engine_argument_that_there_is_not_is_one_clear_line(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded: .*'no_such_argument'"):
        open_llm(ModelRef.parse(f"vllm:{tiny_llama}?no_such_argument=1"))


def test_a_judge_gives_the_same_labels_in_vllm_and_in_transformers(world_judge: Running) -> None:
    """The embedded world's judge: a model that was trained to judge, so its labels have nearly all the mass."""
    posts = [make_post(i) for i in range(8)]
    pairs = [
        Pair(user_prompt(p.text), make_summary(p, 2 * i, SO_SO), make_summary(p, 2 * i + 1, SO_SO))
        for i, p in enumerate(posts)
    ]

    async def judge_all(llm: LLM) -> list[Preference]:
        judge = Judge(llm, load_rubric("tinyworld:pair"), Recipe(max_rationale_tokens=160))
        return list(await asyncio.gather(*map(judge.judge_pair, pairs)))

    ours = world_judge.loop.run(judge_all(world_judge.llm))
    theirs = asyncio.run(judge_all(open_llm(ModelRef.parse("tinyworld:judge"))))
    for one, other in zip(ours, theirs, strict=True):
        for mine, reference in ((one.ab, other.ab), (one.ba, other.ba)):
            assert (mine is None) == (reference is None)
            if mine is not None and reference is not None:
                assert mine.rationale == reference.rationale
                assert mine.labels is not None and mine.labels.mass > 0.9
        assert one.p_a == pytest.approx(other.p_a, abs=1e-3)
    assert len({p.p_a for p in ours}) > 4
