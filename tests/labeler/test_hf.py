"""The transformers back end: batching changes nothing, probabilities are the model's own, label ids are right."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from labeler.backends.hf import HFModel
from labeler.backends.labels import find_aliases, read_top_tokens, resolve_label
from labeler.llm import Generation, LLMOptions, RequestFailed, open_llm
from rlaif.errors import ModelError
from rlaif.models import ModelRef
from rlaif.types import Conversation, user_prompt
from tests.labeler.tiny import WORDS, save_tiny, tiny_model, tiny_tokenizer

PROMPTS = [user_prompt(" ".join(f"w{(7 * i + j) % 40}" for j in range(3 + 5 * i % 17))) for i in range(12)]


def model(*, context: int = 128, rows: int = 8) -> HFModel:
    return HFModel(tiny_model(context=context), tiny_tokenizer(), name="hf:tiny", max_batch_rows=rows)


def generate_all(
    llm: HFModel, prompts: Sequence[Conversation], *, temperature: float = 0.0, stop: Sequence[str] = ()
) -> list[Generation]:
    async def run() -> list[Generation]:
        tasks = [
            llm.generate(p, "w1", max_tokens=20, temperature=temperature, seed=i, stop=stop)
            for i, p in enumerate(prompts)
        ]
        return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def test_greedy_decoding_in_batches_equals_transformers_generate_alone() -> None:
    tokenizer, reference = tiny_tokenizer(), tiny_model()
    done = generate_all(model(), PROMPTS)
    for prompt, generation in zip(PROMPTS, done, strict=True):
        ids = tokenizer(f"<s> {prompt[0].content} | w1", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            out = reference.generate(**ids, max_new_tokens=20, do_sample=False)[
                0, ids["input_ids"].shape[1] :
            ]
        assert generation.text.split() == tokenizer.decode(out, skip_special_tokens=True).split()
        assert generation.completion_tokens == len(out)
        assert generation.finish_reason == ("stop" if out[-1] == tokenizer.eos_token_id else "length")
    assert len({g.completion_tokens for g in done}) > 1, "rows of different length are what is tested"


def test_a_sample_depends_on_its_own_request_alone() -> None:
    together = generate_all(model(rows=12), PROMPTS, temperature=1.0)
    one_by_one = generate_all(model(rows=1), PROMPTS, temperature=1.0)
    assert together == one_by_one
    assert len({g.text for g in together}) > 6


def test_sampling_follows_the_models_distribution() -> None:
    llm, n = model(rows=512), 2000
    prompt = PROMPTS[3]

    async def run() -> list[Generation]:
        return list(
            await asyncio.gather(
                *(llm.generate(prompt, max_tokens=1, temperature=1.0, seed=i) for i in range(n))
            )
        )

    counts = dict.fromkeys(WORDS, 0)
    for generation in asyncio.run(run()):
        counts[generation.text.strip() or "</s>"] += 1
    ids = tiny_tokenizer()(f"<s> {prompt[0].content} |", add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        probs = tiny_model()(**ids).logits[0, -1].softmax(-1)
    for i, word in enumerate(WORDS[4:], 4):
        p = float(probs[i])
        # Five standard errors of a binomial share.
        assert abs(counts[word] / n - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-3


def test_a_stop_string_ends_the_text_before_it() -> None:
    free = generate_all(model(), PROMPTS)
    word = next(g.text.split()[3] for g in free if len(g.text.split()) > 6)
    for before, after in zip(free, generate_all(model(), PROMPTS, stop=(word,)), strict=True):
        if word in before.text:
            assert after.text == before.text[: before.text.index(word)]
            assert after.finish_reason == "stop"
        else:
            assert after == before


def test_label_probabilities_are_the_full_softmax_at_the_next_position() -> None:
    labels = tuple(str(i) for i in range(1, 11))
    llm = model()

    async def run() -> list[tuple[float, ...]]:
        readings = await asyncio.gather(*(llm.label_logprobs(p, "w5 :", labels) for p in PROMPTS))
        return [r.distribution.logprobs for r in readings]

    tokenizer, reference = tiny_tokenizer(), tiny_model()
    for prompt, logprobs in zip(PROMPTS, asyncio.run(run()), strict=True):
        ids = tokenizer(f"<s> {prompt[0].content} | w5 :", add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            expected = reference(**ids).logits[0, -1].log_softmax(-1)
        assert logprobs == pytest.approx([float(expected[WORDS.index(x)]) for x in labels], abs=1e-5)


def test_generation_and_label_requests_may_mix_and_be_cancelled() -> None:
    llm = model()

    async def run() -> None:
        tasks = [asyncio.create_task(llm.generate(p, max_tokens=20)) for p in PROMPTS]
        await asyncio.sleep(0)
        tasks[0].cancel()
        reading = await llm.label_logprobs(PROMPTS[0], ":", ("1", "2"))
        assert 0 < reading.distribution.mass < 1
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[0], asyncio.CancelledError)
        assert all(isinstance(d, Generation) for d in done[1:])
        await llm.close()

    asyncio.run(run())


def test_a_context_that_is_too_long_fails_that_request_alone() -> None:
    llm = model(context=32)

    async def run() -> list[Generation | BaseException]:
        long = user_prompt("w1 " * 40)
        tasks = (llm.generate(p, max_tokens=60) for p in (long, user_prompt("w1 w2")))
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    failed, fine = asyncio.run(run())
    assert isinstance(failed, RequestFailed)
    assert "42 tokens, the model takes 32" in str(failed)
    assert isinstance(fine, Generation)
    assert fine.prompt_tokens + fine.completion_tokens <= 32


def test_an_unknown_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_llm(ModelRef.parse(f"hf:{tmp_path / 'nothing'}"))


def test_weights_decide_the_version(tmp_path: Path) -> None:
    ref = ModelRef.parse(str(save_tiny(tmp_path / "m")))
    before = open_llm(ref).version
    assert open_llm(ref, LLMOptions(max_in_flight=3)).version == before
    changed = tiny_model(seed=1)
    changed.save_pretrained(tmp_path / "m")
    assert open_llm(ref).version != before


# ---- label tokens ----


def by_characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_a_label_that_the_tokenizer_splits_is_named() -> None:
    assert resolve_label(by_characters, "score:", "9", "m") == (ord("9"),)
    with pytest.raises(ModelError, match="tokenizer of m splits the label '10'"):
        resolve_label(by_characters, "score:", "10", "m")


def test_a_label_that_melts_into_the_text_before_it_is_refused() -> None:
    def encode(text: str) -> list[int]:
        return [7] if text == "score:" else [8, 9]

    with pytest.raises(ModelError, match="melts into"):
        resolve_label(encode, "score:", "1", "m")


def test_both_spellings_of_a_label_are_found_in_context() -> None:
    ids = {"x:": [5], "x:1": [5, 11], "x: 1": [5, 12]}
    assert resolve_label(ids.__getitem__, "x:", "1", "m") == (11, 12)


def test_aliases_are_whole_tokens_up_to_white_space() -> None:
    assert find_aliases({3: "1", 4: " 1", 5: "10", 6: "1\n", 7: "a1"}, "1") == [3, 4, 6]


def test_aliases_are_summed() -> None:
    top = [("1", math.log(0.3)), (" 1", math.log(0.2)), ("2", math.log(0.1)), ("x", math.log(0.1))]
    read = read_top_tokens(top, ("1", "2"))
    assert [math.exp(x) for x in read.logprobs] == pytest.approx([0.5, 0.1])
    assert read.mass == pytest.approx(0.6)
    assert not read.censored


def test_a_label_outside_the_top_tokens_gets_a_bound_and_is_censored() -> None:
    read = read_top_tokens([("1", math.log(0.6)), ("x", math.log(0.3))], ("1", "2"))
    # 0.1 is left for all other tokens, less than the least of the list.
    assert math.exp(read.logprobs[1]) == pytest.approx(0.1)
    assert read.mass == pytest.approx(0.6)
    assert read.censored
    tail = read_top_tokens([("1", math.log(0.3)), ("x", math.log(0.01))], ("1", "2"))
    assert math.exp(tail.logprobs[1]) == pytest.approx(0.01)


def test_no_label_among_the_top_tokens_is_a_failure_not_a_tie() -> None:
    with pytest.raises(RequestFailed, match="none of the labels"):
        read_top_tokens([("x", -0.1)], ("1", "2"))
