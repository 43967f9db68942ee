"""A policy of a few thousand parameters with a word-level tokenizer and a chat template, built in a moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policy_trainer.config import OnlineConfig, PPOConfig
from rlaif.types import Conversation

Config = TypeVar("Config", bound=OnlineConfig)

WORDS = [f"w{i}" for i in range(24)]
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>", *WORDS]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def model(seed: int = 0, *, spread: float = 0.3) -> LlamaForCausalLM:
    """A Llama of 2 layers and width 16. `spread` is the standard deviation of its weights: peaked distributions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def save_policy(folder: Path, seed: int = 0, *, spread: float = 0.3) -> Path:
    model(seed, spread=spread).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_prompts(path: Path, count: int = 20) -> Path:
    """Prompts of one to six words."""
    lines = [{"prompt": " ".join(WORDS[(i * 7 + j) % 24] for j in range(1 + i % 6))} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def save_text(path: Path, count: int = 20) -> Path:
    """Texts of two to seven words."""
    lines = [{"text": " ".join(WORDS[(i * 5 + j) % 24] for j in range(2 + i % 6))} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def share_of_w0(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
    """The share of words that are `w0`; an empty response earns 0."""
    return [r.split().count("w0") / max(1, len(r.split())) for r in responses]


def online_config(kind: type[Config], folder: Path, **settings: Any) -> Config:
    """A run in `folder`, over a policy and prompts that are made there if they are not."""
    policy, prompts = folder / "policy", folder / "prompts.jsonl"
    if not policy.exists():
        save_policy(policy)
    if not prompts.exists():
        save_prompts(prompts)
    common: dict[str, Any] = {
        "model_name_or_path": str(policy),
        "dataset": prompts,
        "output_dir": folder / "run",
        "reward_server": "127.0.0.1:1",
        "max_new_tokens": 8,
        "rollout_batch_size": 8,
        "save_steps": 1000,
    }
    return kind(**{**common, **settings})


def ppo_config(folder: Path, **changes: Any) -> PPOConfig:
    """A PPO run in `folder`."""
    settings: dict[str, Any] = {
        "max_steps": 3,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
    }
    return online_config(PPOConfig, folder, **{**settings, **changes})


def round_config(kind: type[Config], folder: Path, **changes: Any) -> Config:
    """A run in `folder` that learns in rounds: DPO or best of n."""
    settings: dict[str, Any] = {
        "num_generations": 4,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 2e-3,
    }
    return online_config(kind, folder, **{**settings, **changes})


def without_times(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without what a clock decided."""
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
