"""KL estimators against numbers worked by hand and against the exact divergence of small distributions."""

from __future__ import annotations

import math

import pytest
import torch

from policy_trainer.config import KLEstimator
from policy_trainer.kl import KLController, PenaltyController, kl_estimate

P = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
Q = torch.tensor([0.25, 0.25, 0.25, 0.25], dtype=torch.float64)
# sum p log(p/q) = 0.5 log 2 + 0 - 0.25 log 2
KL_PQ = 0.25 * math.log(2)


def test_estimators_of_one_token_by_hand() -> None:
    # d = log 0.5 - log 0.25 = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2
    logp, ref = torch.tensor([0.5]).double().log(), torch.tensor([0.25]).double().log()
    assert kl_estimate(logp, ref, "k1").item() == pytest.approx(0.6931471805599453, abs=1e-12)
    assert kl_estimate(logp, ref, "k2").item() == pytest.approx(0.2402265069591007, abs=1e-12)
    assert kl_estimate(logp, ref, "k3").item() == pytest.approx(0.1931471805599453, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_over_the_policy_is_the_exact_kl(estimator: KLEstimator) -> None:
    assert (P * kl_estimate(P.log(), Q.log(), estimator)).sum().item() == pytest.approx(KL_PQ, abs=1e-12)


def test_k3_is_never_negative_and_stays_finite() -> None:
    d = torch.linspace(-500, 500, 2001)
    k3 = kl_estimate(d, torch.zeros_like(d), "k3")
    assert torch.isfinite(k3).all()
    within = d.abs() <= 20
    assert (k3[within] >= 0).all()


def expected_gradient(estimator: KLEstimator) -> torch.Tensor:
    """Gradient by the logits of E_{y ~ p}[estimate(y)] with the samples held fixed, as a loss term has it."""
    logits = P.log().clone().requires_grad_()
    logp = logits.log_softmax(-1)
    (P * kl_estimate(logp, Q.log(), estimator)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def divergence_gradient(forward: bool) -> torch.Tensor:
    logits = P.log().clone().requires_grad_()
    logp = logits.log_softmax(-1)
    divergence = (Q * (Q.log() - logp)).sum() if forward else (logp.exp() * (logp - Q.log())).sum()
    divergence.backward()
    assert logits.grad is not None
    return logits.grad


def test_k1_as_a_loss_has_no_gradient() -> None:
    torch.testing.assert_close(
        expected_gradient("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_k2_as_a_loss_has_the_gradient_of_the_reverse_kl() -> None:
    torch.testing.assert_close(
        expected_gradient("k2"), divergence_gradient(forward=False), atol=1e-12, rtol=0
    )


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl() -> None:
    torch.testing.assert_close(expected_gradient("k3"), divergence_gradient(forward=True), atol=1e-12, rtol=0)
    assert not torch.allclose(expected_gradient("k3"), divergence_gradient(forward=False), atol=1e-3)


def test_straight_through_k3_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    logp = torch.tensor([-0.1, -1.0, -4.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0, -0.5, -4.0], dtype=torch.float64)
    found = kl_estimate(logp, ref, "k3+")
    assert torch.equal(found, kl_estimate(logp, ref, "k3"))
    found.sum().backward()
    # The derivative of d^2 / 2 is d = (1.9, -0.5, 0); that of k3 would be 1 - exp(-d).
    torch.testing.assert_close(logp.grad, torch.tensor([1.9, -0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        expected_gradient("k3+"), divergence_gradient(forward=False), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize(
    ("kl", "coef"),
    [(0.0066, 0.5), (0.0067, 1.0), (0.0149, 1.0), (0.0151, 2.0)],
    ids=["below", "just in", "still in", "above"],
)
def test_the_penalty_coefficient_is_halved_and_doubled_outside_the_target_range(
    kl: float, coef: float
) -> None:
    """Target 0.01: below 0.01 / 1.5 = 0.00667 and above 0.01 * 1.5 = 0.015."""
    assert PenaltyController(1.0, 0.01).updated(kl) == PenaltyController(coef, 0.01)


def test_fixed_coefficient_never_moves() -> None:
    assert KLController(0.05).updated(kl=100.0, episodes=512).coef == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        pytest.param(6.6, 0.15 * (1 + 0.1 * 512 / 10_000), id="ten percent above"),
        pytest.param(60.0, 0.15 * (1 + 0.2 * 512 / 10_000), id="clipped above"),
        pytest.param(0.0, 0.15 * (1 - 0.2 * 512 / 10_000), id="clipped below"),
        pytest.param(6.0, 0.15, id="on target"),
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float) -> None:
    """Ziegler et al.'s settings: beta 0.15, target 6 nats, horizon 10 000 episodes, batch 512."""
    assert KLController(0.15, target=6.0).updated(kl, 512).coef == pytest.approx(expected, abs=1e-15)
