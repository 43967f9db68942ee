"""The flags of the trainer's commands. Imports neither torch, grpc nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from rlaif.errors import ConfigError
from rlaif.lora import LoraFlags
from rlaif.trackers import TrackerName

AdvantageEstimator = Literal["gae", "reinforce", "rloo", "grpo", "dr_grpo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
KLEstimator = Literal["k1", "k2", "k3", "k3+"]
PolicyObjective = Literal["clip", "penalty"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(LoraFlags):
    """What every training command has in common."""

    model_name_or_path: str
    """The policy to train: a path, hf:NAME_OR_PATH or tinyworld:policy."""
    dataset: Path
    """Training data: a JSONL, JSON, CSV or Parquet file, or a dataset folder."""
    output_dir: Path
    """Run directory. If it holds a checkpoint of this run, the run goes on from there."""
    seed: int = 0
    """Decides sampling and the order of the data."""
    chat_template: str | None = None
    """Chat template: `plain`, `transcript` or a Jinja file. By default the tokenizer's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights. With bfloat16 the optimiser has float32 copies of those that it trains."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping it: less memory, more time, the same result."""
    learning_rate: float = 3e-6
    """Peak learning rate of the policy's AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    adam_epsilon: float = 1e-5
    """Epsilon of AdamW. 1e-5 is what the PPO reproductions use; PyTorch's own default is 1e-8."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_tokens: int = 8192
    """Padded tokens in one forward pass. A matter of memory and speed: gradients do not depend on it."""
    save_steps: int = 50
    """Write a checkpoint every n steps; one is always written at the end."""
    save_total_limit: int | None = 2
    """Checkpoints to keep; None keeps all."""
    report_to: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, trackio, or none."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        self.check_lora()
        require(self.learning_rate >= 0, "learning_rate", self.learning_rate, "at least 0")
        require(self.max_grad_norm > 0, "max_grad_norm", self.max_grad_norm, "positive")
        require(self.micro_batch_tokens > 0, "micro_batch_tokens", self.micro_batch_tokens, "positive")
        require(self.save_steps > 0, "save_steps", self.save_steps, "at least 1")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        if self.save_total_limit is not None:
            require(self.save_total_limit > 0, "save_total_limit", self.save_total_limit, "at least 1")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(TrainingConfig):
    """What the commands that sample from the policy and ask a reward server have in common."""

    reward_server: str
    """HOST:PORT of the reward server (`rlaif serve`)."""
    max_steps: int = 100
    """Steps; each samples num_generations responses to rollout_batch_size prompts and learns from them."""
    num_generations: int = 1
    """Responses sampled per prompt."""
    ref_model: str | None = None
    """The reference that KL is measured against. By default the policy as it was before training."""
    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones lose their oldest tokens."""
    max_new_tokens: int = 128
    """Longest response in tokens, EOS included."""
    temperature: float = 1.0
    """Sampling temperature. Log-probabilities are taken at the same temperature."""
    rollout_batch_size: int = 64
    """Prompts per step."""
    generation_batch_size: int = 128
    """Most sequences decoded at once."""
    use_vllm: bool = False
    """Sample with vLLM; by default transformers samples with the very model that is trained."""
    vllm_mode: Literal["colocate", "server"] = "colocate"
    """An engine that this run starts beside the trainer, or a `vllm serve` that runs already."""
    vllm_server_base_url: str = "http://127.0.0.1:8000"
    """The server's URL (server). It needs VLLM_SERVER_DEV_MODE=1 and --logprobs-mode processed_logprobs."""
    vllm_server_timeout: float = 240.0
    """How long the server may take to come up, and to answer one request, in seconds (server)."""
    vllm_gpu_memory_utilization: float = 0.3
    """Share of the GPU's memory for vLLM's weights and cache (colocate)."""
    vllm_enable_sleep_mode: bool = False
    """Give the GPU's memory back while the trainer learns (colocate)."""
    vllm_sync_dir: Path | None = None
    """Where weights are put for vLLM, which reads them under the same path. By default the run directory."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the normalised score of a response that was cut off before its EOS."""
    max_missing_rewards: float = 0.5
    """Stop at a checkpoint if a larger share of a step's rewards is missing. Missing ones never count as 0."""
    reward_timeout_s: float = 120.0
    """Deadline of one request to the reward server, in seconds; a request that hangs is made again."""
    reward_give_up_after_s: float = 300.0
    """How long a reward server that is unavailable or hangs is waited for, in seconds; a restart is ridden out."""
    reward_truncation: Literal["reject", "left"] = "reject"
    """A conversation longer than the reward model's context is a missing reward, or loses its oldest tokens there."""
    self_check: bool = True
    """Check sampling, log-probabilities and the reward server before the first step."""
    samples_per_step: int = 8
    """Transcripts written per step, to samples/."""
    log_completions: bool = False
    """Also write every response of each step to a Parquet table in completions/, with its reward and advantage."""
    eval_dataset: Path | None = None
    """Held-out prompts to evaluate on: mean reward, and win rate over the reference's responses to them."""
    eval_steps: int = 10
    """With eval_dataset: evaluate every n steps and at the end; the best checkpoint is kept, and named in best.json."""
    eval_by: Literal["score", "compare"] = "score"
    """Who wins: the higher reward, or whom the reward server prefers when it compares (a judge in both orders)."""
    early_stop_kl: float | None = None
    """End at a checkpoint once a step's KL to the reference exceeds this, in nats per response."""
    early_stopping_patience: int | None = None
    """With eval_dataset: end at a checkpoint after n evaluations whose win rate is no higher than the best before."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {
            "reward_server",
            "reward_timeout_s",
            "reward_give_up_after_s",
            "vllm_server_base_url",
            "vllm_server_timeout",
            "vllm_gpu_memory_utilization",
            "vllm_enable_sleep_mode",
            "vllm_sync_dir",
            "max_missing_rewards",
            "self_check",
            "samples_per_step",
            "save_steps",
            "save_total_limit",
            "gradient_checkpointing",
            "report_to",
            "log_completions",
            "micro_batch_tokens",
            "eval_steps",
            "early_stop_kl",
            "early_stopping_patience",
        }
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        super().__post_init__()
        require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "positive; greedy answers cannot be learned from",
        )
        require(self.max_steps > 0, "max_steps", self.max_steps, "at least 1")
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(self.max_prompt_length > 1, "max_prompt_length", self.max_prompt_length, "at least 2")
        require(self.rollout_batch_size > 1, "rollout_batch_size", self.rollout_batch_size, "at least 2")
        require(
            self.generation_batch_size > 0, "generation_batch_size", self.generation_batch_size, "at least 1"
        )
        require(self.missing_eos_penalty >= 0, "missing_eos_penalty", self.missing_eos_penalty, "at least 0")
        require(self.eval_steps > 0, "eval_steps", self.eval_steps, "at least 1")
        limit, patience = self.early_stop_kl, self.early_stopping_patience
        require(limit is None or limit > 0, "early_stop_kl", limit, "positive")
        require(patience is None or patience > 0, "early_stopping_patience", patience, "at least 1")
        if patience is not None and self.eval_dataset is None:
            raise ConfigError("early_stopping_patience counts evaluations: give an eval_dataset")
        if self.eval_dataset is not None and self.eval_dataset.absolute() == self.dataset.absolute():
            raise ConfigError("eval_dataset is the training data itself: hold prompts out")
        require(
            0 <= self.max_missing_rewards < 1, "max_missing_rewards", self.max_missing_rewards, "in [0, 1)"
        )
        require(self.vllm_server_timeout > 0, "vllm_server_timeout", self.vllm_server_timeout, "positive")
        require(
            0 < self.vllm_gpu_memory_utilization <= 1,
            "vllm_gpu_memory_utilization",
            self.vllm_gpu_memory_utilization,
            "above 0 and at most 1",
        )

    @property
    def decides_by_metrics(self) -> bool:
        """Whether the course of the run depends on metrics of earlier steps."""
        return self.eval_dataset is not None or self.early_stop_kl is not None

    @property
    def responses_per_step(self) -> int:
        """Responses sampled in one step."""
        return self.rollout_batch_size * self.num_generations


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """Improve a policy by PPO, REINFORCE, RLOO, GRPO or Dr. GRPO against a reward server."""

    advantage_estimator: AdvantageEstimator = "gae"
    """`gae` has a critic. `reinforce` takes the batch's mean as baseline, `rloo` the mean of a prompt's other
    responses, `grpo` the group's mean and std, `dr_grpo` the group's mean. docs/training.md says more."""
    num_generations: int = 1
    """Responses sampled per prompt. rloo, grpo and dr_grpo compare them with each other and need at least 2."""
    num_ppo_epochs: int = 4
    """Passes over each step's responses."""
    num_mini_batches: int = 1
    """Optimiser steps per pass."""
    critic_learning_rate: float = 1e-5
    """Peak learning rate of the critic's AdamW (gae)."""
    critic_warmup_steps: int = 0
    """First steps in which only the critic learns (gae)."""
    value_head: Literal["separate", "shared"] = "separate"
    """A critic of its own, or a value head on the policy's trunk (half the memory and time); gae alone has either."""
    critic_init: str = "policy"
    """Where a separate critic starts: `policy`, or the folder of a reward model with the policy's tokenizer."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference, in the reward or in the loss."""
    use_kl_loss: bool | None = None
    """KL in the loss, or (False) in the reward, per token as k1. By default in the loss for grpo and dr_grpo alone."""
    kl_estimator: KLEstimator = "k3"
    """How KL in the loss is estimated. Each has the gradient of the reverse KL; k1 is noisiest, and k3+ has the value
    of k3 and the gradient of k2 (verl's straight-through)."""
    target_kl: float | None = None
    """Steer kl_coef towards this KL per response, in nats (Ziegler et al.); None keeps it fixed."""
    kl_horizon: float = 10_000.0
    """Episodes over which an adaptive kl_coef reacts."""
    gamma: float = 1.0
    """Discount (gae and reinforce; the others reward a response as a whole)."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation (gae)."""
    policy_objective: PolicyObjective = "clip"
    """PPO's surrogate: `clip` bounds the ratio to the policy that sampled, `penalty` adds KL(old || new) to the loss
    with a weight that adapts (Schulman et al., equations 7 and 8)."""
    cliprange: float = 0.2
    """Clip range of the probability ratio (clip)."""
    cliprange_high: float | None = None
    """Clip range upwards where it is another: DAPO's clip-higher, TRL's epsilon_high (clip)."""
    dual_clip: float | None = None
    """Bounds the loss of a token of negative advantage A at dual_clip * |A|; verl's clip_ratio_c, usually 3 (clip)."""
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """One probability ratio per token, or one per response, the geometric mean of its tokens' as in GSPO (clip, and
    estimators that give all tokens of a response one advantage: rloo, grpo, dr_grpo)."""
    penalty_coef: float = 1.0
    """Weight of KL(old || new) at the start (penalty)."""
    penalty_target: float = 0.01
    """KL(old || new) that a step should make, in nats per token: at less than 2/3 of it the weight is halved, at more
    than 3/2 doubled (penalty)."""
    cliprange_value: float = 0.2
    """Clip range of the critic's move (gae)."""
    vf_coef: float = 0.1
    """Weight of the value loss (gae)."""
    whiten_rewards: bool = False
    """Scale token rewards to unit variance over the batch, keeping their mean (gae and reinforce)."""
    reward_normalization: Literal["none", "batch", "running"] = "none"
    """Shift and scale served scores to mean 0 and variance 1: over each step's responses, or over all since the
    start."""
    vllm_importance_sampling_correction: bool = True
    """Weight the policy loss by the trainer's probabilities over vLLM's, bounded (use_vllm)."""
    vllm_importance_sampling_mode: ImportanceSamplingMode = "token_truncate"
    """Per token or per response; a ratio above the bound is cut down to it, or masked: its loss does not count."""
    vllm_importance_sampling_clip_max: float = 2.0
    """The bound."""
    reuse_logprobs_tolerance: float | None = None
    """Take the engine's log-probabilities for those of the old policy, without a forward of it, in each step in which
    they differ by no more than this, in nats, on a few responses that are read to see. None always reads all."""
    max_staleness: int = 0
    """Sample for step k + n while step k learns, with the policy as it is then: responses are at most n versions old.
    Their old log-probabilities are the engine's own. 0 samples when the step begins."""
    reward_clip: float | None = None
    """Clip normalised scores to [-x, x]; None does not clip."""
    length_penalty_coef: float = 0.0
    """Subtracted from the clipped score for each token beyond length_budget. 1/b with the budget max_new_tokens - b is
    DAPO's soft overlong punishment."""
    length_budget: int = 0
    """Tokens of a response that cost nothing."""
    missing_eos_reward: float | None = None
    """What a response earns that was cut off before its EOS, in place of its score (N+ has -1); None leaves it its
    score less missing_eos_penalty."""
    ptx_dataset: Path | None = None
    """Text whose log-likelihood is raised beside PPO's objective (InstructGPT's PPO-ptx): rows of `text`, cut after
    max_prompt_length + max_new_tokens, or any shape that `rlaif train sft` reads."""
    ptx_coef: float = 0.05
    """Weight of the log-likelihood per token of ptx_dataset."""
    ptx_batch_size: int = 32
    """Rows of ptx_dataset in one optimiser step."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        super().__post_init__()
        require(self.num_ppo_epochs > 0, "num_ppo_epochs", self.num_ppo_epochs, "at least 1")
        require(
            0 < self.num_mini_batches <= self.responses_per_step,
            "num_mini_batches",
            self.num_mini_batches,
            "between 1 and the responses of a step (rollout_batch_size * num_generations)",
        )
        fewest = 2 if self.grouped else 1
        require(
            self.num_generations >= fewest,
            "num_generations",
            self.num_generations,
            f"at least {fewest} with advantage_estimator {self.advantage_estimator}",
        )
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, "at least 0")
        require(self.target_kl is None or self.target_kl > 0, "target_kl", self.target_kl, "positive")
        least = 0.2 * self.responses_per_step  # where a KL of 0 would take all of the weight away in one step
        require(
            self.target_kl is None or self.kl_horizon > least,
            "kl_horizon",
            self.kl_horizon,
            f"above {least:g}, a fifth of the responses of a step",
        )
        if self.target_kl is not None and self.kl_coef == 0:
            raise ConfigError(
                "target_kl steers kl_coef by factors, which never leave 0: give a positive kl_coef"
            )
        require(
            not self.critic_warmup_steps or self.critic_warmup_steps < self.max_steps,
            "critic_warmup_steps",
            self.critic_warmup_steps,
            f"below max_steps ({self.max_steps}), or the policy never learns",
        )
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "in [0, 1]")
        require(0 <= self.lam <= 1, "lam", self.lam, "in [0, 1]")
        require(self.cliprange > 0, "cliprange", self.cliprange, "positive")
        require(self.cliprange_value > 0, "cliprange_value", self.cliprange_value, "positive")
        bound = self.vllm_importance_sampling_clip_max
        require(bound > 0, "vllm_importance_sampling_clip_max", bound, "positive")
        tolerance = self.reuse_logprobs_tolerance
        require(tolerance is None or tolerance >= 0, "reuse_logprobs_tolerance", tolerance, "at least 0")
        require(self.max_staleness >= 0, "max_staleness", self.max_staleness, "at least 0")
        if self.max_staleness and tolerance is not None:
            raise ConfigError(
                "max_staleness takes the engine's log-probabilities in every step: leave out reuse_logprobs_tolerance"
            )
        require(self.reward_clip is None or self.reward_clip > 0, "reward_clip", self.reward_clip, "positive")
        high, dual = self.cliprange_high, self.dual_clip
        require(high is None or high > 0, "cliprange_high", high, "positive")
        require(dual is None or dual > 1, "dual_clip", dual, "above 1")
        require(self.penalty_coef > 0, "penalty_coef", self.penalty_coef, "positive")
        require(self.penalty_target > 0, "penalty_target", self.penalty_target, "positive")
        require(self.length_penalty_coef >= 0, "length_penalty_coef", self.length_penalty_coef, "at least 0")
        require(self.length_budget >= 0, "length_budget", self.length_budget, "at least 0")
        require(self.ptx_coef > 0, "ptx_coef", self.ptx_coef, "positive; leave out ptx_dataset for no mixing")
        require(self.ptx_batch_size > 0, "ptx_batch_size", self.ptx_batch_size, "at least 1")
        by_response = self.importance_sampling_level == "sequence"
        if self.policy_objective == "penalty" and (high is not None or dual is not None or by_response):
            raise ConfigError(
                "policy_objective penalty clips nothing: leave out cliprange_high, dual_clip and "
                "importance_sampling_level, or use clip"
            )
        if by_response and not self.grouped:
            raise ConfigError(
                f"advantage_estimator {self.advantage_estimator} has an advantage for each token: "
                "importance_sampling_level sequence goes with rloo, grpo and dr_grpo"
            )
        if self.missing_eos_reward is not None and self.missing_eos_penalty:
            raise ConfigError(
                "missing_eos_reward replaces the score that missing_eos_penalty would be taken from: use one of them"
            )
        if self.value_head == "shared" and self.critic_init != "policy":
            raise ConfigError("critic_init names a separate critic: use it with value_head separate")
        if not self.has_critic and (self.critic_init != "policy" or self.critic_warmup_steps):
            raise ConfigError(
                f"advantage_estimator {self.advantage_estimator} has no critic: leave out critic_init and "
                "critic_warmup_steps, or use gae"
            )
        if self.grouped and self.whiten_rewards:
            raise ConfigError(
                f"advantage_estimator {self.advantage_estimator} rewards a response as a whole: whiten_rewards, which "
                "scales the rewards of tokens, goes with gae and reinforce"
            )

    @property
    def has_critic(self) -> bool:
        """Whether values are learned; the other estimators have no critic at all."""
        return self.advantage_estimator == "gae"

    @property
    def grouped(self) -> bool:
        """Whether a response is compared with the others of its prompt."""
        return self.advantage_estimator in ("rloo", "grpo", "dr_grpo")

    @property
    def kl_in_loss(self) -> bool:
        """Where the KL to the reference counts: in the loss, otherwise in the reward."""
        if self.use_kl_loss is None:
            return self.advantage_estimator in ("grpo", "dr_grpo")
        return self.use_kl_loss


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on responses: conversations, prompt and completion, or the chosen side of pairs."""

    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""
    num_train_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimiser steps, whatever num_train_epochs says."""
    per_device_train_batch_size: int = 32
    """Conversations in one optimiser step."""
    max_length: int = 1024
    """Longest conversation in tokens; a longer one is set aside, and counted, because its end is what is learned."""

    VOLATILE: ClassVar[frozenset[str]] = frozenset(
        {"save_steps", "save_total_limit", "report_to", "gradient_checkpointing", "micro_batch_tokens"}
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        super().__post_init__()
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "at least 1")
        require(self.max_steps is None or self.max_steps > 0, "max_steps", self.max_steps, "at least 1")
        require(
            self.per_device_train_batch_size > 0,
            "per_device_train_batch_size",
            self.per_device_train_batch_size,
            "at least 1",
        )
        require(self.max_length > 1, "max_length", self.max_length, "at least 2")


@dataclass(frozen=True, kw_only=True)
class RoundConfig(OnlineConfig):
    """What the commands have in common that sample a round, store it, and learn from it in several updates."""

    max_steps: int = 20
    """Rounds. One step is one round: rollout_batch_size prompts sampled, scored and learned from."""
    num_train_epochs: int = 1
    """Passes over each round's data."""
    per_device_train_batch_size: int = 32
    """Pairs or responses in one optimiser step."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        super().__post_init__()
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "at least 1")
        size = self.per_device_train_batch_size
        require(size > 0, "per_device_train_batch_size", size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(RoundConfig):
    """Fine-tune a policy on the best of its own responses: rejection sampling (Llama 2), RAFT, ReST."""

    num_generations: int = 8
    """Responses sampled per prompt: the n of best of n."""
    keep_best: int | None = 1
    """How many responses of a prompt may be learned from, the best ones; None leaves it to reward_thresholds."""
    reward_thresholds: tuple[float, ...] = ()
    """Rising normalised rewards (ReST): one pass over the round for each, over the responses above it."""
    kl_coef: float = 0.0
    """Times a response's log-ratio to the reference, subtracted from its reward before it is compared (RAFT)."""
    num_train_epochs: int = 1
    """Passes over what was kept of a round; with reward_thresholds, for each of them."""
    per_device_train_batch_size: int = 32
    """Responses in one optimiser step."""
    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        super().__post_init__()
        n = self.num_generations
        require(n > 1, "num_generations", n, "at least 2, for one to be the best")
        require(self.kl_coef >= 0, "kl_coef", self.kl_coef, "at least 0")
        if self.keep_best is not None:
            require(self.keep_best > 0, "keep_best", self.keep_best, "at least 1, or None")
        rising = all(a < b for a, b in pairwise(self.reward_thresholds))
        require(rising, "reward_thresholds", self.reward_thresholds, "rising")
        if not self.reward_thresholds and (self.keep_best is None or self.keep_best >= n):
            raise ConfigError(
                "without --reward_thresholds, --keep_best must be below --num_generations: nothing would be rejected"
            )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(RoundConfig):
    """Improve a policy by iterative DPO: sample, score, pair, train; online DPO is one update per round."""

    max_steps: int = 20
    """Rounds. One step is one round: rollout_batch_size prompts sampled, scored, paired and learned from."""
    num_generations: int = 4
    """Responses sampled per prompt, of which pair_strategy makes pairs."""
    num_train_epochs: int = 1
    """Passes over each round's pairs."""
    per_device_train_batch_size: int = 32
    """Pairs in one optimiser step. With as many as a round makes, every round is one online update."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    beta: float = 0.1
    """Pull towards the reference: the implicit reward is beta times the log-ratio to it."""
    loss_type: Literal["sigmoid", "robust", "ipo", "hinge", "kto"] = "sigmoid"
    """`sigmoid` is DPO. `robust` undoes flipped labels (label_smoothing says how many). `ipo` averages log-ratios over
    tokens, as TRL does; `hinge` is SLiC's. `kto` takes each response of a pair for itself."""
    label_smoothing: float = 0.0
    """Share of labels taken to be flipped. With `sigmoid` this is conservative DPO (cDPO)."""
    desirable_weight: float = 1.0
    """Weight of desirable responses (kto)."""
    undesirable_weight: float = 1.0
    """Weight of undesirable responses (kto)."""
    reference: Literal["initial", "previous", "ema"] = "initial"
    """What the log-ratios are taken to: the policy before training (or ref_model), that of the round's start, or the
    moving average of all policies up to there."""
    ema_decay: float = 0.9
    """Share of the moving average that stays in a round (1 - TRL's ref_model_mixup_alpha)."""
    pair_strategy: Literal["best_worst", "max_min", "random", "threshold"] = "best_worst"
    """Which responses of a prompt become pairs: two by their rewards or at random, or (`threshold`) all that differ
    by more than tie_threshold."""
    tie_threshold: float = 0.0
    """Pairs whose normalised rewards differ by no more than this are ties and are dropped."""
    soft_labels: bool = True
    """Train on P(chosen preferred) = sigmoid(difference of raw scores / label_temperature); otherwise on 1."""
    label_temperature: float = 1.0
    """Raw-score units per logit: 1 for a reward model; for a judge, how many points of its scale make one logit."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        super().__post_init__()
        require(
            self.num_generations > 1, "num_generations", self.num_generations, "at least 2, to make a pair"
        )
        require(self.beta > 0, "beta", self.beta, "positive")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "in [0, 0.5)")
        require(self.desirable_weight > 0, "desirable_weight", self.desirable_weight, "positive")
        require(self.undesirable_weight > 0, "undesirable_weight", self.undesirable_weight, "positive")
        require(0 <= self.ema_decay <= 1, "ema_decay", self.ema_decay, "in [0, 1]")
        if self.reference == "ema" and self.use_peft:
            raise ConfigError(
                "reference ema is a second model in memory, which --use_peft does without: use initial or previous"
            )
        if self.loss_type == "robust" and self.label_smoothing == 0:
            raise ConfigError(
                "loss_type robust undoes flipped labels: say by --label_smoothing what share of them is flipped"
            )
        if self.loss_type != "kto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise ConfigError("desirable_weight and undesirable_weight go with loss_type kto")
        require(self.tie_threshold >= 0, "tie_threshold", self.tie_threshold, "at least 0")
        require(self.label_temperature > 0, "label_temperature", self.label_temperature, "positive")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score the conversations of a file with a reward server."""

    reward_server: str
    """HOST:PORT of the reward server (`rlaif serve`)."""
    dataset: Path
    """Conversations that end with an answer, or candidates: a file, or the folder of a run (`rlaif sample`)."""
    output: Path
    """.jsonl or .parquet: the input with reward, reward_raw, reward_reason, ...; a row per response."""
    truncation: Literal["reject", "left"] = "reject"
    """A conversation longer than the model's context is a missing reward, or loses its oldest tokens."""
    max_missing: float = 0.05
    """Exit with an error if a larger share of the rewards is missing; the output is written all the same."""
    batch_size: int = 128
    """Conversations that are journalled together; a kill loses at most those in flight."""
    max_in_flight: int = 4
    """Requests at a time."""
    timeout_s: float = 120.0
    """Deadline of one request, in seconds."""
    give_up_after_s: float = 300.0
    """How long an unavailable server is waited for, in seconds; a restart within it is ridden out."""
    wait_s: float = 10.0
    """How long a server that is not up yet is waited for at the start, in seconds."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        require(self.batch_size > 0, "batch_size", self.batch_size, "at least 1")
        require(self.max_in_flight > 0, "max_in_flight", self.max_in_flight, "at least 1")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "positive")
        require(self.give_up_after_s >= 0, "give_up_after_s", self.give_up_after_s, "at least 0")
        require(0 <= self.max_missing < 1, "max_missing", self.max_missing, "in [0, 1)")
        if self.output.suffix not in (".parquet", ".jsonl"):
            raise ConfigError(f"--output {self.output} must end in .parquet or .jsonl")
        if self.dataset.absolute() == self.output.absolute():
            raise ConfigError("output is the dataset itself: name another file")


@dataclass(frozen=True)
class ModelsConfig:
    """List the models that a reward server holds."""

    reward_server: str
    """HOST:PORT of the reward server, or several separated by commas, of which each is asked."""
    timeout_s: float = 600.0
    """Deadline of one request, in seconds; a model must load within it."""
    give_up_after_s: float = 10.0
    """How long an unavailable server is waited for, in seconds."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: a value is out of range.
        """
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "positive")
        require(self.give_up_after_s >= 0, "give_up_after_s", self.give_up_after_s, "at least 0")


@dataclass(frozen=True, kw_only=True)
class LoadModelConfig(ModelsConfig):
    """Load a reward model in a server beside the one that serves, which goes on serving meanwhile."""

    model: str
    """Reward model as `rlaif serve --model` takes it; the server reads it, from its own disk."""
    activate: bool = False
    """Once it is loaded and warmed up, let it answer all calls that expect no version."""


@dataclass(frozen=True, kw_only=True)
class ActivateModelConfig(ModelsConfig):
    """Let a loaded model answer all calls that expect no version, from the next call on."""

    version: str
    """The model's version, as `rlaif models list` shows it."""


@dataclass(frozen=True, kw_only=True)
class UnloadModelConfig(ModelsConfig):
    """Free a model that is not active, once the calls that it has begun are answered."""

    version: str
    """The model's version, as `rlaif models list` shows it."""


def require(condition: bool, name: str, value: object, must_be: str) -> None:
    """Raise a ConfigError that says what `name` must be, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} must be {must_be}, not {value}")
