"""What PPO and online DPO share around their loops: prompts, checkpoints on the way, missing rewards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from policy_trainer.config import OnlineConfig
from policy_trainer.reward_source import Reward
from rlaif.chat import encode_prompt
from rlaif.errors import ConfigError, QualityError
from rlaif.records import Quarantine, read_prompts
from rlaif.types import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Prompts(NamedTuple):
    """All prompts of a run, as text and as token ids with the generation prompt; same order."""

    conversations: list[Conversation]
    ids: list[list[int]]


def load_prompts(config: OnlineConfig, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Read and encode the prompts; rows that cannot be used go to `quarantine.jsonl` in the run directory.

    Raises:
        DataError: the file is missing or has no usable row.
    """
    quarantine = Quarantine(config.output_dir / "quarantine.jsonl")
    conversations = list(read_prompts(config.dataset, quarantine))
    ids = [encode_prompt(tokenizer, c, max_length=config.max_prompt_length) for c in conversations]
    return Prompts(conversations, ids)


def check_context(config: OnlineConfig, policy: PreTrainedModel, prompts: Prompts) -> None:
    """The longest prompt and a full response fit the model's context.

    Raises:
        ConfigError: they do not.
    """
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
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


def check_missing(rewards: Sequence[Reward], kept: Sequence[int], allowed: float, step: int) -> None:
    """Refuse to learn from a step of which too little is known.

    Args:
        rewards: of one step.
        kept: the responses that are left to learn from.
        allowed: largest share that may be missing.
        step: for the message.

    Raises:
        QualityError: more are missing, or fewer than two are left; the message has the most frequent reason.
    """
    reasons = Counter(r.reason or "no reason given" for r in rewards if r.value is None)
    missing = reasons.total()
    if missing > allowed * len(rewards) or len(kept) < 2:
        reason, count = reasons.most_common(1)[0]
        raise QualityError(
            f"{missing} of {len(rewards)} rewards are missing at step {step}, {count} because: {reason}; the run "
            "stopped at a checkpoint: mend the reward server and run the same command again"
        )
