"""The last layer of a causal classifier, computed only for the tokens that the head reads.

The head reads one token of each sequence. Of the last layer it needs the keys and values of all tokens, and of what
comes after them those of that token alone: an eighth of the work of a model of seven layers, a thirtieth of one of 28.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ReadRows(nn.Module):
    """A module that treats each token by itself, for the tokens that are read; it gives 0 for the others.

    Attributes:
        whole: the module.
        rows: (R,) int64, the tokens.
    """

    whole: nn.Module
    rows: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, in) to (1, T, out)."""
        read: Tensor = self.whole(x[:, self.rows])
        return read.new_zeros(1, x.shape[1], read.shape[2]).index_copy(1, self.rows, read)


def reads_ends_alone(attention: nn.Module) -> bool:
    """Whether what an attention gives is used for the tokens that are read alone."""
    return isinstance(getattr(attention, "o_proj", None), ReadRows)


class LastLayer:
    """What a model's last layer need not compute for every token.

    These are its feed-forward network, its queries, and what becomes of the values that they find. Modules with other
    names are left as they are.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._places: list[tuple[nn.Module, str, ReadRows]] = []
        depth = model.config.get_text_config().num_hidden_layers
        for layers in model.base_model.children():
            if isinstance(layers, nn.ModuleList) and len(layers) == depth:
                last = layers[-1]
                attention = getattr(last, "self_attn", None)
                for owner, name in ((last, "mlp"), (attention, "q_proj"), (attention, "o_proj")):
                    if owner is not None and isinstance(getattr(owner, name, None), nn.Module):
                        self._places.append((owner, name, ReadRows()))

    @contextmanager
    def reading(self, rows: Sequence[int]) -> Iterator[None]:
        """Compute these tokens of a row alone, until the end of the block; the model's modules are then as before.

        Args:
            rows: at least one. A single one is given twice, since code for one is compiled apart.
        """
        read = torch.tensor([*rows, rows[-1]] if len(rows) == 1 else rows)
        for owner, name, limited in self._places:
            limited.whole, limited.rows = getattr(owner, name), read
            setattr(owner, name, limited)
        try:
            yield
        finally:
            for owner, name, limited in self._places:
                setattr(owner, name, limited.whole)
