"""Rollouts made ahead: while one step learns, a thread samples for the next ones and has them scored.

With a bound of s versions, the rollout of step k is made by the policy as it was when step max(0, k - s) began. So it
is known before the run begins which policy answers which prompts, however fast anything is, and a run is a function of
its seed as without. (TRL's AsyncGRPO and others sample as fast as they can and drop what has become too old.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from policy_trainer.episodes import Episodes
from policy_trainer.online import Snapshot
from policy_trainer.reward_source import Reward
from policy_trainer.rollout import Sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Rollout(NamedTuple):
    """Responses of one step, and their rewards, which may be on their way."""

    episodes: Episodes
    rewards: Future[list[Reward]]


class RolloutsAhead:
    """The rollouts of the steps to come, made in the order of the steps by one thread.

    A rollout is kept until its step is complete, because a checkpoint in between must hold it: the policy that made
    it is gone.
    """

    def __init__(
        self, make: Callable[[int, Snapshot], Rollout], *, max_staleness: int, max_steps: int
    ) -> None:
        """Nothing is made before the first `take`.

        Args:
            make: makes the rollout of a step with a snapshot of the policy; called in the thread.
            max_staleness: s, at least 1.
            max_steps: of the run; nothing is made beyond them.
        """
        self._make = make
        self._max_staleness = max_staleness
        self._max_steps = max_steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._made: dict[int, Future[Rollout]] = {}

    def take(self, step: int, policy: PreTrainedModel) -> Rollout:
        """The rollout of `step`; those that `policy` is to make are begun first.

        Args:
            step: that begins now.
            policy: as it is now; it is copied.

        Raises:
            Whatever `make` raised.
        """
        self._made = {of: rollout for of, rollout in self._made.items() if of >= step}
        wanted = range(step, min(step + self._max_staleness + 1, self._max_steps))
        if missing := [of for of in wanted if of not in self._made]:
            snapshot = Snapshot(copy.deepcopy(policy).requires_grad_(False), step)
            for of in missing:
                self._made[of] = self._thread.submit(self._make, of, snapshot)
        return self._made[step].result()

    def state(self, step: int) -> list[dict[str, Any]]:
        """What `restore` needs to go on at `step`, in plain types; waits for what is under way.

        Rewards are left out if one of them is missing: whoever goes on asks again.
        """
        return [
            {"step": of, "sampled": [tuple(s) for s in episodes.sampled], "rewards": _complete(rewards)}
            for of, (episodes, rewards) in sorted((of, made.result()) for of, made in self._made.items())
            if of >= step
        ]

    def restore(
        self,
        state: Sequence[dict[str, Any]],
        episodes_of: Callable[[int, list[Sampled]], Episodes],
        submit: Callable[[Episodes], Future[list[Reward]]],
    ) -> None:
        """Take over what `state` gave.

        Args:
            state: of an earlier run.
            episodes_of: a step's episodes by its number and what was sampled.
            submit: asks for their rewards.
        """
        for kept in state:
            episodes = episodes_of(kept["step"], [Sampled(*fields) for fields in kept["sampled"]])
            if kept["rewards"] is None:
                rewards = submit(episodes)
            else:
                rewards = _resolved([Reward(*fields) for fields in kept["rewards"]])
            self._made[kept["step"]] = _resolved(Rollout(episodes, rewards))

    def close(self) -> None:
        """Wait for the rollout under way; those behind it are not made."""
        self._thread.shutdown(cancel_futures=True)


def _complete(rewards: Future[list[Reward]]) -> list[tuple[Any, ...]] | None:
    found = rewards.result() if rewards.exception() is None else []
    return [tuple(r) for r in found] if found and all(r.value is not None for r in found) else None


def _resolved(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
