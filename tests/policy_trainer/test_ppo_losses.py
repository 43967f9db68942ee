"""PPO losses: numbers worked by hand, the gradient at ratio 1, and invariance to how a batch is cut and padded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policy_trainer.config import KLEstimator
from policy_trainer.ppo_losses import kl_loss, penalised_policy_loss, policy_loss, value_loss

LOG = math.log


def one(*rows: float) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)


def all_true(t: Tensor) -> Tensor:
    return torch.ones_like(t, dtype=torch.bool)


def test_policy_loss_by_hand() -> None:
    """eps = 0.2, four tokens.

    ratio 1.5, A 2: max(-3.0, -1.2 * 2) = -2.4, clipped
    ratio 1.5, A -2: max(3.0, 2.4) = 3.0
    ratio 0.5, A 2: max(-1.0, -1.6) = -1.0
    ratio 0.5, A -2: max(1.0, 1.6) = 1.6, clipped
    """
    logprobs = one(LOG(0.6), LOG(0.6), LOG(0.2), LOG(0.2))
    old = one(LOG(0.4), LOG(0.4), LOG(0.4), LOG(0.4))
    advantages = one(2.0, -2.0, 2.0, -2.0)
    found = policy_loss(logprobs, old, advantages, all_true(old), cliprange=0.2)
    assert found.loss.item() == pytest.approx(-2.4 + 3.0 - 1.0 + 1.6, abs=1e-12)
    assert found.clipped.item() == 2
    assert found.ratio.item() == pytest.approx(4.0, abs=1e-12)
    assert found.ratio_sq.item() == pytest.approx(2 * 2.25 + 2 * 0.25, abs=1e-12)
    assert found.approx_kl.item() == pytest.approx(LOG(1.5) ** 2 + LOG(0.5) ** 2, abs=1e-12)


def test_value_loss_by_hand() -> None:
    """eps = 0.2: V 1.0, old 0.5, R 1.0: clipped to 0.7, max(0, 0.09); V 0.6, old 0.5, R 1.0: max(0.16, 0.16)."""
    found = value_loss(one(1.0, 0.6), one(0.5, 0.5), one(1.0, 1.0), all_true(one(0, 0)), cliprange_value=0.2)
    assert found.loss.item() == pytest.approx((0.09 + 0.16) / 2, abs=1e-12)
    assert found.clipped.item() == 1


def test_at_ratio_1_the_gradient_is_that_of_reinforce() -> None:
    """The four-logit toy of "Putting RL back in RLHF" (Hugging Face blog): equal logits, action 1, advantage A.

    Both gradients by the logits are A * (p - onehot) = A * (0.25, -0.75, 0.25, 0.25); published there for
    A = 0.6995 with the opposite sign, as [-.1749, .5246, -.1749, -.1749].
    """
    advantage = 0.69951
    gradients = []
    for reinforce in (True, False):
        logits = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
        logprob = logits.log_softmax(-1)[..., 1]
        if reinforce:
            loss = -(advantage * logprob).sum()
        else:
            loss = policy_loss(logprob, logprob.detach(), one(advantage), all_true(one(0)), 0.2).loss
        loss.backward()
        assert logits.grad is not None
        gradients.append(logits.grad.flatten())
    torch.testing.assert_close(gradients[0], gradients[1], atol=0, rtol=0)
    published = torch.tensor([-0.1749, 0.5246, -0.1749, -0.1749], dtype=torch.float64)
    torch.testing.assert_close(-gradients[1], published, atol=5e-5, rtol=0)


def test_a_clipped_token_has_no_gradient() -> None:
    logprob = one(LOG(0.9)).requires_grad_()
    policy_loss(logprob, one(LOG(0.3)), one(1.0), all_true(one(0)), 0.2).loss.backward()
    assert logprob.grad is not None and logprob.grad.item() == 0.0


def test_clip_higher_leaves_more_room_upwards() -> None:
    """eps 0.2 down, 0.28 up. Ratio 1.25, A 1: -1.25 where the symmetric clip has -1.2; ratio 1.5: -1.28, clipped.

    Ratio 0.5, A -1: max(0.5, 0.8) as before.
    """
    logprobs, old = one(LOG(0.5), LOG(0.6), LOG(0.2)), one(LOG(0.4), LOG(0.4), LOG(0.4))
    advantages = one(1.0, 1.0, -1.0)
    found = policy_loss(logprobs, old, advantages, all_true(old), 0.2, cliprange_high=0.28)
    assert found.loss.item() == pytest.approx(-1.25 - 1.28 + 0.8, abs=1e-12)
    assert found.clipped.item() == 2
    assert policy_loss(logprobs, old, advantages, all_true(old), 0.2).loss.item() == pytest.approx(-1.6)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_alone() -> None:
    """c = 3. Ratio 5, A -2: max(10, 2.4) = 10, bounded at 6; ratio 2, A -2: 4; ratio 5, A 2: -2.4, as ever."""
    logprobs = one(LOG(0.5), LOG(0.2), LOG(0.5)).requires_grad_()
    old = one(LOG(0.1), LOG(0.1), LOG(0.1))
    found = policy_loss(logprobs, old, one(-2.0, -2.0, 2.0), all_true(old), 0.2, dual_clip=3.0)
    assert found.loss.item() == pytest.approx(6.0 + 4.0 - 2.4, abs=1e-12)
    assert found.clipped.item() == 2
    found.loss.backward()
    # Bounded and clipped tokens have no gradient; that of -rho A by log pi is -rho A = 4.
    torch.testing.assert_close(logprobs.grad, one(0.0, 4.0, 0.0))


def test_a_ratio_of_the_response_is_the_geometric_mean_of_its_tokens() -> None:
    """Ratios 2 and 1/2 make 1: not clipped, loss -1 per token. Ratios 2 and 2 make 2: clipped at 1.2.

    The third token of the first row is padding.
    """
    logprobs = torch.tensor([[LOG(0.8), LOG(0.2), 5.0], [LOG(0.8), LOG(0.8), LOG(0.8)]], dtype=torch.float64)
    old = torch.full((2, 3), LOG(0.4), dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = policy_loss(logprobs, old, torch.ones(2, 3).double(), mask, 0.2, level="sequence")
    assert found.loss.item() == pytest.approx(-2 * 1.0 - 3 * 1.2, abs=1e-12)
    assert found.clipped.item() == 3
    assert found.ratio.item() == pytest.approx(2 * 1.0 + 3 * 2.0, abs=1e-12)
    assert found.approx_kl.item() == pytest.approx(5 * LOG(2) ** 2 / 2, abs=1e-12)


def test_at_ratio_1_a_ratio_of_the_response_has_the_gradient_of_the_tokens_ratios() -> None:
    noise = torch.Generator().manual_seed(0)
    logprobs = torch.randn(3, 4, generator=noise).double().requires_grad_()
    mask = torch.arange(4) < torch.tensor([[4], [1], [3]])
    advantages = torch.tensor([[1.0], [-2.0], [0.5]]).double() * mask
    gradients = [
        torch.autograd.grad(
            policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, level=level).loss, logprobs
        )[0]
        for level in ("token", "sequence")
    ]
    torch.testing.assert_close(gradients[0], -advantages)
    torch.testing.assert_close(gradients[1], -advantages)


def test_penalised_loss_by_hand() -> None:
    """beta 0.5. Ratio 1.5, A 2: -3 + 0.5 (1.5 - 1 - log 1.5); ratio 0.5, A -2: 1 + 0.5 (0.5 - 1 - log 0.5)."""
    logprobs, old = one(LOG(0.6), LOG(0.2)), one(LOG(0.4), LOG(0.4))
    found = penalised_policy_loss(logprobs, old, one(2.0, -2.0), all_true(old), coef=0.5)
    expected = -3 + 0.5 * (0.5 - LOG(1.5)) + 1 + 0.5 * (-0.5 - LOG(0.5))
    assert found.loss.item() == pytest.approx(expected, abs=1e-12)
    assert found.clipped.item() == 0
    assert found.ratio.item() == pytest.approx(2.0, abs=1e-12)


def test_the_penalty_has_value_and_gradient_of_the_kl_from_the_old_policy() -> None:
    """In expectation over the old policy's tokens, by enumeration of a vocabulary, without an advantage."""
    noise = torch.Generator().manual_seed(0)
    logits, old = torch.randn(2, 5, dtype=torch.float64, generator=noise)
    logits.requires_grad_()
    logprobs, old = logits.log_softmax(0), old.log_softmax(0)
    exact = (old.exp() * (old - logprobs)).sum()
    mask = all_true(one(0))
    terms = [
        old[y].exp()
        * penalised_policy_loss(logprobs[y].view(1, 1), old[y].view(1, 1), one(0.0), mask, 1.0).loss
        for y in range(5)
    ]
    expected = torch.stack(terms).sum()
    assert expected.item() == pytest.approx(exact.item(), abs=1e-12) and exact.item() > 0.1
    torch.testing.assert_close(
        torch.autograd.grad(expected, logits, retain_graph=True), torch.autograd.grad(exact, logits)
    )


def test_an_overflowing_ratio_gives_a_finite_loss() -> None:
    logprob = torch.tensor([[0.0]]).requires_grad_()
    found = policy_loss(logprob, torch.tensor([[-1e4]]), torch.tensor([[-1.0]]), all_true(logprob), 0.2)
    found.loss.backward()
    assert torch.isfinite(found.loss) and logprob.grad is not None and torch.isfinite(logprob.grad).all()


@pytest.mark.parametrize("junk", [1e4, float("inf"), float("nan")], ids=["huge", "inf", "nan"])
def test_padding_counts_for_nothing(junk: float) -> None:
    mask = torch.tensor([[True, False]])
    padded, bare = one(LOG(0.6), junk), one(LOG(0.6))
    found = policy_loss(padded, one(LOG(0.4), 0.0), one(-1.0, 5.0), mask, 0.2)
    assert found == policy_loss(bare, one(LOG(0.4)), one(-1.0), all_true(bare), 0.2)
    assert policy_loss(
        padded, one(LOG(0.4), 0.0), one(-1.0, 5.0), mask, 0.2, dual_clip=1.2, level="sequence"
    ) == policy_loss(bare, one(LOG(0.4)), one(-1.0), all_true(bare), 0.2, dual_clip=1.2, level="sequence")
    assert penalised_policy_loss(
        padded, one(LOG(0.4), 0.0), one(-1.0, 5.0), mask, 1.0
    ) == penalised_policy_loss(bare, one(LOG(0.4)), one(-1.0), all_true(bare), 1.0)
    assert value_loss(padded, one(0.0, 0.0), one(1.0, 1.0), mask, 0.2) == value_loss(
        bare, one(0.0), one(1.0), all_true(bare), 0.2
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "k3+"])
def test_kl_in_the_loss_has_the_gradient_of_the_reverse_kl(estimator: KLEstimator) -> None:
    """In expectation over tokens of a sampling policy that is no longer the policy, by enumeration of a vocabulary."""
    noise = torch.Generator().manual_seed(0)
    logits, old, ref = torch.randn(3, 5, dtype=torch.float64, generator=noise)
    logits.requires_grad_()
    logprobs, old, ref = logits.log_softmax(0), old.log_softmax(0), ref.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    expected = torch.stack(
        [
            old[y].exp()
            * kl_loss(
                logprobs[y].view(1, 1), old[y].view(1, 1), ref[y].view(1, 1), all_true(one(0)), estimator
            )
            for y in range(5)
        ]
    ).sum()
    (found,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)
    if estimator != "k2":  # whose value is biased
        value = (logprobs.exp() * (logprobs - ref)).sum().item()
        assert expected.item() == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("junk", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_kl_in_the_loss_does_not_read_padding(junk: float) -> None:
    logprobs = one(LOG(0.6), junk).requires_grad_()
    mask = torch.tensor([[True, False]])
    found = kl_loss(logprobs, one(LOG(0.4), 0.0), one(LOG(0.3), junk), mask, "k3")
    found.backward()
    assert found.item() == pytest.approx(1.5 * (0.5 - 1 + LOG(2)), abs=1e-12)
    assert logprobs.grad is not None and logprobs.grad[0, 1] == 0.0
