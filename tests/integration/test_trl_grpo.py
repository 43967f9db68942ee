"""TRL's GRPO trainer takes a step with rewards of a served reward model; foreign requests reach the same server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from policy_trainer.adapters import trl_reward_function
from tests.reward_server.tiny import byte_tokenizer, save_classifier, save_language_model

pytestmark = pytest.mark.slow


@pytest.fixture
def reward_model(tmp_path: Path) -> Path:
    return save_classifier(tmp_path / "rm")


@pytest.fixture
def address(reward_model: Path, tmp_path: Path) -> Iterator[str]:
    """`rlaif serve` in a process of its own."""
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "rlaif.cli", "serve", "--model", str(reward_model), "--device", "cpu"]
    server = subprocess.Popen([*command, "--port", "0", "--ready_file", str(ready)])
    until = time.monotonic() + 60
    while not ready.exists():
        assert server.poll() is None and time.monotonic() < until, "the server did not start"
        time.sleep(0.05)
    yield ready.read_text()
    os.kill(server.pid, signal.SIGTERM)
    assert server.wait(30) == 0


def test_grpo_takes_a_step_on_served_rewards(address: str, reward_model: Path, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    seen: list[tuple[str, str]] = []

    def witness(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(prompts)

    policy = save_language_model(tmp_path / "policy")
    arguments = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=1,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        seed=0,
    )
    trainer = GRPOTrainer(
        model=str(policy),
        reward_funcs=[trl_reward_function(address, name="served"), witness],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["Say something.", "Sing."] * 2}),
        processing_class=byte_tokenizer(),
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()

    model = AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    tokenizer = byte_tokenizer()
    alone = []
    for prompt, completion in seen:
        # The template `plain`: BOS, the texts, EOS.
        ids = [0, *tokenizer(prompt + completion, add_special_tokens=False)["input_ids"], 1]
        with torch.inference_mode():
            alone.append(model(input_ids=torch.tensor([ids])).logits.item())
    log = next(entry for entry in trainer.state.log_history if "rewards/served/mean" in entry)
    assert len(seen) == 4
    assert log["rewards/served/mean"] == pytest.approx(sum(alone) / 4, abs=1e-5)
    assert log["reward_std"] > 0
    moved = [not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)]
    assert any(moved)
