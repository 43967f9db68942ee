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
    PreferenceObjective,
    denoised,
    hinge_loss,
    ipo_loss,
    kto_loss,
    preference_loss,
    sigmoid_loss,
    smoothed,
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


def trl_loss(data: dict[str, Tensor], loss_type: str, label_smoothing: float = 0.0) -> float:
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
        label_smoothing=label_smoothing,
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


def trl_kto_loss(
    data: dict[str, Tensor], desirable: Tensor, weights: tuple[float, float]
) -> tuple[float, float]:
    """The mean loss and the KL baseline by TRL itself: `KTOTrainer._compute_loss` (trl 1.16.0,
    trainer/kto_trainer.py:1370), run on given token log-probabilities of responses and of mismatched responses."""
    kto_trainer = pytest.importorskip("trl.trainer.kto_trainer")
    ids = {
        1: data["policy"],
        2: data["policy_mismatched"],
    }  # the forward is told by the token which ones are asked for

    def forward(input_ids: Tensor, **_: object) -> SimpleNamespace:
        values = ids[int(input_ids[0, 0])]
        return SimpleNamespace(
            log_probs=values, entropy=torch.zeros_like(values), mean_logits=torch.zeros_like(values)
        )

    forward.training = True  # type: ignore[attr-defined]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        calculate_KL=True,
        precompute_ref_logps=True,
        loss_type="kto",
        beta=BETA,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = lambda model, batch: kto_trainer.KTOTrainer._compute_kl_logps(
        trainer, model, batch
    )
    mask = torch.cat([torch.zeros(len(data["mask"]), 1, dtype=torch.long), data["mask"]], dim=1)
    inputs = {
        "input_ids": torch.full_like(mask, 1),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "KL_input_ids": torch.full_like(mask, 2),
        "KL_attention_mask": torch.ones_like(mask),
        "KL_completion_mask": mask,
        "label": desirable,
        "ref_logps": data["reference"].sum(1),
        "ref_KL_logps": data["reference_mismatched"].sum(1),
    }
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, forward, inputs, False)
    return float(loss), float(trainer._metrics["train"]["kl"][0])


def our_losses(
    data: dict[str, Tensor],
    loss_type: LossType,
    p: float = 1.0,
    *,
    kl: float | None = None,
    **constants: float,
) -> Tensor:
    policy_chosen, policy_rejected = data["policy"].sum(1).chunk(2)
    reference_chosen, reference_rejected = data["reference"].sum(1).chunk(2)
    chosen_lengths, rejected_lengths = data["lengths"].chunk(2)
    return preference_loss(
        policy_chosen,
        policy_rejected,
        reference_chosen,
        reference_rejected,
        chosen_prob=torch.full_like(policy_chosen, p),
        objective=PreferenceObjective(loss_type, BETA, **constants),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        kl=kl,
    ).losses


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_hard_labels_give_trl_s_loss(loss_type: LossType) -> None:
    data = random_pairs()
    assert our_losses(data, loss_type).mean().item() == pytest.approx(trl_loss(data, loss_type), abs=1e-6)


@pytest.mark.parametrize("eps", [0.1, 0.35])
def test_robust_dpo_is_trl_s_robust_loss(eps: float) -> None:
    data = random_pairs()
    ours = our_losses(data, "robust", label_smoothing=eps).mean().item()
    assert ours == pytest.approx(trl_loss(data, "robust", eps), abs=1e-6)


def test_label_smoothing_is_the_one_that_trl_still_has() -> None:
    # TRL ignores label_smoothing with loss_type sigmoid since 0.29; its `aot` sorts the batch before the same formula,
    # so that on one pair it is cDPO.
    data = random_pairs(n=1)
    ours = our_losses(data, "sigmoid", label_smoothing=0.2).item()
    assert ours == pytest.approx(trl_loss(data, "aot", 0.2), abs=1e-6)
    assert ours != pytest.approx(trl_loss(data, "sigmoid"), abs=1e-2)


@pytest.mark.parametrize("policy_is_below", [False, True], ids=["positive KL", "KL clamped at 0"])
def test_kto_is_trl_s_kto_loss(policy_is_below: bool) -> None:
    data = random_pairs()
    generator = torch.Generator().manual_seed(4)
    shift = -1.0 if policy_is_below else 1.0
    other = -3 * torch.rand(data["policy"].shape, generator=generator)
    data["reference_mismatched"] = other * data["mask"]
    data["policy_mismatched"] = (other + shift * torch.rand(other.shape, generator=generator)) * data["mask"]
    first_desirable = torch.arange(14) < 7
    theirs, kl = trl_kto_loss(data, first_desirable, (1.5, 0.7))
    assert (kl == 0.0) == policy_is_below
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    assert our_losses(data, "kto", kl=kl, **weights).mean().item() == pytest.approx(theirs, abs=1e-6)
    # A soft label is the expectation of the two hard ones.
    flipped, _ = trl_kto_loss(data, ~first_desirable, (1.5, 0.7))
    soft = our_losses(data, "kto", 0.8, kl=kl, **weights).mean().item()
    assert soft == pytest.approx(0.8 * theirs + 0.2 * flipped, abs=1e-6)


def test_sigmoid_loss_by_hand() -> None:
    # delta = 2, beta = 0.5, so h = 1: -log s(1) = log(1 + e^-1) = 0.3132617, -log s(-1) = 1.3132617.
    delta = torch.tensor([2.0, 2.0, 2.0, -2.0])
    p = torch.tensor([1.0, 0.0, 0.75, 1.0])
    expected = [0.3132617, 1.3132617, 0.75 * 0.3132617 + 0.25 * 1.3132617, 1.3132617]
    assert sigmoid_loss(delta, p, 0.5).tolist() == pytest.approx(expected, abs=1e-6)


def one_pair(loss_type: LossType, p: float, **constants: float) -> float:
    """The loss of a pair whose log-ratios are 1 and -1; beta = 0.3."""
    one, zero = torch.ones(1), torch.zeros(1)
    objective = PreferenceObjective(loss_type, 0.3, **constants)
    return preference_loss(
        one, -one, zero, zero, chosen_prob=torch.tensor([p]), objective=objective
    ).losses.item()


def test_label_smoothing_is_conservative_dpo_and_composes_with_a_soft_label() -> None:
    # cDPO (Mitchell's note, TRL <= 0.28 `label_smoothing`): -(1-e) log s(h) - e log s(-h); e = 0.1, h = 0.6.
    # log s(0.6) = -0.4374879, log s(-0.6) = -1.0374879.
    assert one_pair("sigmoid", 1.0, label_smoothing=0.1) == pytest.approx(
        0.9 * 0.4374879 + 0.1 * 1.0374879, abs=1e-6
    )
    # p' = 0.8 * 0.9 + 0.2 * 0.1 = 0.74
    smooth = one_pair("sigmoid", 0.8, label_smoothing=0.1)
    assert smooth == pytest.approx(0.74 * 0.4374879 + 0.26 * 1.0374879, abs=1e-6)
    assert smooth == pytest.approx(one_pair("sigmoid", 0.74), abs=1e-6)


@given(p=st.floats(0, 1), eps=st.floats(0, 0.45))
def test_denoising_undoes_smoothing(p: float, eps: float) -> None:
    label = torch.tensor([p], dtype=torch.float64)
    assert denoised(smoothed(label, eps), eps).item() == pytest.approx(p, abs=1e-9)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    # Chowdhury et al., lemma on unbiasedness: over a label that is wrong one time in four, the expected loss is DPO's.
    expected = 0.75 * one_pair("robust", 1.0, label_smoothing=0.25) + 0.25 * one_pair(
        "robust", 0.0, label_smoothing=0.25
    )
    assert expected == pytest.approx(one_pair("sigmoid", 1.0), abs=1e-6)


def test_kto_loss_by_hand() -> None:
    # log-ratio 3, z0 = 1, beta = 0.5: h = 1, 1 - s(1) = 0.2689414, 1 - s(-1) = 0.7310586.
    ratio = torch.tensor([3.0, 3.0, 3.0])
    loss = kto_loss(ratio, torch.tensor([1.0, 0.0, 0.25]), 1.0, 0.5, 2.0, 3.0)
    expected = [2 * 0.2689414, 3 * 0.7310586, 0.25 * 2 * 0.2689414 + 0.75 * 3 * 0.7310586]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_kto_response_at_the_kl_of_the_policy_costs_half_its_weight() -> None:
    one = torch.ones(1)
    objective = PreferenceObjective("kto", 0.1, desirable_weight=1.0, undesirable_weight=3.0)
    loss = preference_loss(one, one, one * 0, one * 0, chosen_prob=one, objective=objective, kl=1.0)
    assert loss.losses.item() == pytest.approx((0.5 * 1.0 + 0.5 * 3.0) / 2)


def test_kto_without_a_kl_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="kl"):
        preference_loss(one, one, one, one, chosen_prob=one, objective=PreferenceObjective("kto"))


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
        objective=PreferenceObjective("ipo", 0.5),
        chosen_lengths=torch.tensor([4]),
        rejected_lengths=torch.tensor([3]),
    )
    # (4/4 - (-6)/3 - 1)^2 = (1 + 2 - 1)^2
    assert loss.losses.item() == pytest.approx(4.0)


def test_ipo_without_lengths_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="lengths"):
        preference_loss(one, one, one, one, chosen_prob=one, objective=PreferenceObjective("ipo"))


def test_hinge_loss_by_hand() -> None:
    # h = 0.5: max(0, 0.5) = 0.5 and max(0, 1.5) = 1.5; h = 3: 0 and 4.
    delta = torch.tensor([1.0, 1.0, 6.0, 6.0])
    p = torch.tensor([1.0, 0.25, 1.0, 0.5])
    assert hinge_loss(delta, p, 0.5).tolist() == pytest.approx([0.5, 0.25 * 0.5 + 0.75 * 1.5, 0.0, 2.0])


def test_policy_equal_to_reference_costs_log_2_and_prefers_nothing() -> None:
    logps = torch.tensor([-3.0, -7.5])
    p = torch.tensor([1.0, 0.8])
    loss = preference_loss(logps, logps + 1, logps, logps + 1, chosen_prob=p, objective=PreferenceObjective())
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
        objective=PreferenceObjective(),
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
    zeros, ones = torch.zeros(2), torch.ones(2)
    loss = preference_loss(x, -x, zeros, zeros, chosen_prob=ones, objective=PreferenceObjective())
    assert loss.losses.requires_grad
    assert not loss.rewards_chosen.requires_grad
