from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from policy_trainer.batching import collate, length_buckets, pad_right
from policy_trainer.logprobs import token_logprobs
from policy_trainer.rollout import HFRollout, Sampled, decode_response
from rlaif.errors import ModelError
from tests.policy_trainer import tiny

PROMPTS = [[1, 4, 6 + i % 20, *range(7, 7 + i % 5), 5] for i in range(24)]


def sample(seed: int = 0, *, copies: int = 1, temperature: float = 0.8, batch_size: int = 7) -> list[Sampled]:
    engine = HFRollout(tiny.model(), [2], batch_size=batch_size)
    return engine.generate(
        PROMPTS, num_return_sequences=copies, max_new_tokens=10, temperature=temperature, seed=seed
    )


def test_equal_seeds_give_equal_responses_and_others_do_not() -> None:
    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_a_bucket_samples_the_same_whatever_was_sampled_before_it() -> None:
    """Other prompts in the earlier buckets draw other numbers of tokens, which must not move this one's."""
    sampled = sample()
    last = length_buckets([len(p) for p in PROMPTS], max_rows=7)[-1]
    engine = HFRollout(tiny.model(), [2], batch_size=7)

    def sample_with_others(others: list[int]) -> list[Sampled]:
        prompts = [PROMPTS[i] if i in last else [*others, *PROMPTS[i]] for i in range(24)]
        found = engine.generate(prompts, max_new_tokens=10, temperature=0.8, seed=0)
        return [found[i] for i in last]

    assert sample_with_others([9, 9]) == sample_with_others([8] * 5) == [sampled[i] for i in last]


@pytest.mark.parametrize("copies", [1, 3])
def test_log_probabilities_are_the_trainers(copies: int) -> None:
    """Through bucketing, the cache, ended rows that leave, and several samples of one prompt."""
    sampled = sample(copies=copies)
    assert [s.prompt_index for s in sampled] == [i for i in range(24) for _ in range(copies)]
    batch = collate([PROMPTS[s.prompt_index] for s in sampled], [s.response_ids for s in sampled])
    with torch.no_grad():
        ours = token_logprobs(
            tiny.model(), batch.input_ids, batch.attention_mask, batch.response_len, 0.8
        ).logprobs
    engine = pad_right([torch.tensor(s.logprobs) for s in sampled], batch.response_len)
    torch.testing.assert_close(engine, ours * batch.response_mask, atol=2e-5, rtol=0)


_WIDTH = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3_5", {"text_config": {**_WIDTH, **_DELTA}}),
        ("bamba", {**_WIDTH, **_SSM, "attn_layer_indices": [1, 3]}),
        ("falcon_h1", {**_WIDTH, **_SSM, "mamba_d_ssm": 64}),
        ("mamba", {"vocab_size": len(tiny.VOCABULARY), "hidden_size": 32, "num_hidden_layers": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recurrent_states_follow_their_rows(kind: str, settings: dict[str, object]) -> None:
    """Against the model's own forward, one sequence at a time: prompts of several lengths, copies, rows that leave."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    engine = HFRollout(model, range(2, 30, 3))
    sampled = engine.generate(PROMPTS[:5], num_return_sequences=3, max_new_tokens=10, temperature=4.0, seed=0)
    assert len({len(s.response_ids) for s in sampled}) > 3
    for s in sampled:
        ids = [*PROMPTS[s.prompt_index], *s.response_ids]
        with torch.no_grad():
            rows = model(torch.tensor([ids]), use_cache=False).logits[0].div(4).log_softmax(-1)
        before = range(len(PROMPTS[s.prompt_index]) - 1, len(ids) - 1)
        expected = [rows[at, ids[at + 1]].item() for at in before]
        assert s.logprobs == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("openai-gpt", {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
        ("recurrent_gemma", {**_WIDTH, "lru_width": 32}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_architecture_without_a_cache_for_batches_is_refused(
    kind: str, settings: dict[str, object]
) -> None:
    config = AutoConfig.for_model(kind, **settings)
    engine = HFRollout(AutoModelForCausalLM.from_config(config).eval(), [2])
    with pytest.raises(ModelError, match="transformers cannot sample from"):
        engine.generate(PROMPTS[:2], max_new_tokens=4, temperature=1.0, seed=0)


def test_a_response_ends_at_its_first_eos_or_at_the_limit() -> None:
    sampled = sample()
    assert {s.finished for s in sampled} == {True, False}
    for s in sampled:
        assert s.finished == (s.response_ids[-1] == 2)
        assert 2 not in s.response_ids[:-1]
        assert len(s.response_ids) == len(s.logprobs) <= 10
        assert s.finished or len(s.response_ids) == 10


def test_samples_follow_the_full_distribution() -> None:
    """First tokens of 6000 samples of one prompt against the model's probabilities (chi-squared, 29 degrees)."""
    model = tiny.model()
    engine = HFRollout(model, [2], batch_size=6000)
    drawn = engine.generate(
        [PROMPTS[0]], num_return_sequences=6000, max_new_tokens=1, temperature=1.5, seed=0
    )
    counts = torch.bincount(torch.tensor([s.response_ids[0] for s in drawn]), minlength=len(tiny.VOCABULARY))
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5).softmax(-1) * 6000
    assert ((counts - expected).square() / expected).sum() < 58.3  # the 0.1 % quantile


def test_greedy_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature"):
        sample(temperature=0.0)


def test_text_for_the_server_has_neither_eos_nor_markup() -> None:
    tokenizer = tiny.tokenizer()
    prompt = tokenizer.convert_tokens_to_ids(["<bos>", "<user>", "w1", "<assistant>"])
    answer = tokenizer.convert_tokens_to_ids(["w2", "w3", "<eos>"])
    assert decode_response(tokenizer, prompt, Sampled(0, answer, [0.0] * 3, True), [2]) == "w2 w3"
    assert decode_response(tokenizer, prompt, Sampled(0, answer[:2], [0.0] * 2, False), [2]) == "w2 w3"
    assert decode_response(tokenizer, prompt, Sampled(0, answer[2:], [0.0], True), [2]) == ""
