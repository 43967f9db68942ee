"""What tests of the online trainers have in common: reading run directories, and a reward source that misbehaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from policy_trainer.reward_source import FunctionReward, Reward
from rlaif.types import Conversation
from tests.policy_trainer import tiny


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Logged metrics, without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return tiny.without_times(rows)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model folder."""
    return load_file(folder / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Equal metrics and weights, to the last bit."""
    assert metrics(one) == metrics(other)
    mine, theirs = weights(one), weights(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Interrupting(FunctionReward):
    """Share of w0, and something that happens at the n-th call (the self-check's is call 0)."""

    def __init__(self, at: int, event: Callable[[], object] | None, function: Any = tiny.share_of_w0) -> None:
        super().__init__(function)
        self.calls, self._at, self._event = 0, at, event

    def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
        """Once more."""
        self.calls += 1
        if self._event is not None and self.calls - 1 == self._at:
            self._event()
        return super().score(conversations)
