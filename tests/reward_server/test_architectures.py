"""Any sequence classifier of transformers with one output is a reward model, whatever its architecture."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

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
