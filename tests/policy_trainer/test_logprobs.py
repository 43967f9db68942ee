"""Batches and log-probabilities against the model's own full forward, one unpadded sequence at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from policy_trainer.batching import collate, length_buckets
from policy_trainer.logprobs import has_plain_head, token_logprobs
from policy_trainer.rollout import HFRollout
from tests.policy_trainer import tiny

PROMPTS = [[1, 4, 7, 5], [1, 4, 8, 9, 10, 11, 5], [1, 5]]
RESPONSES = [[8, 9, 2], [12], [13, 14, 15, 16, 2]]


def alone(model: torch.nn.Module, prompt: list[int], response: list[int], temperature: float) -> torch.Tensor:
    """The definition: log softmax of the logits before each response token."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0].float() / temperature
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return rows[torch.arange(len(response)), torch.tensor(response)]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("chunk", [2, 4096], ids=["many chunks", "one chunk"])
def test_equal_to_each_sequence_alone(temperature: float, chunk: int) -> None:
    model = tiny.model()
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        found = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.response_len, temperature, chunk=chunk
        ).logprobs
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            torch.testing.assert_close(
                found[i, : len(response)], alone(model, prompt, response, temperature), atol=1e-5, rtol=0
            )


def test_entropy_is_that_of_the_sampling_distribution() -> None:
    model = tiny.model()
    batch = collate([PROMPTS[0]], [RESPONSES[0]])
    with torch.no_grad():
        entropy = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.response_len, 0.5, with_entropy=True
        ).entropy
        logits = model(batch.input_ids).logits[0, len(PROMPTS[0]) - 1 : -1] / 0.5
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert entropy is not None
    torch.testing.assert_close(entropy[0], expected, atol=1e-5, rtol=0)


def gradients(chunk: int) -> list[torch.Tensor]:
    model = tiny.model()
    batch = collate(PROMPTS, RESPONSES)
    read = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_len, 1.0, chunk=chunk)
    read.logprobs[batch.response_mask].sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_recomputing_logits_chunk_by_chunk_gives_the_same_gradient() -> None:
    whole, chunked = gradients(4096), gradients(2)
    assert len(whole) == len(chunked) > 0
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


_WIDTH = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_CAPPED = {**_WIDTH, "final_logit_softcapping": 2.0}
_GEMMA4 = {**_CAPPED, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [
        ("llama", _WIDTH, True),
        ("opt", {"vocab_size": 30, "hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2}, True),
        ("gemma2", _CAPPED, False),
        ("gemma4", {"text_config": {**_GEMMA4, "vocab_size_per_layer_input": 30}}, False),
        ("recurrent_gemma", {**_WIDTH, "lru_width": 16, "logits_soft_cap": 2.0}, False),
        ("granite", {**_WIDTH, "logits_scaling": 4.0}, False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_architecture_that_changes_its_logits_is_read_through_its_own_forward(
    kind: str, settings: dict[str, object], plain: bool
) -> None:
    config = AutoConfig.for_model(kind, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    assert has_plain_head(model) is plain
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        found = token_logprobs(
            model, batch.input_ids, batch.attention_mask, batch.response_len, 0.7, with_entropy=True
        )
        assert found.entropy is not None
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            expected = alone(model, prompt, response, 0.7)
            torch.testing.assert_close(found.logprobs[i, : len(response)], expected, atol=1e-5, rtol=0)
            logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].float()
            entropy = torch.distributions.Categorical(logits=logits / 0.7).entropy()
            torch.testing.assert_close(found.entropy[i, : len(response)], entropy, atol=1e-5, rtol=0)


def test_collate_pads_prompts_left_and_responses_right() -> None:
    batch = collate([[1, 2], [3]], [[4], [5, 6]])
    assert batch.input_ids.tolist() == [[1, 2, 4, 0], [0, 3, 5, 6]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]


def test_an_empty_response_is_refused() -> None:
    with pytest.raises(ValueError, match="no token"):
        collate([[1]], [[]])


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 120)),
)
def test_buckets_hold_every_sequence_once_and_respect_their_limits(
    lengths: list[int], max_rows: int, max_tokens: int | None
) -> None:
    batches = length_buckets(lengths, max_rows=max_rows, max_tokens=max_tokens)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= max_rows
        padded = len(batch) * max(lengths[i] for i in batch)
        assert max_tokens is None or padded <= max_tokens or len(batch) == 1


def test_learned_positions_start_at_the_first_real_token() -> None:
    """Rotary models cannot tell a shifted prompt; GPT-2 can, so left padding shows here if positions count it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    batch = collate(PROMPTS, RESPONSES)
    with torch.no_grad():
        found = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_len, 1.0).logprobs
        for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            expected = alone(model, prompt, response, 1.0)
            torch.testing.assert_close(found[i, : len(response)], expected, atol=1e-5, rtol=0)
    engine = HFRollout(model, [2])
    for s in engine.generate(PROMPTS, max_new_tokens=6, temperature=1.0, seed=0):
        with torch.no_grad():
            expected = alone(model, PROMPTS[s.prompt_index], s.response_ids, 1.0)
        torch.testing.assert_close(torch.tensor(s.logprobs), expected, atol=1e-5, rtol=0)
