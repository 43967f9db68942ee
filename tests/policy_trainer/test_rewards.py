from __future__ import annotations

from typing import Any

import pytest
import torch

from policy_trainer.advantages import Moments
from policy_trainer.rewards import adjust_scores, token_rewards


def test_the_score_falls_on_the_last_token_that_counts_and_kl_on_all() -> None:
    """beta = 0.5; k1 = (1, -2) and (4); scores 10 and 20.

    row 1: -0.5 * 1, -0.5 * -2 + 10; row 2: -0.5 * 4 + 20
    """
    found = token_rewards(
        torch.tensor([10.0, 20.0]),
        torch.tensor([[-1.0, -3.0, -9.0], [-1.0, -9.0, -9.0]]),
        torch.tensor([[-2.0, -1.0, 0.0], [-5.0, 0.0, 0.0]]),
        torch.tensor([[True, True, False], [True, False, False]]),
        kl_coef=0.5,
    )
    assert found.rewards.tolist() == [[-0.5, 11.0, 0.0], [18.0, 0.0, 0.0]]
    assert found.kl.tolist() == [-1.0, 4.0]
    assert found.non_score.tolist() == [0.5, -2.0]


def test_rewards_of_a_response_sum_to_score_and_kl_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(7) < torch.tensor([[3], [7], [1]])
    scores, logp, ref = (torch.randn(s, generator=generator) for s in ((3,), (3, 7), (3, 7)))
    found = token_rewards(scores, logp, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(found.rewards.sum(1), scores + found.non_score)


def test_padding_cannot_leak_into_rewards() -> None:
    mask = torch.tensor([[True, False]])
    nan = float("nan")
    found = token_rewards(
        torch.tensor([1.0]), torch.tensor([[-1.0, nan]]), torch.tensor([[-1.0, nan]]), mask, kl_coef=0.1
    )
    assert found.rewards.tolist() == [[1.0, 0.0]]


def adjusted(*scores: float, finished: bool = True, lengths: int = 1, **settings: Any) -> list[float]:
    n = len(scores)
    made = adjust_scores(
        torch.tensor(scores), torch.tensor([finished] * n), torch.tensor([lengths] * n), **settings
    )
    return [pytest.approx(x, abs=1e-6) for x in made.tolist()]


def test_clip_comes_before_the_penalty_for_a_missing_eos() -> None:
    assert adjusted(7.0, clip=5.0, missing_eos_penalty=1.0) == [5.0]
    assert adjusted(-7.0, 1.0, finished=False, clip=5.0, missing_eos_penalty=1.0) == [-6.0, 0.0]


def test_normalisation_comes_before_the_clip() -> None:
    """Mean 10, standard deviation 4: 7 and 30 become -0.75 and 5."""
    over = Moments(10.0, 16.0, 100)
    assert adjusted(7.0, 30.0, over=over) == [-0.75, 5.0]
    assert adjusted(7.0, 30.0, over=over, clip=1.5) == [-0.75, 1.5]


def test_scores_that_never_differed_are_normalised_to_0() -> None:
    assert adjusted(3.0, over=Moments(3.0, 0.0, 5)) == [0.0]


@pytest.mark.parametrize(
    ("length", "punishment"), [(1, 0.0), (80, 0.0), (81, -0.05), (90, -0.5), (100, -1.0)]
)
def test_the_length_penalty_can_be_dapos_soft_overlong_punishment(length: int, punishment: float) -> None:
    """Equation 13 with L_max 100 and L_cache 20: 0 up to 80, ((L_max - L_cache) - |y|) / L_cache up to 100."""
    assert adjusted(2.0, lengths=length, length_penalty_coef=1 / 20, length_budget=80) == [2.0 + punishment]


def test_a_missing_eos_may_replace_the_score() -> None:
    settings: dict[str, Any] = {"missing_eos_reward": -1.0, "length_penalty_coef": 0.5}
    assert adjusted(9.0, lengths=2, finished=False, **settings) == [-1.0]
    assert adjusted(9.0, lengths=2, **settings) == [8.0]


def test_scores_pass_unchanged_by_default() -> None:
    scores = torch.tensor([7.0, -7.0])
    assert torch.equal(adjust_scores(scores, torch.tensor([True, False]), torch.tensor([3, 9])), scores)
