"""Optimisers whose learning rate is a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from policy_trainer.config import TrainingConfig
from rlaif.errors import QualityError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, config: TrainingConfig
) -> torch.optim.AdamW:
    """AdamW with the run's epsilon and weight decay, over those of the parameters that are trained."""
    trained = [p for p in parameters if p.requires_grad]
    kind = torch.optim.AdamW if all(p.dtype == torch.float32 for p in trained) else MasterAdamW
    return kind(trained, lr=learning_rate, eps=config.adam_epsilon, weight_decay=config.weight_decay)


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of weights in a lower precision (arXiv 1710.03740, section 3.1).

    A bfloat16 number has 8 significant bits: a step of less than 1/512 of a weight, which is what fine-tuning takes,
    would be rounded away.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **settings: Any) -> None:
        """Optimise `parameters`; those in float32 have no copy."""
        self._weights = list(parameters)
        self._masters = [
            p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters
        ]
        super().__init__(self._masters, **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the copies, from the gradients of the weights, which are then the copies rounded."""
        assert closure is None
        copied = [(w, m) for w, m in zip(self._weights, self._masters, strict=True) if w is not m]
        for weight, master in copied:
            master.grad = None if weight.grad is None else weight.grad.float()
        super().step()
        for weight, master in copied:
            weight.copy_(master)
            master.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the weights."""
        for weight in self._weights:
            weight.grad = None

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, and the copies."""
        return {**super().state_dict(), "masters": [m.detach() for m in self._masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        state = dict(state_dict)
        for master, saved in zip(self._masters, state.pop("masters"), strict=True):
            master.copy_(saved)
        super().load_state_dict(state)


class MovingAverage:
    """The exponential moving average of a model's weights: the soft update of TR-DPO (arXiv 2404.09656).

    It is kept in float32, for the reason that `MasterAdamW` gives; the weights of `model` are the average, rounded.

    Attributes:
        model: frozen, a copy of what is averaged.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        """Start from the weights of `model`; `decay` in [0, 1] is the share of the average that an update keeps."""
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._decay = decay
        self._means = [
            p if p.dtype == torch.float32 else nn.Parameter(p.float(), requires_grad=False)
            for p in self.model.parameters()
        ]

    @torch.no_grad()
    def update(self, model: PreTrainedModel) -> None:
        """Set each weight to decay average + (1 - decay) of the model's."""
        for mean, weight, current in zip(
            self._means, self.model.parameters(), model.parameters(), strict=True
        ):
            mean.lerp_(current.float(), 1.0 - self._decay)
            if mean is not weight:
                weight.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """The average, in float32."""
        return {"means": [mean.detach() for mean in self._means]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for mean, weight, saved in zip(self._means, self.model.parameters(), state["means"], strict=True):
            mean.copy_(saved)
            weight.copy_(saved)


def lr_factor(kind: str, step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """Factor on the peak learning rate of step `step` (counted from 0) of `total_steps`.

    Linear warm-up, then constant, linear to 0 or half a cosine to 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return (1.0 + math.cos(math.pi * done)) / 2
    return 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, what: str) -> Tensor:
    """Scale gradients down to `max_norm`; returns the norm before.

    Raises:
        QualityError: the norm is NaN or infinite; no weight has been changed by this gradient.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not torch.isfinite(norm):
        raise QualityError(
            f"the gradient of the {what} is {norm.item()}: lower the learning rate or look at the last samples; the "
            "last checkpoint is from before this step"
        )
    return norm


def step_seed(seed: int, *purpose: int) -> int:
    """A seed for one purpose, a pure function of the run's seed and of the numbers that name the purpose."""
    digest = hashlib.blake2b(repr((seed, *map(int, purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # generators take seeds below 2^63


def permutation(size: int, seed: int) -> list[int]:
    """A random order of `range(size)`."""
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def shuffled_stream(size: int, seed: int, start: int, count: int) -> list[int]:
    """Items `start` to `start + count` of the endless stream that passes over `range(size)` in ever new orders.

    The position in the stream is all there is to a data cursor.
    """
    picked: list[int] = []
    while len(picked) < count:
        epoch, offset = divmod(start + len(picked), size)
        picked += permutation(size, step_seed(seed, epoch))[offset : offset + count - len(picked)]
    return picked
