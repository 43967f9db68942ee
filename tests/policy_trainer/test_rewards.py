from __future__ import annotations

import torch

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


def test_clip_comes_before_the_penalty_for_a_missing_eos() -> None:
    found = adjust_scores(
        torch.tensor([7.0, -7.0, 1.0]), torch.tensor([True, False, False]), clip=5.0, missing_eos_penalty=1.0
    )
    assert found.tolist() == [5.0, -6.0, 0.0]


def test_scores_pass_unchanged_by_default() -> None:
    scores = torch.tensor([7.0, -7.0])
    assert torch.equal(adjust_scores(scores, torch.tensor([True, False])), scores)
