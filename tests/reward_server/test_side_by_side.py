"""What others put beside a sequence, or before it, leaves its score as it is, whatever the architecture."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from reward_server.company import key_of
from reward_server.forward import BatchedForward, scores

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_labels": 1,
}
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 1, "num_labels": 1}
BART = {
    "vocab_size": 120,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.3,
    "num_labels": 1,
}
DYNAMIC = {
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
LONG = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    },
}


def made(name: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(name, **settings)
    )
    model.config.pad_token_id = 1
    return model.eval()  # type: ignore[no-untyped-call]


def sequences(*lengths: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, 120) for _ in range(n)] for n in lengths]


def alone(model: PreTrainedModel, ids: list[int]) -> float:
    """A model that has seen nothing yet: `model` itself must not have been used."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        found: float = fresh(input_ids=torch.tensor([ids])).logits.item()
    return found


@pytest.mark.parametrize("stretched", [("llama", DYNAMIC), ("phi3", LONG)], ids=lambda kind: str(kind[0]))
def test_rotary_embeddings_that_stretch_are_those_of_the_sequence_itself(
    stretched: tuple[str, dict[str, Any]],
) -> None:
    name, settings = stretched
    model = made(name, **{**SIZES, **settings})
    batch = sequences(60, 80, 70, 400, 20, 80, 64, 65)
    expected = [alone(model, ids) for ids in batch]
    forward = BatchedForward(copy.deepcopy(model))
    assert forward.scores(batch)[0].tolist() == pytest.approx(expected, abs=1e-4)
    for ids, score in zip(batch, expected, strict=True):  # after a long one
        assert forward.scores([ids])[0].item() == pytest.approx(score, abs=1e-4)


MIXING: dict[str, dict[str, Any]] = {
    "xlnet": {"vocab_size": 120, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "num_labels": 1},
    "fnet": SIZES,
    "convbert": {**SIZES, "embedding_size": 32},
    "nystromformer": SIZES,
}


@pytest.mark.parametrize("name", MIXING)
def test_where_padding_changes_scores_nothing_is_padded(name: str) -> None:
    model = made(name, **MIXING[name])
    batch = sequences(5, 41, 12, 90)
    expected = [alone(model, ids) for ids in batch]
    with torch.no_grad():
        padded = scores(model, batch).tolist()
    assert padded != pytest.approx(expected, abs=1e-3), "or this test tells nothing"
    assert BatchedForward(model).scores(batch)[0].tolist() == pytest.approx(expected, abs=1e-4)
    trained = scores(model, batch, key_of(model))
    assert trained.tolist() == pytest.approx(expected, abs=1e-4) and trained.requires_grad


def test_texts_with_other_numbers_of_eos_are_scored_in_one_batch() -> None:
    model = made("bart", **BART)
    batch = [[0, 5, 6, 7, 2], [0, 9, 2, 7, 8, 2], [0, 8, 2], [0, 5, 2, 6, 2, 7, 2]]
    expected = [alone(model, ids) for ids in batch]
    assert BatchedForward(model).scores(batch)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert scores(model, batch, key_of(model)).tolist() == pytest.approx(expected, abs=1e-5)


SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {**GPT2, "n_positions": 64}),
    "gpt2 of a few tokens": ("gpt2", {**GPT2, "n_positions": 8}),
    "opt": ("opt", {**SIZES, "max_position_embeddings": 66, "word_embed_proj_dim": 32, "ffn_dim": 64}),
    "no cache in the output": ("ctrl", {**GPT2, "dff": 64, "n_positions": 512}),
    "a cache of its own": ("minimax", {**SIZES, "block_size": 32, "num_local_experts": 2}),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_model_that_cannot_do_what_is_tried_is_computed_without(name: str) -> None:
    kind, settings = SHORT[name]
    model = made(kind, **settings)
    batch = sequences(1, 8, 5, 7) if "few" in name else sequences(3, 61, 12, 33)
    expected = [alone(model, ids) for ids in batch]
    assert BatchedForward(model).scores(batch)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_sequences_of_ordinary_models_share_their_passes() -> None:
    for name in ("llama", "qwen2", "mistral", "gemma2", "bert", "roberta", "deberta-v2", "modernbert"):
        assert key_of(made(name, **SIZES)) is None, name
    assert key_of(made("gpt2", **GPT2)) is None
    forward = BatchedForward(made("phi3", **{**SIZES, **LONG}))
    (group,) = forward.plan(sequences(60, 61, 62, 64))
    assert group.passes == ((0, 1, 2, 3),), "LongRoPE is one thing for all short texts"
