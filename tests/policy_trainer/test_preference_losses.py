from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policy_trainer.preference_losses import (
    LossType,
    hinge_loss,
    ipo_loss,
    preference_loss,
    sigmoid_loss,
)

BETA = 0.3


def random_pairs(n: int = 7, tokens: int = 5) -> dict[str, Tensor]:
    """Per-token log-probabilities of n pairs, (2n, tokens): chosen rows first; and ragged completion masks."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, tokens + 1, (2 * n,), generator=generator)
    mask = torch.arange(tokens)[None] < lengths[:, None]
    return {
        "policy": -torch.rand((2 * n, tokens), generator=generator) * 3 * mask,
        "reference": -torch.rand((2 * n, tokens), generator=generator) * 3 * mask,
        "mask": mask.long(),
        "lengths": lengths,
    }


def trl_loss(data: dict[str, Tensor], loss_type: str) -> float:
    """The mean loss by TRL itself: `DPOTrainer._compute_loss` (trl 1.16.0, trainer/dpo_trainer.py:1285), run on given
    token log-probabilities. Everything around it (model, accelerator) only hands tensors through."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")

    def model(values: Tensor) -> Callable[..., SimpleNamespace]:
        zeros = torch.zeros_like(values)
        outputs = SimpleNamespace(log_probs=values, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        forward = lambda **_: outputs  # noqa: E731
        forward.training = True  # type: ignore[attr-defined]
        return forward

    accelerator = SimpleNamespace(
        device="cpu",
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
    )
    policy = model(data["policy"])
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
        label_smoothing=0.0,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    chosen, rejected = data["reference"].sum(1).chunk(2)
    width = data["mask"].shape[1] + 1  # TRL predicts from one token of prompt
    mask = torch.cat([torch.zeros(len(data["mask"]), 1, dtype=torch.long), data["mask"]], dim=1)
    inputs = {
        "input_ids": torch.ones(len(mask), width, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, policy, inputs, False)
    return float(loss)


def our_losses(data: dict[str, Tensor], loss_type: LossType, p: float = 1.0) -> Tensor:
    policy_chosen, policy_rejected = data["policy"].sum(1).chunk(2)
    reference_chosen, reference_rejected = data["reference"].sum(1).chunk(2)
    chosen_lengths, rejected_lengths = data["lengths"].chunk(2)
    return preference_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        chosen_prob=torch.full_like(policy_chosen, p),
        beta=BETA,
        loss_type=loss_type,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    ).losses


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_hard_labels_give_trl_s_loss(loss_type: LossType) -> None:
    data = random_pairs()
    assert our_losses(data, loss_type).mean().item() == pytest.approx(trl_loss(data, loss_type), abs=1e-6)


def test_sigmoid_loss_by_hand() -> None:
    # delta = 2, beta = 0.5, so h = 1: -log s(1) = log(1 + e^-1) = 0.3132617, -log s(-1) = 1.3132617.
    delta = torch.tensor([2.0, 2.0, 2.0, -2.0])
    p = torch.tensor([1.0, 0.0, 0.75, 1.0])
    expected = [0.3132617, 1.3132617, 0.75 * 0.3132617 + 0.25 * 1.3132617, 1.3132617]
    assert sigmoid_loss(delta, p, 0.5).tolist() == pytest.approx(expected, abs=1e-6)


def test_constant_soft_label_is_conservative_dpo() -> None:
    # cDPO (Mitchell's note, TRL <= 0.28 `label_smoothing`): -(1-e) log s(h) - e log s(-h); e = 0.1, h = 0.6.
    # log s(0.6) = -0.4374879, log s(-0.6) = -1.0374879.
    loss = sigmoid_loss(torch.tensor([2.0]), torch.tensor([0.9]), 0.3)
    assert loss.item() == pytest.approx(0.9 * 0.4374879 + 0.1 * 1.0374879, abs=1e-6)


def test_ipo_loss_by_hand() -> None:
    # c = 1 / (2 * 0.25) = 2: (1 - 2)^2 = 1 and (1 + 2)^2 = 9; half and half is 5.
    delta = torch.tensor([1.0, 1.0, 1.0])
    assert ipo_loss(delta, torch.tensor([1.0, 0.0, 0.5]), 0.25).tolist() == pytest.approx([1.0, 9.0, 5.0])


def test_ipo_averages_over_the_tokens_of_each_response() -> None:
    loss = preference_loss(
        torch.tensor([-2.0]),
        torch.tensor([-9.0]),
        torch.tensor([-6.0]),
        torch.tensor([-3.0]),
        chosen_prob=torch.ones(1),
        beta=0.5,
        loss_type="ipo",
        chosen_lengths=torch.tensor([4]),
        rejected_lengths=torch.tensor([3]),
    )
    # (4/4 - (-6)/3 - 1)^2 = (1 + 2 - 1)^2
    assert loss.losses.item() == pytest.approx(4.0)


def test_ipo_without_lengths_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="lengths"):
        preference_loss(one, one, one, one, chosen_prob=one, beta=0.1, loss_type="ipo")


def test_hinge_loss_by_hand() -> None:
    # h = 0.5: max(0, 0.5) = 0.5 and max(0, 1.5) = 1.5; h = 3: 0 and 4.
    delta = torch.tensor([1.0, 1.0, 6.0, 6.0])
    p = torch.tensor([1.0, 0.25, 1.0, 0.5])
    assert hinge_loss(delta, p, 0.5).tolist() == pytest.approx([0.5, 0.25 * 0.5 + 0.75 * 1.5, 0.0, 2.0])


def test_policy_equal_to_reference_costs_log_2_and_prefers_nothing() -> None:
    logps = torch.tensor([-3.0, -7.5])
    loss = preference_loss(logps, logps + 1, logps, logps + 1, chosen_prob=torch.tensor([1.0, 0.8]), beta=0.1)
    assert loss.losses.tolist() == pytest.approx([0.6931472, 0.6931472], abs=1e-6)
    assert loss.margins.tolist() == [0.0, 0.0]
    assert loss.accuracies.tolist() == [0.0, 0.0]


def test_rewards_margins_and_accuracies_by_hand() -> None:
    loss = preference_loss(
        torch.tensor([-1.0, -4.0]),
        torch.tensor([-5.0, -2.0]),
        torch.tensor([-2.0, -2.0]),
        torch.tensor([-3.0, -2.5]),
        chosen_prob=torch.ones(2),
        beta=0.1,
    )
    assert loss.rewards_chosen.tolist() == pytest.approx([0.1, -0.2])
    assert loss.rewards_rejected.tolist() == pytest.approx([-0.2, 0.05])
    assert loss.margins.tolist() == pytest.approx([0.3, -0.25])
    assert loss.accuracies.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("loss", [sigmoid_loss, ipo_loss, hinge_loss])
@given(delta=st.floats(-20, 20), p=st.floats(0, 1))
def test_swapping_the_pair_and_its_label_changes_nothing(
    loss: Callable[[Tensor, Tensor, float], Tensor], delta: float, p: float
) -> None:
    d, q = torch.tensor([delta], dtype=torch.float64), torch.tensor([p], dtype=torch.float64)
    assert loss(d, q, 0.2).item() == pytest.approx(loss(-d, 1 - q, 0.2).item(), rel=1e-9, abs=1e-9)


@given(delta=st.floats(-5, 5), p=st.floats(0.01, 0.99))
def test_gradient_of_the_sigmoid_loss_vanishes_where_the_policy_agrees_with_the_label(
    delta: float, p: float
) -> None:
    # d loss / d delta = beta * (s(beta * delta) - p), derived by hand from equation 7.
    d = torch.tensor([delta], dtype=torch.float64, requires_grad=True)
    sigmoid_loss(d, torch.tensor([p], dtype=torch.float64), 0.7).sum().backward()
    assert d.grad is not None
    implied = 1 / (1 + torch.exp(torch.tensor(-0.7 * delta, dtype=torch.float64)))
    assert d.grad.item() == pytest.approx(0.7 * (implied.item() - p), abs=1e-9)


def test_rewards_carry_no_gradient_and_losses_do() -> None:
    x = torch.zeros(2, requires_grad=True)
    loss = preference_loss(x, -x, torch.zeros(2), torch.zeros(2), chosen_prob=torch.ones(2), beta=0.1)
    assert loss.losses.requires_grad
    assert not loss.rewards_chosen.requires_grad
