"""`POST /get_reward` as OpenRLHF's remote reward client sends it (openrlhf/utils/agent.py, cli/serve_rm.py).

The client sends one query per rollout: the detokenised prompt and response with their special tokens. It tries five
times, a second apart, whatever the status, and then goes on without a reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, StrictStr, model_validator

from reward_server.facade.body import Items
from reward_server.facade.faults import all_scored
from reward_server.scorers.base import Failure, Kind, Outcome, Scored, Scorer, ScoreTask, SequenceTask, Task
from rlaif.types import user_prompt, with_response


class GetReward(BaseModel):
    """The request. `labels` are for rule-based rewards and are not read."""

    query: Items[StrictStr]
    prompts: Items[StrictStr] | None = None
    labels: list[Any] | None = None

    @model_validator(mode="after")
    def _same_length(self) -> GetReward:
        if self.prompts is not None and len(self.prompts) != len(self.query):
            raise ValueError(f"prompts must hold {len(self.query)} texts, one per query")
        return self


def tasks(request: GetReward, kind: Kind) -> list[Task | Failure]:
    """One task per query. The text bears its special tokens, so the tokenizer adds none.

    Judges and composites read a prompt and a response: the response is what follows the prompt in the query.
    """
    if kind == "reward_model":
        return [SequenceTask(query) for query in request.query]
    prompts = request.prompts or [""] * len(request.query)
    return [_split(query, prompt) for query, prompt in zip(request.query, prompts, strict=True)]


def _split(query: str, prompt: str) -> Task | Failure:
    if not prompt or not query.startswith(prompt):
        return Failure(
            "invalid",
            "without a prompt in prompts that the query begins with, nothing says where the response begins",
        )
    return ScoreTask(with_response(user_prompt(prompt), query[len(prompt) :]))


def answer(outcomes: Sequence[Outcome], scorer: Scorer, *, drop_failed: bool) -> dict[str, Any]:
    """The reply: normalised scores, as the gRPC client gives them to a trainer, and raw ones in `extra_logs`.

    With `drop_failed`, a query without a score is null, and a reply without any score is empty: the client takes
    that for "no reward" at once, where an error would make it ask four times more.

    Raises:
        Fault: a query has no score.
    """
    if drop_failed:
        scored = [o if isinstance(o, Scored) else None for o in outcomes]
        if not any(scored) and scored:
            return {}
    else:
        scored = list(all_scored(outcomes, "query", callers_own=422))
    scale = scorer.normalization
    rewards = [None if s is None else (s.raw - scale.center) / scale.scale for s in scored]
    logs = {
        "raw_score": [None if s is None else s.raw for s in scored],
        "reward_tokens": [None if s is None else s.tokens for s in scored],
    }
    return {"rewards": rewards, "scores": rewards, "extra_logs": logs}
