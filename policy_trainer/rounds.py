"""Rounds: responses of one policy, their rewards, and what the reference thinks of them; and learning from them.

A round is written to the run directory before it is learned from, so that neither the sampling nor the reward
calls are paid for twice when a run is killed, and a resumed run learns from the very numbers of the first
attempt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any, NamedTuple

from policy_trainer import optim
from policy_trainer.branches import sequence_logprobs
from policy_trainer.config import RoundConfig
from policy_trainer.importance import Difference, probed_difference
from policy_trainer.online import OnlineTrainer, Prompts, Purpose
from policy_trainer.reward_source import Reward
from policy_trainer.rollout import decode_response
from rlaif.errors import DataError, QualityError, RewardServerError, StorageError
from rlaif.runs import write_atomic
from rlaif.types import to_dicts, with_response

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS_FOLDER = "rounds"


class RoundSample(NamedTuple):
    """One sampled response of a round.

    Attributes:
        prompt: row of its prompt in the dataset.
        response_ids: as sampled, the EOS included.
        response: the text that was scored.
        finished: whether it ended with an EOS.
        logprob: under the policy that sampled it, summed over tokens, in nats.
        reference_logprob: the same under the reference of this round's log-ratios.
        kl: log-probability under the policy minus that under the frozen reference model (k1), in nats.
        reward: what is learned from: the server's, less the penalty of an unfinished response.
        mismatched_logprob: the log-probability of the response under the reference of the log-ratios, given
            `mismatched_prompt` instead of its own; None unless KTO needs it.
    """

    prompt: int
    response_ids: list[int]
    response: str
    finished: bool
    logprob: float
    reference_logprob: float
    kl: float
    reward: Reward
    mismatched_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """What one round learns from.

    Attributes:
        step: rounds completed before this one.
        samples: grouped by prompt, `num_generations` in a row.
        seconds: how long sampling, reading with the reference and waiting for rewards took.
        reward_version: of the model that rewarded it.
        engine: how far the engine's log-probabilities are from those of the policy that it sampled.
    """

    step: int
    samples: list[RoundSample]
    seconds: dict[str, float]
    reward_version: str
    engine: Difference

    @property
    def rewards(self) -> list[Reward]:
        """Of all samples."""
        return [s.reward for s in self.samples]

    def groups(self, size: int) -> list[list[RoundSample]]:
        """The samples of each prompt together."""
        return [self.samples[i : i + size] for i in range(0, len(self.samples), size)]


@dataclass(kw_only=True)
class RoundTrainer(OnlineTrainer):
    """A trainer that learns from stored rounds, each in several updates, and may be interrupted between any two."""

    config: RoundConfig

    def collect(self) -> Round:
        """Sample and score this step's round.

        Raises:
            RewardServerError: the server cannot be reached or used.
        """
        return collect_round(self, log_ratios_to=self.reference)

    def take_round(self) -> Round:
        """This step's round: the one that an interrupted attempt has stored, or else a fresh one, which is stored.

        Raises:
            QualityError: too many rewards are missing; a checkpoint has been written.
            RewardServerError: the server cannot be reached or used; a checkpoint has been written.
        """
        round_ = stored_round(self.config.output_dir, self.step, self.source.info().version)
        if round_ is None:
            try:
                round_ = self.collect()
                scored = [i for i, r in enumerate(round_.rewards) if r.value is not None]
                self.check_missing(round_.rewards, scored)
            except (RewardServerError, QualityError):
                self.save()
                raise
            if self.world.is_main:
                store_round(self.config.output_dir, round_)
        return round_

    def minibatches(self, epochs: Sequence[Sequence[int]]) -> list[list[int]]:
        """Which items each of this round's optimiser steps takes.

        Args:
            epochs: the items of each pass. Every pass has an order of its own; its last minibatch may be smaller.
        """
        size, batches = self.config.per_device_train_batch_size, []
        for epoch, items in enumerate(epochs):
            seed = optim.step_seed(self.config.seed, Purpose.SHUFFLING, self.step, epoch)
            order = [items[i] for i in optim.permutation(len(items), seed)]
            batches += [order[i : i + size] for i in range(0, len(order), size)]
        return batches

    def next_step(self) -> None:
        """The round is done."""
        self.step, self.updates = self.step + 1, 0

    def info(self) -> dict[str, Any]:
        """See `OnlineTrainer.info`."""
        return {**super().info(), "updates": self.updates}

    def restore(self, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """See `OnlineTrainer.restore`."""
        super().restore(state, info)
        self.updates = info["updates"]

    def save(self) -> None:
        """Write a checkpoint of the completed rounds and of the one under way."""
        super().save()
        if self.world.is_main:
            forget_rounds(self.config.output_dir, self.step)


def collect_round(
    trainer: OnlineTrainer, *, log_ratios_to: PreTrainedModel, read_mismatched: bool = False
) -> Round:
    """Sample responses to this step's prompts, and read them with the reference while the server scores them.

    Args:
        trainer: whose policy samples, and whose reference KL is measured against.
        log_ratios_to: the model that DPO's log-ratios are taken to: the reference, the current policy, another.
        read_mismatched: read the responses with another prompt as well (`mismatched_prompt`), for KTO.

    Raises:
        DataError: `read_mismatched`, and all prompts are the same.
        RewardServerError: the server cannot be reached or used.
    """
    config, prompts, source = trainer.config, trainer.prompts, trainer.source

    # 1. Sample from the current policy.
    began = time.perf_counter()
    rows = trainer.prompt_rows()
    sampled = trainer.sample(rows)
    prompt_ids = [prompts.ids[rows[s.prompt_index]] for s in sampled]
    sampled_at = time.perf_counter()

    # 2. Ask for the rewards; the answer is awaited after the reference's forwards, which it overlaps.
    texts = [
        decode_response(trainer.tokenizer, ids, s, trainer.eos_ids)
        for ids, s in zip(prompt_ids, sampled, strict=True)
    ]
    pending = source.submit(
        [
            with_response(prompts.conversations[rows[s.prompt_index]], text)
            for s, text in zip(sampled, texts, strict=True)
        ]
    )

    # 3. Log-probabilities under the frozen reference, and under the model of the log-ratios if that is
    # another; and whether the engine's are those of the policy.
    pairs = [(ids, s.response_ids) for ids, s in zip(prompt_ids, sampled, strict=True)]
    how = (config.temperature, config.micro_batch_tokens, trainer.world)
    frozen = sequence_logprobs(trainer.reference, pairs, *how)
    ratio = frozen if log_ratios_to is trainer.reference else sequence_logprobs(log_ratios_to, pairs, *how)
    of_mismatched: Sequence[float | None] = [None] * len(sampled)
    if read_mismatched:
        crossed = [(mismatched_prompt(prompts, rows[s.prompt_index]), s.response_ids) for s in sampled]
        of_mismatched = sequence_logprobs(log_ratios_to, crossed, *how)
    engine = probed_difference(
        trainer.policy, prompt_ids, sampled, config.temperature, config.micro_batch_tokens
    )
    read_at = time.perf_counter()

    # 4. Rewards. A missing one stays missing; an unfinished response pays its penalty in both units.
    rewards = pending.result()
    info = source.info()
    samples = []
    for s, text, reward, of_frozen, of_ratio, of_other in zip(
        sampled, texts, rewards, frozen, ratio, of_mismatched, strict=True
    ):
        logprob = sum(s.logprobs)
        samples.append(
            RoundSample(
                prompt=rows[s.prompt_index],
                response_ids=s.response_ids,
                response=text,
                finished=s.finished,
                logprob=logprob,
                reference_logprob=of_ratio,
                kl=logprob - of_frozen,
                reward=reward if s.finished else penalised(reward, config.missing_eos_penalty, info.scale),
                mismatched_logprob=of_other,
            )
        )
    seconds = {
        "rollout": sampled_at - began,
        "forward": read_at - sampled_at,
        "reward": time.perf_counter() - read_at,
    }
    return Round(trainer.step, samples, seconds, info.version, engine)


def mismatched_prompt(prompts: Prompts, row: int) -> list[int]:
    """The prompt that KTO reads the responses to `row` with: the next one of the dataset that differs from it.

    KTO estimates the KL to the reference from responses that answer another prompt (arXiv 2402.01306: the outputs of a
    batch, each moved to another input of it). A pairing that depends on the row alone is the same whatever minibatch a
    response is learned in, and finds another prompt in any dataset that has one.

    Raises:
        DataError: all prompts are the same.
    """
    n = len(prompts.ids)
    for step in range(1, n):
        other = prompts.ids[(row + step) % n]
        if other != prompts.ids[row]:
            return other
    raise DataError("all prompts are the same: loss_type kto reads each response with another prompt as well")


def penalised(reward: Reward, penalty: float, scale: float) -> Reward:
    """The reward less a penalty given in normalised units, in both units; a missing one stays missing."""
    if reward.value is None or reward.raw is None:
        return reward
    return reward._replace(value=reward.value - penalty, raw=reward.raw - penalty * scale)


def store_round(output_dir: Path, round_: Round) -> None:
    """Write the round to the run directory, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    record = {
        name: getattr(round_, name) for name in ("step", "samples", "seconds", "reward_version", "engine")
    }
    write_atomic(_path(output_dir, round_.step), json.dumps(record))


def stored_round(output_dir: Path, step: int, reward_version: str) -> Round | None:
    """The round of this step if an earlier attempt has collected it, with rewards of the same model.

    Raises:
        StorageError: the file was not written by this program.
    """
    path = _path(output_dir, step)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["reward_version"] != reward_version:
            return None
        read = [RoundSample(*fields) for fields in record["samples"]]
        samples = [sample._replace(reward=Reward(*sample.reward)) for sample in read]
        engine = Difference(*record["engine"])
        return Round(int(record["step"]), samples, dict(record["seconds"]), reward_version, engine)
    except (ValueError, KeyError, TypeError) as err:
        raise StorageError(f"{path} cannot be read: remove it and run the same command again") from err


def forget_rounds(output_dir: Path, before: int) -> None:
    """Remove stored rounds that a checkpoint at step `before` has made useless."""
    for path in (output_dir / ROUNDS_FOLDER).glob("round-*.json"):
        if path < _path(output_dir, before):
            path.unlink()


def _path(output_dir: Path, step: int) -> Path:
    return output_dir / ROUNDS_FOLDER / f"round-{step:06d}.json"


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
        **round_.engine.metrics(),
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
