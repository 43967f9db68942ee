"""Any sequence classifier of transformers with one output is a reward model, whatever its architecture."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from reward_server.model import load_reward_model
from reward_server.scorers.base import Scored, ScoreTask
from reward_server.scorers.learned import LearnedScorer
from reward_server.training.train import run
from rlaif.chat import encode_conversation
from rlaif.types import Message, user_prompt
from tests.reward_server import tiny
from tests.reward_server.training.test_train import config, polite_rows, write

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 259,
    "pad_token_id": 2,
    "max_position_embeddings": 128,
    "num_labels": 1,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 16}
ARCHITECTURES = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": {"num_key_value_heads": 1},
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "gemma2": GROUPED,
    "gpt_neox": {},
    "bert": {},
    "roberta": {"max_position_embeddings": 140},
    "modernbert": {"cls_token_id": 0, "sep_token_id": 1, "bos_token_id": 0, "eos_token_id": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_classifier_of_any_architecture_is_served_and_trained(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES[name]})
    made = AutoModelForSequenceClassification.from_config(settings).eval()
    made.save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")

    reward_model = load_reward_model(str(tmp_path / "model"), device="cpu")
    scorer = LearnedScorer(name, reward_model)
    turns = [(*user_prompt("p" * k), Message("assistant", "answer " * k)) for k in (1, 7, 3)]
    prepared = [scorer.prepare(ScoreTask(turn, "left")) for turn in turns]
    outcomes = asyncio.run(scorer.score(prepared))
    for turn, outcome in zip(turns, outcomes, strict=True):
        ids = encode_conversation(reward_model.tokenizer, turn, max_length=128, truncation="left").ids
        with torch.no_grad():
            alone = made(input_ids=torch.tensor([ids])).logits.item()
        assert isinstance(outcome, Scored)
        assert outcome.raw == pytest.approx(alone, abs=1e-5)

    dataset = write(tmp_path / "pairs.jsonl", polite_rows(20))
    run(config(tmp_path / "model", dataset, tmp_path / "rm"))
    load_reward_model(str(tmp_path / "rm"), device="cpu")


LONGEST: dict[str, tuple[dict[str, Any], int]] = {
    "roberta": ({}, 64 - 3),  # its first token has the position after PAD's, which is 2
    "xlm-roberta": ({}, 61),
    "camembert": ({}, 61),
    "data2vec-text": ({}, 61),
    "roberta-prelayernorm": ({}, 61),
    "esm": ({}, 61),
    "ibert": ({}, 61),
    "mpnet": ({}, 64 - 2),  # whatever its PAD, positions begin at 2
    "longformer": ({"attention_window": [8, 8]}, 61),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 64}, 64),
    "mpt": ({"max_seq_len": 64, "max_position_embeddings": None}, 64),
    "gpt2": ({}, 64),
    "bert": ({}, 64),
}


@pytest.mark.parametrize("name", LONGEST)
def test_a_text_is_cut_to_what_the_positions_of_the_model_allow(name: str, tmp_path: Path) -> None:
    changes, longest = LONGEST[name]
    settings = AutoConfig.for_model(name, **{**SIZES, "max_position_embeddings": 64, **changes})
    made = AutoModelForSequenceClassification.from_config(settings).eval()
    made.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)

    reward_model = load_reward_model(str(tmp_path), device="cpu")
    assert reward_model.max_length == longest
    scorer = LearnedScorer(name, reward_model)
    turns = [(*user_prompt("p" * 300), Message("assistant", "r" * k)) for k in (1, 9)]
    prepared = [scorer.prepare(ScoreTask(turn, "left")) for turn in turns]
    assert [item.tokens for item in prepared] == [longest, longest]
    for item, outcome in zip(prepared, asyncio.run(scorer.score(prepared)), strict=True):
        with torch.no_grad():
            alone = made(input_ids=torch.tensor([item.sequences[0]])).logits.item()
        assert isinstance(outcome, Scored)
        assert outcome.raw == pytest.approx(alone, abs=1e-5)


def test_conversations_longer_than_a_roberta_reads_are_trained_on(tmp_path: Path) -> None:
    settings = AutoConfig.for_model("roberta", **{**SIZES, "max_position_embeddings": 67})
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path / "model")
    tiny.byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{**row, "prompt": row["prompt"] + "x" * 100} for row in polite_rows(20)]
    run(config(tmp_path / "model", write(tmp_path / "pairs.jsonl", rows), tmp_path / "rm", max_length=1024))
    assert load_reward_model(str(tmp_path / "rm"), device="cpu").max_length == 64


WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(20))]


def word_tokenizer(kind: str) -> PreTrainedTokenizerBase:
    """One token for each word, framed as BERT, DeBERTa or RoBERTa frame a text or two."""
    if kind == "deberta-v2":
        pieces = [(word if word.startswith("[") else f"\u2581{word}", 0.0) for word in WORDS]
        return DebertaV2Tokenizer(vocab=pieces, unk_id=0)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    if kind == "bert":
        return BertTokenizer(vocab=vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"bos": "[CLS]", "cls": "[CLS]", "eos": "[SEP]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "roberta"])
def test_an_encoder_without_a_template_reads_prompt_and_response_as_two_texts(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 60, "pad_token_id": 1, "initializer_range": 0.5}
    made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(name, **sizes)).eval()
    made.save_pretrained(tmp_path)
    word_tokenizer(name).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    scorer = LearnedScorer(name, load_reward_model(str(tmp_path), device="cpu"))
    asked = [("w1 w2", "w3"), ("w4", "w5 w6 w7 w8 w9"), ("w1 w2", "w9 w3")]
    prepared = [scorer.prepare(ScoreTask((*user_prompt(q), Message("assistant", a)))) for q, a in asked]
    outcomes = asyncio.run(scorer.score(prepared))
    for (question, answer), item, outcome in zip(asked, prepared, outcomes, strict=True):
        inputs = tokenizer(question, answer, return_tensors="pt")
        assert item.sequences[0] == tuple(inputs["input_ids"][0].tolist())
        assert 0 not in item.sequences[0]
        with torch.no_grad():
            expected = made(**inputs).logits.item()
        assert isinstance(outcome, Scored)
        assert outcome.raw == pytest.approx(expected, abs=1e-5)
