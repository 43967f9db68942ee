"""`rlaif train ppo`: PPO on language models, with rewards from a server in another process.

The loop in `train` follows "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031); REINFORCE, RLOO, GRPO
and Dr. GRPO are the same loop with other advantages and no critic. All arithmetic is in `rewards`, `advantages`,
`ppo_losses` and `kl`; this file decides what is computed when.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from policy_trainer import optim
from policy_trainer.advantages import NO_VALUES, Moments, estimate, moments, whiten
from policy_trainer.ahead import Rollout, RolloutsAhead
from policy_trainer.batching import forward_batches
from policy_trainer.config import PPOConfig
from policy_trainer.episodes import Episodes, Reading, mean_raw, scatter, transcripts
from policy_trainer.importance import difference, importance_weights, probed_difference, weight_metrics
from policy_trainer.kl import KLController, PenaltyController, kl_estimate
from policy_trainer.logprobs import token_logprobs
from policy_trainer.models import ActorCritic, Evaluation, build_critic, build_value_head
from policy_trainer.online import (
    Clock,
    OnlineTrainer,
    Purpose,
    Snapshot,
    comparable,
    context_length,
    served_reward,
    session,
)
from policy_trainer.ppo_losses import kl_loss, penalised_policy_loss, policy_loss, value_loss
from policy_trainer.ptx import TextMix
from policy_trainer.reward_source import RewardSource
from policy_trainer.rewards import adjust_scores, token_rewards
from policy_trainer.rollout import Sampled, decode_response
from policy_trainer.sft import accumulate_gradients
from rlaif.errors import ConfigError, QualityError, RewardServerError
from rlaif.records import Quarantine
from rlaif.types import with_response


def run(config: PPOConfig) -> None:
    """Train against the reward server at `config.reward_server`."""
    with served_reward(config) as source:
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
    with session(Trainer, config, source, method="ppo") as at_work:
        trainer = at_work.trainer
        while at_work.unfinished:
            clock = Clock()

            # 1. Sample responses and ask for rewards, or take what an earlier step has begun. Which prompts, and how
            #    they are answered, follows from the seed and the step alone.
            episodes, pending = trainer.next_rollout()
            clock.lap("rollout")

            # 2. While the reward server works, policy, critic and reference read the responses.
            read = trainer.read(episodes)
            clock.lap("forward")

            # 3. A missing reward takes its response out of everything that follows, and with it a response that
            #    was to be compared with it alone.
            try:
                rewards = pending.result()
                clock.lap("reward")
                scored = [i for i, r in enumerate(rewards) if r.value is not None]
                kept = comparable(scored, episodes.groups) if config.grouped else scored
                trainer.check_missing(rewards, kept)
            except (RewardServerError, QualityError):
                trainer.save()
                raise
            mask = read.mask[kept]
            groups = torch.tensor(episodes.groups)[kept]
            scores = torch.tensor([rewards[i].value for i in kept])
            finished = torch.tensor([episodes.sampled[i].finished for i in kept])

            # 4. Token rewards: the KL penalty on each token unless it is in the loss, the score on the last.
            adjusted = adjust_scores(
                scores,
                finished,
                mask.sum(1),
                over=trainer.normalised_by(scores),
                clip=config.reward_clip,
                length_penalty_coef=config.length_penalty_coef,
                length_budget=config.length_budget,
                missing_eos_penalty=config.missing_eos_penalty,
                missing_eos_reward=config.missing_eos_reward,
            )
            penalty = 0.0 if config.kl_in_loss else trainer.kl.coef
            shaped = token_rewards(adjusted, read.logprobs[kept], read.ref_logprobs[kept], mask, penalty)
            per_token = shaped.rewards
            if config.whiten_rewards:
                per_token = whiten(per_token, mask, moments(per_token, mask), shift_mean=False)

            # 5. Advantages, over the whole batch.
            estimated = estimate(
                config.advantage_estimator,
                per_token,
                read.values[kept],
                mask,
                groups,
                gamma=config.gamma,
                lam=config.lam,
            )

            # 6. Epochs, minibatches, micro-batches.
            stats = trainer.update(
                episodes,
                read,
                scatter(estimated.advantages, kept, read.mask),
                scatter(estimated.returns, kept, read.mask),
                kept,
            )
            clock.lap("update")

            # 7. Book-keeping.
            mean_kl = float(shaped.kl.mean())
            learning_rate = trainer.learning_rate()
            trainer.step += 1
            metrics = {
                "episode": trainer.step * config.responses_per_step,
                "objective/kl": mean_kl,
                "objective/kl_coef": trainer.kl.coef,
                "objective/entropy": float(-read.logprobs[kept][mask].sum()) / len(kept),
                "objective/non_score_reward": float(shaped.non_score.mean()),
                "objective/rlhf_reward": float((shaped.non_score + adjusted).mean()),
                "objective/scores": float(scores.mean()),
                "objective/scores_std": float(scores.std(correction=0)),
                "objective/scores_raw": mean_raw([rewards[i] for i in kept]),
                **stats,
                **read.metrics,
                "val/num_eos_tokens": int(finished.sum()),
                "reward/missing": len(rewards) - len(scored),
                **(group_metrics(adjusted, groups, config.rollout_batch_size) if config.grouped else {}),
                "response/length": float(mask.sum()) / len(kept),
                "lr": learning_rate,
                **clock.times(),
            }
            trainer.kl = trainer.kl.updated(mean_kl, len(kept))
            at_work.end_step(
                metrics,
                transcripts(
                    episodes, rewards, kept, shaped.kl, (estimated.advantages * mask).sum(1) / mask.sum(1)
                ),
                score=metrics["objective/scores"],
                kl=mean_kl,
            )


@dataclass(kw_only=True)
class Trainer(OnlineTrainer):
    """The policy, its critic if it has one, and the operations of the loop on them.

    Attributes:
        model: the policy with its critic.
        value_optimizer: the critic's; None without one.
        kl: the coefficient of the KL to the reference.
        penalty: the coefficient of KL(old || new), of PPO-penalty.
        scores_seen: mean and variance of the scores learned from so far, where they are normalised by those.
        text: what is mixed in; None for nothing.
        ahead: the rollouts of later steps; None where each is made when its step begins.
    """

    config: PPOConfig
    model: ActorCritic = field(init=False)
    value_optimizer: torch.optim.AdamW | None = field(init=False, default=None)
    kl: KLController = field(init=False)
    penalty: PenaltyController = field(init=False)
    scores_seen: Moments = NO_VALUES
    text: TextMix | None = field(init=False, default=None)
    ahead: RolloutsAhead | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        config, critic = self.config, None
        if config.has_critic:
            separate = config.value_head == "separate"
            critic = (
                build_critic(self.policy, config.critic_init) if separate else build_value_head(self.policy)
            )
            self.value_optimizer = optim.adamw(critic.parameters(), config.critic_learning_rate, config)
        self.model = ActorCritic(self.policy, critic)
        self.kl = KLController(config.kl_coef, config.target_kl, config.kl_horizon)
        self.penalty = PenaltyController(config.penalty_coef, config.penalty_target)
        if config.ptx_dataset is not None:
            longest = config.max_prompt_length + config.max_new_tokens
            self.text = TextMix.load(
                config.ptx_dataset,
                self.tokenizer,
                max_length=min(longest, context_length(self.policy) or longest),
                batch_size=config.ptx_batch_size,
                seed=optim.step_seed(config.seed, Purpose.PTX),
                quarantine=Quarantine(
                    config.output_dir / "quarantine-ptx.jsonl" if self.world.is_main else None
                ),
                eos_ids=self.eos_ids,
            )
        if config.max_staleness:
            if self.world.size > 1:
                raise ConfigError("max_staleness goes with one process: start the run without torchrun")
            self.ahead = RolloutsAhead(
                self.rollout, max_staleness=config.max_staleness, max_steps=config.max_steps
            )

    def next_rollout(self) -> Rollout:
        """This step's rollout: made now, or ahead of it."""
        if self.ahead is not None:
            return self.ahead.take(self.step, self.policy)
        return self.rollout(self.step, Snapshot(self.policy, self.step))

    def rollout(self, step: int, by: Snapshot) -> Rollout:
        """Sample a step's responses and ask for their rewards."""
        episodes = self.episodes(step, self.sample(self.prompt_rows(step), step=step, by=by))
        return Rollout(episodes, self.source.submit(episodes.conversations))

    def episodes(self, step: int, sampled: list[Sampled]) -> Episodes:
        """What was sampled at a step, with its prompts."""
        rows = self.prompt_rows(step)
        prompt_ids = [self.prompts.ids[rows[s.prompt_index]] for s in sampled]
        conversations = [
            with_response(
                self.prompts.conversations[rows[s.prompt_index]],
                decode_response(self.tokenizer, ids, s, self.eos_ids),
            )
            for ids, s in zip(prompt_ids, sampled, strict=True)
        ]
        return Episodes(prompt_ids, sampled, conversations)

    @torch.no_grad()
    def read(self, episodes: Episodes) -> Reading:
        """Log-probabilities under policy and reference, and values, before any update.

        The micro-batches are those of the first epoch, so that its first ratios are 1 to the last bit: a forward
        over other neighbours may round differently.
        """
        config = self.config
        mask, engine = episodes.response_mask, episodes.engine_logprobs
        reused, metrics = self.may_reuse(episodes)
        logprobs, ref_logprobs, values = (torch.zeros_like(engine) for _ in range(3))
        for minibatch in self.minibatches(episodes, epoch=0):
            for rows in self.world.share(minibatch):
                batch = episodes.collate(rows).to(self.device)
                inputs = (batch.input_ids, batch.attention_mask, batch.response_len)
                if reused:
                    said = engine[rows, : batch.response_len].to(self.device)
                    own = Evaluation(said, self.model.values(*inputs), None)
                else:
                    own = self.model(*inputs, config.temperature)
                ref = token_logprobs(self.reference, *inputs, config.temperature).logprobs
                for target, part in ((logprobs, own.logprobs), (ref_logprobs, ref), (values, own.values)):
                    if part is not None:
                        target[rows, : batch.response_len] = (part * batch.response_mask).cpu()
        for target in (logprobs, ref_logprobs, values):
            self.world.add(target)
        if reused:
            return Reading(mask, logprobs, ref_logprobs, values, None, metrics)
        metrics |= difference(logprobs, engine, mask).metrics()
        weights = None
        if config.use_vllm and config.vllm_importance_sampling_correction:
            weights = importance_weights(
                logprobs,
                engine,
                mask,
                mode=config.vllm_importance_sampling_mode,
                clip_max=config.vllm_importance_sampling_clip_max,
            )
            metrics |= weight_metrics(weights, mask)
        return Reading(mask, logprobs, ref_logprobs, values, weights, metrics)

    def may_reuse(self, episodes: Episodes) -> tuple[bool, dict[str, float]]:
        """Whether the engine's log-probabilities stand for the trainer's own, and what is known of that.

        The policy that sampled ahead is gone, so what its engine said is all there is.
        """
        config = self.config
        if config.max_staleness:
            return True, {"sample/staleness_mean": self.step - episodes.sampled[0].policy_version}
        if config.reuse_logprobs_tolerance is None:
            return False, {}
        found = probed_difference(
            self.policy,
            episodes.prompt_ids,
            episodes.sampled,
            config.temperature,
            config.micro_batch_tokens,
        )
        reused = found.max <= config.reuse_logprobs_tolerance
        return reused, {**found.metrics(), "sampling/logprobs_reused": float(reused)}

    def normalised_by(self, scores: Tensor) -> Moments | None:
        """The moments that this step's scores, (N,), are normalised by; None leaves them as they are."""
        if self.config.reward_normalization == "none":
            return None
        of_step = moments(scores, torch.ones_like(scores, dtype=torch.bool))
        if self.config.reward_normalization == "batch":
            return of_step
        self.scores_seen = self.scores_seen.merged(of_step)
        return self.scores_seen

    def minibatches(self, episodes: Episodes, epoch: int) -> list[list[list[int]]]:
        """Shuffled minibatches of this step's responses, each cut into micro-batches of like length."""
        n = len(episodes.sampled)
        order = optim.permutation(n, optim.step_seed(self.config.seed, Purpose.SHUFFLING, self.step, epoch))
        parts = torch.tensor(order).tensor_split(self.config.num_mini_batches)
        return [
            forward_batches(
                episodes.lengths,
                max_tokens=self.config.micro_batch_tokens,
                device=self.device,
                indices=part.tolist(),
            )
            for part in parts
        ]

    def update(
        self, episodes: Episodes, read: Reading, advantages: Tensor, returns: Tensor, kept: Sequence[int]
    ) -> dict[str, float]:
        """Learn from the responses in `kept`, several times over; returns means over all tokens seen.

        In PPO-penalty the coefficient of KL(old || new) then adapts to how far the policy has moved.

        Args:
            episodes: N responses.
            read: what was known before the update.
            advantages: (N, R).
            returns: (N, R).
            kept: the responses to learn from.
        """
        config = self.config
        known = frozenset(kept)
        learns = self.step >= config.critic_warmup_steps
        optim.set_learning_rate(self.optimizer, self.learning_rate())
        if self.value_optimizer is not None:
            optim.set_learning_rate(self.value_optimizer, self.learning_rate(config.critic_learning_rate))
        sums: dict[str, float] = {}
        tokens_seen = 0
        text_losses = []
        for epoch in range(config.num_ppo_epochs):
            for number, minibatch in enumerate(self.minibatches(episodes, epoch)):
                micro_batches = [[i for i in rows if i in known] for rows in minibatch]
                micro_batches = [rows for rows in micro_batches if rows]
                if not micro_batches:
                    continue
                # One division by a number of the whole minibatch: the gradient does not depend on its cut.
                rows_seen = [i for rows in micro_batches for i in rows]
                tokens = int(read.mask[rows_seen].sum())
                divisor = self.loss_divisor(tokens, len(rows_seen))
                self.model.zero_grad(set_to_none=True)
                for rows in self.world.share(micro_batches):
                    found = self.accumulate(episodes, read, advantages, returns, rows, divisor, learns)
                    sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
                tokens_seen += tokens
                if self.text is not None and learns:
                    epochs = self.step * config.num_ppo_epochs + epoch
                    examples = self.text.batch(epochs * config.num_mini_batches + number)
                    text_losses.append(
                        accumulate_gradients(
                            self.policy,
                            examples,
                            micro_batch_tokens=config.micro_batch_tokens,
                            weight=config.ptx_coef,
                            world=self.world,
                        )
                    )
                self.apply_gradients(learns)
        mean = {name: value / tokens_seen for name, value in self.world.total(sums).items()}
        mean["val/ratio_var"] = max(0.0, mean.pop("ratio_sq") - mean["val/ratio"] ** 2)
        if text_losses:
            mean["loss/ptx_avg"] = sum(text_losses) / len(text_losses)
        if config.policy_objective == "penalty" and learns:
            moved = self.moved(episodes, read, kept)
            mean |= {"policy/penalty_coef": self.penalty.coef, "policy/penalty_kl": moved}
            self.penalty = self.penalty.updated(moved)
        return mean

    @torch.no_grad()
    def moved(self, episodes: Episodes, read: Reading, kept: Sequence[int]) -> float:
        """KL(old || new) over the step's responses, in nats per token: how far the update has moved the policy."""
        total = 0.0
        buckets = forward_batches(
            episodes.lengths,
            max_tokens=self.config.micro_batch_tokens,
            device=self.device,
            indices=kept,
        )
        for rows in self.world.share(buckets):
            batch = episodes.collate(rows).to(self.device)
            now = token_logprobs(
                self.policy,
                batch.input_ids,
                batch.attention_mask,
                batch.response_len,
                self.config.temperature,
            ).logprobs
            old = read.logprobs[rows, : batch.response_len].to(self.device)
            total += float(kl_estimate(old, now, "k3")[batch.response_mask].double().sum())
        return sum(self.world.gather(total)) / int(read.mask[kept].sum())

    def loss_divisor(self, tokens: int, responses: int) -> int:
        """What the sums of a minibatch's losses are divided by.

        Its tokens (verl's `token-mean`, DAPO); for Dr. GRPO the tokens that its responses could have had, so that
        a token weighs the same in a minibatch of short responses and in one of long ones (arXiv 2503.20783).
        """
        if self.config.advantage_estimator == "dr_grpo":
            return responses * self.config.max_new_tokens
        return tokens

    def accumulate(
        self,
        episodes: Episodes,
        read: Reading,
        advantages: Tensor,
        returns: Tensor,
        rows: Sequence[int],
        divisor: int,
        policy_learns: bool,
    ) -> dict[str, float]:
        """Add the gradient of one micro-batch; returns sums over its tokens by the names that TRL gives their means.

        `ratio_sq` is for `val/ratio_var`.
        """
        config = self.config
        batch = episodes.collate(rows).to(self.device)
        mask = batch.response_mask
        old_logprobs, ref_logprobs, old_values, advantage, target = (
            t[rows, : batch.response_len].to(self.device)
            for t in (read.logprobs, read.ref_logprobs, read.values, advantages, returns)
        )
        now = self.model(
            batch.input_ids, batch.attention_mask, batch.response_len, config.temperature, with_entropy=True
        )
        assert now.entropy is not None
        weights = None if read.weights is None else read.weights[rows, : batch.response_len].to(self.device)
        surrogate = (now.logprobs, old_logprobs, advantage, mask)
        if config.policy_objective == "penalty":
            policy = penalised_policy_loss(*surrogate, self.penalty.coef, weights)
        else:
            policy = policy_loss(
                *surrogate,
                config.cliprange,
                weights,
                cliprange_high=config.cliprange_high,
                dual_clip=config.dual_clip,
                level=config.importance_sampling_level,
            )
        loss = policy.loss if policy_learns else torch.zeros_like(policy.loss)
        sums = {
            "loss/policy_avg": policy.loss,
            "policy/approxkl_avg": policy.approx_kl,
            "policy/clipfrac_avg": policy.clipped,
            "policy/entropy_avg": now.entropy[mask].sum(),
            "val/ratio": policy.ratio,
            "ratio_sq": policy.ratio_sq,
        }
        if config.kl_in_loss and policy_learns:
            kl = kl_loss(now.logprobs, old_logprobs, ref_logprobs, mask, config.kl_estimator)
            loss = loss + self.kl.coef * kl
            sums["loss/kl_avg"] = kl
        if now.values is not None:
            value = value_loss(now.values, old_values, target, mask, config.cliprange_value)
            loss = config.vf_coef * value.loss + loss
            sums |= {"loss/value_avg": value.loss, "val/clipfrac_avg": value.clipped}
        torch.autograd.backward(loss / divisor)
        return {name: t.item() for name, t in sums.items()}

    def apply_gradients(self, policy_learns: bool) -> None:
        """Clip and step both optimisers; in the critic's warm-up the policy stays as it is.

        Raises:
            QualityError: a gradient is not finite; neither model has been changed by it.
        """
        self.world.add_gradients(self.model.parameters())
        norm = self.config.max_grad_norm
        policy_parameters = list(self.policy.parameters())
        if self.model.critic is not None:
            optim.clip_gradients(list(self.model.critic.parameters()), norm, "critic")
        if policy_learns:
            optim.clip_gradients(policy_parameters, norm, "policy")
            self.optimizer.step()
        if self.value_optimizer is not None:
            self.value_optimizer.step()

    def state(self) -> dict[str, Any]:
        """See `OnlineTrainer.state`."""
        state = super().state()
        if self.model.critic is not None and self.value_optimizer is not None:
            state |= {
                "value": self.model.critic.state_dict(),
                "value_optimizer": self.value_optimizer.state_dict(),
            }
        if self.ahead is not None:
            state["ahead"] = self.ahead.state(self.step)
        return state

    def info(self) -> dict[str, Any]:
        """See `OnlineTrainer.info`."""
        return {
            **super().info(),
            "kl_coef": self.kl.coef,
            "penalty_coef": self.penalty.coef,
            "scores_seen": list(self.scores_seen),
        }

    def restore(self, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        """See `OnlineTrainer.restore`."""
        super().restore(state, info)
        if self.model.critic is not None and self.value_optimizer is not None:
            self.model.critic.load_state_dict(state["value"])
            self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.kl = replace(self.kl, coef=info["kl_coef"])
        # Checkpoints of earlier releases have neither; they could not be set.
        self.penalty = replace(self.penalty, coef=info.get("penalty_coef", self.penalty.coef))
        self.scores_seen = Moments(*info.get("scores_seen", NO_VALUES))
        if self.ahead is not None:
            self.ahead.restore(state["ahead"], self.episodes, lambda e: self.source.submit(e.conversations))

    def close(self) -> None:
        """See `OnlineTrainer.close`."""
        if self.ahead is not None:
            self.ahead.close()
        super().close()

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.device


def group_metrics(scores: Tensor, groups: Tensor, sampled: int) -> dict[str, float]:
    """How many of `sampled` groups had too few rewards, and in which share of the others all were equal."""
    spread = [bool((of := scores[groups == g]).max() > of.min()) for g in set(groups.tolist())]
    return {
        "reward/dropped_groups": sampled - len(spread),
        "reward/frac_zero_std": 1 - sum(spread) / len(spread),
    }
