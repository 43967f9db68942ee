"""TRL's own trainers take one step on a dataset that `rlaif label pairs` wrote, read unchanged.

    python examples/trl_one_step.py --dataset LABELED_DIR --model_name_or_path MODEL

The model needs a chat template, since the dataset is conversational. Each trainer prints its loss.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

ONE_STEP: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "max_length": 512,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def reward_step(dataset: Dataset, model: str, output_dir: str) -> float:
    """Loss of one step of `RewardTrainer`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    backbone = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    arguments = RewardConfig(output_dir=output_dir, **ONE_STEP)
    trainer = RewardTrainer(model=backbone, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    return float(trainer.train().training_loss)


def dpo_step(dataset: Dataset, model: str, output_dir: str) -> float:
    """Loss of one step of `DPOTrainer`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    arguments = DPOConfig(output_dir=output_dir, **ONE_STEP)
    trainer = DPOTrainer(model=policy, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    return float(trainer.train().training_loss)


def kto_step(dataset: Dataset, model: str, output_dir: str) -> float:
    """Loss of one step of `KTOTrainer`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model)
    arguments = KTOConfig(output_dir=output_dir, **ONE_STEP)
    trainer = KTOTrainer(model=policy, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    return float(trainer.train().training_loss)


def main() -> None:
    """Load the dataset, take one step with each trainer, print the losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", type=Path, required=True, help="the output_dir of `rlaif label pairs`")
    parser.add_argument("--model_name_or_path", required=True)
    arguments = parser.parse_args()
    dataset = load_dataset(str(arguments.dataset), split="train")
    print(f"{len(dataset)} rows; columns: {', '.join(dataset.column_names)}")
    with tempfile.TemporaryDirectory() as folder:
        print(f"RewardTrainer: loss {reward_step(dataset, arguments.model_name_or_path, folder):.4f}")
        print(f"DPOTrainer: loss {dpo_step(dataset, arguments.model_name_or_path, folder):.4f}")
        print(f"KTOTrainer: loss {kto_step(dataset, arguments.model_name_or_path, folder):.4f}")


if __name__ == "__main__":
    main()
