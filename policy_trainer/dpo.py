"""`rlaif train dpo`: iterative DPO against a reward server; with one update per round it is online DPO.

Each step is one round: sample G responses to each of B prompts from the current policy, have them scored, make pairs
with soft labels of them, and take DPO epochs over the pairs. `train` reads so from top to bottom; the losses are in
`preference_losses`, the pairs in `pairs`, the round as data in `rounds`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from policy_trainer import optim
from policy_trainer.branches import Answered, forward_passes, sequence_logprobs, summed_logprobs
from policy_trainer.config import DPOConfig
from policy_trainer.online import Prompts, Purpose, served_reward, session
from policy_trainer.pairs import PairSet, build_pairs
from policy_trainer.parallel import ALONE, World
from policy_trainer.preference_losses import LossType, PreferenceObjective, preference_loss
from policy_trainer.reward_source import RewardSource
from policy_trainer.rounds import (
    Round,
    RoundTrainer,
    collect_round,
    mismatched_prompt,
    round_metrics,
    transcripts,
)

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
            round_ = trainer.take_round()

            # 2. Pairs with their soft labels. Ties and missing rewards make none.
            pairs = trainer.pair(round_)
            examples = pair_examples(round_, pairs, trainer.prompts, config.num_generations)
            updating = time.perf_counter()

            # 3. Epochs over the pairs, in minibatches; one optimiser step each.
            epochs = [range(len(examples))] * config.num_train_epochs
            for update, rows in enumerate(trainer.minibatches(epochs)):
                if update < trainer.updates:  # learned before the interruption
                    continue
                trainer.update([examples[i] for i in rows])
                if at_work.stopping():
                    trainer.save()
                    raise KeyboardInterrupt
            updated = time.perf_counter()

            # 4. Book-keeping.
            learning_rate, sums = trainer.learning_rate(), trainer.sums
            trainer.next_step()
            metrics = {
                "episode": trainer.step * config.responses_per_step,
                **round_metrics(round_),
                **pair_metrics(pairs, sums, config.loss_type),
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


class Mismatched(NamedTuple):
    """Another prompt, and the reference log-probabilities of a pair's responses given it; see `mismatched_prompt`."""

    prompt_ids: Sequence[int]
    reference_chosen: float
    reference_rejected: float


class PairExample(NamedTuple):
    """A pair to learn from: token ids, summed reference log-probabilities in nats, and P(chosen preferred).

    `mismatched` is what KTO needs besides; None for the other losses.
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    reference_chosen: float
    reference_rejected: float
    chosen_prob: float
    mismatched: Mismatched | None = None


class PairSums(NamedTuple):
    """Sums over the pairs of some optimiser steps; `grad_norm` and `kto_kl` are summed over the `updates`."""

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
    kto_kl: float = 0.0

    def plus(self, other: PairSums) -> PairSums:
        """The sums of both."""
        return PairSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass(kw_only=True)
class Trainer(RoundTrainer):
    """The policy, what the round under way has taught it, and the operations of the loop.

    Attributes:
        sums: what the updates of the round under way amounted to.
        average: of the policies with `--reference ema`, otherwise None.
    """

    config: DPOConfig
    sums: PairSums = field(default_factory=PairSums)
    average: optim.MovingAverage | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config.reference == "ema":
            self.average = optim.MovingAverage(self.policy, self.config.ema_decay)

    def collect(self) -> Round:
        """This step's round: responses of the current policy, their rewards and reference log-probabilities.

        Raises:
            RewardServerError: the server cannot be reached or used.
        """
        if self.average is not None:
            log_ratios_to = self.average.model
        else:
            log_ratios_to = self.policy if self.config.reference == "previous" else self.reference
        kto = self.config.loss_type == "kto"
        return collect_round(self, log_ratios_to=log_ratios_to, read_mismatched=kto)

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
            objective=PreferenceObjective(
                self.config.loss_type,
                self.config.beta,
                self.config.label_smoothing,
                self.config.desirable_weight,
                self.config.undesirable_weight,
            ),
            temperature=self.config.temperature,
            micro_batch_tokens=self.config.micro_batch_tokens,
            world=self.world,
        )
        norm = optim.clip_gradients(list(self.policy.parameters()), self.config.max_grad_norm, "policy")
        self.optimizer.step()
        self.updates += 1
        self.sums = self.sums.plus(sums).plus(PairSums(updates=1.0, grad_norm=float(norm)))

    def next_step(self) -> None:
        """The round is done."""
        if self.average is not None:
            self.average.update(self.policy)
        super().next_step()
        self.sums = PairSums()

    def state(self) -> dict[str, Any]:
        """See `OnlineTrainer.state`."""
        if self.average is None:
            return super().state()
        return {**super().state(), "average": self.average.state_dict()}

    def info(self) -> dict[str, Any]:
        """See `OnlineTrainer.info`."""
        return {**super().info(), "sums": list(self.sums)}

    def restore(self, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """See `OnlineTrainer.restore`."""
        super().restore(state, info)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.sums = PairSums(*info["sums"])


def pair_examples(round_: Round, pairs: PairSet, prompts: Prompts, num_generations: int) -> list[PairExample]:
    """The token ids and reference log-probabilities of each pair."""
    groups = round_.groups(num_generations)
    examples = []
    for pair in pairs.pairs:
        chosen, rejected = groups[pair.group][pair.chosen], groups[pair.group][pair.rejected]
        mismatched = None
        if chosen.mismatched_logprob is not None and rejected.mismatched_logprob is not None:
            other = mismatched_prompt(prompts, chosen.prompt)
            mismatched = Mismatched(other, chosen.mismatched_logprob, rejected.mismatched_logprob)
        examples.append(
            PairExample(
                prompts.ids[chosen.prompt],
                chosen.response_ids,
                rejected.response_ids,
                chosen.reference_logprob,
                rejected.reference_logprob,
                pair.chosen_prob,
                mismatched,
            )
        )
    return examples


def accumulate_gradients(
    policy: PreTrainedModel,
    examples: Sequence[PairExample],
    *,
    objective: PreferenceObjective,
    temperature: float,
    micro_batch_tokens: int,
    world: World = ALONE,
) -> PairSums:
    """Add the gradient of the mean loss over `examples` to the policy's parameters.

    Each micro-batch adds its *sum* divided by the pair count of the whole minibatch, so neither the
    micro-batch size, nor the padding, nor the order of the buckets changes the gradient.

    Args:
        policy: in eval mode (no dropout), with gradients.
        examples: one optimiser step's pairs.
        objective: the loss and its constants.
        temperature: of sampling.
        micro_batch_tokens: padded tokens in one forward pass; both responses of a pair go through one, and
            their prompt once where that pays.
        world: the processes that share the work; gradients and sums are those of all.
    """
    kl = None
    if objective.loss_type == "kto":
        kl = kto_kl(policy, examples, temperature, micro_batch_tokens, world)
    rows = [Answered(e.prompt_ids, (e.chosen_ids, e.rejected_ids)) for e in examples]
    sums = PairSums()
    for indices in world.share(forward_passes(policy, rows, micro_batch_tokens)):
        micro = [examples[i] for i in indices]
        summed = summed_logprobs(policy, [rows[i] for i in indices], temperature)  # (2b,)
        chosen, rejected = summed[0::2], summed[1::2]
        like = summed.new_tensor
        loss = preference_loss(
            chosen,
            rejected,
            like([e.reference_chosen for e in micro]),
            like([e.reference_rejected for e in micro]),
            chosen_prob=like([e.chosen_prob for e in micro]),
            objective=objective,
            chosen_lengths=like([len(e.chosen_ids) for e in micro]),
            rejected_lengths=like([len(e.rejected_ids) for e in micro]),
            kl=kl,
        )
        torch.autograd.backward(loss.losses.sum() / len(examples))
        sums = sums.plus(
            PairSums(
                len(micro),
                _total(loss.losses),
                _total(loss.rewards_chosen),
                _total(loss.rewards_rejected),
                _total(loss.margins),
                _total(loss.accuracies),
                _total(chosen),
                _total(rejected),
            )
        )
    world.add_gradients(policy.parameters())
    of_all = (PairSums(*part) for part in world.gather(tuple(sums)))
    return reduce(PairSums.plus, of_all, PairSums(kto_kl=kl or 0.0))


def kto_kl(
    policy: PreTrainedModel,
    examples: Sequence[PairExample],
    temperature: float,
    micro_batch_tokens: int,
    world: World = ALONE,
) -> float:
    """z0 of KTO: max(0, mean of log pi(y|x') - log pi_ref(y|x')) over both responses of every pair, in nats.

    It is one number for the whole minibatch, so that micro-batches do not change the loss.

    Raises:
        ValueError: an example lacks what KTO needs.
    """
    crossed: list[tuple[Sequence[int], Sequence[int]]] = []
    references: list[float] = []
    for example in examples:
        if example.mismatched is None:
            raise ValueError("the round was collected without mismatched prompts, which kto needs")
        prompt_ids, *of_reference = example.mismatched
        crossed += [(prompt_ids, example.chosen_ids), (prompt_ids, example.rejected_ids)]
        references += of_reference
    of_policy = sequence_logprobs(policy, crossed, temperature, micro_batch_tokens, world)
    return max(0.0, fmean(mine - theirs for mine, theirs in zip(of_policy, references, strict=True)))


def _total(values: Tensor) -> float:
    return float(values.detach().double().sum())


def pair_metrics(pair_set: PairSet, sums: PairSums, loss_type: LossType) -> dict[str, float | None]:
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
        **({"kto/kl": sums.kto_kl / sums.updates if sums.updates else None} if loss_type == "kto" else {}),
        "pairs/count": float(len(pairs)),
        "pairs/chosen_prob": fmean(p.chosen_prob for p in pairs) if pairs else None,
        "pairs/margin": fmean(p.margin for p in pairs) if pairs else None,
        **{
            f"pairs/skipped_{reason}": float(pair_set.skipped[reason])
            for reason in ("tie", "identical", "too_few_rewards")
        },
    }
