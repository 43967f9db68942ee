"""Small runs of the online loops, for one process or for several: torchrun ... parallel_runs.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from policy_trainer import best_of_n, dpo, ppo, sft
from policy_trainer.config import BestOfNConfig, DPOConfig, SFTConfig
from policy_trainer.reward_source import FunctionReward
from tests.policy_trainer import tiny

GROUPED: dict[str, Any] = {"rollout_batch_size": 4, "num_generations": 3, "micro_batch_tokens": 48}
PPO: dict[str, dict[str, Any]] = {
    "ppo": {"value_head": "separate", "micro_batch_tokens": 48, "whiten_rewards": True},
    "ppo-lora": {"value_head": "shared", "use_peft": True, "micro_batch_tokens": 48},
    "rloo": {"advantage_estimator": "rloo", **GROUPED},
    "grpo": {"advantage_estimator": "grpo", **GROUPED},
    # One micro-batch a step: the second process has nothing to learn from.
    "reinforce": {"advantage_estimator": "reinforce", "num_mini_batches": 1},
}
DPO: dict[str, dict[str, Any]] = {"dpo": {}, "kto": {"loss_type": "kto", "reference": "ema"}}
BEST_OF_N: dict[str, dict[str, Any]] = {"rest": {"keep_best": None, "reward_thresholds": (0.0, 0.2)}}
ROUNDS: dict[str, Any] = {
    "reward_server": "127.0.0.1:1",
    "max_new_tokens": 8,
    "rollout_batch_size": 6,
    "num_generations": 3,
    "generation_batch_size": 6,
    "per_device_train_batch_size": 4,
    "micro_batch_tokens": 48,
    "learning_rate": 1e-3,
    "max_steps": 2,
}
NAMES = (*PPO, *DPO, *BEST_OF_N, "sft")


def run(name: str, folder: Path) -> None:
    """Train into `folder / name`."""
    source = FunctionReward(tiny.share_of_w0)
    of_rounds: dict[str, Any] = {
        "model_name_or_path": str(folder / "policy"),
        "dataset": folder / "prompts.jsonl",
        "output_dir": folder / name,
        **ROUNDS,
    }
    if name in PPO:
        ppo.train(
            tiny.ppo_config(
                folder, output_dir=folder / name, max_steps=2, generation_batch_size=3, **PPO[name]
            ),
            source,
        )
    elif name in DPO:
        dpo.train(DPOConfig(**of_rounds, **DPO[name]), source)
    elif name in BEST_OF_N:
        best_of_n.train(BestOfNConfig(**of_rounds, **BEST_OF_N[name]), source)
    else:
        sft.run(
            SFTConfig(
                model_name_or_path=str(folder / "policy"),
                dataset=folder / "conversations.jsonl",
                output_dir=folder / name,
                per_device_train_batch_size=8,
                micro_batch_tokens=32,
                learning_rate=1e-2,
                max_steps=2,
            )
        )


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for each in NAMES:
        run(each, Path(sys.argv[1]))
    dist.destroy_process_group()
