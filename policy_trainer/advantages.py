"""Generalised advantage estimation and whitening over the tokens that count."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Shapes (N, R); 0 where the mask is False.

    Attributes:
        advantages: A_t, not whitened.
        returns: A_t + V_t, the target of the critic; never whitened.
    """

    advantages: Tensor
    returns: Tensor


class Moments(NamedTuple):
    """Mean and biased variance of `size` values."""

    mean: float
    variance: float
    size: int


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, lam: float) -> Advantages:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equations 11-16).

        delta_t = r_t + gamma * V_{t+1} - V_t        with V_{T+1} = 0
        A_t     = delta_t + gamma * lam * A_{t+1}    with A_{T+1} = 0
        R_t     = A_t + V_t

    Each row is computed elementwise from its own tokens, so padding changes no bit of the result.

    Args:
        rewards: (N, R).
        values: (N, R), V of the state before each token; whatever stands at padding is ignored.
        response_mask: (N, R) bool; each row is True, then False.
        gamma: discount, in [0, 1].
        lam: lambda, in [0, 1]; 1 is the Monte Carlo return minus the value.
    """
    zero = torch.zeros_like(rewards[:, 0])
    values = torch.where(response_mask, values, torch.zeros_like(values))
    advantages = torch.zeros_like(rewards)
    next_advantage, next_value = zero, zero
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # At padding the advantage is 0, which makes the last real token see V = A = 0 beyond the end.
        next_advantage = torch.where(response_mask[:, t], delta + gamma * lam * next_advantage, zero)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return Advantages(advantages, advantages + values)


def moments(values: Tensor, mask: Tensor) -> Moments:
    """Mean and biased variance of the values where `mask` is True, in float64; same shapes.

    The variance divides by n, as in TensorFlow's `tf.nn.moments` that OpenAI's code used and the N+ implementation
    follows (`unbiased=False`); TRL divides by n - 1.

    Raises:
        ValueError: the mask selects nothing.
    """
    chosen = values[mask].double()
    if chosen.numel() == 0:
        raise ValueError("moments of no values")
    mean = chosen.mean()
    return Moments(float(mean), float((chosen - mean).square().mean()), chosen.numel())


def whiten(values: Tensor, mask: Tensor, over: Moments, *, shift_mean: bool = True) -> Tensor:
    """Scale to unit variance and, with `shift_mean`, to zero mean; 0 where `mask` is False.

    The moments are given and not taken from `values`, so that a part of a batch is whitened with the moments of
    the whole and the result does not depend on how the batch was split.

    Args:
        values: (N, R).
        mask: (N, R) bool.
        over: moments of the whole batch.
        shift_mean: False keeps the mean (for rewards, whose sign means something).
    """
    whitened = (values - over.mean) * (over.variance + 1e-8) ** -0.5
    if not shift_mean:
        whitened = whitened + over.mean
    return torch.where(mask, whitened, torch.zeros_like(whitened))
