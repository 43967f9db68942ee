"""Several responses in one row are read as each would be in a row of its own."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from policy_trainer.batching import collate
from policy_trainer.branches import (
    Answered,
    collate_branches,
    forward_passes,
    has_branches,
    pays,
    reads_once,
    rows_of_neighbours,
    sequence_logprobs,
    summed_logprobs,
)
from policy_trainer.logprobs import token_logprobs
from tests.policy_trainer import tiny

SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "max_position_embeddings": 1024,
}


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8))


def gpt2() -> PreTrainedModel:
    """Learned positions."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))


def eager() -> PreTrainedModel:
    """Attention as plain products of matrices, to which a mask is added."""
    model = qwen3()
    model.set_attn_implementation("eager")
    return model


def made(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


def some_rows(seed: int = 0) -> list[Answered]:
    rng = random.Random(seed)

    def words(least: int, most: int) -> list[int]:
        return [rng.randrange(3, 30) for _ in range(rng.randint(least, most))]

    return [Answered(words(15, 30), [words(1, 9) for _ in range(n)]) for n in (2, 3, 2)]


def alone(model: PreTrainedModel, rows: list[Answered], temperature: float) -> torch.Tensor:
    """Each response after its prompt, without padding, in a pass of its own."""
    sums = []
    for prompt, responses in rows:
        for response in responses:
            batch = collate([prompt], [response])
            read = token_logprobs(
                model, batch.input_ids, batch.attention_mask, batch.response_len, temperature
            )
            sums.append(read.logprobs.sum())
    return torch.stack(sums)


def gradient(model: PreTrainedModel, sums: torch.Tensor) -> torch.Tensor:
    """Of a sum in which every response has a weight of its own."""
    model.zero_grad()
    torch.autograd.backward((sums * torch.arange(1.0, len(sums) + 1)).sum())
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("build", [qwen3, gpt2, eager])
def test_packed_after_one_prompt_responses_have_the_values_and_gradients_of_rows_of_their_own(
    build: Callable[[], PreTrainedModel],
) -> None:
    model, rows = made(build), some_rows()
    assert all(reads_once(model, row) for row in rows)
    packed, unpacked = summed_logprobs(model, rows, 0.7), alone(model, rows, 0.7)
    torch.testing.assert_close(packed, unpacked, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient(model, packed), gradient(model, unpacked), rtol=1e-4, atol=1e-3)


def test_a_response_sees_its_prompt_and_itself_alone() -> None:
    batch = collate_branches([Answered([7, 8], ([9], [10, 11])), Answered([7], ([12], [13]))])
    assert batch.input_ids.tolist() == [[7, 8, 9, 10, 11], [7, 12, 13, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3], [0, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [[9, 0], [10, 11], [12, 0], [13, 0]]
    assert batch.read_at.tolist() == [[1, 0], [1, 3], [0, 0], [0, 0]]
    seen = (batch.mask(torch.float32) == 0).int()[:, 0]
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert seen[1, :3].tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]


@pytest.mark.parametrize(
    ("prompt", "responses", "width", "expected"),
    [
        (100, [20, 20], 1000, True),  # 140 + 140^2 / 6000 = 143.3 against 240 + 2 * 120^2 / 12000 = 242.4
        (100, [20], 1000, False),  # nothing to share
        (5, [500, 500], 16, False),  # 1005 + 1005^2 / 96 = 11526 against 1010 + 2 * 505^2 / 192 = 3667
        (8000, [200, 200], 4096, False),  # longer than a row may be
    ],
)
def test_the_prompt_is_read_once_where_that_is_less_work(
    prompt: int, responses: list[int], width: int, expected: bool
) -> None:
    assert pays(prompt, responses, width) is expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=512)),
        lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, window_size=8,
                attention_types=[[["global", "local"], 1]], initializer_range=0.3,
            )
        ),
        lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)),
        lambda: Qwen3ForCausalLM(
            Qwen3Config(
                **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            )
        ),
    ],
    ids=["window", "untold window", "no positions", "positions that depend on the length"],
)  # fmt: skip
def test_models_that_would_see_something_else_read_every_response_apart(
    build: Callable[[], PreTrainedModel],
) -> None:
    model, rows = made(build), some_rows()
    assert not has_branches(model)
    torch.testing.assert_close(
        summed_logprobs(model, rows, 1.0), alone(model, rows, 1.0), rtol=1e-5, atol=1e-4
    )


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    micro_batch_tokens=st.integers(1, 300),
    seed=st.integers(0, 3),
)
def test_whatever_is_read_together_sequences_have_their_own_log_probabilities(
    counts: list[int], micro_batch_tokens: int, seed: int
) -> None:
    model, rng = tiny.model(), random.Random(seed)
    prompts = [[rng.randrange(6, 30) for _ in range(rng.randint(2, 40))] for _ in counts]
    pairs = [
        (prompt, [rng.randrange(6, 30) for _ in range(rng.randint(1, 8))])
        for prompt, count in zip(prompts, counts, strict=True)
        for _ in range(count)
    ]
    rows = rows_of_neighbours(model, pairs, micro_batch_tokens)
    assert [(list(r.prompt_ids), list(y)) for r in rows for y in r.responses] == pairs
    passes = forward_passes(model, rows, micro_batch_tokens)
    assert sorted(i for indices in passes for i in indices) == list(range(len(rows)))
    found = sequence_logprobs(model, pairs, 0.7, micro_batch_tokens)
    expected = alone(model, [Answered(prompt, [response]) for prompt, response in pairs], 0.7)
    torch.testing.assert_close(torch.tensor(found), expected.detach(), rtol=1e-5, atol=2e-4)
