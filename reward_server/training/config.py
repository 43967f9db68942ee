"""The flags of `rlaif train rm`. Imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from rlaif.errors import ConfigError
from rlaif.lora import LoraFlags
from rlaif.trackers import TrackerName

LossType = Literal["soft_cross_entropy", "bradley_terry", "margin", "regression"]


@dataclass(frozen=True)
class RewardModelConfig(LoraFlags):
    """Train a reward model on soft preferences: a backbone with one scalar output."""

    model_name_or_path: str
    """Backbone: any sequence classifier with one output, or a causal or masked LM that gets a scalar head."""
    dataset: Path
    """Preference dataset: a folder written by `rlaif label pairs`, or a Parquet or JSONL file of pairs. For
    --loss_type regression: a folder written by `rlaif label scores`, or a file of responses with scores."""
    output_dir: Path
    """Where the reward model, its metrics and its checkpoint go."""
    eval_dataset: Path | None = None
    """Held-out data. Without it, `--eval_fraction` of the prompts of `--dataset` are held out."""
    eval_fraction: float = 0.1
    """Share of prompts held out, chosen by a hash of prompt and --split_seed; all pairs of a prompt stay together."""
    split_seed: int = 0
    """Seed of the held-out split; apart from --seed, so that runs with other seeds are measured on the same pairs."""
    chat_template: str | None = None
    """Chat template: `plain`, `transcript` or a Jinja file. By default the tokenizer's own."""
    max_length: int = 1024
    """Longest conversation in tokens; longer ones lose the oldest tokens of their prompt."""
    loss_type: LossType = "soft_cross_entropy"
    """What is learnt: soft_cross_entropy label probabilities; bradley_terry which response is preferred; margin that
    it is, by the row's `margin` (Llama 2); regression the scores of single responses, by squared error."""
    center_rewards_coefficient: float | None = None
    """Weight of the squared sum of a pair's scores in the loss, which draws them to mean zero; TRL recommends 0.01."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW. LoRA wants about ten times as much."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_ratio: float = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    num_train_epochs: int = 1
    """Passes over the training data."""
    per_device_train_batch_size: int = 32
    """Pairs (or scored responses) in one optimiser step; all those of a prompt are in one step."""
    micro_batch_tokens: int = 4096
    """Padded tokens in one forward pass. A matter of memory and speed: the step is the same whatever it is."""
    freeze_layers: int = 0
    """Keep the embeddings and the first n layers as they were pretrained (0 trains everything)."""
    disable_dropout: bool = True
    """Train without dropout, so that both responses of a pair are read by the same network."""
    lora_dropout: float = 0.0
    """Dropout before the adapters; needs --no_disable_dropout."""
    num_ensemble: int = 1
    """Reward models to train, with seeds --seed, --seed + 1, ...: an ensemble that is served as one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights while training."""
    golden_items: int = 16
    """Short training conversations kept in the checkpoint with their scores, and scored again whenever it is loaded."""
    logging_steps: int = 10
    """Write metrics every n steps."""
    save_steps: int = 100
    """Write a checkpoint to resume from every n steps, and after each epoch."""
    report_to: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, or none."""
    seed: int = 0
    """Seed of the head, the order of prompts and dropout."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"logging_steps", "save_steps", "micro_batch_tokens", "report_to"}
    )

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        if self.eval_dataset is None and not 0.0 < self.eval_fraction < 1.0:
            raise ConfigError(f"--eval_fraction must be between 0 and 1, not {self.eval_fraction}")
        for name, least in (
            ("max_length", 2),
            ("num_train_epochs", 1),
            ("per_device_train_batch_size", 1),
            ("micro_batch_tokens", 1),
            ("num_ensemble", 1),
            ("logging_steps", 1),
            ("save_steps", 1),
            ("golden_items", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, not {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ConfigError(f"--learning_rate must be positive, not {self.learning_rate}")
        if not 0.0 <= self.warmup_ratio <= 1.0:
            raise ConfigError(f"--warmup_ratio must be between 0 and 1, not {self.warmup_ratio}")
        self._check_loss()
        self._check_adapters()

    def _check_loss(self) -> None:
        coefficient = self.center_rewards_coefficient
        if coefficient is not None and coefficient <= 0:
            raise ConfigError(f"--center_rewards_coefficient must be positive, not {coefficient}")
        if coefficient is not None and self.loss_type == "regression":
            raise ConfigError(
                "--center_rewards_coefficient is for pairs; the scores of --loss_type regression have their own mean"
            )

    def _check_adapters(self) -> None:
        self.check_lora()
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"--lora_dropout must be at least 0 and below 1, not {self.lora_dropout}")
        if self.lora_dropout and self.disable_dropout:
            raise ConfigError(
                f"--lora_dropout {self.lora_dropout} has no effect without --no_disable_dropout"
            )
        if self.use_peft and self.freeze_layers:
            raise ConfigError(
                "--freeze_layers has no meaning with --use_peft, which trains none of the backbone's own weights"
            )
        if self.lora_dropout and not self.use_peft:
            raise ConfigError("--lora_dropout needs --use_peft")
