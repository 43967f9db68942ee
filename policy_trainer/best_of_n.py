"""`rlaif train best_of_n`: fine-tuning on the best of the policy's own responses, scored by a reward server.

Each step is one round, in ReST's words (arXiv 2308.08998) a grow and some improve steps:

    grow      sample n responses to each of B prompts from the current policy, and have them scored
    improve   supervised fine-tuning on the responses that were selected; with rising thresholds, one pass for each

The selection makes the method. Rejection sampling (Llama 2, arXiv 2307.09288) and RAFT (arXiv 2304.06767) keep the best
response to each prompt, RAFT by a reward less the log-ratio to the reference; ReST keeps all above the threshold.
`train` reads so from top to bottom; the round as data is in `rounds`, the gradient in `sft`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from policy_trainer import optim
from policy_trainer.config import BestOfNConfig
from policy_trainer.online import Prompts, served_reward, session
from policy_trainer.reward_source import RewardSource
from policy_trainer.rounds import Round, RoundTrainer, round_metrics, transcripts
from policy_trainer.sft import accumulate_gradients
from rlaif.chat import EncodedPair


def run(config: BestOfNConfig) -> None:
    """Train against the reward server at `config.reward_server`."""
    with served_reward(config) as source:
        train(config, source)


def train(config: BestOfNConfig, source: RewardSource) -> None:
    """Run best-of-n fine-tuning until `config.max_steps`, or go on from the run directory's last checkpoint.

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
    with session(Trainer, config, source, method="best_of_n") as at_work:
        trainer = at_work.trainer
        while at_work.unfinished:
            began = time.perf_counter()

            # 1. Grow: sample and score; or take up the round that was under way when the run was interrupted.
            round_ = trainer.take_round()
            updating = time.perf_counter()

            # 2. Select: one selection per threshold. A missing reward is never selected.
            selections = trainer.select(round_)

            # 3. Improve: epochs over each selection, in minibatches; one optimiser step each.
            epochs = [rows for rows in selections for _ in range(config.num_train_epochs)]
            for update, rows in enumerate(trainer.minibatches(epochs)):
                if update < trainer.updates:  # learned before the interruption
                    continue
                trainer.update([trainer.example(round_, i) for i in rows])
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
                **selection_metrics(round_, selections),
                **sums.metrics(),
                "lr": learning_rate,
                **{f"time/{part}": seconds for part, seconds in round_.seconds.items()},
                "time/update": updated - updating,
                "time/step": updated - began,
            }
            at_work.end_step(
                metrics,
                selected_transcripts(round_, selections, trainer.prompts),
                score=metrics["objective/scores"],
                kl=metrics["objective/kl"],
                selected=metrics["selected/count"],
            )


def select(
    scores: Sequence[Sequence[float | None]], *, keep_best: int | None, threshold: float | None = None
) -> list[int]:
    """The responses to learn from.

    Args:
        scores: per prompt, the score of each response, or None where the reward is missing.
        keep_best: most responses of a prompt, the best ones; the first wins among equals. None sets no limit.
        threshold: a response must score above it. None: above the worst response to its prompt. So a prompt whose
            responses all score the same teaches nothing: to imitate one that is no better only narrows the policy.

    Returns:
        Positions in the flattened `scores`, rising.
    """
    selected: list[int] = []
    start = 0
    for group in scores:
        ranked = sorted(
            ((score, start + i) for i, score in enumerate(group) if score is not None), key=lambda s: -s[0]
        )
        start += len(group)
        if ranked:
            floor = ranked[-1][0] if threshold is None else threshold
            selected += sorted(i for score, i in ranked[:keep_best] if score > floor)
    return selected


class ImitationSums(NamedTuple):
    """Sums over the response tokens of some optimiser steps; `grad_norm` is summed over the `updates`."""

    tokens: float = 0.0
    loss: float = 0.0
    updates: float = 0.0
    grad_norm: float = 0.0

    def plus(self, other: ImitationSums) -> ImitationSums:
        """The sums of both."""
        return ImitationSums(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, float | None]:
        """Means for the log; None where nothing was learned from."""
        return {
            "loss/sft": self.loss / self.tokens if self.tokens else None,
            "grad_norm": self.grad_norm / self.updates if self.updates else None,
        }


@dataclass(kw_only=True)
class Trainer(RoundTrainer):
    """The policy, what the round under way has taught it, and the operations of the loop.

    Attributes:
        sums: what the updates of the round under way amounted to.
    """

    config: BestOfNConfig
    sums: ImitationSums = field(default_factory=ImitationSums)

    def select(self, round_: Round) -> list[list[int]]:
        """The samples to learn from in each pass over the round, as positions in `round_.samples`."""
        config = self.config
        scores = [
            [None if s.reward.value is None else s.reward.value - config.kl_coef * s.kl for s in group]
            for group in round_.groups(config.num_generations)
        ]
        return [
            select(scores, keep_best=config.keep_best, threshold=threshold)
            for threshold in config.reward_thresholds or (None,)
        ]

    def example(self, round_: Round, position: int) -> EncodedPair:
        """A sample as what supervised fine-tuning learns from: the very ids that were sampled."""
        sample = round_.samples[position]
        return EncodedPair(self.prompts.ids[sample.prompt], sample.response_ids)

    def update(self, examples: Sequence[EncodedPair]) -> None:
        """One optimiser step.

        Raises:
            QualityError: the gradient is not finite; the policy has not been changed by it.
        """
        optim.set_learning_rate(self.optimizer, self.learning_rate())
        self.optimizer.zero_grad(set_to_none=True)
        loss = accumulate_gradients(
            self.policy,
            examples,
            micro_batch_tokens=self.config.micro_batch_tokens,
            temperature=self.config.temperature,  # what was sampled, and so what is to resemble the best
            world=self.world,
        )
        self.world.add_gradients(self.policy.parameters())
        norm = optim.clip_gradients(list(self.policy.parameters()), self.config.max_grad_norm, "policy")
        self.optimizer.step()
        self.updates += 1
        tokens = float(sum(len(e.response_ids) for e in examples))
        self.sums = self.sums.plus(ImitationSums(tokens, loss * tokens, 1.0, float(norm)))

    def next_step(self) -> None:
        """The round is done."""
        super().next_step()
        self.sums = ImitationSums()

    def info(self) -> dict[str, Any]:
        """See `OnlineTrainer.info`."""
        return {**super().info(), "sums": list(self.sums)}

    def restore(self, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """See `OnlineTrainer.restore`."""
        super().restore(state, info)
        self.sums = ImitationSums(*info["sums"])


def selected_transcripts(
    round_: Round, selections: Sequence[Sequence[int]], prompts: Prompts
) -> list[dict[str, Any]]:
    """Rows for `samples/`; `selected` says in how many passes a response was learned from."""
    passes = Counter(i for rows in selections for i in rows)
    return [{**row, "selected": passes[i]} for i, row in enumerate(transcripts(round_, prompts))]


def selection_metrics(round_: Round, selections: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """How many responses were selected, of how many prompts, and their mean reward; by pass if there are several."""
    metrics: dict[str, float | None] = {
        "selected/count": float(sum(map(len, selections))),
        "selected/prompts": float(len({round_.samples[i].prompt for i in selections[0]})),
    }
    for number, rows in enumerate(selections, 1):
        name = "selected/scores" if len(selections) == 1 else f"selected/scores_{number}"
        values = [v for i in rows if (v := round_.samples[i].reward.value) is not None]
        metrics[name] = fmean(values) if values else None
        if len(selections) > 1:
            metrics[f"selected/count_{number}"] = float(len(rows))
    return metrics
