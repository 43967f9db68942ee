"""The loss and the figures, against numbers worked by hand and against TRL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_server.loss import accuracy, preference_loss, preference_metrics


def loss(difference: float, p: float) -> float:
    """The loss of one pair in double precision."""
    d = torch.tensor([difference], dtype=torch.float64)
    return preference_loss(d, torch.zeros_like(d), torch.tensor([p], dtype=torch.float64)).item()


def test_the_loss_equals_numbers_worked_by_hand() -> None:
    assert loss(0.0, 1.0) == pytest.approx(math.log(2))
    assert loss(math.log(3), 1.0) == pytest.approx(-math.log(3 / 4))
    assert loss(math.log(3), 0.0) == pytest.approx(-math.log(1 / 4))
    assert loss(math.log(3), 0.7) == pytest.approx(-0.7 * math.log(3 / 4) - 0.3 * math.log(1 / 4))
    assert loss(-800.0, 1.0) == pytest.approx(800.0)  # no overflow


@given(st.floats(-30, 30), st.floats(0, 1))
def test_exchanging_the_responses_and_the_label_changes_nothing(difference: float, p: float) -> None:
    assert loss(difference, p) == pytest.approx(loss(-difference, 1 - p), abs=1e-9)


@given(st.floats(0.01, 0.99), st.floats(-5, 5))
def test_the_loss_is_least_where_the_model_agrees_with_the_label(p: float, away: float) -> None:
    best = math.log(p / (1 - p))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert loss(best, p) == pytest.approx(entropy)
    assert loss(best + away, p) >= entropy - 1e-12


def test_the_loss_of_hard_labels_equals_that_of_trl() -> None:
    """TRL's `RewardTrainer.compute_loss` itself, on a model that returns given rewards."""
    trl = pytest.importorskip("trl")
    from collections import defaultdict
    from types import SimpleNamespace

    rewards = torch.randn(2 * 16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    class GivenRewards(torch.nn.Module):
        def forward(self, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=rewards)

    identity = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=GivenRewards(),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=identity,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    inputs = {"attention_mask": torch.ones(32, 4, dtype=torch.int64)}
    theirs = trl.RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    chosen, rejected = rewards.squeeze(-1).chunk(2)
    ours = preference_loss(chosen, rejected, torch.ones(16)).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_accuracy_leaves_ties_out_and_counts_equal_scores_half() -> None:
    differences = [1.0, -1.0, 0.0, 5.0, -2.0]
    labels = [0.9, 0.8, 1.0, 0.5, 0.3]
    assert accuracy(differences, labels) == (1 + 0 + 0.5 + 1) / 4
    assert accuracy([1.0], [0.5]) is None


def test_figures_equal_numbers_worked_by_hand() -> None:
    # Confidences 0.75, 0.75, 0.95, 0.5 in the preferred response; its label 1, 0, 0.8, 0.5.
    differences = [math.log(3), -math.log(3), math.log(19), 0.0]
    labels = [1.0, 1.0, 0.8, 0.5]
    metrics = preference_metrics(differences, labels, num_bins=5)
    assert metrics.labelled == 3
    assert metrics.brier == pytest.approx((0.25**2 + 0.75**2 + 0.15**2 + 0) / 4)
    assert metrics.ece == pytest.approx((2 * 0.25 + 1 * 0.15 + 0) / 4)
    assert [b.count for b in metrics.bins] == [1, 0, 2, 0, 1]
    assert metrics.bins[2].confidence == pytest.approx(0.75)
    assert metrics.bins[2].accuracy == pytest.approx(0.5)
    assert metrics.bins[1].confidence is None
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2) + math.log(2)
    assert metrics.label_entropy == pytest.approx(entropy / 4)
    log_losses = [
        -math.log(0.75),
        -math.log(0.25),
        -0.8 * math.log(0.95) - 0.2 * math.log(0.05),
        math.log(2),
    ]
    assert metrics.log_loss == pytest.approx(sum(log_losses) / 4)


def test_figures_do_not_depend_on_which_response_is_called_chosen() -> None:
    differences, labels = [0.3, -1.2, 2.0], [0.9, 0.6, 0.2]
    swapped = preference_metrics([-d for d in differences], [1 - p for p in labels])
    metrics = preference_metrics(differences, labels)
    for name in ("accuracy", "log_loss", "brier", "ece", "label_entropy"):
        assert getattr(metrics, name) == pytest.approx(getattr(swapped, name))


def test_no_pairs_have_no_figures() -> None:
    with pytest.raises(ValueError, match="no pairs"):
        preference_metrics([], [])
