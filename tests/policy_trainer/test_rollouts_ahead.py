"""Rollouts made ahead of their step, and old log-probabilities taken from the engine that sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from policy_trainer import optim
from policy_trainer.models import load_policy
from policy_trainer.online import Purpose
from policy_trainer.ppo import train
from policy_trainer.reward_source import FunctionReward, Reward
from policy_trainer.rollout import HFRollout, decode_response
from rlaif.chat import encode_prompt
from rlaif.errors import ConfigError
from rlaif.records import Quarantine, read_prompts
from rlaif.types import Conversation
from tests.policy_trainer import tiny

STEPS = 5


def run(folder: Path, **changes: Any) -> list[dict[str, Any]]:
    config = tiny.ppo_config(folder, **{"max_steps": STEPS, **changes})
    train(config, FunctionReward(tiny.share_of_w0))
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    return tiny.without_times([json.loads(line) for line in lines])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_policy(str(folder / "run")).model.state_dict()


def test_a_response_is_of_the_policy_that_the_bound_names(tmp_path: Path) -> None:
    """Sampled anew from the checkpoint of step max(0, k - 2), the responses of step k are the same."""
    rows = run(tmp_path, max_staleness=2, save_steps=1, save_total_limit=None, samples_per_step=8)
    assert [row["sample/staleness_mean"] for row in rows] == [0, 1, 2, 2, 2]
    config = tiny.ppo_config(tmp_path)
    prompts = list(read_prompts(config.dataset, Quarantine(tmp_path / "quarantine.jsonl")))
    for step in range(STEPS):
        version = max(0, step - 2)
        folder = config.output_dir / f"checkpoint-{version:06d}" if version else tmp_path / "policy"
        policy, tokenizer = load_policy(str(folder))
        chosen = optim.shuffled_stream(
            len(prompts), optim.step_seed(0, Purpose.PROMPTS), start=step * 8, count=8
        )
        ids = [encode_prompt(tokenizer, prompts[i], max_length=512) for i in chosen]
        sampled = HFRollout(policy, [2]).generate(
            ids, max_new_tokens=8, temperature=1.0, seed=optim.step_seed(0, Purpose.SAMPLING, step)
        )
        expected = [decode_response(tokenizer, ids[s.prompt_index], s, [2]) for s in sampled]
        transcripts = sorted((config.output_dir / "samples").iterdir())[step].read_text().splitlines()
        assert [json.loads(line)["response"] for line in transcripts] == expected


def test_the_old_log_probabilities_are_those_of_the_policy_that_sampled(tmp_path: Path) -> None:
    """Ratios are 1 where the policy has not changed since, and not where it has."""
    rows = run(tmp_path, max_staleness=1, num_ppo_epochs=1, num_mini_batches=1)
    assert rows[0]["policy/approxkl_avg"] < 1e-10
    assert all(row["policy/approxkl_avg"] > 1e-5 for row in rows[1:])


class Impatient:
    """Gives the rewards of a rollout only once those of the next one have been asked for."""

    def __init__(self, calls: int) -> None:
        self._rewards = FunctionReward(tiny.share_of_w0)
        self._waiting: list[tuple[Future[list[Reward]], Sequence[Conversation]]] = []
        self._left = calls
        self.info, self.score, self.close = self._rewards.info, self._rewards.score, self._rewards.close

    def submit(self, conversations: Sequence[Conversation]) -> Future[list[Reward]]:
        self._left -= 1
        self._waiting.append((Future(), conversations))
        for future, asked in self._waiting[: None if self._left == 0 else -1]:
            if not future.done():
                future.set_result(self.score(asked))
        return self._waiting[-1][0]


@pytest.mark.timeout(60)
def test_the_next_rollout_is_sampled_and_sent_before_this_ones_rewards_are_there(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, max_steps=STEPS, max_staleness=1)
    train(config, Impatient(calls=STEPS))
    plain = tmp_path / "plain"
    assert [r["objective/scores"] for r in run(plain, max_staleness=1)] == [
        json.loads(line)["objective/scores"]
        for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()
    ]


def test_engine_and_trainer_are_compared_in_every_step(tmp_path: Path) -> None:
    for row in run(tmp_path):
        mean, most = (row[f"sampling/sampling_logp_difference/{of}"] for of in ("mean", "max"))
        assert 0 < mean < most < 1e-5


def test_log_probabilities_are_reused_within_the_tolerance_alone(tmp_path: Path) -> None:
    run(tmp_path / "default")
    exact = run(tmp_path / "exact", reuse_logprobs_tolerance=0.0)
    reused = run(tmp_path / "reused", reuse_logprobs_tolerance=1e-3)
    assert {row["sampling/logprobs_reused"] for row in exact} == {0.0}
    assert {row["sampling/logprobs_reused"] for row in reused} == {1.0}
    default = weights(tmp_path / "default")
    for name, found in weights(tmp_path / "exact").items():
        assert torch.equal(found, default[name])
    for name, found in weights(tmp_path / "reused").items():
        torch.testing.assert_close(found, default[name], atol=1e-4, rtol=0)


def test_reuse_beside_staleness_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave out reuse_logprobs_tolerance"):
        tiny.ppo_config(tmp_path, max_staleness=1, reuse_logprobs_tolerance=0.1)
