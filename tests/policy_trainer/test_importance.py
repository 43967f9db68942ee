"""Importance weights between engine and trainer: worked by hand, and against the code that TRL runs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from policy_trainer.config import ImportanceSamplingMode
from policy_trainer.importance import difference, importance_weights, probed_difference, weight_metrics
from policy_trainer.ppo_losses import policy_loss
from policy_trainer.rollout import Sampled
from tests.policy_trainer import tiny

TRAINER = torch.tensor([[0.6, 0.3, 0.5], [0.2, 0.8, 0.9]], dtype=torch.float64).log()
ENGINE = torch.tensor([[0.2, 0.6, 0.5], [0.1, 0.8, 0.1]], dtype=torch.float64).log()
MASK = torch.tensor([[True, True, True], [True, True, False]])
# pi / mu by hand: 3, 1/2, 1 with product 3/2; and 2, 1 (the 9 of padding does not count) with product 2.


@pytest.mark.parametrize(
    ("mode", "clip_max", "expected"),
    [
        ("token_truncate", 2.5, [[2.5, 0.5, 1.0], [2.0, 1.0, 1.0]]),
        ("token_mask", 2.5, [[0.0, 0.5, 1.0], [2.0, 1.0, 1.0]]),
        ("sequence_truncate", 1.75, [[1.5, 1.5, 1.5], [1.75, 1.75, 1.75]]),
        ("sequence_mask", 1.75, [[1.5, 1.5, 1.5], [0.0, 0.0, 0.0]]),
    ],
)
def test_weights_by_hand(mode: ImportanceSamplingMode, clip_max: float, expected: list[list[float]]) -> None:
    found = importance_weights(TRAINER, ENGINE, MASK, mode=mode, clip_max=clip_max)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_an_engine_that_agrees_to_the_last_bit_changes_nothing(mode: ImportanceSamplingMode) -> None:
    logprobs = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) - 3
    mask = torch.ones(5, 7, dtype=torch.bool)
    weights = importance_weights(logprobs, logprobs.clone(), mask, mode=mode, clip_max=2.0)
    assert torch.equal(weights, torch.ones(5, 7))
    advantages = torch.randn(5, 7)
    plain = policy_loss(logprobs + 0.1, logprobs, advantages, mask, 0.2)
    weighted = policy_loss(logprobs + 0.1, logprobs, advantages, mask, 0.2, weights)
    assert torch.equal(plain.loss, weighted.loss)


def test_a_weight_scales_its_tokens_part_of_the_gradient() -> None:
    """At ratio 1 the gradient by a token's log-probability is -weight * advantage."""
    logprobs = TRAINER.clone().requires_grad_()
    advantages = torch.tensor([[1.0, -2.0, 4.0], [0.5, 3.0, 7.0]], dtype=torch.float64)
    weights = importance_weights(TRAINER, ENGINE, MASK, mode="token_truncate", clip_max=2.5)
    torch.autograd.backward(policy_loss(logprobs, TRAINER, advantages, MASK, 0.2, weights).loss)
    expected = torch.tensor([[-2.5, 1.0, -4.0], [-1.0, -3.0, 0.0]], dtype=torch.float64)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, expected, atol=1e-12, rtol=0)


def test_a_probability_that_the_engine_nearly_excluded_stays_finite() -> None:
    engine = torch.tensor([[-9999.0]])
    found = importance_weights(
        torch.zeros(1, 1), engine, torch.ones(1, 1, dtype=torch.bool), mode="token_mask", clip_max=2.0
    )
    assert found.item() == 0.0


def test_metrics_by_hand() -> None:
    """|log| of 3, 1/2, 1, 2, 1: mean log(12) / 5, maximum log(3)."""
    found = difference(TRAINER, ENGINE, MASK).metrics()
    assert found["sampling/sampling_logp_difference/mean"] == pytest.approx(math.log(12) / 5, abs=1e-12)
    assert found["sampling/sampling_logp_difference/max"] == pytest.approx(math.log(3), abs=1e-12)
    weights = importance_weights(TRAINER, ENGINE, MASK, mode="token_truncate", clip_max=2.5)
    ratios: Tensor | dict[str, float] = weight_metrics(weights, MASK)
    assert list(ratios.values()) == pytest.approx([0.5, 7.0 / 5, 2.5], abs=1e-12)


@pytest.mark.parametrize("micro_batch_tokens", [1, 10, 10**6])
@pytest.mark.parametrize(("responses", "read"), [(3, [0, 1, 2]), (16, [0, 2, 4, 6, 8, 10, 12, 14])])
def test_a_few_responses_spread_over_a_step_are_probed(
    responses: int, read: list[int], micro_batch_tokens: int
) -> None:
    """The engine is wrong by 0.25 nats at the second token of response 1, and by 0.5 at that of response 2."""
    policy, prompts = tiny.model(), [[1, 6, 7], [8]]
    prompt_ids = [prompts[i % 2] for i in range(responses)]
    sampled = []
    for i, prompt in enumerate(prompt_ids):
        ids = [6 + i % 3, 2]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + ids])).logits[0] / 0.7
        at = len(prompt) - 1
        first, second = (float(logits[at + k].log_softmax(-1)[ids[k]]) for k in (0, 1))
        sampled.append(Sampled(i % 2, ids, [first, second + {1: 0.25, 2: 0.5}.get(i, 0.0)], True))
    passes: list[torch.Size] = []
    policy.model.register_forward_pre_hook(
        lambda _, args, given: passes.append((args[0] if args else given["input_ids"]).shape),
        with_kwargs=True,
    )
    found = probed_difference(policy, prompt_ids, sampled, 0.7, micro_batch_tokens)
    assert all(rows == 1 or rows * width <= micro_batch_tokens for rows, width in passes)
    wrong = [{1: 0.25, 2: 0.5}.get(i, 0.0) for i in read]
    assert found.mean == pytest.approx(sum(wrong) / (2 * len(read)), abs=1e-5)
    assert found.max == pytest.approx(max(wrong), abs=1e-5)
