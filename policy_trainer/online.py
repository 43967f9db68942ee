"""What the online trainers share: their state, the commands' frame around the loop, prompts, missing rewards.

A command is a loop over `session`, which opens the run directory and the trainer, and `Session.end_step`, which
writes what a step was and stops where it was asked to.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Self, TypeVar

import torch

from policy_trainer import optim
from policy_trainer.batching import data_id
from policy_trainer.card import write_card
from policy_trainer.checkpoint import (
    Checkpoint,
    check_same_data,
    load_latest,
    restore_rng,
    save_checkpoint,
    save_final,
)
from policy_trainer.client import RewardClient
from policy_trainer.config import OnlineConfig
from policy_trainer.heldout import HeldOut, best_step, mark_best, reason_to_stop
from policy_trainer.models import TrainedPolicy, eos_token_ids, fingerprint, load_reference, load_trained
from policy_trainer.parallel import ALONE, SharedReward, World, joined, run_directory
from policy_trainer.reward_source import Reward, RewardSource, main_cause
from policy_trainer.rollout import HFRollout, RolloutEngine, Sampled
from policy_trainer.selfcheck import TRUNCATION, self_check
from policy_trainer.vllm_rollout import open_vllm
from rlaif.chat import encode_prompt
from rlaif.errors import ConfigError, DataError, ModelError, QualityError, RewardServerError
from rlaif.fields import Row
from rlaif.records import Quarantine, read_as
from rlaif.runs import Progress, Run, progress
from rlaif.shapes import PROMPT_SHAPES, parse_prompt
from rlaif.signals import StopRequest, stop_on_signal
from rlaif.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF_CHECK_PROMPTS = 16


class Purpose(IntEnum):
    """What a step's seed is for; see `optim.step_seed`."""

    PROMPTS = 0
    SAMPLING = 1
    SHUFFLING = 2
    PAIRING = 3
    SELF_CHECK = 4
    PTX = 5
    EVALUATION = 6


class Prompts(NamedTuple):
    """All prompts of a run, as text and as token ids with the generation prompt; same order."""

    conversations: list[Conversation]
    ids: list[list[int]]


class Snapshot(NamedTuple):
    """A policy as it was when some step began; `version` is the number of that step."""

    policy: PreTrainedModel
    version: int


@dataclass(kw_only=True)
class OnlineTrainer:
    """Everything of an online run that has a state, and the operations that every method has on it.

    A method adds its own state by overriding `state`, `info` and `restore`.

    Attributes:
        config: the run.
        trained: the policy, and its adapters if it has any.
        reference: frozen; KL is measured against it.
        reference_id: fingerprint of its weights.
        prompts: the dataset.
        data_id: of the prompts' token ids.
        optimizer: the policy's.
        source: gives the rewards.
        world: the processes of the run.
        step: completed steps.
        updates: optimiser steps taken in the step under way, as far as a run may be interrupted between them.
        told_missing: whether it was said that rewards are missing.
    """

    config: OnlineConfig
    trained: TrainedPolicy
    reference: PreTrainedModel
    reference_id: str
    prompts: Prompts
    optimizer: torch.optim.AdamW
    source: RewardSource
    world: World = ALONE
    step: int = 0
    updates: int = 0
    data_id: str = field(init=False)
    eos_ids: tuple[int, ...] = field(init=False)
    engine: RolloutEngine = field(init=False)
    told_missing: bool = field(init=False, default=False)
    engine_lock: threading.Lock = field(init=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.data_id = data_id(self.prompts.ids)
        self.eos_ids = eos_token_ids(self.policy, self.tokenizer)
        if self.config.use_vllm and self.world.size > 1:
            raise ConfigError("use_vllm goes with one process: start the run without torchrun")
        if self.config.use_vllm:
            self.engine = open_vllm(self.config, self.policy, self.eos_ids)
        else:
            self.engine = HFRollout(
                self.policy, self.eos_ids, batch_size=self.config.generation_batch_size, world=self.world
            )

    @property
    def policy(self) -> PreTrainedModel:
        """What is trained, in eval mode (no dropout)."""
        return self.trained.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's."""
        return self.trained.tokenizer

    @classmethod
    def start(cls, config: OnlineConfig, source: RewardSource, world: World = ALONE) -> Self:
        """Load models and data, and the last checkpoint if there is one.

        Raises:
            ModelError: a model cannot be loaded, or the reference has another vocabulary or is not the one that the run
                began with.
            RewardServerError: the server serves other weights than those that the run began with.
        """
        checkpoint = load_latest(config.output_dir, world)
        trained = load_trained(config, None if checkpoint is None else checkpoint.path)
        # The reference is named by the config and never by a checkpoint: a resumed run keeps its anchor.
        if trained.base is not None and config.ref_model is None:
            reference = trained.base
        else:
            name = config.ref_model or config.model_name_or_path
            reference = load_reference(name, trained.tokenizer, dtype=config.dtype)
        reference.requires_grad_(False)
        trainer = cls(
            config=config,
            trained=trained,
            reference=reference,
            reference_id=fingerprint(reference),
            prompts=load_prompts(config, trained, config.dataset, world.file("quarantine.jsonl")),
            optimizer=optim.adamw(trained.model.parameters(), config.learning_rate, config),
            source=source,
            world=world,
        )
        if checkpoint is None:
            torch.manual_seed(config.seed)
        else:
            trainer.resume(checkpoint)
        return trainer

    def prompt_rows(self, step: int | None = None) -> list[int]:
        """Which prompts a step answers (this one by default); a function of the seed and the step alone."""
        config = self.config
        return optim.shuffled_stream(
            len(self.prompts.ids),
            optim.step_seed(config.seed, Purpose.PROMPTS),
            start=(self.step if step is None else step) * config.rollout_batch_size,
            count=config.rollout_batch_size,
        )

    def sample(
        self, rows: Sequence[int], *, step: int | None = None, by: Snapshot | None = None
    ) -> list[Sampled]:
        """A step's responses, `num_generations` to each of the prompts `rows`.

        Args:
            rows: of the prompts.
            step: decides the seed; this step by default.
            by: who answers; the policy as it is now by default.
        """
        return self.answers(
            [self.prompts.ids[row] for row in rows],
            num_return_sequences=self.config.num_generations,
            seed=optim.step_seed(self.config.seed, Purpose.SAMPLING, self.step if step is None else step),
            by=by,
        )

    def answers(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        seed: int,
        num_return_sequences: int = 1,
        by: Snapshot | None = None,
    ) -> list[Sampled]:
        """Responses to any prompts, as the run samples them; in any thread, one at a time.

        Args:
            prompt_ids: token ids with the generation prompt.
            seed: of the sampling.
            num_return_sequences: responses to each prompt.
            by: who answers; the policy as it is now by default.
        """
        with self.engine_lock:
            self.engine.sync(*(by or Snapshot(self.policy, self.step)))
            return self.engine.generate(
                prompt_ids,
                num_return_sequences=num_return_sequences,
                max_new_tokens=self.config.max_new_tokens,
                temperature=self.config.temperature,
                seed=seed,
            )

    def learning_rate(self, peak: float | None = None) -> float:
        """The learning rate of this step; `peak` is the policy's unless given."""
        config = self.config
        factor = optim.lr_factor(config.lr_scheduler_type, self.step, config.max_steps, config.warmup_steps)
        return (config.learning_rate if peak is None else peak) * factor

    def self_check(self) -> None:
        """Run the start-up self-check and print its findings to stderr.

        Raises:
            SelfCheckError: with the cause.
        """
        unlike = None
        if self.config.ref_model is not None:
            unlike = "they are different models"
        elif not self.untrained:
            unlike = "the policy has been trained already"
        chosen = range(min(SELF_CHECK_PROMPTS, len(self.prompts.ids)))
        self.engine.sync(self.policy, self.step)
        report = self_check(
            policy=self.policy,
            reference=self.reference,
            unlike=unlike,
            tokenizer=self.tokenizer,
            eos_ids=self.eos_ids,
            engine=self.engine,
            source=self.source,
            prompts=[self.prompts.conversations[i] for i in chosen],
            prompt_ids=[self.prompts.ids[i] for i in chosen],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=optim.step_seed(self.config.seed, Purpose.SELF_CHECK),
        )
        if self.world.is_main:
            print(report, file=sys.stderr)

    def check_missing(self, rewards: Sequence[Reward], kept: Sequence[int]) -> None:
        """Refuse to learn from this step if too little is known of it; say on stderr when rewards are first missing.

        Args:
            rewards: of the step.
            kept: the responses that are left to learn from.

        Raises:
            QualityError: more than `max_missing_rewards` are missing, or fewer than two responses are left; the message
                has the most frequent reason.
        """
        cause = main_cause(rewards)
        missing = sum(r.value is None for r in rewards)
        found = f"{missing} of {len(rewards)} rewards are missing at step {self.step + 1}" + (
            "" if cause is None else f", {cause}"
        )
        if missing > self.config.max_missing_rewards * len(rewards) or len(kept) < 2:
            remedy = "mend the reward server and run the same command again"
            if cause is not None and cause.too_long:
                remedy = (
                    f"begin anew, in another --output_dir, with {TRUNCATION} left or against a reward model that is "
                    "served with a larger --max_length: the run goes on with these settings alone"
                )
            raise QualityError(f"{found}; the run stopped at a checkpoint: {remedy}")
        if cause is not None and not self.told_missing:
            self.told_missing = True
            if self.world.is_main:
                print(
                    f"{found}{cause.advice(TRUNCATION)}; these responses are left out, and reward/missing counts them "
                    "in every step",
                    file=sys.stderr,
                    flush=True,
                )

    @property
    def untrained(self) -> bool:
        """Whether no update has been made yet."""
        return self.step == 0 and self.updates == 0

    def state(self) -> dict[str, Any]:
        """State dicts for a checkpoint, beside the policy's weights."""
        return {"optimizer": self.optimizer.state_dict()}

    def info(self) -> dict[str, Any]:
        """JSON values for a checkpoint: counters and identities."""
        return {
            "reference": self.reference_id,
            "data": self.data_id,
            "reward_version": self.source.info().version,
            "episodes": self.step * self.config.responses_per_step,
        }

    def restore(self, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """Take over what `state` and `info` gave."""
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self) -> None:
        """Write a checkpoint, from the main process.

        Raises:
            StorageError: it cannot be written; earlier ones are untouched.
        """
        if not self.world.is_main:
            return
        save_checkpoint(
            self.config.output_dir,
            self.step,
            policy=self.trained.saved,
            tokenizer=self.tokenizer,
            state=self.state(),
            info=self.info(),
            updates=self.updates,
            keep=self.config.save_total_limit,
        )

    def close(self) -> None:
        """End what the trainer started: it is not used afterwards."""
        self.engine.close()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state; the policy's weights are loaded already.

        Raises:
            DataError: the prompts have changed since the run began.
            ModelError: the reference has changed since the run began.
            RewardServerError: the reward model has changed since the run began.
        """
        info, version = checkpoint.info, self.source.info().version
        check_same_data(checkpoint, self.data_id, self.config.dataset)
        if info["reference"] != self.reference_id:
            raise ModelError(
                f"the reference {self.config.ref_model or self.config.model_name_or_path} is not the one that this run "
                "began with: KL would be measured from elsewhere; put it back or start with a fresh --output_dir"
            )
        if info["reward_version"] != version:
            raise RewardServerError(
                f"the reward server serves version {version}, this run began with {info['reward_version']}: serve "
                "that model again or start with a fresh --output_dir"
            )
        self.step = checkpoint.step
        self.restore(checkpoint.state, info)
        restore_rng(checkpoint.state["rng"])


T = TypeVar("T", bound=OnlineTrainer)


@dataclass
class Session(Generic[T]):
    """A trainer at work: its run directory, its progress and whether somebody asked it to end.

    Attributes:
        trainer: the trainer.
        run: the run directory; None but in the main process.
        bar: progress; None but in the main process.
        stop: true once a signal has asked this process for an end.
        held_out: evaluation on the way; None without held-out prompts.
        ended: why the run ends before `max_steps`; None while it goes on.
    """

    trainer: T
    run: Run | None
    bar: Progress | None
    stop: StopRequest
    held_out: HeldOut | None = None
    ended: str | None = None

    @property
    def unfinished(self) -> bool:
        """Whether there is another step to do."""
        return self.ended is None and self.trainer.step < self.trainer.config.max_steps

    def stopping(self) -> bool:
        """Whether a signal has asked any of the processes for an end."""
        return self.trainer.world.any(bool(self.stop))

    def end_step(
        self,
        metrics: Mapping[str, float | int | None],
        transcripts: Sequence[Mapping[str, Any]],
        **shown: object,
    ) -> None:
        """Write what the step just completed was, show `shown`, save when it is time, stop if asked to.

        Raises:
            QualityError: a metric is not finite.
            KeyboardInterrupt: a signal asked for an end; a checkpoint has been written.
        """
        trainer, config = self.trainer, self.trainer.config
        evaluated = self.held_out is not None and self.held_out.is_due()
        if self.held_out is not None and evaluated:
            metrics = {**metrics, **self.held_out.evaluate()}
        if self.run is not None:
            self.run.samples(trainer.step, transcripts[: config.samples_per_step])
            if config.log_completions:
                self.run.completions(trainer.step, transcripts)
            self.run.log(trainer.step, metrics)
        if self.bar is not None:
            self.bar.advance(1, **shown)
        rows = trainer.world.from_main(lambda: self._rows() if config.decides_by_metrics else [])
        self.ended = reason_to_stop(config, rows)
        best = evaluated and best_step(rows) == trainer.step
        stop = self.stopping()
        if stop or best or trainer.step % config.save_steps == 0 or not self.unfinished:
            trainer.save()
        if best and self.run is not None:
            mark_best(self.run, rows)
        if stop and self.unfinished:
            raise KeyboardInterrupt

    def _rows(self) -> list[dict[str, Any]]:
        return [] if self.run is None else self.run.metrics()


@contextmanager
def session(
    kind: type[T], config: OnlineConfig, source: RewardSource, *, method: str
) -> Iterator[Session[T]]:
    """Open the run directory, start or resume its trainer, check it; at the end save the policy for use.

    Args:
        kind: the trainer's class.
        config: the run.
        source: rewards.
        method: `ppo`, `dpo`, ...: the command's last word.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGINT asked for an end.
        RlaifError: bad input, see the message.
    """
    with (
        joined() as world,
        run_directory(world, config, command=f"train {method}") as run,
        stop_on_signal() as stop,
        closing(
            kind.start(config, source if world.size == 1 else SharedReward(source, world), world)
        ) as trainer,
    ):
        if run is not None:
            run.truncate_metrics(trainer.step)
        rows = world.from_main(lambda: [] if run is None else run.metrics())
        if run is not None:
            mark_best(run, rows)  # a kill may have come between a checkpoint and its mark
        ended = reason_to_stop(config, rows)
        if run is not None and trainer.step >= config.max_steps:
            print(
                f"{config.output_dir} has done all of its {config.max_steps} steps already", file=sys.stderr
            )
        elif run is not None and ended is None and not trainer.untrained:
            print(f"going on from step {trainer.step}", file=sys.stderr)
        if config.self_check and trainer.step < config.max_steps:
            trainer.self_check()
        what = f"{method.upper().replace('_', ' ')} steps"
        done = trainer.step
        with progress(config.max_steps, what, done=done) if world.is_main else nullcontext() as bar:
            at_work = Session(trainer, run, bar, stop, _held_out(trainer), ended)
            try:
                yield at_work
            except KeyboardInterrupt:
                if run is not None:
                    run.end(trainer.step, "interrupted")
                raise
        if run is None:
            return
        save_final(config.output_dir, trainer.trained.merged(), trainer.tokenizer)
        run.end(trainer.step, at_work.ended or "max_steps")
        info = source.info()
        write_card(run, reward_model=(info.name, info.version))
        if at_work.ended is not None:
            print(f"ended at step {trainer.step}: {at_work.ended}", file=sys.stderr)


def _held_out(trainer: OnlineTrainer) -> HeldOut | None:
    config = trainer.config
    if config.eval_dataset is None or trainer.step >= config.max_steps:
        return None
    quarantine = trainer.world.file("eval-quarantine.jsonl")
    prompts = load_prompts(config, trainer.trained, config.eval_dataset, quarantine)
    return HeldOut(trainer, prompts, seed=optim.step_seed(config.seed, Purpose.EVALUATION))


@contextmanager
def served_reward(config: OnlineConfig) -> Iterator[RewardClient]:
    """The reward server at `config.reward_server`, once it is ready.

    Raises:
        DataError: a dataset is not there, which is said before the server is waited for.
        RewardServerError: it is not ready in time.
    """
    for path in (config.dataset, config.eval_dataset):
        if path is not None and not path.exists():
            raise DataError(f"cannot read {path}: does not exist; check the path")
    with RewardClient(
        config.reward_server,
        timeout_s=config.reward_timeout_s,
        give_up_after_s=config.reward_give_up_after_s,
        truncation=config.reward_truncation,
    ) as source:
        source.wait_ready(config.reward_give_up_after_s)
        yield source


class Clock:
    """Wall-clock seconds of the parts of one step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The part `name` ends now."""
        now = time.perf_counter()
        self._laps[f"time/{name}"] = now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """`time/NAME` of each part, and `time/step` for all."""
        return {**self._laps, "time/step": time.perf_counter() - self._start}


def load_prompts(
    config: OnlineConfig, policy: TrainedPolicy, dataset: Path, quarantine: str | None
) -> Prompts:
    """Read and encode prompts; unusable rows go to the file `quarantine` in the run directory, if it is given.

    Raises:
        DataError: the dataset is missing or has no usable row.
        ConfigError: the longest prompt and a full response exceed the policy's context.
    """
    unusable = Quarantine(None if quarantine is None else config.output_dir / quarantine)

    def encoded(row: Row) -> tuple[Conversation, list[int]]:
        prompt = parse_prompt(row)
        return prompt, encode_prompt(policy.tokenizer, prompt, max_length=config.max_prompt_length)

    read = list(read_as(dataset, unusable, encoded, PROMPT_SHAPES))
    prompts = Prompts([prompt for prompt, _ in read], [ids for _, ids in read])
    check_context(config, policy.model, prompts)
    return prompts


def context_length(policy: PreTrainedModel) -> int | None:
    """The most tokens that the policy can read; None if its config does not say."""
    length: int | None = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    return length


def check_context(config: OnlineConfig, policy: PreTrainedModel, prompts: Prompts) -> None:
    """The longest prompt and a full response fit the model's context.

    Raises:
        ConfigError: they do not.
    """
    context = context_length(policy)
    longest = max(map(len, prompts.ids))
    if context is not None and longest + config.max_new_tokens > context:
        raise ConfigError(
            f"a prompt of {longest} tokens and max_new_tokens {config.max_new_tokens} exceed the model's context of "
            f"{context}: lower --max_prompt_length or --max_new_tokens"
        )


def comparable(scored: Sequence[int], groups: Sequence[int]) -> list[int]:
    """Those of the responses `scored` that are not alone in their group; `groups` has the group of every response."""
    sizes = Counter(groups[i] for i in scored)
    return [i for i in scored if sizes[groups[i]] > 1]
