from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_trainer.advantages import NO_VALUES, dr_grpo, estimate, gae, grpo, moments, rloo, whiten


def test_gae_by_hand() -> None:
    """gamma = lambda = 1/2, two tokens and one of padding.

    delta_2 = 4 - 2 = 2                     A_2 = 2
    delta_1 = 1 + 0.5 * 2 - 3 = -1          A_1 = -1 + 0.25 * 2 = -0.5
    R = A + V = (2.5, 4)
    """
    found = gae(
        torch.tensor([[1.0, 4.0, 9.0]]),
        torch.tensor([[3.0, 2.0, 7.0]]),
        torch.tensor([[True, True, False]]),
        gamma=0.5,
        lam=0.5,
    )
    assert found.advantages.tolist() == [[-0.5, 2.0, 0.0]]
    assert found.returns.tolist() == [[2.5, 4.0, 0.0]]


def test_with_lambda_and_gamma_1_the_return_is_the_sum_of_rewards_to_come() -> None:
    rewards = torch.tensor([[0.5, -1.0, 2.0]])
    values = torch.tensor([[10.0, -3.0, 0.25]])
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    torch.testing.assert_close(found.returns, torch.tensor([[1.5, 1.0, 2.0]]))


def test_with_lambda_0_the_advantage_is_the_one_step_error() -> None:
    rewards = torch.tensor([[0.5, -1.0, 2.0]])
    values = torch.tensor([[10.0, -3.0, 0.25]])
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, lam=0.0)
    expected = [[0.5 + 0.9 * -3.0 - 10.0, -1.0 + 0.9 * 0.25 + 3.0, 2.0 - 0.25]]
    torch.testing.assert_close(found.advantages, torch.tensor(expected))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 9), st.integers(0, 2**31))
def test_gae_is_bitwise_the_same_under_any_padding(lengths: list[int], extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rewards = torch.randn(len(lengths), width, generator=generator) * mask
    values = torch.randn(len(lengths), width, generator=generator)
    wide = torch.nn.functional.pad
    padded = gae(
        wide(rewards, (0, extra)),
        wide(values, (0, extra), value=5.0),
        wide(mask, (0, extra)),
        gamma=0.99,
        lam=0.95,
    )
    together = gae(rewards, values, mask, gamma=0.99, lam=0.95)
    assert torch.equal(padded.advantages[:, :width], together.advantages)
    assert torch.equal(padded.returns[:, :width], together.returns)
    for i, n in enumerate(lengths):
        alone = gae(rewards[i : i + 1, :n], values[i : i + 1, :n], mask[i : i + 1, :n], gamma=0.99, lam=0.95)
        assert torch.equal(alone.advantages[0], together.advantages[i, :n])


def test_moments_count_only_the_mask_and_divide_by_n() -> None:
    # values 1, 2, 6: mean 3, variance (4 + 1 + 9) / 3
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    found = moments(values, mask)
    assert found.size == 3
    assert found.mean == 3.0
    assert found.variance == pytest.approx(14 / 3, abs=1e-12)


def test_whitening_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    std = (14 / 3) ** 0.5
    expected = torch.tensor([[-2 / std, -1 / std, 0.0], [3 / std, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, mask, moments(values, mask)), expected)
    kept_mean = whiten(values, mask, moments(values, mask), shift_mean=False)
    torch.testing.assert_close(kept_mean[mask], expected[mask] + 3.0)


def test_whitening_a_part_with_the_moments_of_the_whole_is_the_part_of_the_whole() -> None:
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) > 0.3
    whole = moments(values, mask)
    assert torch.equal(whiten(values[2:4], mask[2:4], whole), whiten(values, mask, whole)[2:4])
    # The control: moments of the part give something else, which is why they are an argument.
    assert not torch.allclose(
        whiten(values[2:4], mask[2:4], moments(values[2:4], mask[2:4])), whiten(values, mask, whole)[2:4]
    )


def test_moments_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        moments(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_merged_moments_are_those_of_all_values(parts: list[list[float]]) -> None:
    running = NO_VALUES
    for part in parts:
        values = torch.tensor(part, dtype=torch.float64)
        running = running.merged(moments(values, torch.ones_like(values, dtype=torch.bool)))
    everything = [x for part in parts for x in part]
    assert running.size == len(everything)
    assert running.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
    assert running.variance == pytest.approx(statistics.pvariance(everything), abs=1e-7)


# ---- without a critic ----

GROUPS = st.lists(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=5), min_size=1, max_size=5)


def in_some_order(groups: Sequence[Sequence[float]], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewards and the numbers of their groups, shuffled."""
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float64)
    numbers = torch.tensor([7 * g for g, group in enumerate(groups) for _ in group])
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))
    return rewards[order], numbers[order]


@settings(max_examples=50, deadline=None)
@given(GROUPS, st.integers(0, 2**31))
def test_rloo_is_the_reward_less_the_mean_of_the_others(groups: list[list[float]], seed: int) -> None:
    """The double loop of the paper's equation, group sizes as they come."""
    rewards, numbers = in_some_order(groups, seed)
    expected = []
    for i in range(len(rewards)):
        others = [float(rewards[j]) for j in range(len(rewards)) if j != i and numbers[j] == numbers[i]]
        expected.append(float(rewards[i]) - sum(others) / len(others))
    found = rloo(rewards, numbers)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_group_relative_advantages_by_hand() -> None:
    """Group 0 has 1 and 3: mean 2, std sqrt(2). Group 4 has 0, 0, 3: mean 1, std sqrt((1 + 1 + 4) / 2)."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0, 3.0], dtype=torch.float64)
    numbers = torch.tensor([4, 0, 4, 0, 4])
    less_mean = [-1.0, -1.0, -1.0, 1.0, 2.0]
    stds = [3**0.5, 2**0.5, 3**0.5, 2**0.5, 3**0.5]
    assert dr_grpo(rewards, numbers).tolist() == less_mean
    assert grpo(rewards, numbers).tolist() == pytest.approx(
        [a / (s + 1e-4) for a, s in zip(less_mean, stds, strict=True)], abs=1e-12
    )
    assert grpo(torch.full((3,), 0.1), torch.zeros(3, dtype=torch.long)).tolist() == [0.0] * 3


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.none() | st.floats(-10, 10, width=32), min_size=n, max_size=n), min_size=1, max_size=5
        )
    )
)
def test_grpo_is_trls_with_missing_rewards_left_out(groups: list[list[float | None]]) -> None:
    """TRL 1.16 `GRPOTrainer._compute_advantages`: nanmean and nanstd over a group, NaN for a missing reward."""
    nanstd = pytest.importorskip("trl.trainer.utils").nanstd
    groups = [g for g in groups if sum(r is not None for r in g) > 1]
    if not groups:
        return
    n = len(groups[0])
    table = torch.tensor([[float("nan") if r is None else r for r in g] for g in groups], dtype=torch.float64)
    rewards = table.flatten()
    mean = torch.nanmean(table, dim=1).repeat_interleave(n)
    std = nanstd(table, dim=1).repeat_interleave(n)
    scored = ~rewards.isnan()
    trls = ((rewards - mean) / (std + 1e-4))[scored]
    numbers = torch.arange(len(groups)).repeat_interleave(n)
    torch.testing.assert_close(grpo(rewards[scored], numbers[scored]), trls, atol=1e-8, rtol=1e-8)


def test_a_response_that_is_alone_has_no_group_relative_advantage() -> None:
    for estimator in (rloo, grpo, dr_grpo):
        with pytest.raises(ValueError, match="fewer than two"):
            estimator(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_reinforce_by_hand() -> None:
    """gamma = 1/2: returns (1 + 4/2, 4) and (2); whitened over the three tokens: mean 3, variance (0 + 1 + 1) / 3."""
    rewards = torch.tensor([[1.0, 4.0], [2.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    zero = torch.zeros(2, 2)
    found = estimate("reinforce", rewards, zero, mask, torch.arange(2), gamma=0.5, lam=0.3)
    assert found.returns.tolist() == [[3.0, 4.0], [2.0, 0.0]]
    torch.testing.assert_close(found.advantages, torch.tensor([[0.0, 1.5**0.5], [-(1.5**0.5), 0.0]]))


def test_all_tokens_of_a_response_share_its_group_relative_advantage() -> None:
    """The KL penalty on tokens is inside the response's reward: 3 - 1 = 2 against 1."""
    rewards = torch.tensor([[-1.0, 3.0], [1.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    zero = torch.zeros(2, 2)
    found = estimate("rloo", rewards, zero, mask, torch.zeros(2, dtype=torch.long), gamma=1.0, lam=1.0)
    assert found.advantages.tolist() == [[1.0, 1.0], [-1.0, 0.0]]
    assert found.returns.tolist() == [[2.0, 2.0], [1.0, 0.0]]
