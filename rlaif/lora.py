"""LoRA (arXiv 2106.09685): the flags that every trained model has, and the adapters put into it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from rlaif.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """What a command that can train adapters is told about them; the names are TRL's and peft's."""

    use_peft: bool = False
    """Train LoRA adapters and new heads alone; they are merged at the end into an ordinary checkpoint."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Scale of the adapters: alpha / r."""
    lora_target_modules: tuple[str, ...] = ()
    """Layers that get adapters, by name, or `all-linear`. By default those that peft knows for the architecture."""

    def check_lora(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range, or does nothing.
        """
        for name in ("lora_r", "lora_alpha"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for field in fields(LoraFlags):
            changed = getattr(self, field.name) != field.default
            if field.name.startswith("lora_") and changed and not self.use_peft:
                raise ConfigError(f"--{field.name} needs --use_peft")


def add_adapters(
    model: PreTrainedModel,
    flags: LoraFlags,
    *,
    task: str,
    dropout: float = 0.0,
    trained_whole: Sequence[str] = (),
) -> PeftModel:
    """Put adapters into `model`, in place, and freeze all but them and the modules `trained_whole`.

    Their first matrices are drawn from torch's global generator; the second are 0, so the model computes what it did.
    In a model of lower precision they are float32.

    Args:
        model: of transformers.
        flags: of the command.
        task: `CAUSAL_LM`, `SEQ_CLS`: one of peft's task types.
        dropout: before the adapters.
        trained_whole: names of modules that learn without adapters.

    Returns:
        peft's view of the model. Its `disable_adapter` is the model without them, its `merge_and_unload` makes
        `model` an ordinary one again, the adapters added in.

    Raises:
        ConfigError: peft is not installed, or the target modules cannot be found or changed alone.
    """
    peft = imported()
    targets = list(flags.lora_target_modules)
    try:
        adapted: PeftModel = peft.get_peft_model(
            model,
            peft.LoraConfig(
                task_type=task,
                r=flags.lora_r,
                lora_alpha=flags.lora_alpha,
                lora_dropout=dropout,
                target_modules=targets[0] if targets == ["all-linear"] else targets or None,
                modules_to_save=list(trained_whole) or None,
            ),
        )
    except ValueError as err:
        detail = " ".join(str(err).split())[:120]
        raise ConfigError(
            f"LoRA cannot be applied to {', '.join(targets) or 'this architecture'}: give other "
            f"--lora_target_modules, names of layers or all-linear ({detail})"
        ) from err
    check_tied(model)
    return adapted


def check_tied(model: PreTrainedModel) -> None:
    """The embedding and the head have no adapters where they are one tensor: merged into it, they would change both.

    Args:
        model: with its adapters.

    Raises:
        ConfigError: one of them has.
    """
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
    tied = None not in ends and ends[0].weight is ends[1].weight
    if tied and any(hasattr(end, "base_layer") for end in ends):
        raise ConfigError(
            "the embedding and the head of this model share their weight (tie_word_embeddings), and adapters to one of "
            "them would end up in both: leave them out of --lora_target_modules"
        )


def imported(needed_by: str = "--use_peft") -> Any:
    """The module peft.

    Args:
        needed_by: what cannot do without it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import peft
    except ImportError as err:
        raise ConfigError(
            f"{needed_by} cannot be used without the library peft: pip install 'rlaif[peft]'"
        ) from err
    return peft
