"""Decisions by vLLM's own endpoint, beside a transformers forward over the prompt that its documentation shows."""

from __future__ import annotations

import asyncio
import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from labeler.llm import LabelReading, open_llm
from rlaif.models import ModelRef
from rlaif.types import user_prompt

from .conftest import EXAMPLES, needs_vllm, serving

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]

STATE = "Answer 1: bake it longer. Answer 2: bread is a food."
PROMPT = f"{STATE}\n\nQuestion: Better answer:\nA: 1\nB: 2\nAnswer with the letter of one option only."


def save_qwen3(folder: Path) -> None:
    """A Qwen3 of random weights: vLLM decides with few architectures, and Llama is none of them."""
    spec = spec_from_file_location("make_tiny_llama", EXAMPLES / "make_tiny_llama.py")
    assert spec is not None and spec.loader is not None
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    # vLLM wants each of its labels to be one token: A to Z, 0 to 9, yes, no.
    tokenizer = example.make_tokenizer(iter([PROMPT, "yes", "no"] * 20), 400)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_a_decision_is_the_softmax_over_the_options(tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    save_qwen3(folder)

    async def decide(url: str) -> LabelReading:
        llm = open_llm(ModelRef.parse(f"decisions:tiny-llama@{url}/v1"))
        try:
            return await llm.label_logprobs(user_prompt(STATE), "Better answer:", ("1", "2"))
        finally:
            await llm.close()

    with serving(folder, tmp_path / "vllm.log") as url:
        reading = asyncio.run(decide(url))

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    expected = [float(logprobs[tokenizer.convert_tokens_to_ids(letter)]) for letter in "AB"]
    assert reading.distribution.logprobs == pytest.approx(expected, abs=1e-3)
    assert reading.distribution.mass == pytest.approx(sum(map(math.exp, expected)), rel=1e-3)
    assert (reading.prompt_tokens, reading.completion_tokens) == (len(ids), 1)
