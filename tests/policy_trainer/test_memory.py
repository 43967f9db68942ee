"""What saves memory and must not change the result: adapters, recomputed layers, weights in bfloat16."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from policy_trainer import dpo, optim, ppo, sft
from policy_trainer.config import DPOConfig, PPOConfig, SFTConfig, TrainingConfig
from policy_trainer.logprobs import token_logprobs
from policy_trainer.models import checkpoint_layers, load_trained
from policy_trainer.reward_source import FunctionReward
from rlaif.errors import ConfigError
from tests.policy_trainer import tiny

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2}
IDS = torch.arange(6, 22).view(2, 8)


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tiny.without_times([json.loads(line) for line in lines])


def logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, IDS, torch.ones_like(IDS), 4, 1.0).logprobs


def dpo_config(folder: Path, **changes: Any) -> DPOConfig:
    ppo_config = tiny.ppo_config(folder)
    return DPOConfig(
        model_name_or_path=ppo_config.model_name_or_path,
        dataset=ppo_config.dataset,
        output_dir=folder / "run",
        reward_server="127.0.0.1:1",
        max_new_tokens=8,
        rollout_batch_size=6,
        max_steps=4,
        save_steps=1000,
        **changes,
    )


def sft_config(folder: Path, **changes: Any) -> SFTConfig:
    tiny.save_policy(folder / "policy")
    rows = [{"prompt": f"w{i}", "completion": f"w{i + 1} w{i % 5}"} for i in range(20)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SFTConfig(
        model_name_or_path=str(folder / "policy"),
        dataset=folder / "data.jsonl",
        output_dir=folder / "run",
        per_device_train_batch_size=5,
        save_steps=1000,
        **changes,
    )


def train(config: TrainingConfig) -> None:
    source = FunctionReward(tiny.share_of_w0)
    if isinstance(config, PPOConfig):
        ppo.train(config, source)
    elif isinstance(config, DPOConfig):
        dpo.train(config, source)
    else:
        assert isinstance(config, SFTConfig)
        sft.run(config)


CONFIGS: dict[str, Callable[..., TrainingConfig]] = {
    "ppo": tiny.ppo_config,
    "dpo": dpo_config,
    "sft": sft_config,
}


# ---- adapters ----


def test_the_reference_is_the_policy_without_its_adapters_and_no_second_model(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, **LORA, value_head="shared")
    trainer = ppo.Trainer.start(config, FunctionReward(tiny.share_of_w0))
    own = {p.data_ptr() for p in trainer.policy.parameters() if not p.requires_grad}
    assert {p.data_ptr() for p in trainer.reference.parameters()} == own
    before = logprobs(trainer.reference)
    assert logprobs(trainer.policy).equal(before)  # adapters begin at 0
    for name, p in trainer.policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    assert not logprobs(trainer.policy).equal(before)
    assert logprobs(trainer.reference).equal(before)


def test_adapters_and_the_value_head_alone_are_trained_and_optimised(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, **LORA, value_head="shared")
    trainer = ppo.Trainer.start(config, FunctionReward(tiny.share_of_w0))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"critic.weight", "critic.bias"}
    optimised = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(optimised) == len(trained) - 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_run_with_adapters_learns_from_the_base_and_saves_what_anyone_can_load(
    tmp_path: Path, kind: str
) -> None:
    config = CONFIGS[kind](tmp_path, **LORA)
    train(config)
    rows = metrics(config.output_dir)
    if kind != "sft":
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
        assert abs(rows[-1]["objective/kl"]) > 1e-3
    (checkpoint,) = config.output_dir.glob("checkpoint-*")
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    merged = AutoModelForCausalLM.from_pretrained(config.output_dir)
    adapted = AutoModelForCausalLM.from_pretrained(checkpoint)  # by transformers, which asks peft
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in base.named_parameters()}
    assert_close(logprobs(merged), logprobs(adapted), rtol=1e-4, atol=1e-4)
    assert (logprobs(merged) - logprobs(base)).abs().max() > 1e-2


def test_adapters_are_drawn_from_the_runs_seed(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, **LORA)

    def drawn(seed: int) -> dict[str, Tensor]:
        model = load_trained(dataclasses.replace(config, seed=seed), None).model
        return {name: p for name, p in model.named_parameters() if "lora_A" in name}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first
    assert all(first[name].equal(again[name]) and not first[name].equal(other[name]) for name in first)


def test_flags_of_adapters_without_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--lora_r needs --use_peft"):
        tiny.ppo_config(tmp_path, lora_r=4)


def test_a_moving_average_of_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="second model"):
        dpo_config(tmp_path, use_peft=True, reference="ema")


# ---- recomputed layers ----


@pytest.mark.parametrize("changes", [{}, {"value_head": "shared"}, LORA], ids=["separate", "shared", "lora"])
def test_recomputing_layers_changes_no_bit_of_a_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = tiny.ppo_config(tmp_path, **changes)
    again = dataclasses.replace(config, gradient_checkpointing=True, output_dir=tmp_path / "again")
    train(config)
    train(again)
    assert metrics(again.output_dir) == metrics(config.output_dir)
    saved = [(c.output_dir / "model.safetensors").read_bytes() for c in (config, again)]
    assert saved[0] == saved[1]


def test_recomputed_layers_keep_their_inputs_alone_for_the_backward_pass() -> None:
    plain = tiny.model()
    recomputing = copy.deepcopy(plain)
    checkpoint_layers(recomputing)

    def kept(model: nn.Module) -> int:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=IDS).logits.sum()
        loss.backward()
        return sum(sizes)

    assert kept(recomputing) < kept(plain) / 2
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert one.grad.equal(other.grad)


def test_an_architecture_whose_layers_are_unknown_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gradient_checkpointing"):
        checkpoint_layers(nn.Linear(2, 2))


# ---- bfloat16 ----


def test_bfloat16_weights_follow_their_float32_copies(tmp_path: Path) -> None:
    """Steps of 1e-4 are rounded away beside a weight of 1, where neighbouring bfloat16 numbers are 2^-7 apart."""
    exact = nn.Parameter(torch.ones(3))
    rounded, stuck = (nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    config = tiny.ppo_config(tmp_path)
    ours = [optim.adamw([p], 1e-4, config) for p in (exact, rounded)]
    naive = torch.optim.AdamW([stuck], lr=1e-4, eps=config.adam_epsilon, weight_decay=0.0)
    for _ in range(100):
        for p in (exact, rounded, stuck):
            p.grad = torch.ones_like(p)
        for optimizer in (*ours, naive):
            optimizer.step()
    assert stuck.equal(torch.ones_like(stuck))
    assert exact.max() < 0.995
    assert rounded.equal(exact.to(torch.bfloat16))


def test_a_run_in_bfloat16_learns(tmp_path: Path) -> None:
    config = tiny.ppo_config(
        tmp_path, dtype="bfloat16", max_steps=12, rollout_batch_size=32, kl_coef=0.01, learning_rate=3e-3
    )
    train(config)
    scores = [row["objective/scores"] for row in metrics(config.output_dir)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.1
    saved = AutoModelForCausalLM.from_pretrained(config.output_dir, dtype="auto")
    assert saved.dtype == torch.bfloat16
