"""LoRA for a reward model: adapters in the backbone's layers beside a head that is trained whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from reward_server.training.config import RewardModelConfig
from rlaif import lora

if TYPE_CHECKING:
    from peft import PeftModel

_POOLER = "pooler"
"""Between the body and the head of an encoder; checkpoints of masked language models do not have it."""


def add_adapters(model: PreTrainedModel, config: RewardModelConfig) -> PeftModel:
    """Put adapters into `model`, in place, and freeze all but them, the head and a pooler; see `rlaif.lora`."""
    return lora.add_adapters(
        model, config, task="SEQ_CLS", dropout=config.lora_dropout, trained_whole=_trained_whole(model)
    )


def _trained_whole(model: PreTrainedModel) -> list[str]:
    """Names of the modules that may be new: all outside the body, and the pooler inside it."""
    body = model.base_model_prefix
    outside = [name for name, child in model.named_children() if name != body and list(child.parameters())]
    inside = [_POOLER] if any(name.endswith(f".{_POOLER}") for name, _ in model.named_modules()) else []
    return [*outside, *inside]
