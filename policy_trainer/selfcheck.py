"""Start-up self-check: what would make training meaningless is found before the first step, and named.

Users of other trainers meet these as "negative KL" or "ratio above 10" warnings hours into a run; each has a cause
that a first small rollout shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from policy_trainer.batching import SequenceBatch, collate, pad_right
from policy_trainer.logprobs import token_logprobs
from policy_trainer.reward_source import Cause, Reward, RewardSource, main_cause
from policy_trainer.rollout import RolloutEngine, Sampled, decode_response
from rlaif.chat import render
from rlaif.errors import SelfCheckError
from rlaif.types import Conversation, with_response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TRUNCATION = "--reward_truncation"
"""The flag of the online trainers that decides about conversations too long for the scorer."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
"""Largest mean difference of log-probabilities, in nats, between two ways to compute them. Measured elsewhere for
bfloat16 with other batch shapes: standard deviation 0.05 (facts of trl#6789); fp32 agrees to 1e-5."""


@dataclass(frozen=True, slots=True)
class SelfCheckReport:
    """What the self-check measured.

    Attributes:
        parity: mean |log-probability of the engine - of the trainer| per token, in nats.
        kl: mean k1 KL per response between policy and reference; None where it was not checked.
        scores: normalised rewards of the sampled responses, missing ones left out.
        missing: how many rewards are missing.
        cause: why most of those are; None if none is.
        unlike: why policy and reference may differ; None where they should not.
    """

    parity: float
    kl: float | None
    scores: tuple[float, ...]
    missing: int = 0
    cause: Cause | None = None
    unlike: str | None = None

    def __str__(self) -> str:
        """One line for the log."""
        mean = math.fsum(self.scores) / len(self.scores)
        spread = math.sqrt(math.fsum((s - mean) ** 2 for s in self.scores) / len(self.scores))
        kl = f"not checked, as {self.unlike}" if self.kl is None else f"{self.kl:.1e}"
        return (
            f"self-check passed: engine/trainer log-probabilities differ by {self.parity:.1e}, KL to reference {kl}, "
            f"rewards {mean:.2f} +- {spread:.2f} over {len(self.scores)} responses"
            + (
                ""
                if self.cause is None
                else f"; those of {self.missing} more are missing, {self.cause}{self.cause.advice(TRUNCATION)}"
            )
        )


@torch.no_grad()
def self_check(
    *,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    unlike: str | None,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    engine: RolloutEngine,
    source: RewardSource,
    prompts: Sequence[Conversation],
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> SelfCheckReport:
    """Sample a few responses and check everything that training relies on.

    Args:
        policy: as it will be trained.
        reference: the frozen model.
        unlike: why policy and reference may differ, for the report; None where they should be equal now (a fresh run
            without `ref_model`).
        tokenizer: the policy's, with its chat template.
        eos_ids: tokens that end a response.
        engine: samples from `policy`.
        source: gives the rewards.
        prompts: a few prompts; 8 to 16 will do.
        prompt_ids: the same, encoded with the generation prompt.
        max_new_tokens: as in training.
        temperature: as in training.
        seed: of the sampling.

    Raises:
        SelfCheckError: with the cause.
        RewardServerError: the reward server cannot be reached or used.
    """
    check_tokens(tokenizer, eos_ids, prompts, prompt_ids)
    sampled = engine.generate(prompt_ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    batch = collate([prompt_ids[s.prompt_index] for s in sampled], [s.response_ids for s in sampled])
    batch = batch.to(policy.device)
    parity = check_parity(policy, batch, sampled, temperature)
    kl = check_reference(policy, reference, batch, temperature) if unlike is None else None
    conversations = [
        with_response(
            prompts[s.prompt_index], decode_response(tokenizer, prompt_ids[s.prompt_index], s, eos_ids)
        )
        for s in sampled
    ]
    rewards = source.score(conversations)
    scores = check_rewards(rewards, source.info().name)
    return SelfCheckReport(parity, kl, scores, len(rewards) - len(scores), main_cause(rewards), unlike)


def check_tokens(
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    prompts: Sequence[Conversation],
    prompt_ids: Sequence[Sequence[int]],
) -> None:
    """EOS and PAD differ, and prompts are open: a response can follow them.

    Raises:
        SelfCheckError: with the cause.
    """
    # Of several tokens that end a response, PAD may be one that the chat template does not write (Qwen's is).
    if tokenizer.pad_token_id == tokenizer.eos_token_id or set(eos_ids) == {tokenizer.pad_token_id}:
        raise SelfCheckError(
            f"PAD and EOS are the same token ({tokenizer.pad_token!r}): whoever masks padding by its id would never "
            "learn to stop; give the tokenizer a PAD of its own"
        )
    closed = [
        ids
        for prompt, ids in zip(prompts, prompt_ids, strict=True)
        if len(ids) > 1 and _is_closed(tokenizer, eos_ids, prompt, ids[-1])
    ]
    if closed:
        raise SelfCheckError(
            f"{len(closed)} of {len(prompt_ids)} encoded prompts end with EOS, so the policy is asked to go on after "
            "the end: the chat template has no generation prompt; choose another with --chat_template"
        )


def _is_closed(
    tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], prompt: Conversation, last: int
) -> bool:
    if last == tokenizer.eos_token_id:
        return True
    if last not in eos_ids:
        return False
    # A generation prompt may be a token that ends a response as well (Phi-3's <|assistant|> is).
    opened, as_it_is = (render(tokenizer, prompt, add_generation_prompt=asked) for asked in (True, False))
    return opened == as_it_is


def check_parity(
    policy: PreTrainedModel, batch: SequenceBatch, sampled: Sequence[Sampled], temperature: float
) -> float:
    """The engine's log-probabilities are the trainer's: the ratio of the first update would be 1.

    Raises:
        SelfCheckError: they differ; the message names what explains the difference.
    """
    mask = batch.response_mask.cpu()
    engine = pad_right([torch.tensor(s.logprobs) for s in sampled], batch.response_len)

    def difference(at: float) -> tuple[float, Tensor]:
        ours = token_logprobs(policy, batch.input_ids, batch.attention_mask, batch.response_len, at)
        d = (ours.logprobs.cpu() - engine)[mask]
        return float(d.abs().mean()), d

    allowed = TOLERANCE.get(policy.dtype, 1e-3)
    parity, d = difference(temperature)
    if parity <= allowed:
        return parity
    found = f"the engine's log-probabilities differ from the trainer's by {parity:.3g} nats per token"
    if policy.training or difference(temperature)[0] != parity:
        raise SelfCheckError(f"{found}: two forwards of the policy differ as well, so dropout is on")
    if temperature != 1.0 and difference(1.0)[0] <= allowed:
        raise SelfCheckError(
            f"{found}: the engine reports them at temperature 1 and not at {temperature} (vLLM: logprobs_mode "
            "must be processed_logprobs)"
        )
    if bool((d <= allowed).all()):
        raise SelfCheckError(
            f"{found}, always downwards: the engine samples a truncated distribution (top-k, top-p or min-p)"
        )
    raise SelfCheckError(f"{found}: other weights, number format, position ids or padding in the engine")


def check_reference(
    policy: PreTrainedModel, reference: PreTrainedModel, batch: SequenceBatch, temperature: float
) -> float:
    """Before the first step the policy is the reference, so the KL is 0.

    Raises:
        SelfCheckError: it is not.
    """
    arguments = (batch.input_ids, batch.attention_mask, batch.response_len, temperature)
    d = token_logprobs(policy, *arguments).logprobs - token_logprobs(reference, *arguments).logprobs
    kl = float(d[batch.response_mask].sum() / len(d))
    if float(d[batch.response_mask].abs().max()) > TOLERANCE.get(policy.dtype, 1e-3):
        raise SelfCheckError(
            f"the KL between the untrained policy and its reference is {kl:.3g} nats and should be 0: they are "
            "different weights or in different number formats, or dropout is on"
        )
    return kl


def check_rewards(rewards: Sequence[Reward], name: str) -> tuple[float, ...]:
    """The reward server tells responses apart, on a scale that training can use.

    Raises:
        SelfCheckError: no reward could be had, or all are equal, or they are far from unit scale.
    """
    values = tuple(r.value for r in rewards if r.value is not None)
    if not values:
        cause = main_cause(rewards)
        why = "" if cause is None else f"; {cause}{cause.advice(TRUNCATION)}"
        raise SelfCheckError(f"{name} rewarded none of {len(rewards)} sampled responses{why}")
    if len(values) > 1 and max(values) == min(values):
        raise SelfCheckError(
            f"{name} gave each of {len(values)} sampled responses the same reward {values[0]:.4g}: nothing can be "
            "learned from it; look at the model, its chat template and what the policy writes (--no-self_check if the "
            "reward is rare by nature)"
        )
    if max(map(abs, values)) > 100:
        raise SelfCheckError(
            f"{name} sends rewards as large as {max(map(abs, values)):.4g}, far from unit scale: its normalisation "
            "(center, scale) is missing"
        )
    return values
