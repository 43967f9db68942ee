"""What a model's positions allow: how long a text may be, and what else its rotary embedding depends on."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from reward_server.plan import Key
from rlaif.models import length_dependent_positions

_UNLIMITED = 1 << 20

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Names of the longest input in configurations; the last is MPT's."""


def context_length(model: PreTrainedModel) -> int:
    """Longest input in tokens that the model's configuration allows."""
    config = model.config.get_text_config()
    lengths = (getattr(config, name, None) for name in _LENGTHS)
    length = next((int(n) for n in lengths if n and n > 0), _UNLIMITED)  # XLNet says -1
    return min([length, *(n for module in model.modules() if (n := _places(module)) is not None)])


def _places(module: nn.Module) -> int | None:
    """How many tokens a table of positions has rows for, if it keeps rows for PAD.

    RoBERTa and its kin give PAD the position of its id, and count from there: the first token has `padding_idx + 1`.
    """
    table = getattr(module, "position_embeddings", None)
    pad: int | None = getattr(table, "padding_idx", None)
    return None if table is None or pad is None else len(table.weight) - pad - 1


def same_rotation(model: PreTrainedModel) -> Key | None:
    """What two sequences must have in common to be rotated alike in one pass; None: nothing, positions are absolute.

    Dynamic NTK scaling stretches positions by the longest sequence of a pass, once that is longer than the context of
    the pretraining; LongRoPE then takes other factors (`transformers.modeling_rope_utils`).
    """
    stretches: list[int] = []
    switches: list[int] = []
    for rope in length_dependent_positions(model.config):
        trained = model.config.get_text_config().max_position_embeddings
        if rope["rope_type"] == "dynamic":
            stretches.append(trained)
        else:
            switches.append(rope.get("original_max_position_embeddings", trained))
    if not stretches and not switches:
        return None
    return lambda ids: (*(max(len(ids), n) for n in stretches), *(len(ids) > n for n in switches))


def forget_lengths(model: PreTrainedModel) -> None:
    """Take rotary embeddings that a longer sequence has stretched back to where they began.

    Dynamic NTK scaling keeps the stretch of the longest sequence so far for all that are longer than the context of the
    pretraining, so that a score would depend on what was scored before.
    """
    if not length_dependent_positions(model.config):
        return
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        by_layer = (
            {f"{layer}_": own for layer, own in types.items()} if isinstance(types, dict) else {"": types}
        )
        for prefix, rope_type in by_layer.items():
            if rope_type == "dynamic":
                original = getattr(module, f"{prefix}original_inv_freq")
                device = getattr(module, f"{prefix}inv_freq").device
                module.register_buffer(f"{prefix}inv_freq", original.to(device), persistent=False)
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
