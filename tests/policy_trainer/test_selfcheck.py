"""Each fault that the self-check exists for, made for real, is found and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from policy_trainer.reward_source import FunctionReward, Reward
from policy_trainer.rollout import HFRollout, Sampled
from policy_trainer.selfcheck import SelfCheckReport, self_check
from rlaif.chat import BUILTIN_TEMPLATES, encode_prompt
from rlaif.errors import SelfCheckError
from rlaif.types import Conversation, user_prompt
from tests.policy_trainer import tiny

PROMPTS = [user_prompt(f"w{i} w{i + 1}") for i in range(12)]


class Altered:
    """An engine whose samples are those of another temperature, or are changed afterwards."""

    def __init__(
        self, engine: HFRollout, change: Callable[[Sampled], Sampled], temperature: float | None = None
    ) -> None:
        self._engine = engine
        self._change = change
        self._temperature = temperature

    def generate(self, prompt_ids: Sequence[Sequence[int]], **arguments: Any) -> list[Sampled]:
        if self._temperature is not None:
            arguments["temperature"] = self._temperature
        return [self._change(s) for s in self._engine.generate(prompt_ids, **arguments)]


def check(
    engine: Any = None,
    *,
    policy: torch.nn.Module | None = None,
    reference: torch.nn.Module | None = None,
    rewards: Callable[..., Any] = tiny.share_of_w0,
    source: FunctionReward | None = None,
    tokenizer: Any = None,
    temperature: float = 0.7,
    unlike: str | None = None,
    eos_ids: Sequence[int] = (2,),
) -> SelfCheckReport:
    policy = policy or tiny.model()
    tokenizer = tokenizer or tiny.tokenizer()
    return self_check(
        policy=policy,  # type: ignore[arg-type]
        reference=reference or tiny.model(),  # type: ignore[arg-type]
        unlike=unlike,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        engine=engine or HFRollout(tiny.model(), eos_ids),
        source=source or FunctionReward(rewards),
        prompts=PROMPTS,
        prompt_ids=[encode_prompt(tokenizer, p, max_length=64) for p in PROMPTS],
        max_new_tokens=12,
        temperature=temperature,
        seed=0,
    )


def test_a_sound_set_up_passes() -> None:
    report = check()
    assert report.parity < 1e-5
    assert report.kl == 0.0
    assert len(report.scores) == 12
    assert "self-check passed" in str(report)


def test_missing_rewards_are_counted_with_the_reason_of_most_whatever_its_numbers() -> None:
    """Four reasons of two kinds: three conversations are too long, each by another length, and one is refused."""
    reasons = [f"out_of_range: the conversation has {n} tokens" for n in (754, 803, 912)]
    missing = [Reward(None, None, reason) for reason in ("unavailable: busy", *reasons)]

    class Partly(FunctionReward):
        def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
            return [*missing, *super().score(conversations)[len(missing) :]]

    report = str(check(source=Partly(tiny.share_of_w0)))
    assert "over 8 responses; those of 4 more are missing, 3 because: " + reasons[0] in report
    assert "--reward_truncation left" in report
    assert "missing" not in str(check())


def test_an_engine_that_reports_at_temperature_1() -> None:
    """vLLM's default `raw_logprobs`."""
    with pytest.raises(SelfCheckError, match=r"at temperature 1 and not at 0\.7"):
        check(Altered(HFRollout(tiny.model(), [2]), lambda s: s, temperature=1.0))


def test_an_engine_that_samples_a_truncated_distribution() -> None:
    """Renormalised log-probabilities of a truncated distribution are too high, each of them."""
    with pytest.raises(SelfCheckError, match="truncated distribution"):
        check(
            Altered(
                HFRollout(tiny.model(), [2]), lambda s: s._replace(logprobs=[x + 0.2 for x in s.logprobs])
            )
        )


def test_an_engine_with_other_weights() -> None:
    with pytest.raises(SelfCheckError, match="other weights"):
        check(HFRollout(tiny.model(seed=1), [2]))


def test_dropout_left_on() -> None:
    policy = tiny.model()
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.train()
    with pytest.raises(SelfCheckError, match="dropout is on"):
        check(policy=policy)


def test_a_reference_that_is_another_model() -> None:
    with pytest.raises(SelfCheckError, match="should be 0"):
        check(reference=tiny.model(seed=1))


def test_a_policy_that_was_trained_may_differ_from_its_reference_and_the_report_says_why() -> None:
    report = check(reference=tiny.model(seed=1), unlike="the policy has been trained already")
    assert "KL to reference not checked, as the policy has been trained already," in str(report)


def test_pad_that_is_eos() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(SelfCheckError, match="PAD and EOS are the same"):
        check(tokenizer=tokenizer)


def test_a_template_that_closes_the_prompt() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = BUILTIN_TEMPLATES["plain"] + " {{ eos_token }}"
    with pytest.raises(SelfCheckError, match="no generation prompt"):
        check(tokenizer=tokenizer)


def test_a_template_that_closes_the_prompt_with_an_eos_that_is_not_the_tokenizers() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = BUILTIN_TEMPLATES["plain"] + " <unk>"
    with pytest.raises(SelfCheckError, match="no generation prompt"):
        check(tokenizer=tokenizer, eos_ids=[2, 3])


def test_pad_may_be_one_of_several_tokens_that_end_a_response() -> None:
    """Qwen-Instruct: EOS <|im_end|> of the template, and <|endoftext|>, which is PAD too."""
    assert len(check(eos_ids=[2, 0]).scores) == 12


def test_the_generation_prompt_may_be_a_token_that_ends_a_response() -> None:
    """Phi-3: <|assistant|> begins a turn, and a response that starts another one ends there."""
    assert len(check(eos_ids=[2, 5]).scores) == 12


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        pytest.param(lambda p, r: [None] * len(r), "rewarded none of 12", id="all missing"),
        pytest.param(lambda p, r: [3.0] * len(r), "the same reward 3", id="all equal"),
        pytest.param(lambda p, r: [500.0 + len(x) for x in r], "normalisation", id="far from unit scale"),
    ],
)
def test_rewards_that_teach_nothing(rewards: Callable[..., Any], message: str) -> None:
    with pytest.raises(SelfCheckError, match=message):
        check(rewards=rewards)
