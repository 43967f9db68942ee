"""Linear layers that are faster on a CPU, for `rlaif serve --torch_compile`.

Their weights are kept in the order in which oneDNN reads them, which its product then need not bring about on every
call; vLLM does the same on a CPU. On an AMD EPYC a core then computes 98 to 107 GFLOP/s instead of MKL's 78 to 94
(layers of 384 to 1,024, 512 to 2,048 tokens).
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
"""How far scores of a compiled model may be from those before, relative to scores above 1."""


_packed: dict[int, Tensor] = {}
"""Packed weights by a number, as which they go through `torch.compile`: it knows no tensors in a layout of oneDNN's."""

_numbers = itertools.count()


@torch.library.custom_op("rlaif::packed_linear", mutates_args=())
def _packed_linear(x: Tensor, number: int, bias: Tensor | None, out_features: int) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, _packed[number], bias, "none", [], "")
    return result


@_packed_linear.register_fake
def _(x: Tensor, number: int, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored once more, packed."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.plain = (layer,)  # a tuple: it is no part of this module
        self.weight = layer.weight  # for those who ask for its type or device
        self.bias = layer.bias
        self._out_features = layer.out_features
        self._number = next(_numbers)
        _packed[self._number] = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        weakref.finalize(self, _packed.pop, self._number)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), float32."""
        result: Tensor = _packed_linear(x, self._number, self.bias, self._out_features)
        return result


def pack_linear_layers(model: nn.Module) -> int:
    """Replace the float32 linear layers on a CPU, as far as oneDNN is there; how many they were."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    packed = 0
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or layer.out_features == 1:
                continue  # LoRA's and quantized ones are left alone, and so is the head
            if layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(layer))
                packed += 1
    return packed


def unpack_linear_layers(model: nn.Module) -> None:
    """Put the layers back that were replaced."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, PackedLinear):
                setattr(module, name, layer.plain[0])
