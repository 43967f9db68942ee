"""The transformers back end: batching changes nothing, probabilities are the model's own, label ids are right."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from labeler.backends.hf import HFModel
from labeler.backends.labels import find_aliases, read_top_tokens
from labeler.backends.local import context_ids, continued
from labeler.llm import Generation, LLMOptions, RequestFailed, open_llm
from rlaif.errors import ModelError
from rlaif.models import ModelRef
from rlaif.types import Conversation, expectation, user_prompt
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
    assert "the model takes 32 tokens" in str(failed)
    assert isinstance(fine, Generation)
    assert fine.prompt_tokens + fine.completion_tokens <= 32


class SmallDevice(LlamaForCausalLM):
    """A model on a device that has room for so many tokens at a time."""

    room = 40

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        if input_ids.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(input_ids=input_ids, **more)


def test_a_row_that_the_device_has_no_room_for_fails_alone() -> None:
    small = SmallDevice(tiny_model().config)
    small.load_state_dict(tiny_model().state_dict())
    prompts = [user_prompt("w1 " * n) for n in (8, 30, 50, 9, 10)]

    async def run(model: LlamaForCausalLM, read: bool) -> list[Any]:
        llm = HFModel(model, tiny_tokenizer(), name="hf:tiny")
        tasks = [
            llm.label_logprobs(p, ":", ("1", "2")) if read else llm.generate(p, max_tokens=5) for p in prompts
        ]
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    for read in (True, False):
        found, with_room = (asyncio.run(run(model, read)) for model in (small, tiny_model()))
        assert isinstance(found[2], RequestFailed)
        # The prompt with its two tokens of template, and the prefix or what is to be generated.
        assert str(found[2]) == f"out of memory on a row of up to {50 + 2 + (1 if read else 5)} tokens"
        del found[2], with_room[2]
        if read:
            for one, other in zip(found, with_room, strict=True):
                assert one.distribution.logprobs == pytest.approx(other.distribution.logprobs, abs=1e-5)
        else:
            assert found == with_room


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_no_numbers_fails_alone(temperature: float) -> None:
    broken, whole = tiny_model(), tiny_model()
    with torch.no_grad():
        broken.get_input_embeddings().weight[WORDS.index("w39")] = math.nan
    prompts = [user_prompt(text) for text in ("w1 w2", "w1 w39 w3 w4", "w5 w6")]

    async def run(model: LlamaForCausalLM) -> list[Any]:
        llm = HFModel(model, tiny_tokenizer(), name="hf:tiny")
        texts = [llm.generate(p, max_tokens=4, temperature=temperature) for p in prompts]
        reads = [llm.label_logprobs(p, ":", ("1", "2")) for p in prompts]
        return list(await asyncio.gather(*texts, *reads, return_exceptions=True))

    found, expected = asyncio.run(run(broken)), asyncio.run(run(whole))
    assert [i for i, one in enumerate(found) if isinstance(one, RequestFailed)] == [1, 4]
    assert "NaN" in str(found[1]) and "NaN" in str(found[4])
    assert [found[0], found[2]] == [expected[0], expected[2]]
    for i in (3, 5):
        assert found[i].distribution.logprobs == pytest.approx(expected[i].distribution.logprobs, abs=1e-5)


def test_an_unknown_model_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_llm(ModelRef.parse(f"hf:{tmp_path}"))  # an empty folder


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_says_how_to_install_it() -> None:
    with pytest.raises(ModelError, match=r"needs vLLM: pip install 'rlaif\[vllm\]'"):
        open_llm(ModelRef.parse("vllm:org/model"))


def test_weights_decide_the_version(tmp_path: Path) -> None:
    ref = ModelRef.parse(str(save_tiny(tmp_path / "m")))
    before = open_llm(ref).version
    assert open_llm(ref, LLMOptions(max_in_flight=3)).version == before
    changed = tiny_model(seed=1)
    changed.save_pretrained(tmp_path / "m")
    assert open_llm(ref).version != before


def own_logprobs(reference: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-softmax after the last of `ids`, by one plain forward."""
    with torch.no_grad():
        return reference(torch.tensor([list(ids)])).logits[0, -1].double().log_softmax(-1)


def test_labels_that_the_tokenizer_splits_get_the_probability_of_their_whole_spelling() -> None:
    tokenizer, reference = tiny_tokenizer(), tiny_model()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(individual_digits=True)]
    )
    llm = HFModel(reference, tokenizer, name="hf:tiny")
    read = asyncio.run(llm.label_logprobs(PROMPTS[0], ":", ("1", "2", "12", "3"))).distribution

    ids = tokenizer(f"<s> {PROMPTS[0][0].content} | :", add_special_tokens=False)["input_ids"]
    one, two, three = (WORDS.index(x) for x in "123")
    first = own_logprobs(reference, ids)
    two_after_one = float(own_logprobs(reference, [*ids, one])[two])
    assert read.logprobs == pytest.approx(
        [
            float(first[one]) + math.log(1 - math.exp(two_after_one)),
            float(first[two]),
            float(first[one]) + two_after_one,
            float(first[three]),
        ],
        abs=1e-5,
    )
    assert read.mass == pytest.approx(float(first[[one, two, three]].exp().sum()), abs=1e-6)


def test_a_real_tokenizer_that_splits_ten_gives_a_scale_of_ten(shared_data: Path) -> None:
    """Llama's tokenizer writes 10 as 1, 0, and a space as a token of its own."""
    folder = shared_data / "models" / "stories260K"
    labels = tuple(str(i) for i in range(1, 11))
    llm = open_llm(ModelRef.parse(str(folder)))
    read = asyncio.run(llm.label_logprobs(user_prompt("One day a cat"), "saw", labels)).distribution

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("<s>One day a cat\n\nsaw", add_special_tokens=False)["input_ids"]
    digit = {label: tokenizer.convert_tokens_to_ids(label) for label in "0123456789"}
    expected = dict.fromkeys(labels, 0.0)
    for gap in ([], [tokenizer.convert_tokens_to_ids("▁")]):
        whole = math.exp(sum(float(own_logprobs(reference, ids)[t]) for t in gap))
        after = own_logprobs(reference, [*ids, *gap]).exp()
        zero = float(own_logprobs(reference, [*ids, *gap, digit["1"]]).exp()[digit["0"]])
        for label in labels[1:9]:
            expected[label] += whole * float(after[digit[label]])
        expected["1"] += whole * float(after[digit["1"]]) * (1 - zero)
        expected["10"] += whole * float(after[digit["1"]]) * zero
    # SentencePiece has no single token for a digit after a space, so these are all spellings but the aliases.
    aliases = [t for t in ("▁1", "▁2") if t in tokenizer.get_vocab()]
    assert not aliases
    assert [math.exp(x) for x in read.logprobs] == pytest.approx(list(expected.values()), rel=1e-4)


# ---- reading on from a generation ----


def test_a_generation_tells_the_ids_of_its_text_without_what_ended_it() -> None:
    tokenizer = tiny_tokenizer()
    for prompt, generation in zip(PROMPTS, generate_all(model(), PROMPTS), strict=True):
        written = tokenizer(f"{prompt[0].content} | w1 {generation.text}", add_special_tokens=False)
        shown = [i for i in generation.context_ids if i not in tokenizer.all_special_ids]
        assert shown == written["input_ids"]
        assert tokenizer.eos_token_id not in generation.context_ids


def test_a_text_that_ends_inside_a_token_has_no_ids() -> None:
    tokenizer = tiny_tokenizer()
    prompt, new = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("<s> w5 |", "w1 w12"))
    assert context_ids(tokenizer, prompt, new, " w1 w12") == (*prompt, *new)
    assert context_ids(tokenizer, prompt, new, " w1 w1") == ()


@given(st.text("ab ", min_size=1, max_size=12), st.integers(0, 12), st.lists(st.integers(0, 3), max_size=12))
def test_reading_on_keeps_the_text_and_the_tokens_already_computed(
    text: str, cut: int, ways: list[int]
) -> None:
    """A text may be written in many ways with a, b, ab, ba, space; the tokenizer has one of its own."""
    vocabulary = {"a": 0, "b": 1, " ": 2, "ab": 3, "ba": 4}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [("a", "b"), ("b", "a")]))
    )
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    begun = text[:cut]
    written, at = [], 0
    for way in [*ways, *[0] * len(text)]:  # the model's way through the beginning of the text
        pieces = [p for p in sorted(vocabulary) if begun.startswith(p, at)]
        if not pieces:
            break
        piece = pieces[way % len(pieces)]
        written.append(vocabulary[piece])
        at += len(piece)
    own = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    joined = continued(tokenizer, written, own)
    assert tokenizer.decode(joined) == tokenizer.decode(own) == text
    spelled = tokenizer.decode(written)
    ends = [tokenizer.decode(own[:k]) for k in range(len(own) + 1)]
    if spelled in ends:
        assert joined[: len(written)] == tuple(written), "what was computed is not met again"


# ---- label tokens ----


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


def test_a_list_that_sums_to_one_leaves_almost_nothing_for_other_labels() -> None:
    sure = read_top_tokens([("1", 0.0)], ("1", "2"))
    # In fp32 the sum of 1 and 2^-24 is 1, so the other label may have so much.
    assert math.exp(sure.logprobs[1]) == pytest.approx(2.0**-24)
    assert sure.probs[0] == pytest.approx(1.0, abs=1e-7)
    assert sure.censored


def test_labels_outside_the_top_tokens_share_what_the_list_leaves_over() -> None:
    scale = tuple(str(i) for i in range(1, 11))
    top = [
        (label, math.log(p)) for label, p in (("7", 0.4), ("8", 0.3), ("6", 0.15), ("9", 0.1), ("5", 0.03))
    ]
    read = read_top_tokens(top, scale)
    probs = [math.exp(x) for x in read.logprobs]
    # 0.02 is left for 1, 2, 3, 4 and 10: 0.004 each.
    assert probs == pytest.approx([0.004, 0.004, 0.004, 0.004, 0.03, 0.15, 0.4, 0.3, 0.1, 0.004])
    # 5 x 0.03 + 6 x 0.15 + 7 x 0.4 + 8 x 0.3 + 9 x 0.1 = 7.15, and 0.004 x (1 + 2 + 3 + 4 + 10) = 0.08.
    assert expectation(read.probs, range(1, 11)) == pytest.approx(7.23)
    assert read.mass == pytest.approx(0.98)
    assert read.censored


def test_no_label_among_the_top_tokens_is_a_failure_not_a_tie() -> None:
    with pytest.raises(RequestFailed, match="none of the labels"):
        read_top_tokens([("x", -0.1)], ("1", "2"))
