"""A real transformers model of a few thousand random weights, with a word-level tokenizer and a chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "|",
    ":",
    *(str(i) for i in range(1, 11)),
    *(f"w{i}" for i in range(40)),
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}{% else %} {{ m.content }} |{% endif %}"
        "{% endfor %}"
    )
    return tokenizer


def tiny_model(*, context: int = 128, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        initializer_range=0.4,  # far from uniform, so that a wrong mask or position shows
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, *, context: int = 128) -> Path:
    tiny_model(context=context).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
