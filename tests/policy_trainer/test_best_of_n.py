import json
import os
import random
import signal
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from policy_trainer.best_of_n import Trainer, select, train
from policy_trainer.checkpoint import list_checkpoints
from policy_trainer.config import BestOfNConfig
from policy_trainer.importance import Difference
from policy_trainer.reward_source import FunctionReward, Reward
from policy_trainer.rounds import Round, RoundSample
from policy_trainer.sft import accumulate_gradients
from rlaif.chat import EncodedPair
from rlaif.cli import main
from rlaif.errors import ConfigError, QualityError, RewardServerError
from rlaif.types import Conversation
from tests.policy_trainer import tiny
from tests.policy_trainer.online_runs import Interrupting, assert_same_run, metrics, weights
from tests.policy_trainer.reward_servers import NumberServer, serving


def config_in(folder: Path, **changes: Any) -> BestOfNConfig:
    return tiny.round_config(BestOfNConfig, folder, **changes)


REST = {"keep_best": None, "reward_thresholds": (0.0, 0.2, 0.4)}


@pytest.fixture
def source() -> Iterator[FunctionReward]:
    made = FunctionReward(tiny.share_of_w0)
    yield made
    made.close()


# ---- what is learned from ----

scores = st.lists(
    st.lists(st.one_of(st.none(), st.integers(-2, 2).map(float), st.floats(-3, 3)), max_size=5), max_size=4
)


def test_the_best_response_of_each_prompt_is_selected() -> None:
    groups = [[0.1, 0.9, 0.3], [2.0, -1.0, 2.0], [None, -3.0, -2.0]]
    assert select(groups, keep_best=1) == [1, 3, 8]  # the first wins among equals
    assert select(groups, keep_best=2) == [1, 2, 3, 5, 8]


def test_nothing_is_selected_where_nothing_is_better() -> None:
    assert select([[1.0, 1.0], [None, 5.0], [None, None], []], keep_best=1) == []


def test_a_threshold_selects_all_above_it_and_keep_best_sets_a_limit() -> None:
    groups = [[0.1, 0.9, 0.5], [0.6, 0.6, None], [0.5, 0.4, 0.3]]
    assert select(groups, keep_best=None, threshold=0.5) == [1, 3, 4]
    assert select(groups, keep_best=1, threshold=0.5) == [1, 3]


@given(groups=scores, keep_best=st.integers(1, 5), threshold=st.one_of(st.none(), st.floats(-3, 3)))
def test_no_selected_response_is_missing_or_worse_than_one_that_is_not(
    groups: list[list[float | None]], keep_best: int, threshold: float | None
) -> None:
    selected = set(select(groups, keep_best=keep_best, threshold=threshold))
    start = 0
    for group in groups:
        places = range(start, start + len(group))
        start += len(group)
        mine = [group[i - places.start] for i in places if i in selected]
        others = [s for i in places if i not in selected and (s := group[i - places.start]) is not None]
        assert None not in mine and len(mine) <= keep_best
        floor = threshold if threshold is not None else min([*mine, *others], default=0.0)
        assert all(s > floor for s in mine)
        assert all(s <= min(mine) for s in others if mine)
        # Whatever else passes the threshold had no room left.
        assert len(mine) == keep_best or all(s <= floor for s in others)


def test_the_kl_to_the_reference_counts_against_a_reward(tmp_path: Path, source: FunctionReward) -> None:
    # Rewards 1.0 and 0.9, log-ratios 3 and 1: with kl_coef 0.1, scores 0.7 and 0.8.
    samples = [
        RoundSample(0, [7, 2], "w1", True, -1.0, -4.0, 3.0, Reward(1.0, 1.0)),
        RoundSample(0, [8, 2], "w2", True, -1.0, -2.0, 1.0, Reward(0.9, 0.9)),
    ]
    round_ = Round(0, samples, {}, "1", Difference(0.0, 0.0))
    for kl_coef, best in ((0.0, 0), (0.1, 1)):
        trainer = Trainer.start(config_in(tmp_path, num_generations=2, kl_coef=kl_coef), source)
        assert trainer.select(round_) == [[best]]


# ---- the gradient ----


def some_examples() -> list[EncodedPair]:
    rng = random.Random(3)

    def words(most: int) -> list[int]:
        return [rng.randrange(6, 30) for _ in range(rng.randint(1, most))]

    return [EncodedPair([1, 4, *words(9), 5], words(12)) for _ in range(6)]


def gradient(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_the_equation(examples: Sequence[EncodedPair]) -> torch.Tensor:
    """-1/T sum log pi(y_t | x, y_<t), response by response, without padding, from the model's plain logits."""
    model = tiny.model()
    tokens = sum(len(e.response_ids) for e in examples)
    for prompt, response in examples:
        ids = torch.tensor([[*prompt, *response]])
        logps = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
        own = logps[range(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum()
        torch.autograd.backward(-own / tokens)
    return gradient(model)


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(6)), micro_batch_tokens=st.integers(1, 300))
def test_gradient_is_that_of_the_equation_whatever_the_order_padding_and_micro_batch(
    order: list[int], micro_batch_tokens: int
) -> None:
    model, examples = tiny.model(), some_examples()
    accumulate_gradients(
        model, [examples[i] for i in order], micro_batch_tokens=micro_batch_tokens, temperature=0.7
    )
    torch.testing.assert_close(gradient(model), by_the_equation(examples), rtol=1e-4, atol=1e-6)


# ---- the loop ----


@pytest.mark.parametrize(
    "changes", [{}, {"keep_best": 2, "kl_coef": 0.02}, REST], ids=["best", "RAFT", "ReST"]
)
def test_the_reward_rises_and_kl_stays_in_range(
    tmp_path: Path, changes: dict[str, Any], source: FunctionReward
) -> None:
    learning = {"max_steps": 10, "rollout_batch_size": 16, "learning_rate": 5e-3, "num_train_epochs": 2}
    train(config_in(tmp_path, per_device_train_batch_size=8, **learning, **changes), source)
    rows = metrics(tmp_path / "run")
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert rows[0]["objective/scores"] < 0.15
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.25
    assert all(-1e-4 <= row["objective/kl"] < 30 for row in rows)


def test_what_was_selected_is_logged_and_marked_in_the_transcripts(
    tmp_path: Path, source: FunctionReward
) -> None:
    train(config_in(tmp_path, max_steps=1, samples_per_step=32), source)
    (row,) = metrics(tmp_path / "run")
    transcript = (tmp_path / "run/samples/step-000001.jsonl").read_text().splitlines()
    written = [json.loads(line) for line in transcript]
    selected = [w for w in written if w["selected"]]
    best = [max(w["reward"] for w in written[i : i + 4]) for i in range(0, 32, 4)]
    assert [w["reward"] for w in selected] == [b for b in best if b > 0]
    assert row["selected/count"] == row["selected/prompts"] == len(selected)
    assert row["selected/scores"] == pytest.approx(sum(w["reward"] for w in selected) / len(selected))
    assert row["selected/scores"] > row["objective/scores"]


def test_each_rising_threshold_learns_from_fewer_and_better_responses(
    tmp_path: Path, source: FunctionReward
) -> None:
    train(config_in(tmp_path, max_steps=1, rollout_batch_size=64, **REST), source)
    (row,) = metrics(tmp_path / "run")
    counts = [row[f"selected/count_{i}"] for i in (1, 2, 3)]
    assert counts[0] > counts[1] > counts[2] and sum(counts) == row["selected/count"]
    means = [row[f"selected/scores_{i}"] for i in (1, 2, 3) if row[f"selected/scores_{i}"] is not None]
    assert means == sorted(means) and len(means) > 1


def test_a_missing_reward_is_counted_and_takes_no_part(tmp_path: Path) -> None:
    def mostly(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        return [None if i % 4 == 0 else -5.0 - i % 4 for i in range(len(responses))]

    train(config_in(tmp_path, max_steps=1, self_check=False, samples_per_step=32), FunctionReward(mostly))
    (row,) = metrics(tmp_path / "run")
    assert row["reward/missing"] == 8
    assert row["selected/count"] == 8
    assert row["selected/scores"] == -6.0  # a missing one as 0 would be the best of its prompt


def test_a_round_without_a_better_response_changes_nothing(tmp_path: Path) -> None:
    equal = FunctionReward(lambda prompts, responses: [1.0] * len(responses))
    train(config_in(tmp_path, max_steps=2, self_check=False), equal)
    before, after = weights(tmp_path / "policy"), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert [row["loss/sft"] for row in metrics(tmp_path / "run")] == [None, None]


def test_micro_batches_do_not_change_the_run(tmp_path: Path, source: FunctionReward) -> None:
    train(config_in(tmp_path, micro_batch_tokens=30, output_dir=tmp_path / "small"), source)
    train(config_in(tmp_path, micro_batch_tokens=100_000, output_dir=tmp_path / "large"), source)
    for small, large in zip(metrics(tmp_path / "small"), metrics(tmp_path / "large"), strict=True):
        assert small == pytest.approx(large, abs=1e-4)


def test_the_command_trains_against_a_server_as_here_against_the_same_reward(tmp_path: Path) -> None:
    def share(text: str) -> float:
        return text.split().count("w0") / max(1, len(text.split()))

    server = NumberServer(score=share, max_items=16)
    local = FunctionReward(tiny.share_of_w0, center=server.center, scale=server.scale)
    with serving(server) as at:
        config = config_in(tmp_path, max_steps=2, reward_server=at, output_dir=tmp_path / "served")
        given = [f.name for f in fields(config) if f.name == "seed" or getattr(config, f.name) != f.default]
        flags = [word for name in given for word in (f"--{name}", str(getattr(config, name)))]
        assert main(["train", "best_of_n", *flags]) == 0
    train(replace(config, output_dir=tmp_path / "run"), local)
    assert_same_run(tmp_path / "run", tmp_path / "served")


# ---- resume ----


@pytest.mark.parametrize("changes", [{"num_train_epochs": 2}, REST], ids=["best", "ReST"])
def test_a_run_stopped_between_two_updates_of_a_round_goes_on_to_the_same_result(
    tmp_path: Path, source: FunctionReward, changes: dict[str, Any]
) -> None:
    config = config_in(tmp_path, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupting(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    state = json.loads((list_checkpoints(tmp_path / "run")[-1] / "state.json").read_text())
    assert (state["step"], state["updates"]) == (1, 1)
    counting = Interrupting(-1, None)
    train(config, counting)
    train(replace(config, output_dir=tmp_path / "whole"), source)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    # The self-check, and rounds 3 and 4: the round under way had been scored already.
    assert counting.calls == 3


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def test_a_run_that_died_without_a_checkpoint_learns_from_the_rounds_that_it_had_paid_for(
    tmp_path: Path, source: FunctionReward
) -> None:
    def die() -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(config_in(tmp_path), Interrupting(3, die))
    assert not list_checkpoints(tmp_path / "run")
    counting = Interrupting(-1, None)
    train(config_in(tmp_path), counting)
    assert counting.calls == 3  # the self-check, and rounds 3 and 4
    train(config_in(tmp_path, output_dir=tmp_path / "whole"), source)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_too_many_missing_rewards_or_a_lost_server_stop_the_run_at_a_checkpoint(
    tmp_path: Path, source: FunctionReward
) -> None:
    failing = False

    def some(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        rewards = tiny.share_of_w0(prompts, responses)
        return [None if failing and i % 2 else r for i, r in enumerate(rewards)]

    def fail() -> None:
        nonlocal failing
        failing = True

    def lose() -> None:
        raise RewardServerError("gone")

    with pytest.raises(QualityError, match=r"16 of 32 rewards are missing"):
        train(config_in(tmp_path, max_missing_rewards=0.4), Interrupting(2, fail, some))
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-000001"
    with pytest.raises(RewardServerError, match="gone"):
        train(config_in(tmp_path), Interrupting(2, lose))
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-000002"
    train(config_in(tmp_path), source)
    train(config_in(tmp_path, output_dir=tmp_path / "whole"), source)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ---- flags ----


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_generations": 1}, "num_generations"),
        ({"keep_best": 0}, "keep_best"),
        ({"keep_best": None}, "rejected"),
        ({"keep_best": 4}, "rejected"),
        ({"reward_thresholds": (0.5, 0.5)}, "rising"),
        ({"kl_coef": -1.0}, "kl_coef"),
    ],
    ids=str,
)
def test_flags_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        config_in(tmp_path, **change)
