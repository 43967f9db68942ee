"""A Llama of a few thousand random weights with a byte tokenizer: an ordinary checkpoint for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then BOS, EOS and PAD."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def config(**changes: object) -> LlamaConfig:
    """A Llama of two layers and width 32 with room for 128 tokens."""
    return LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
            **changes,
        }
    )


def save_language_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A causal LM checkpoint: a backbone without a scalar head."""
    torch.manual_seed(seed)
    LlamaForCausalLM(config(**changes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_classifier(folder: Path, num_labels: int = 1, seed: int = 0, **changes: object) -> Path:
    """A sequence classifier as others publish them: no `reward_model.json`, and no chat template."""
    torch.manual_seed(seed)
    model = LlamaForSequenceClassification(config(num_labels=num_labels, **changes))
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
