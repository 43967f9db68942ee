"""Advantage estimators: how much better than expected a token was, with a critic or without.

`estimate` chooses one; the others are its parts. Those that compare the responses to one prompt (a group) take the
reward of a response as a whole and give all of its tokens the same advantage.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policy_trainer.config import AdvantageEstimator

STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as in TRL: a group whose rewards are all equal has advantages of 0."""


class Advantages(NamedTuple):
    """Shapes (N, R); 0 where the mask is False.

    Attributes:
        advantages: A_t.
        returns: what was earned from this token on, the target of a critic; never whitened.
    """

    advantages: Tensor
    returns: Tensor


class Moments(NamedTuple):
    """Mean and biased variance of `size` values."""

    mean: float
    variance: float
    size: int

    def merged(self, other: Moments) -> Moments:
        """Of the values of both (Chan, Golub and LeVeque, 1979)."""
        size = self.size + other.size
        apart = other.mean - self.mean
        within = self.variance * self.size + other.variance * other.size
        between = apart**2 * self.size * other.size / size
        return Moments(self.mean + apart * other.size / size, (within + between) / size, size)


NO_VALUES = Moments(0.0, 0.0, 0)
"""The moments of nothing, to begin a running mean with."""


def estimate(
    estimator: AdvantageEstimator,
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    groups: Tensor,
    *,
    gamma: float,
    lam: float,
) -> Advantages:
    """The advantages that the policy learns from.

    `gae` and `reinforce` are whitened over all tokens of the batch. `reinforce` is REINFORCE (Williams, 1992) on
    discounted returns: GAE with V = 0 and lambda = 1; whitening subtracts the batch's mean as the baseline and
    scales, which makes it REINFORCE++ (Hu et al., arXiv 2501.03262).

    Args:
        estimator: which one.
        rewards: (N, R), of the responses to learn from.
        values: (N, R), of the critic; 0 where there is none.
        response_mask: (N, R) bool.
        groups: (N,) int64, equal for responses to the same prompt.
        gamma: discount, in [0, 1]; of `gae` and `reinforce`.
        lam: lambda, in [0, 1]; of `gae`.

    Raises:
        ValueError: the estimator compares responses and one of them is alone in its group.
    """
    if estimator in ("gae", "reinforce"):
        found = gae(rewards, values, response_mask, gamma=gamma, lam=lam if estimator == "gae" else 1.0)
        whitened = whiten(found.advantages, response_mask, moments(found.advantages, response_mask))
        return found._replace(advantages=whitened)
    earned = rewards.sum(dim=1)
    of_response = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}[estimator](earned, groups)
    return Advantages(*(t.unsqueeze(1) * response_mask for t in (of_response, earned)))


def rloo(rewards: Tensor, groups: Tensor) -> Tensor:
    """REINFORCE with the leave-one-out baseline (Ahmadian et al., arXiv 2402.14740, equation 8).

        A_i = r_i - 1/(n-1) sum_{j != i} r_j = n/(n-1) (r_i - mean)

    Args:
        rewards: (N,), of whole responses; the KL penalty is inside if it counts at all.
        groups: (N,) int64; each group has at least two members.

    Returns:
        (N,).

    Raises:
        ValueError: a group has one member.
    """
    group = group_moments(rewards, groups)
    return (rewards - group.mean) * (group.size / (group.size - 1))


def grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """Group-relative advantages (Shao et al., arXiv 2402.03300, section 4.1.2): A_i = (r_i - mean) / std.

    The standard deviation divides by n - 1, as in TRL and verl. Arguments, result and errors as in `rloo`.
    """
    group = group_moments(rewards, groups)
    return (rewards - group.mean) / (group.std + STD_EPSILON)


def dr_grpo(rewards: Tensor, groups: Tensor) -> Tensor:
    """Group-relative advantages as Dr. GRPO has them (Liu et al., arXiv 2503.20783): A_i = r_i - mean.

    Without the standard deviation, questions that are nearly always or nearly never answered weigh no more than
    others. Arguments, result and errors as in `rloo`.
    """
    return rewards - group_moments(rewards, groups).mean


class GroupMoments(NamedTuple):
    """Of each response's group, (N,): mean, standard deviation over n - 1, and number of members n."""

    mean: Tensor
    std: Tensor
    size: Tensor


def group_moments(rewards: Tensor, groups: Tensor) -> GroupMoments:
    """Moments of the groups that (N,) rewards fall into, at each response; sums are taken in float64.

    Raises:
        ValueError: a group has one member, so there is nothing to compare it with.
    """
    _, member, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        raise ValueError("a group has fewer than two responses")
    size = counts.double()
    sums = torch.zeros_like(size)
    mean = sums.index_add(0, member, rewards.double()) / size
    squares = sums.index_add(0, member, (rewards.double() - mean[member]).square())
    std = (squares / (size - 1)).sqrt()
    return GroupMoments(*(t[member].to(rewards.dtype) for t in (mean, std, size)))


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
