"""What one step of PPO knows of its responses, and the rows it writes about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, zeros

from policy_trainer.batching import SequenceBatch, collate, pad_right
from policy_trainer.reward_source import Reward
from policy_trainer.rollout import Sampled
from rlaif.types import Conversation, to_dicts


class Episodes(NamedTuple):
    """One step's responses, ordered by prompt; all lists have N items.

    Attributes:
        prompt_ids: token ids with the generation prompt, of each response's prompt.
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

    @property
    def groups(self) -> list[int]:
        """Equal numbers for responses to the same prompt."""
        return [s.prompt_index for s in self.sampled]

    @property
    def engine_logprobs(self) -> Tensor:
        """(N, R) float32, what the engine said of each token that it sampled; 0 at padding."""
        longest = max(len(s.response_ids) for s in self.sampled)
        return pad_right([torch.tensor(s.logprobs) for s in self.sampled], longest)

    @property
    def response_mask(self) -> Tensor:
        """(N, R) bool, True = a response token that counts."""
        longest = max(len(s.response_ids) for s in self.sampled)
        return pad_right([torch.ones(len(s.response_ids), dtype=torch.bool) for s in self.sampled], longest)

    def collate(self, rows: Sequence[int]) -> SequenceBatch:
        """The padded batch of some rows."""
        return collate([self.prompt_ids[i] for i in rows], [self.sampled[i].response_ids for i in rows])


class Reading(NamedTuple):
    """What the models say of a step's responses before any update; (N, R) on the CPU, 0 at padding.

    Attributes:
        mask: bool, True = a response token that counts.
        logprobs: of the policy that sampled, by the trainer's own forward or the engine's.
        ref_logprobs: of the reference.
        values: of the critic; 0 where there is none.
        weights: of the policy loss, for what lies between engine and trainer; None where nothing is corrected.
        metrics: how far engine and trainer are from each other.
    """

    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    weights: Tensor | None
    metrics: dict[str, float]


def scatter(rows: Tensor, kept: Sequence[int], like: Tensor) -> Tensor:
    """Put (len(kept), R) rows back to their places among N; 0 elsewhere. `like` is (N, R)."""
    out = zeros(like.shape, dtype=rows.dtype)
    out[kept] = rows
    return out


def mean_raw(rewards: Sequence[Reward]) -> float | None:
    """Mean of the scorer's own outputs; None if it gave none."""
    raw = [r.raw for r in rewards if r.raw is not None]
    return sum(raw) / len(raw) if raw else None


def transcripts(
    episodes: Episodes, rewards: Sequence[Reward], kept: Sequence[int], kl: Tensor, advantages: Tensor
) -> list[dict[str, Any]]:
    """Rows for `samples/` and `completions/`: what was asked, what was answered, what it earned.

    Args:
        episodes: N responses.
        rewards: N of them.
        kept: the K responses that were learned from; the others have no KL and no advantage.
        kl: (K,) to the reference, in nats per response.
        advantages: (K,) mean over the response's tokens.
    """
    learned = {i: (float(kl[at]), float(advantages[at])) for at, i in enumerate(kept)}
    rows = []
    for i, (conversation, reward, sampled) in enumerate(
        zip(episodes.conversations, rewards, episodes.sampled, strict=True)
    ):
        of_kl, advantage = learned.get(i, (None, None))
        rows.append(
            {
                "prompt": to_dicts(conversation[:-1]),
                "response": conversation[-1].content,
                "reward": reward.value,
                "raw": reward.raw,
                "kl": of_kl,
                "advantage": advantage,
                "finished": sampled.finished,
            }
        )
    return rows
