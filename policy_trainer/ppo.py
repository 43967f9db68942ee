"""`rlaif train ppo`: PPO on language models, with rewards from a server in another process.

The loop in `train` follows "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031). All arithmetic is
in `rewards`, `advantages`, `ppo_losses` and `kl`; this file decides what is computed when.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from policy_trainer import optim
from policy_trainer.advantages import gae, moments, whiten
from policy_trainer.batching import SequenceBatch, collate, length_buckets
from policy_trainer.checkpoint import (
    Checkpoint,
    load_latest,
    restore_rng,
    save_checkpoint,
    save_final,
    stop_on_signal,
)
from policy_trainer.client import RewardClient
from policy_trainer.config import PPOConfig
from policy_trainer.kl import KLController
from policy_trainer.logprobs import token_logprobs
from policy_trainer.models import ActorCritic, build_critic, eos_token_ids, fingerprint, load_policy
from policy_trainer.online import Prompts, check_context, check_missing, load_prompts
from policy_trainer.ppo_losses import policy_loss, value_loss
from policy_trainer.reward_source import Reward, RewardSource
from policy_trainer.rewards import adjust_scores, token_rewards
from policy_trainer.rollout import HFRollout, Sampled, decode_response
from policy_trainer.selfcheck import self_check
from rlaif.errors import ModelError, QualityError, RewardServerError
from rlaif.runs import Run, progress
from rlaif.types import Conversation, to_dicts, with_response

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SELF_CHECK_PROMPTS = 16

# What a step's seed is for; see `optim.step_seed`.
_PROMPTS, _SAMPLING, _SHUFFLING, _SELF_CHECK = range(4)


def run(config: PPOConfig) -> None:
    """Train against the reward server at `config.reward_server`."""
    with RewardClient(
        config.reward_server,
        timeout_s=config.reward_timeout_s,
        give_up_after_s=config.reward_give_up_after_s,
    ) as source:
        source.wait_ready(config.reward_give_up_after_s)
        train(config, source)


def train(config: PPOConfig, source: RewardSource) -> None:
    """Run PPO until `config.max_steps`, or go on from the run directory's last checkpoint.

    Args:
        config: the run.
        source: rewards; a `RewardClient` outside of tests.

    Raises:
        QualityError: too many rewards are missing, or a loss, gradient or metric is not finite.
        KeyboardInterrupt: SIGTERM or SIGINT asked for an end; a checkpoint has been written.
        RlaifError: bad input, see the message.
    """
    with (
        Run.open(config.output_dir, config, command="train ppo") as out,
        stop_on_signal() as stop,
    ):
        trainer = Trainer.start(config, source)
        out.truncate_metrics(trainer.step)
        if config.self_check and trainer.step < config.max_steps:
            trainer.self_check(source)
        with progress(config.max_steps, "PPO steps") as bar:
            bar.advance(trainer.step)
            while trainer.step < config.max_steps:
                clock = Clock()

                # 1. Sample one response per prompt. Which prompts, and how they are answered, follows from the
                #    seed and the step alone.
                episodes = trainer.rollout()
                clock.lap("rollout")

                # 2. Ask for rewards. While the server works, policy, critic and reference read the responses.
                pending = source.submit(episodes.conversations)
                read = trainer.read(episodes)
                clock.lap("forward")

                # 3. A missing reward takes its response out of everything that follows.
                rewards = pending.result()
                clock.lap("reward")
                try:
                    check_missing(rewards, config.max_missing_rewards, trainer.step + 1)
                except QualityError:
                    trainer.save()
                    raise
                kept = [i for i, r in enumerate(rewards) if r.value is not None]
                mask = read.mask[kept]
                scores = torch.tensor([r.value for r in rewards if r.value is not None])
                finished = torch.tensor([episodes.sampled[i].finished for i in kept])

                # 4. Token rewards: the KL penalty on each token, the score on the last.
                adjusted = adjust_scores(
                    scores, finished, clip=config.reward_clip, missing_eos_penalty=config.missing_eos_penalty
                )
                shaped = token_rewards(
                    adjusted, read.logprobs[kept], read.ref_logprobs[kept], mask, trainer.kl.coef
                )
                per_token = shaped.rewards
                if config.whiten_rewards:
                    per_token = whiten(per_token, mask, moments(per_token, mask), shift_mean=False)

                # 5. Advantages, whitened over the tokens of the whole batch; returns stay as they are.
                estimated = gae(per_token, read.values[kept], mask, gamma=config.gamma, lam=config.lam)
                advantages = whiten(estimated.advantages, mask, moments(estimated.advantages, mask))

                # 6. Epochs, minibatches, micro-batches.
                stats = trainer.update(
                    episodes,
                    read,
                    scatter(advantages, kept, read.mask),
                    scatter(estimated.returns, kept, read.mask),
                    kept,
                )
                clock.lap("update")

                # 7. Book-keeping.
                mean_kl = float(shaped.kl.mean())
                trainer.step += 1
                metrics = {
                    "episode": trainer.step * config.rollout_batch_size,
                    "objective/kl": mean_kl,
                    "objective/kl_coef": trainer.kl.coef,
                    "objective/entropy": float(-read.logprobs[kept][mask].sum()) / len(kept),
                    "objective/non_score_reward": float(shaped.non_score.mean()),
                    "objective/rlhf_reward": float((shaped.non_score + adjusted).mean()),
                    "objective/scores": float(scores.mean()),
                    "objective/scores_std": float(scores.std(correction=0)),
                    "objective/scores_raw": mean_raw(rewards),
                    **stats,
                    "val/num_eos_tokens": int(finished.sum()),
                    "reward/missing": len(rewards) - len(kept),
                    "response/length": float(mask.sum()) / len(kept),
                    "lr": trainer.learning_rate(config.learning_rate, trainer.step - 1),
                    **clock.times(),
                }
                trainer.kl = trainer.kl.updated(mean_kl, len(kept))
                out.samples(
                    trainer.step, transcripts(episodes, rewards, kept, shaped.kl)[: config.samples_per_step]
                )
                out.log(trainer.step, metrics)
                bar.advance(1, score=metrics["objective/scores"], kl=mean_kl)
                if stop or trainer.step % config.save_steps == 0 or trainer.step == config.max_steps:
                    trainer.save()
                if stop and trainer.step < config.max_steps:
                    raise KeyboardInterrupt
        save_final(config.output_dir, trainer.model.policy, trainer.tokenizer)


class Episodes(NamedTuple):
    """One step's responses; all lists have N items.

    Attributes:
        prompt_ids: token ids with the generation prompt.
        sampled: ids and the engine's own log-probabilities.
        conversations: prompt and response as text, for the reward server.
    """

    prompt_ids: list[list[int]]
    sampled: list[Sampled]
    conversations: list[Conversation]

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and response."""
        return [len(p) + len(s.response_ids) for p, s in zip(self.prompt_ids, self.sampled, strict=True)]

    def collate(self, rows: Sequence[int]) -> SequenceBatch:
        """The padded batch of some rows."""
        return collate([self.prompt_ids[i] for i in rows], [self.sampled[i].response_ids for i in rows])


class Reading(NamedTuple):
    """What the models say of a step's responses before any update; (N, R) on the CPU, 0 at padding.

    Attributes:
        mask: bool, True = a response token that counts.
        logprobs: of the policy that sampled, by the trainer's own forward.
        ref_logprobs: of the reference.
        values: of the critic.
    """

    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor


@dataclass
class Trainer:
    """Everything that has a state, and the operations of the loop on it."""

    config: PPOConfig
    model: ActorCritic
    reference: PreTrainedModel
    reference_id: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    policy_optimizer: torch.optim.AdamW
    value_optimizer: torch.optim.AdamW
    kl: KLController
    reward_version: str
    step: int = 0

    def __post_init__(self) -> None:
        policy = self.model.policy
        self.eos_ids = eos_token_ids(policy, self.tokenizer)
        self.engine = HFRollout(policy, self.eos_ids, batch_size=self.config.generation_batch_size)

    @classmethod
    def start(cls, config: PPOConfig, source: RewardSource) -> Trainer:
        """Load models and data, and the last checkpoint if there is one.

        Raises:
            ModelError: a model cannot be loaded, or the reference is not the one that the run began with.
            RewardServerError: the server serves other weights than those that the run began with.
        """
        checkpoint = load_latest(config.output_dir)
        path = config.model_name_or_path if checkpoint is None else str(checkpoint.path)
        template = config.chat_template if checkpoint is None else None
        policy, tokenizer = load_policy(path, dtype=config.dtype, chat_template=template)
        # The reference is named by the config and never by a checkpoint: a resumed run keeps its anchor.
        reference = load_policy(config.ref_model or config.model_name_or_path, dtype=config.dtype).model
        reference.requires_grad_(False)
        critic = build_critic(policy, config.critic_init) if config.value_head == "separate" else None
        model = ActorCritic(policy, critic)
        prompts = load_prompts(config, tokenizer)
        check_context(config, policy, prompts)
        trainer = cls(
            config=config,
            model=model,
            reference=reference,
            reference_id=fingerprint(reference),
            tokenizer=tokenizer,
            prompts=prompts,
            policy_optimizer=optim.adamw(policy.parameters(), config.learning_rate, config),
            value_optimizer=optim.adamw(model.value_parameters(), config.critic_learning_rate, config),
            kl=KLController(config.kl_coef, config.target_kl, config.kl_horizon),
            reward_version=source.info().version,
        )
        if checkpoint is None:
            torch.manual_seed(config.seed)
        else:
            trainer.resume(checkpoint)
        return trainer

    def rollout(self) -> Episodes:
        """Sample this step's responses."""
        config = self.config
        chosen = optim.shuffled_stream(
            len(self.prompts.ids),
            optim.step_seed(config.seed, _PROMPTS),
            start=self.step * config.rollout_batch_size,
            count=config.rollout_batch_size,
        )
        prompt_ids = [self.prompts.ids[i] for i in chosen]
        sampled = self.engine.generate(
            prompt_ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            seed=optim.step_seed(config.seed, _SAMPLING, self.step),
        )
        conversations = [
            with_response(
                self.prompts.conversations[chosen[s.prompt_index]],
                decode_response(self.tokenizer, prompt_ids[s.prompt_index], s, self.eos_ids),
            )
            for s in sampled
        ]
        return Episodes(prompt_ids, sampled, conversations)

    @torch.no_grad()
    def read(self, episodes: Episodes) -> Reading:
        """Log-probabilities under policy and reference, and values, before any update.

        The micro-batches are those of the first epoch, so that its first ratios are 1 to the last bit: a forward
        over other neighbours may round differently.
        """
        longest = max(len(s.response_ids) for s in episodes.sampled)
        shape = (len(episodes.sampled), longest)
        reading = Reading(torch.zeros(shape, dtype=torch.bool), *(torch.zeros(shape) for _ in range(3)))
        for minibatch in self.minibatches(episodes, epoch=0):
            for rows in minibatch:
                batch = episodes.collate(rows).to(self.device)
                inputs = (batch.input_ids, batch.attention_mask, batch.response_len)
                own = self.model(*inputs, self.config.temperature)
                ref = token_logprobs(self.reference, *inputs, self.config.temperature).logprobs
                found = (batch.response_mask, own.logprobs, ref, own.values)
                for target, values in zip(reading, found, strict=True):
                    target[rows, : batch.response_len] = (values * batch.response_mask).cpu()
        return reading

    def minibatches(self, episodes: Episodes, epoch: int) -> list[list[list[int]]]:
        """Shuffled minibatches of this step's responses, each cut into micro-batches of like length."""
        n = len(episodes.sampled)
        order = optim.permutation(n, optim.step_seed(self.config.seed, _SHUFFLING, self.step, epoch))
        parts = torch.tensor(order).tensor_split(self.config.num_mini_batches)
        return [
            length_buckets(
                episodes.lengths,
                max_rows=n,
                max_tokens=self.config.micro_batch_tokens,
                indices=part.tolist(),
            )
            for part in parts
        ]

    def update(
        self, episodes: Episodes, read: Reading, advantages: Tensor, returns: Tensor, kept: Sequence[int]
    ) -> dict[str, float]:
        """Learn from the responses in `kept`, several times over; returns means over all tokens seen.

        Args:
            episodes: N responses.
            read: what was known before the update.
            advantages: (N, R), whitened.
            returns: (N, R).
            kept: the responses that have a reward.
        """
        config = self.config
        known = frozenset(kept)
        learns = self.step >= config.critic_warmup_steps
        optim.set_learning_rate(self.policy_optimizer, self.learning_rate(config.learning_rate, self.step))
        optim.set_learning_rate(
            self.value_optimizer, self.learning_rate(config.critic_learning_rate, self.step)
        )
        sums = torch.zeros(len(_STATS), dtype=torch.float64)
        tokens_seen = 0
        for epoch in range(config.num_ppo_epochs):
            for minibatch in self.minibatches(episodes, epoch):
                micro_batches = [[i for i in rows if i in known] for rows in minibatch]
                micro_batches = [rows for rows in micro_batches if rows]
                if not micro_batches:
                    continue
                # One division by the tokens of the whole minibatch: the gradient does not depend on its cut.
                tokens = int(read.mask[[i for rows in micro_batches for i in rows]].sum())
                self.model.zero_grad(set_to_none=True)
                for rows in micro_batches:
                    sums += self.accumulate(episodes, read, advantages, returns, rows, tokens, learns)
                tokens_seen += tokens
                self.apply_gradients(learns)
        mean = dict(zip(_STATS, (sums / tokens_seen).tolist(), strict=True))
        mean["val/ratio_var"] = max(0.0, mean.pop("ratio_sq") - mean["val/ratio"] ** 2)
        return mean

    def accumulate(
        self,
        episodes: Episodes,
        read: Reading,
        advantages: Tensor,
        returns: Tensor,
        rows: Sequence[int],
        tokens: int,
        policy_learns: bool,
    ) -> Tensor:
        """Add the gradient of one micro-batch; returns the sums named by `_STATS`."""
        config = self.config
        batch = episodes.collate(rows).to(self.device)
        old_logprobs, old_values, advantage, target = (
            t[rows, : batch.response_len].to(self.device)
            for t in (read.logprobs, read.values, advantages, returns)
        )
        now = self.model(
            batch.input_ids, batch.attention_mask, batch.response_len, config.temperature, with_entropy=True
        )
        policy = policy_loss(now.logprobs, old_logprobs, advantage, batch.response_mask, config.cliprange)
        value = value_loss(now.values, old_values, target, batch.response_mask, config.cliprange_value)
        loss = config.vf_coef * value.loss + (policy.loss if policy_learns else 0.0)
        torch.autograd.backward(loss / tokens)
        entropy = now.entropy[batch.response_mask].sum()
        stats = (
            policy.loss,
            value.loss,
            policy.approx_kl,
            policy.clipped,
            entropy,
            policy.ratio,
            policy.ratio_sq,
        )
        return torch.stack([t.detach().double().cpu() for t in (*stats, value.clipped)])

    def apply_gradients(self, policy_learns: bool) -> None:
        """Clip and step both optimisers; in the critic's warm-up the policy stays as it is.

        Raises:
            QualityError: a gradient is not finite; neither model has been changed by it.
        """
        norm = self.config.max_grad_norm
        policy_parameters = list(self.model.policy.parameters())
        optim.clip_gradients(self.model.value_parameters(), norm, "critic")
        if policy_learns:
            optim.clip_gradients(policy_parameters, norm, "policy")
            self.policy_optimizer.step()
        self.value_optimizer.step()

    def learning_rate(self, peak: float, step: int) -> float:
        """The learning rate of a step."""
        config = self.config
        return peak * optim.lr_factor(config.lr_scheduler_type, step, config.max_steps, config.warmup_steps)

    def self_check(self, source: RewardSource) -> None:
        """Run the start-up self-check and print its findings to stderr.

        Raises:
            SelfCheckError: with the cause.
        """
        chosen = range(min(SELF_CHECK_PROMPTS, len(self.prompts.ids)))
        report = self_check(
            policy=self.model.policy,
            reference=self.reference,
            same_model=self.config.ref_model is None and self.step == 0,
            tokenizer=self.tokenizer,
            eos_ids=self.eos_ids,
            engine=self.engine,
            source=source,
            prompts=[self.prompts.conversations[i] for i in chosen],
            prompt_ids=[self.prompts.ids[i] for i in chosen],
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=optim.step_seed(self.config.seed, _SELF_CHECK),
        )
        print(report, file=sys.stderr)

    def save(self) -> None:
        """Write a checkpoint of the completed steps."""
        save_checkpoint(
            self.config.output_dir,
            self.step,
            policy=self.model.policy,
            tokenizer=self.tokenizer,
            state={
                "value": self.model.value_state(),
                "policy_optimizer": self.policy_optimizer.state_dict(),
                "value_optimizer": self.value_optimizer.state_dict(),
            },
            info={
                "kl_coef": self.kl.coef,
                "reference": self.reference_id,
                "reward_version": self.reward_version,
                "episodes": self.step * self.config.rollout_batch_size,
            },
            keep=self.config.save_total_limit,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint's state; the policy's weights are loaded already.

        Raises:
            ModelError: the reference has changed since the run began.
            RewardServerError: the reward model has changed since the run began.
        """
        state, info = checkpoint.state, checkpoint.info
        if info["reference"] != self.reference_id:
            raise ModelError(
                f"the reference {self.config.ref_model or self.config.model_name_or_path} is not the one that this run "
                "began with: KL would be measured from elsewhere; put it back or start with a fresh --output_dir"
            )
        if info["reward_version"] != self.reward_version:
            raise RewardServerError(
                f"the reward server serves version {self.reward_version}, this run began with "
                f"{info['reward_version']}: serve that model again or start with a fresh --output_dir"
            )
        self.model.load_value_state(state["value"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.kl = replace(self.kl, coef=info["kl_coef"])
        self.step = checkpoint.step
        restore_rng(state["rng"])

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.model.policy.device


_STATS = (
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "val/ratio",
    "ratio_sq",
    "val/clipfrac_avg",
)
"""What `Trainer.accumulate` sums over tokens, in order. Names are TRL's; `ratio_sq` becomes `val/ratio_var`."""


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


def scatter(rows: Tensor, kept: Sequence[int], like: Tensor) -> Tensor:
    """Put (len(kept), R) rows back to their places among N; 0 elsewhere. `like` is (N, R)."""
    out = torch.zeros(like.shape, dtype=rows.dtype)
    out[kept] = rows
    return out


def mean_raw(rewards: Sequence[Reward]) -> float | None:
    """Mean of the scorer's own outputs; None if it gave none."""
    raw = [r.raw for r in rewards if r.raw is not None]
    return sum(raw) / len(raw) if raw else None


def transcripts(
    episodes: Episodes, rewards: Sequence[Reward], kept: Sequence[int], kl: Tensor
) -> list[dict[str, Any]]:
    """Rows for `samples/`: what was asked, what was answered, what it earned."""
    return [
        {
            "prompt": to_dicts(episodes.conversations[i][:-1]),
            "response": episodes.conversations[i][-1].content,
            "reward": rewards[i].value,
            "raw": rewards[i].raw,
            "kl": float(kl[at]),
            "finished": episodes.sampled[i].finished,
        }
        for at, i in enumerate(kept)
    ]
