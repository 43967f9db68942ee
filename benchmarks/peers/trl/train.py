"""TRL's trainers as their documentation shows them: train.py METHOD FOLDER --steps N; prints one line of JSON.

`online_dpo` and `dpo` in the environment `trl`, `ppo` in `trl_ppo`. Everything that trains is in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import trainer_load as load
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from transformers.modeling_outputs import BaseModelOutput

marks: list[list[float]] = []
"""Wall-clock and processor seconds at which each step's rewards were asked for, or a DPO step ended."""
ended: list[float] = []
"""Share of each step's responses that ended with an EOS."""


def mark() -> None:
    marks.append([time.perf_counter(), time.process_time()])


class Marks(TrainerCallback):
    """Marks the beginning of training and the end of every step."""

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Training begins with its first step."""
        if not marks:
            mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step has been made."""
        mark()


class MeanWordValue(torch.nn.Module):
    """`load.rewards` as the reward model that PPOTrainer wants: a backbone and a scalar head."""

    base_model_prefix = "backbone"

    def __init__(self) -> None:
        super().__init__()
        values = [load.word_value(f"w{i}") for i in range(load.VOCABULARY - len(load.SPECIAL))]
        self.backbone = _RunningMean(torch.tensor([0.0] * len(load.SPECIAL) + values))
        self.score = torch.nn.Identity()


class _RunningMean(torch.nn.Module):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutput:
        mark()
        is_word = input_ids >= len(load.SPECIAL)
        sums = (self.values[input_ids] * is_word).cumsum(1)
        means = sums / is_word.cumsum(1).clamp(min=1)
        return BaseModelOutput(hidden_states=(means.unsqueeze(-1),))


def ppo(folder: Path, steps: int, batch: int, micro: int, seed: int, output: Path) -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = [row["prompt"] + " " for row in load.read(folder / "prompts.jsonl")]
    dataset = Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in prompts]})
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(output), seed=seed, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", learning_rate=3e-6, per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro, total_episodes=batch * steps, num_sample_generations=0,
            response_length=load.MAX_RESPONSE, stop_token="eos", temperature=1.0, num_ppo_epochs=4,
            num_mini_batches=1,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=MeanWordValue(),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
        train_dataset=dataset,
        eval_dataset=dataset,
    )  # fmt: skip
    log = trainer.log

    def keep(metrics: dict[str, float], *args: Any) -> None:
        ended.append(metrics["val/num_eos_tokens"] / batch)
        log(metrics, *args)

    trainer.log = keep
    trainer.train()


def online_dpo(folder: Path, steps: int, batch: int, micro: int, seed: int, output: Path) -> None:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        mark()
        return load.rewards(prompts, completions)

    trainer = OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=reward,
        args=OnlineDPOConfig(
            output_dir=str(output), seed=seed, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", learning_rate=1e-6, per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro, max_steps=steps, max_new_tokens=load.MAX_RESPONSE,
            temperature=1.0,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"] + " "} for row in load.read(folder / "prompts.jsonl")]
        ),
    )  # fmt: skip
    trainer.train()
    ended.extend(trainer.stats["val/contain_eos_token"])


def dpo(folder: Path, steps: int, batch: int, micro: int, seed: int, output: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=DPOConfig(
            output_dir=str(output), seed=seed, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", learning_rate=1e-6, per_device_train_batch_size=micro,
            gradient_accumulation_steps=batch // micro, max_steps=steps, precompute_ref_log_probs=True,
        ),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(
            [{**row, "prompt": row["prompt"] + " "} for row in load.read(folder / "pairs.jsonl")]
        ),
        callbacks=[Marks()],
    ).train()  # fmt: skip


METHODS = {"ppo": ppo, "online_dpo": online_dpo, "dpo": dpo}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    for number in ("steps", "batch", "micro", "seed"):
        parser.add_argument(f"--{number}", type=int, required=True)
    args = parser.parse_args()
    METHODS[args.method](args.folder, args.steps, args.batch, args.micro, args.seed, args.output)
    print(json.dumps({"marks": marks, "ended": ended}))
