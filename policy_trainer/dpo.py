"""`rlaif train dpo`: iterative DPO against a reward server; with one update per round it is online DPO.

Each step is one round: sample G responses to each of B prompts from the current policy, have them scored, make at most
one pair per prompt with a soft label, and take DPO epochs over the pairs. `train` reads so from top to bottom; the
losses are in `preference_losses`, the pairs in `pairs`, the round as data in `rounds`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from policy_trainer import optim
from policy_trainer.batching import collate, length_buckets
from policy_trainer.config import DPOConfig
from policy_trainer.logprobs import token_logprobs
from policy_trainer.online import (
    OnlineTrainer,
    Prompts,
    Purpose,
    check_missing,
    served_reward,
    session,
)
from policy_trainer.pairs import PairSet, build_pairs
from policy_trainer.preference_losses import LossType, preference_loss
from policy_trainer.reward_source import RewardSource
from policy_trainer.rounds import Round, collect_round, forget_rounds, store_round, stored_round
from rlaif.errors import QualityError, RewardServerError
from rlaif.types import to_dicts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(config: DPOConfig) -> None:
    """Train against the reward server at `config.reward_server`."""
    with served_reward(config) as source:
        train(config, source)


def train(config: DPOConfig, source: RewardSource) -> None:
    """Run iterative DPO until `config.max_steps`, or go on from the run directory's last checkpoint.

    Seeds and the order of the data are functions of the step, and a round is stored before it is learned from, so a
    run that was interrupted anywhere ends where the uninterrupted one does.

    Args:
        config: the run.
        source: rewards; a `RewardClient` outside of tests.

    Raises:
        QualityError: too many rewards are missing, or a loss, gradient or metric is not finite.
        KeyboardInterrupt: SIGTERM or SIGINT asked for an end; a checkpoint has been written.
        RlaifError: bad input, see the message.
    """
    with session(Trainer, config, source, method="dpo") as at_work:
        trainer = at_work.trainer
        while at_work.unfinished:
            began = time.perf_counter()

            # 1. Sample, score, and read with the reference while the server scores; or take up the round that
            #    was under way when the run was interrupted.
            round_ = stored_round(config.output_dir, trainer.step, source.info().version)
            if round_ is None:
                try:
                    round_ = trainer.collect()
                    scored = [i for i, r in enumerate(round_.rewards) if r.value is not None]
                    check_missing(round_.rewards, scored, config.max_missing_rewards, trainer.step + 1)
                except (RewardServerError, QualityError):
                    trainer.save()
                    raise
                store_round(config.output_dir, round_)

            # 2. Pairs: at most one per prompt, with its soft label. Ties and missing rewards make none.
            pairs = trainer.pair(round_)
            examples = pair_examples(round_, pairs, trainer.prompts, config.num_generations)
            updating = time.perf_counter()

            # 3. Epochs over the pairs, in minibatches; one optimiser step each.
            for update, rows in enumerate(trainer.minibatches(len(examples))):
                if update < trainer.updates:  # learned before the interruption
                    continue
                trainer.update([examples[i] for i in rows])
                if at_work.stop:
                    trainer.save()
                    raise KeyboardInterrupt
            updated = time.perf_counter()

            # 4. Book-keeping.
            learning_rate, sums = trainer.learning_rate(), trainer.sums
            trainer.next_step()
            metrics = {
                "episode": trainer.step * config.responses_per_step,
                **round_metrics(round_),
                **pair_metrics(pairs, sums),
                "lr": learning_rate,
                **{f"time/{part}": seconds for part, seconds in round_.seconds.items()},
                "time/update": updated - updating,
                "time/step": updated - began,
            }
            at_work.end_step(
                metrics,
                transcripts(round_, trainer.prompts),
                score=metrics["objective/scores"],
                kl=metrics["objective/kl"],
                pairs=len(examples),
            )


class PairExample(NamedTuple):
    """A pair to learn from: token ids, summed reference log-probabilities in nats, and P(chosen preferred)."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    reference_chosen: float
    reference_rejected: float
    chosen_prob: float


class PairSums(NamedTuple):
    """Sums over the pairs of some optimiser steps; `grad_norm` is summed over the `updates`."""

    pairs: float = 0.0
    loss: float = 0.0
    rewards_chosen: float = 0.0
    rewards_rejected: float = 0.0
    margins: float = 0.0
    accuracies: float = 0.0
    logps_chosen: float = 0.0
    logps_rejected: float = 0.0
    updates: float = 0.0
    grad_norm: float = 0.0

    def plus(self, other: PairSums) -> PairSums:
        """The sums of both."""
        return PairSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(kw_only=True)
class Trainer(OnlineTrainer):
    """The policy, how far the round under way has been learned from, and the operations of the loop.

    Attributes:
        updates: optimiser steps taken in the round under way.
        sums: what they amounted to.
    """

    config: DPOConfig
    updates: int = 0
    sums: PairSums = field(default_factory=PairSums)

    def collect(self) -> Round:
        """This step's round: responses of the current policy, their rewards and reference log-probabilities.

        Raises:
            RewardServerError: the server cannot be reached or used.
        """
        initial = self.config.reference == "initial"
        return collect_round(self, log_ratios_to=self.reference if initial else self.policy)

    def pair(self, round_: Round) -> PairSet:
        """The round's preference pairs."""
        config = self.config
        groups = round_.groups(config.num_generations)
        return build_pairs(
            [[s.response for s in group] for group in groups],
            [[s.reward.value for s in group] for group in groups],
            [[s.reward.raw for s in group] for group in groups],
            strategy=config.pair_strategy,
            threshold=config.tie_threshold,
            soft_labels=config.soft_labels,
            label_temperature=config.label_temperature,
            seed=optim.step_seed(config.seed, Purpose.PAIRING, self.step),
        )

    def minibatches(self, pairs: int) -> list[list[int]]:
        """Which pairs each of this round's optimiser steps takes.

        Every epoch has an order of its own; its last minibatch may be smaller.
        """
        size = self.config.per_device_train_batch_size
        orders = [
            optim.permutation(pairs, optim.step_seed(self.config.seed, Purpose.SHUFFLING, self.step, epoch))
            for epoch in range(self.config.num_train_epochs)
        ]
        return [order[i : i + size] for order in orders for i in range(0, pairs, size)]

    def update(self, examples: Sequence[PairExample]) -> None:
        """One optimiser step.

        Raises:
            QualityError: the gradient is not finite; the policy has not been changed by it.
        """
        optim.set_learning_rate(self.optimizer, self.learning_rate())
        self.optimizer.zero_grad(set_to_none=True)
        sums = accumulate_gradients(
            self.policy,
            examples,
            beta=self.config.beta,
            loss_type=self.config.loss_type,
            temperature=self.config.temperature,
            micro_batch_tokens=self.config.micro_batch_tokens,
        )
        norm = optim.clip_gradients(list(self.policy.parameters()), self.config.max_grad_norm, "policy")
        self.optimizer.step()
        self.updates += 1
        self.sums = self.sums.plus(sums).plus(PairSums(updates=1.0, grad_norm=float(norm)))

    def next_step(self) -> None:
        """The round is done."""
        self.step, self.updates, self.sums = self.step + 1, 0, PairSums()

    @property
    def untrained(self) -> bool:
        """Whether no update has been made yet."""
        return self.step == 0 and self.updates == 0

    def info(self) -> dict[str, Any]:
        """See `OnlineTrainer.info`."""
        return {**super().info(), "updates": self.updates, "sums": list(self.sums)}

    def restore(self, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """See `OnlineTrainer.restore`."""
        super().restore(state, info)
        self.updates, self.sums = info["updates"], PairSums(*info["sums"])

    def save(self) -> None:
        """Write a checkpoint of the completed rounds and of the one under way."""
        super().save()
        forget_rounds(self.config.output_dir, self.step)


def pair_examples(round_: Round, pairs: PairSet, prompts: Prompts, num_generations: int) -> list[PairExample]:
    """The token ids and reference log-probabilities of each pair."""
    groups = round_.groups(num_generations)
    examples = []
    for pair in pairs.pairs:
        chosen, rejected = groups[pair.group][pair.chosen], groups[pair.group][pair.rejected]
        examples.append(
            PairExample(
                prompts.ids[chosen.prompt],
                chosen.response_ids,
                rejected.response_ids,
                chosen.reference_logprob,
                rejected.reference_logprob,
                pair.chosen_prob,
            )
        )
    return examples


def accumulate_gradients(
    policy: PreTrainedModel,
    examples: Sequence[PairExample],
    *,
    beta: float,
    loss_type: LossType,
    temperature: float,
    micro_batch_tokens: int,
) -> PairSums:
    """Add the gradient of the mean loss over `examples` to the policy's parameters.

    Each micro-batch adds its *sum* divided by the pair count of the whole minibatch, so neither the
    micro-batch size, nor the padding, nor the order of the buckets changes the gradient.

    Args:
        policy: in eval mode (no dropout), with gradients.
        examples: one optimiser step's pairs.
        beta: of the loss.
        loss_type: of the loss.
        temperature: of sampling.
        micro_batch_tokens: padded tokens in one forward pass; both responses of a pair go through one.
    """
    lengths = [len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in examples]
    sums = PairSums()
    buckets = length_buckets(lengths, max_rows=len(examples), max_tokens=max(1, micro_batch_tokens // 2))
    for rows in buckets:
        micro = [examples[i] for i in rows]
        b = len(micro)
        batch = collate(
            [e.prompt_ids for e in micro] * 2, [e.chosen_ids for e in micro] + [e.rejected_ids for e in micro]
        ).to(policy.device)
        logprobs = token_logprobs(
            policy, batch.input_ids, batch.attention_mask, batch.response_len, temperature
        ).logprobs  # (2b, R)
        summed = logprobs.masked_fill(~batch.response_mask, 0.0).sum(dim=1)  # (2b,)
        token_counts = batch.response_mask.sum(dim=1)  # (2b,)
        like = summed.new_tensor
        loss = preference_loss(
            summed[:b],
            summed[b:],
            like([e.reference_chosen for e in micro]),
            like([e.reference_rejected for e in micro]),
            chosen_prob=like([e.chosen_prob for e in micro]),
            beta=beta,
            loss_type=loss_type,
            chosen_lengths=token_counts[:b],
            rejected_lengths=token_counts[b:],
        )
        torch.autograd.backward(loss.losses.sum() / len(examples))
        sums = PairSums(
            sums.pairs + b,
            sums.loss + _total(loss.losses),
            sums.rewards_chosen + _total(loss.rewards_chosen),
            sums.rewards_rejected + _total(loss.rewards_rejected),
            sums.margins + _total(loss.margins),
            sums.accuracies + _total(loss.accuracies),
            sums.logps_chosen + _total(summed[:b]),
            sums.logps_rejected + _total(summed[b:]),
        )
    return sums


def _total(values: Tensor) -> float:
    return float(values.detach().double().sum())


def round_metrics(round_: Round) -> dict[str, float | None]:
    """What the policy of a round's start did, over the samples that have a reward; KL and lengths over all."""
    values = [r.value for r in round_.rewards if r.value is not None]
    raws = [r.raw for r in round_.rewards if r.raw is not None]
    n = len(round_.samples)
    return {
        "objective/kl": fmean(s.kl for s in round_.samples),
        "objective/entropy": fmean(-s.logprob for s in round_.samples),
        "objective/scores": fmean(values) if values else None,
        "objective/scores_std": pstdev(values) if values else None,
        "objective/scores_raw": fmean(raws) if raws else None,
        "reward/missing": float(n - len(values)),
        "response/length": fmean(len(s.response_ids) for s in round_.samples),
        "val/num_eos_tokens": float(sum(s.finished for s in round_.samples)),
    }


def pair_metrics(pair_set: PairSet, sums: PairSums) -> dict[str, float | None]:
    """What was learned from, and how: means over the pairs of all optimiser steps; None where there was no pair."""

    def mean(total: float) -> float | None:
        return total / sums.pairs if sums.pairs else None

    pairs = pair_set.pairs
    return {
        "loss/dpo": mean(sums.loss),
        "rewards/chosen": mean(sums.rewards_chosen),
        "rewards/rejected": mean(sums.rewards_rejected),
        "rewards/margins": mean(sums.margins),
        "rewards/accuracies": mean(sums.accuracies),
        "logps/chosen": mean(sums.logps_chosen),
        "logps/rejected": mean(sums.logps_rejected),
        "grad_norm": sums.grad_norm / sums.updates if sums.updates else None,
        "pairs/count": float(len(pairs)),
        "pairs/chosen_prob": fmean(p.chosen_prob for p in pairs) if pairs else None,
        "pairs/margin": fmean(p.margin for p in pairs) if pairs else None,
        **{
            f"pairs/skipped_{reason}": float(pair_set.skipped[reason])
            for reason in ("tie", "identical", "too_few_rewards")
        },
    }


def transcripts(round_: Round, prompts: Prompts) -> list[dict[str, Any]]:
    """Rows for `samples/`: what was asked, what was answered, what it earned."""
    return [
        {
            "prompt": to_dicts(prompts.conversations[s.prompt]),
            "response": s.response,
            "reward": s.reward.value,
            "raw": s.reward.raw,
            "kl": s.kl,
            "finished": s.finished,
        }
        for s in round_.samples
    ]
