"""The losses, against numbers worked by hand and against TRL's `RewardTrainer` itself."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reward_server.training.data import Comparison, Unit
from reward_server.training.loop import summed_loss
from reward_server.training.loss import preference_loss


def loss(difference: float, p: float, margin: float = 0.0) -> float:
    """The loss of one pair in double precision."""
    d = torch.tensor([difference], dtype=torch.float64)
    label = torch.tensor([p], dtype=torch.float64)
    return preference_loss(d, torch.zeros_like(d), label, margin).item()


def test_the_loss_equals_numbers_worked_by_hand() -> None:
    assert loss(0.0, 1.0) == pytest.approx(math.log(2))
    assert loss(math.log(3), 1.0) == pytest.approx(-math.log(3 / 4))
    assert loss(math.log(3), 0.0) == pytest.approx(-math.log(1 / 4))
    assert loss(math.log(3), 0.7) == pytest.approx(-0.7 * math.log(3 / 4) - 0.3 * math.log(1 / 4))
    assert loss(1 + math.log(3), 1.0, margin=1.0) == pytest.approx(-math.log(3 / 4))
    assert loss(-800.0, 1.0) == pytest.approx(800.0)  # no overflow


@given(st.floats(-30, 30), st.floats(0, 1), st.floats(-3, 3))
def test_exchanging_the_responses_changes_nothing(difference: float, p: float, margin: float) -> None:
    assert loss(difference, p, margin) == pytest.approx(loss(-difference, 1 - p, -margin), abs=1e-9)


@given(st.floats(0.01, 0.99), st.floats(-5, 5))
def test_the_loss_is_least_where_the_model_agrees_with_the_label(p: float, away: float) -> None:
    best = math.log(p / (1 - p))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    assert loss(best, p) == pytest.approx(entropy)
    assert loss(best + away, p) >= entropy - 1e-12


def loss_of_trl(rewards: Tensor, margin: Tensor | None, center: float | None) -> float:
    """`RewardTrainer.compute_loss` on a model that returns given rewards: first those of the chosen, (2 B, 1)."""
    trl = pytest.importorskip("trl")

    class GivenRewards(torch.nn.Module):
        def forward(self, **_: object) -> SimpleNamespace:
            return SimpleNamespace(logits=rewards)

    trainer = SimpleNamespace(
        model=GivenRewards(),
        args=SimpleNamespace(center_rewards_coefficient=center),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )
    inputs: dict[str, Any] = {"attention_mask": torch.ones(len(rewards), 4, dtype=torch.int64)}
    if margin is not None:
        inputs["margin"] = margin
    return float(trl.RewardTrainer.compute_loss(trainer, trainer.model, inputs))


@pytest.mark.parametrize("center", [None, 0.01], ids=["free", "centered"])
@pytest.mark.parametrize("with_margin", [False, True], ids=["hard", "margin"])
def test_losses_equal_those_of_trl(with_margin: bool, center: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = 3 * torch.randn(2 * 16, 1, dtype=torch.float64, generator=generator)
    margin = torch.rand(16, dtype=torch.float64, generator=generator) * 3
    theirs = loss_of_trl(rewards, margin if with_margin else None, center)
    # TRL has the chosen first and then the rejected; here each pair is a unit of its own.
    units = [
        Unit(((0,), (0,)), (Comparison(0, 1, 1.0, margin[i].item() if with_margin else 0.0),))
        for i in range(16)
    ]
    ours = rewards.squeeze(-1).view(2, 16).T.reshape(-1)
    assert summed_loss(ours, units, center).item() / 16 == pytest.approx(theirs, abs=1e-6)


def test_the_loss_of_scores_is_the_squared_error() -> None:
    units = [Unit(((0,),), scores=(1.0,)), Unit(((0,),), scores=(-0.5,))]
    assert summed_loss(torch.tensor([0.5, 0.5]), units, None).item() == pytest.approx(0.25 + 1.0)
