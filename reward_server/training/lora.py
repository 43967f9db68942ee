"""LoRA (arXiv 2106.09685) for a reward model: adapters in the backbone's layers beside a head that is trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from reward_server.training.config import RewardModelConfig
from rlaif.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

_POOLER = "pooler"
"""Between the body and the head of an encoder; checkpoints of masked language models do not have it."""


def add_adapters(model: PreTrainedModel, config: RewardModelConfig) -> PeftModel:
    """Put adapters into `model`, in place, and freeze all but them, the head and a pooler.

    Returns:
        peft's view of the model; its `merge_and_unload` makes `model` an ordinary one again, the adapters added in.

    Raises:
        ConfigError: peft is not installed, or the target modules cannot be found.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as err:
        raise ConfigError("--use_peft needs the library peft: pip install 'rlaif[peft]'") from err
    targets = list(config.lora_target_modules)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_dropout=config.lora_dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets or None,
                modules_to_save=_trained_whole(model),
            ),
        )
    except ValueError as err:
        detail = " ".join(str(err).split())[:120]
        raise ConfigError(
            f"LoRA cannot be applied to {', '.join(targets) or 'this architecture'}: give other "
            f"--lora_target_modules, names of layers or all-linear ({detail})"
        ) from err


def _trained_whole(model: PreTrainedModel) -> list[str]:
    """Names of the modules that may be new: all outside the body, and the pooler inside it."""
    body = model.base_model_prefix
    outside = [name for name, child in model.named_children() if name != body and list(child.parameters())]
    inside = [_POOLER] if any(name.endswith(f".{_POOLER}") for name, _ in model.named_modules()) else []
    return [*outside, *inside]
