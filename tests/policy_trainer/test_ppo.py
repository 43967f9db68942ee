"""The PPO loop as a whole: what must hold at its first step, whatever the batch is cut into, and over a run."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from policy_trainer.advantages import Moments, moments, whiten
from policy_trainer.batching import SequenceBatch
from policy_trainer.checkpoint import load_latest
from policy_trainer.config import PPOConfig
from policy_trainer.episodes import Episodes, Reading
from policy_trainer.online import served_reward
from policy_trainer.ppo import Trainer, train
from policy_trainer.ptx import TextMix
from policy_trainer.reward_source import FunctionReward, Reward
from protos.rlaif.reward.v1 import reward_pb2
from rlaif.chat import EncodedPair
from rlaif.cli import COMMANDS, parse_config
from rlaif.errors import ConfigError, DataError, QualityError, SelfCheckError
from rlaif.types import Conversation
from tests.policy_trainer import tiny
from tests.policy_trainer.reward_servers import NumberServer, conversation, serving

CRITIC_FREE: dict[str, dict[str, Any]] = {
    "reinforce": {"advantage_estimator": "reinforce"},
    "rloo": {"advantage_estimator": "rloo", "rollout_batch_size": 3, "num_generations": 4},
    "grpo": {"advantage_estimator": "grpo", "rollout_batch_size": 3, "num_generations": 4},
    "dr_grpo": {"advantage_estimator": "dr_grpo", "rollout_batch_size": 3, "num_generations": 4},
}
ESTIMATORS: dict[str, dict[str, Any]] = {
    "separate critic": {"value_head": "separate"},
    "shared critic": {"value_head": "shared"},
    **CRITIC_FREE,
    "penalty": {"policy_objective": "penalty"},
    "clip-higher and dual clip": {"cliprange_high": 0.28, "dual_clip": 1.3},
    "grpo with ratios of responses": {**CRITIC_FREE["grpo"], "importance_sampling_level": "sequence"},
    "straight-through kl": {"use_kl_loss": True, "kl_estimator": "k3+"},
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def source(function: Callable[..., list[float | None]] = tiny.share_of_w0) -> FunctionReward:
    return FunctionReward(function)


# ---- the first step ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("micro_batch_tokens", [40, 8192], ids=["many micro-batches", "one micro-batch"])
def test_at_the_first_step_ratio_is_1_and_kl_0_to_the_last_bit(
    tmp_path: Path, estimator: str, micro_batch_tokens: int
) -> None:
    settings = {**ESTIMATORS[estimator], "micro_batch_tokens": micro_batch_tokens, "max_steps": 1}
    train(tiny.ppo_config(tmp_path, num_ppo_epochs=1, num_mini_batches=1, **settings), source())
    (first,) = metrics(tmp_path)
    assert first["val/ratio"] == 1.0
    assert first["val/ratio_var"] == 0.0
    assert first["policy/approxkl_avg"] == 0.0
    assert first["policy/clipfrac_avg"] == 0.0
    assert first["objective/kl"] == 0.0
    assert first["objective/non_score_reward"] == 0.0
    assert first["objective/rlhf_reward"] == first["objective/scores"]
    assert first.get("loss/kl_avg", 0.0) == 0.0
    assert ("loss/kl_avg" in first) == ("grpo" in estimator or "kl" in estimator)


def test_later_minibatches_move_away_from_ratio_1(tmp_path: Path) -> None:
    """The control: the numbers above are measured and not constants."""
    train(tiny.ppo_config(tmp_path, max_steps=2), source())
    first, second = metrics(tmp_path)
    assert first["val/ratio_var"] > 0
    assert second["objective/kl"] != 0.0


# ---- invariance ----


@dataclasses.dataclass
class Step:
    """One step's data, with old log-probabilities moved so that ratios are not 1 and some are clipped."""

    trainer: Trainer
    episodes: Episodes
    read: Reading
    advantages: torch.Tensor
    returns: torch.Tensor

    def gradient(
        self, micro_batches: Sequence[Sequence[int]], divisors: Sequence[int] | None = None
    ) -> torch.Tensor:
        whole = self.divisor(range(12))
        self.trainer.model.zero_grad()
        for rows, divisor in zip(micro_batches, divisors or [whole] * len(micro_batches), strict=True):
            self.trainer.accumulate(
                self.episodes, self.read, self.advantages, self.returns, rows, divisor, policy_learns=True
            )
        grads = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        return torch.cat([g.flatten() for g in grads])

    def divisor(self, rows: Sequence[int]) -> int:
        return self.trainer.loss_divisor(int(self.read.mask[rows].sum()), len(rows))

    def padded(self, extra: int) -> Step:
        wide = torch.nn.functional.pad
        return dataclasses.replace(
            self,
            read=Reading(
                *(wide(t, (0, extra)) for t in self.read if isinstance(t, torch.Tensor)), metrics={}
            ),
            advantages=wide(self.advantages, (0, extra), value=3.0),
            returns=wide(self.returns, (0, extra), value=3.0),
        )


@pytest.fixture(params=ESTIMATORS)
def step(request: pytest.FixtureRequest, tmp_path: Path) -> Step:
    """Twelve responses, at a reference that is not the policy: where KL is in the loss, it has a gradient."""
    settings = {"rollout_batch_size": 12, "vf_coef": 0.5, **ESTIMATORS[request.param]}
    reference = tiny.save_policy(tmp_path / "reference", seed=1)
    trainer = Trainer.start(tiny.ppo_config(tmp_path, ref_model=str(reference), **settings), source())
    episodes = trainer.next_rollout().episodes
    read = trainer.read(episodes)
    noise = torch.Generator().manual_seed(0)
    moved = read.logprobs + 0.3 * torch.randn(read.logprobs.shape, generator=noise) * read.mask
    advantages = torch.randn(read.mask.shape, generator=noise) * read.mask
    returns = torch.randn(read.mask.shape, generator=noise) * read.mask
    weights = torch.rand(read.mask.shape, generator=noise)
    return Step(trainer, episodes, read._replace(logprobs=moved, weights=weights), advantages, returns)


def test_gradients_do_not_depend_on_micro_batches_padding_or_order(step: Step) -> None:
    whole = step.gradient([range(12)])
    assert whole.abs().max() > 1e-3
    cuts = {
        "one by one": [[i] for i in range(12)],
        "ragged": [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]],
        "reversed": [list(reversed(range(12)))],
        "by length": [[i] for i in sorted(range(12), key=lambda i: step.episodes.lengths[i])],
    }
    for name, cut in cuts.items():
        torch.testing.assert_close(
            step.gradient(cut), whole, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(step.padded(5).gradient([range(12)]), whole, atol=2e-6, rtol=1e-4)


def test_a_mean_of_micro_batch_means_would_be_another_gradient(step: Step) -> None:
    """The control: what the loop avoids is visible with these tolerances."""
    cut = [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]]
    means = [step.divisor(rows) * len(cut) for rows in cut]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            step.gradient(cut, means), step.gradient([range(12)]), atol=2e-6, rtol=1e-4
        )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_does_not_depend_on_the_size_of_micro_batches(tmp_path: Path, estimator: str) -> None:
    runs = []
    for tokens in (30, 8192):
        settings = {**ESTIMATORS[estimator], "micro_batch_tokens": tokens}
        train(tiny.ppo_config(tmp_path, output_dir=tmp_path / str(tokens), **settings), source())
        lines = (tmp_path / str(tokens) / "metrics.jsonl").read_text().splitlines()
        runs.append(tiny.without_times([json.loads(line) for line in lines]))
    for small, large in zip(*runs, strict=True):
        for name in small:
            assert small[name] == pytest.approx(large[name], abs=2e-4, rel=1e-3), name


def test_at_ratio_1_the_step_of_reinforce_is_the_policy_gradient(tmp_path: Path) -> None:
    """The whole way through batches and the clipped objective gives the gradient of -sum A log pi / tokens."""
    trainer = Trainer.start(tiny.ppo_config(tmp_path, **CRITIC_FREE["reinforce"]), source())
    episodes = trainer.next_rollout().episodes
    read = trainer.read(episodes)
    advantages = torch.randn(read.mask.shape, generator=torch.Generator().manual_seed(0)) * read.mask
    tokens = int(read.mask.sum())
    parameters = list(trainer.model.parameters())
    for rows in ([0, 1, 2], [3, 4, 5, 6, 7]):
        trainer.accumulate(episodes, read, advantages, advantages, rows, tokens, policy_learns=True)
    found = [p.grad for p in parameters]
    batch = episodes.collate(range(8))
    logits = trainer.model.policy(batch.input_ids, batch.attention_mask, position_ids=positions(batch)).logits
    logprobs = logits[:, -batch.response_len - 1 : -1].log_softmax(-1)
    chosen = logprobs.gather(2, batch.response_ids.unsqueeze(2)).squeeze(2)
    expected = torch.autograd.grad(-(advantages * chosen).sum() / tokens, parameters)
    assert max(float(e.abs().max()) for e in expected) > 1e-3
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, atol=2e-6, rtol=1e-4)


def positions(batch: SequenceBatch) -> torch.Tensor:
    return (batch.attention_mask.cumsum(1) - 1).clamp(min=0)


# ---- beside the objective ----


def test_the_penalty_coefficient_follows_how_far_the_policy_moved(tmp_path: Path) -> None:
    """A target far above what a step of this size moves halves it each time; one far below doubles it."""
    for target, factor in ((10.0, 0.5), (1e-9, 2.0)):
        run = tmp_path / str(target)
        train(
            tiny.ppo_config(tmp_path, output_dir=run, policy_objective="penalty", penalty_target=target),
            source(),
        )
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["policy/penalty_coef"] for row in rows] == [1.0, factor, factor**2]
        assert all(1e-9 < row["policy/penalty_kl"] < 1 for row in rows)


def test_in_the_critics_warm_up_the_penalty_coefficient_waits(tmp_path: Path) -> None:
    """The policy does not move then, which says nothing about the coefficient."""
    train(tiny.ppo_config(tmp_path, policy_objective="penalty", critic_warmup_steps=2), source())
    assert [row.get("policy/penalty_coef") for row in metrics(tmp_path)] == [None, None, 1.0]


def test_a_large_penalty_holds_the_policy_where_it_was(tmp_path: Path) -> None:
    moved = []
    for coef in (0.01, 100.0):
        run = tmp_path / str(coef)
        settings = {"policy_objective": "penalty", "penalty_coef": coef, "max_steps": 1, "num_ppo_epochs": 6}
        train(tiny.ppo_config(tmp_path, output_dir=run, **settings), source())
        moved.append(json.loads((run / "metrics.jsonl").read_text())["policy/penalty_kl"])
    assert moved[1] < moved[0] / 3


def mixed(folder: Path, rows: Sequence[dict[str, str]], **changes: Any) -> PPOConfig:
    text = folder / "mixed.jsonl"
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tiny.ppo_config(folder, ptx_dataset=text, ptx_batch_size=3, **changes)


TEXTS = [{"text": " ".join(f"w{(i * 5 + j) % 24}" for j in range(2 + i % 4))} for i in range(7)]


def test_the_mixed_in_gradient_is_that_of_the_mean_log_likelihood(tmp_path: Path) -> None:
    """Without anything else to learn from, an optimiser step is one on the text alone; against plain logits."""
    config = mixed(tmp_path, TEXTS, ptx_coef=0.5, kl_coef=0.0, max_grad_norm=1e9, micro_batch_tokens=10)
    trainer = Trainer.start(config, source())
    assert trainer.text is not None
    episodes = trainer.next_rollout().episodes
    read = trainer.read(episodes)
    nothing = torch.zeros_like(read.logprobs)
    seen = [trainer.text.batch(0), trainer.text.batch(1)]
    assert seen[0] != seen[1]
    trainer.config = dataclasses.replace(config, num_ppo_epochs=1, num_mini_batches=1)
    stats = trainer.update(episodes, read, nothing, nothing, range(8))
    found = [p.grad.clone() for p in trainer.policy.parameters() if p.grad is not None]

    fresh = tiny.model()
    total, tokens = torch.zeros(()), 0
    for example in seen[0]:
        ids = torch.tensor([[*example.prompt_ids, *example.response_ids]])
        logprobs = fresh(ids).logits[0, :-1].log_softmax(-1)
        total = total - logprobs.gather(1, ids[0, 1:, None]).sum()
        tokens += len(example.response_ids)
    expected = torch.autograd.grad(0.5 * total / tokens, list(fresh.parameters()))
    assert stats["loss/ptx_avg"] == pytest.approx(total.item() / tokens, rel=1e-5)
    for e, g in zip(expected, found, strict=True):
        torch.testing.assert_close(g, e, atol=2e-6, rtol=1e-4)


def test_each_optimiser_step_mixes_in_the_next_texts(tmp_path: Path) -> None:
    """Steps of 2 epochs of 2 minibatches: updates 0 to 3, then 4 to 7. 12 updates of 3 rows pass 7 texts 5 times."""

    class Recording(TextMix):
        def batch(self, update: int) -> list[EncodedPair]:
            asked.append(update)
            return super().batch(update)

    asked: list[int] = []
    trainer = Trainer.start(mixed(tmp_path, TEXTS), source())
    assert trainer.text is not None
    trainer.text = Recording(trainer.text.examples, trainer.text.batch_size, trainer.text.seed)
    for step in range(3):
        trainer.step = step
        episodes = trainer.next_rollout().episodes
        read = trainer.read(episodes)
        trainer.update(episodes, read, read.logprobs, read.logprobs, range(8))
    assert asked == list(range(12))
    counts = Counter(tuple(e.response_ids) for u in asked[:12] for e in trainer.text.batch(u))
    assert sorted(counts.values()) == [5, 5, 5, 5, 5, 5, 6]


def test_conversations_may_be_mixed_in_and_what_is_too_long_is_set_aside(tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w1", "completion": "w4 " * 200}]
    config = mixed(tmp_path, rows, max_steps=1)
    train(config, source())
    assert math.isfinite(metrics(tmp_path)[0]["loss/ptx_avg"])
    (line,) = (config.output_dir / "quarantine-ptx.jsonl").read_text().splitlines()
    assert "longer than max_length 128" in line


def test_text_that_cannot_be_learned_from_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ptx_dataset .*mixed.jsonl has no row"):
        train(mixed(tmp_path, [{"text": ""}]), source())


def test_running_normalisation_knows_all_steps_and_batch_normalisation_one(tmp_path: Path) -> None:
    """Scores of 5 and 9, then of 5 and 13, at 8 responses: the advantages of RLOO show what they were divided by."""
    top = 9.0

    def scores(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        return [5.0, top] * (len(responses) // 2)

    config = tiny.ppo_config(
        tmp_path, **CRITIC_FREE["reinforce"], kl_coef=0.0, reward_normalization="running"
    )
    trainer = Trainer.start(config, source())
    first = torch.tensor([5.0, 9.0] * 4)
    second = torch.tensor([5.0, 13.0] * 4)
    assert trainer.normalised_by(first) == Moments(7.0, 4.0, 8)
    # All 16: mean 8, variance (8 * 9 + 4 * 1 + 4 * 25) / 16 = 11.
    assert trainer.normalised_by(second) == Moments(8.0, 11.0, 16)
    trainer.config = dataclasses.replace(config, reward_normalization="batch")
    assert trainer.normalised_by(second) == Moments(9.0, 16.0, 8)
    train(config, source(scores))
    assert all(row["objective/rlhf_reward"] == pytest.approx(0.0, abs=1e-6) for row in metrics(tmp_path))
    assert all(row["objective/scores"] == 7.0 for row in metrics(tmp_path))
    saved = load_latest(config.output_dir)
    assert saved is not None and saved.info["scores_seen"] == [7.0, 4.0, 24]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy_objective": "penalty", "dual_clip": 3.0}, "clips nothing"),
        ({"importance_sampling_level": "sequence"}, "rloo, grpo and dr_grpo"),
        ({"missing_eos_reward": -1.0, "missing_eos_penalty": 1.0}, "use one of them"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"ptx_coef": 0.0}, "ptx_coef must be positive"),
    ],
    ids=[
        "penalty and clip",
        "sequence ratio with gae",
        "two eos penalties",
        "dual clip of 1",
        "no ptx weight",
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny.ppo_config(tmp_path, **settings)


# ---- without a critic ----


@pytest.mark.parametrize("estimator", CRITIC_FREE)
def test_without_a_critic_there_is_none_in_memory_nor_in_a_checkpoint(tmp_path: Path, estimator: str) -> None:
    config = tiny.ppo_config(tmp_path, max_steps=1, **CRITIC_FREE[estimator])
    trainer = Trainer.start(config, source())
    assert sum(1 for _ in trainer.model.parameters()) == sum(1 for _ in trainer.model.policy.parameters())
    train(config, source())
    saved = load_latest(config.output_dir)
    assert saved is not None and set(saved.state) == {"optimizer", "rng"}
    assert not any("value" in name or name == "val/clipfrac_avg" for name in metrics(tmp_path)[0])


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "dr_grpo"])
def test_a_missing_reward_leaves_its_group_and_takes_a_lone_response_along(
    tmp_path: Path, estimator: str
) -> None:
    """Three groups of four: one loses one reward, one keeps a single reward and drops out, one is whole."""
    given: list[float | None] = [None, 0.0, 1.0, 2.0, None, None, None, 50.0, 3.0, 3.0, 3.0, 3.0]
    config = tiny.ppo_config(tmp_path, max_steps=1, samples_per_step=100, **CRITIC_FREE[estimator])
    train(config, source(lambda p, r: given if len(r) == 12 else tiny.share_of_w0(p, r)))
    (row,) = metrics(tmp_path)
    text = (tmp_path / "run" / "samples" / "step-000001.jsonl").read_text()
    written = [json.loads(line) for line in text.splitlines()]
    assert [r["reward"] for r in written] == given
    learned = [r["reward"] for r in written if r["advantage"] is not None]
    assert learned == [0.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0]
    assert row["reward/missing"] == 4 and row["reward/dropped_groups"] == 1
    assert row["reward/frac_zero_std"] == 0.5
    assert row["objective/scores"] == pytest.approx(15 / 7, abs=1e-6)


def test_without_a_group_to_compare_in_the_run_stops_at_a_checkpoint(tmp_path: Path) -> None:
    """Three rewards would be enough, but each is alone in its group."""
    given: list[float | None] = [1.0, None, None, None] * 3
    config = tiny.ppo_config(tmp_path, max_missing_rewards=0.9, **CRITIC_FREE["rloo"])
    with pytest.raises(QualityError, match="9 of 12 rewards are missing at step 1"):
        train(config, source(lambda p, r: given if len(r) == 12 else tiny.share_of_w0(p, r)))
    saved = load_latest(config.output_dir)
    assert saved is not None and saved.step == 0


# ---- missing rewards ----


def no_reward_for_long_ones(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
    known = tiny.share_of_w0(prompts, responses)
    return [None if len(r.split()) > 6 else s for r, s in zip(responses, known, strict=True)]


def test_a_missing_reward_takes_its_response_out_and_is_counted(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, max_steps=2, samples_per_step=100, max_missing_rewards=0.9)
    train(config, source(no_reward_for_long_ones))
    for row in metrics(tmp_path):
        text = (tmp_path / "run" / "samples" / f"step-{row['step']:06d}.jsonl").read_text()
        written = [json.loads(line) for line in text.splitlines()]
        kept = [sample for sample in written if sample["reward"] is not None]
        assert len(written) == 8 and 0 < row["reward/missing"] == 8 - len(kept)
        assert all(len(sample["response"].split()) <= 6 for sample in kept)
        assert row["objective/scores"] == pytest.approx(
            math.fsum(s["reward"] for s in kept) / len(kept), abs=1e-6
        )
        assert row["objective/kl"] == pytest.approx(math.fsum(s["kl"] for s in kept) / len(kept), abs=1e-6)
        assert row["response/length"] <= 7


def test_missing_rewards_are_told_once_with_their_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.ppo_config(tmp_path, max_steps=3, self_check=False)
    train(config, source(lambda p, r: [None, None, *tiny.share_of_w0(p, r)[2:]]))
    assert [row["reward/missing"] for row in metrics(tmp_path)] == [2, 2, 2]
    told = [line for line in capsys.readouterr().err.splitlines() if "missing" in line]
    assert len(told) == 1
    assert told[0].startswith("2 of 8 rewards are missing at step 1, 2 because: no_reward: the function")


def test_conversations_that_are_too_long_for_the_reward_model_name_the_flag_that_cuts_them(
    tmp_path: Path,
) -> None:
    class TooLong(FunctionReward):
        def score(self, conversations: Sequence[Conversation]) -> list[Reward]:
            lengths = range(700, 700 + len(conversations))
            return [Reward(None, None, f"out_of_range: it has {n} tokens") for n in lengths]

    config = tiny.ppo_config(tmp_path, self_check=False)
    with pytest.raises(QualityError, match=r"8 because: out_of_range: it has 700 .*--reward_truncation left"):
        train(config, TooLong(tiny.share_of_w0))


@pytest.mark.parametrize("truncation", ["reject", "left"])
def test_the_reward_server_is_told_what_to_do_with_long_conversations(
    tmp_path: Path, truncation: Literal["reject", "left"]
) -> None:
    with serving(server := NumberServer()) as address:
        config = tiny.ppo_config(tmp_path, reward_server=address, reward_truncation=truncation)
        with served_reward(config) as client:
            client.score([conversation("1")])
    assert reward_pb2.Truncation.Name(server.calls[-1].truncation) == f"TRUNCATION_{truncation.upper()}"


def test_a_response_without_a_reward_has_no_gradient(step: Step) -> None:
    """An update with response 5 missing leaves the models as an update that never heard of it."""
    kept = [i for i in range(12) if i != 5]
    weights = []
    for poison in (0.0, 1e6):
        step.advantages[5] = poison
        step.returns[5] = poison
        trainer = Trainer.start(step.trainer.config, source())
        stats = trainer.update(step.episodes, step.read, step.advantages, step.returns, kept)
        weights.append((stats, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    assert weights[0][0] == weights[1][0]
    assert torch.equal(weights[0][1], weights[1][1])


def test_too_many_missing_rewards_stop_at_a_checkpoint_and_the_run_goes_on_when_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def failing(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        return [None] * len(prompts) if calls == 3 else tiny.share_of_w0(prompts, responses)

    config = tiny.ppo_config(tmp_path, max_steps=4)
    with pytest.raises(
        QualityError, match=r"8 of 8 rewards are missing at step 2.*None.*run the same command again"
    ):
        train(config, source(failing))
    assert [row["step"] for row in metrics(tmp_path)] == [1]
    assert "going on" not in capsys.readouterr().err
    train(config, source())
    went_on, checked, *_ = capsys.readouterr().err.splitlines()
    assert went_on == "going on from step 1"
    assert checked.startswith("self-check passed") and "the policy has been trained already" in checked
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    train(whole, source())
    expected = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert tiny.without_times(metrics(tmp_path)) == tiny.without_times(expected)


# ---- a run ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"value_head": "separate", "rollout_batch_size": 32},
        {"value_head": "shared", "rollout_batch_size": 32},
        {"advantage_estimator": "rloo", "rollout_batch_size": 8, "num_generations": 4},
    ],
    ids=["separate critic", "shared critic", "rloo"],
)
def test_the_reward_rises_while_kl_stays_in_range(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tiny.ppo_config(
        tmp_path,
        **settings,
        max_steps=40,
        num_mini_batches=1,
        num_ppo_epochs=4,
        learning_rate=2e-3,
        critic_learning_rate=2e-3,
        missing_eos_penalty=0.1,
    )
    train(config, source())
    rows = metrics(tmp_path)
    before = sum(r["objective/scores"] for r in rows[:5]) / 5
    after = sum(r["objective/scores"] for r in rows[-5:]) / 5
    assert after > before + 0.25
    assert all(-0.5 < r["objective/kl"] < 12 for r in rows)


def test_in_the_critics_warm_up_only_the_critic_learns(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, critic_warmup_steps=2, lr_scheduler_type="constant")
    train(config, source())
    first, second, third = metrics(tmp_path)
    # A later epoch reads in other micro-batches, so its ratios are 1 but for rounding.
    assert second["val/ratio_var"] < 1e-6 < 1e-5 < third["val/ratio_var"]
    assert second["objective/kl"] == 0.0
    assert second["loss/value_avg"] != first["loss/value_avg"]


def test_rewards_may_be_whitened(tmp_path: Path) -> None:
    """Token rewards of unit variance and unchanged mean; the metrics keep the scores as they were served."""
    values = torch.tensor([[0.0, 0.0, 3.0], [0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    scaled = whiten(values, mask, moments(values, mask), shift_mean=False)
    found = moments(scaled, mask)
    assert found.mean == pytest.approx(0.8, abs=1e-6) and found.variance == pytest.approx(1.0, abs=1e-6)
    train(tiny.ppo_config(tmp_path, whiten_rewards=True, max_steps=1), source())
    assert metrics(tmp_path)[0]["objective/rlhf_reward"] == metrics(tmp_path)[0]["objective/scores"]


def test_an_adaptive_kl_coefficient_moves_with_the_kl(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, target_kl=6.0, kl_horizon=80.0)
    train(config, source())
    rows = metrics(tmp_path)
    # The first step's KL is 0: the error is clipped at -0.2, and 8 of 80 episodes have passed.
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.05 * (1 - 0.2 * 8 / 80), abs=1e-12)


def test_divergence_stops_with_one_clear_line(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, learning_rate=1e30, num_ppo_epochs=1, num_mini_batches=1)
    with pytest.raises(QualityError, match="diverged"):
        train(config, source())
    (only,) = metrics(tmp_path)
    assert all(v is None or math.isfinite(v) for v in only.values())


def test_a_gradient_that_is_not_finite_changes_no_weight(step: Step) -> None:
    step.advantages[:, 0] = float("nan")
    before = torch.cat([p.detach().flatten() for p in step.trainer.model.parameters()]).clone()
    with pytest.raises(QualityError, match="gradient of the policy is nan"):
        step.trainer.update(step.episodes, step.read, step.advantages, step.returns, range(12))
    assert torch.equal(torch.cat([p.detach().flatten() for p in step.trainer.model.parameters()]), before)


def test_prompt_and_response_must_fit_the_context(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="context of 128"):
        train(tiny.ppo_config(tmp_path, max_new_tokens=125), source())


def test_a_reward_that_is_always_the_same_stops_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(SelfCheckError, match="same reward 7"):
        train(tiny.ppo_config(tmp_path), source(lambda prompts, responses: [7.0] * len(prompts)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("written", [True, False, None])
def test_where_kl_counts_can_stand_in_a_file(tmp_path: Path, written: bool | None) -> None:
    line = "" if written is None else f"use_kl_loss: {str(written).lower()}\n"
    file = tmp_path / "ppo.yaml"
    file.write_text(
        "model_name_or_path: a\ndataset: b\noutput_dir: c\nreward_server: d:1\nself_check: false\n" + line
    )
    command = next(c for c in COMMANDS if c.name == "train ppo")
    config = parse_config(command, ["--config", str(file)])
    assert config.use_kl_loss is written and config.self_check is False
