import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from policy_trainer.branches import sequence_logprobs
from policy_trainer.checkpoint import is_between_steps, list_checkpoints
from policy_trainer.client import RewardClient
from policy_trainer.config import DPOConfig
from policy_trainer.dpo import (
    Mismatched,
    PairExample,
    PairSums,
    accumulate_gradients,
    kto_kl,
    train,
)
from policy_trainer.importance import Difference
from policy_trainer.online import Prompts
from policy_trainer.preference_losses import PreferenceObjective
from policy_trainer.reward_source import FunctionReward, Reward
from policy_trainer.rounds import (
    Round,
    RoundSample,
    mismatched_prompt,
    penalised,
    store_round,
    stored_round,
)
from rlaif.cli import main
from rlaif.errors import ConfigError, DataError, ModelError, QualityError, RewardServerError
from rlaif.types import Conversation
from tests.policy_trainer import tiny
from tests.policy_trainer.online_runs import Interrupting, assert_same_run, metrics, weights
from tests.policy_trainer.reward_servers import NumberServer, free_port, serving


def dpo_config(folder: Path, **changes: Any) -> DPOConfig:
    return tiny.round_config(DPOConfig, folder, **changes)


@pytest.fixture
def source() -> Iterator[FunctionReward]:
    made = FunctionReward(tiny.share_of_w0)
    yield made
    made.close()


# ---- the gradient of a minibatch ----


EVERY_LOSS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.1},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "kto": {"loss_type": "kto", "desirable_weight": 1.3},
}
"""Flags of each loss, by its name in the field."""


def some_pairs(count: int = 5) -> list[PairExample]:
    rng = random.Random(5)

    def words(most: int) -> list[int]:
        return [rng.randrange(6, 30) for _ in range(rng.randint(1, most))]

    def unlikely() -> float:
        return -rng.uniform(1, 30)

    return [
        PairExample([1, 4, *words(9), 5], words(12), words(12), unlikely(), unlikely(), p)
        for p in (1.0, 0.9, 0.6, 0.75, 0.5)[:count]
    ]


def some_pairs_for_kto() -> list[PairExample]:
    """The same, and a prompt of another pair for each. The reference is far below the policy: the KL is not 0."""
    examples = some_pairs()
    others = [*examples[1:], examples[0]]
    return [
        e._replace(mismatched=Mismatched(other.prompt_ids, -60.0 - i, -70.0 + i))
        for i, (e, other) in enumerate(zip(examples, others, strict=True))
    ]


def gradients(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient_of(
    examples: Sequence[PairExample], micro_batch_tokens: int, **flags: Any
) -> tuple[torch.Tensor, PairSums]:
    model = tiny.model()
    sums = accumulate_gradients(
        model,
        examples,
        objective=PreferenceObjective(**{"beta": 0.2, **flags}),
        temperature=0.7,
        micro_batch_tokens=micro_batch_tokens,
    )
    return gradients(model), sums


def by_the_equation(examples: Sequence[PairExample], divisors: Sequence[int]) -> torch.Tensor:
    """Equation 7 with soft labels, pair by pair, without padding, from the model's plain logits in float32."""
    model = tiny.model()
    for example, divisor in zip(examples, divisors, strict=True):

        def logprob(response: Sequence[int], prompt: Sequence[int] = example.prompt_ids) -> torch.Tensor:
            ids = torch.tensor([[*prompt, *response]])
            logps = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
            return logps[range(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum()

        h = 0.2 * (
            (logprob(example.chosen_ids) - example.reference_chosen)
            - (logprob(example.rejected_ids) - example.reference_rejected)
        )
        p = example.chosen_prob
        loss = -(p * torch.log(torch.sigmoid(h)) + (1 - p) * torch.log(torch.sigmoid(-h)))
        torch.autograd.backward(loss / divisor)
    return gradients(model)


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 100_000], ids=["one pair", "some", "all at once"])
def test_gradient_is_that_of_the_equation_whatever_the_micro_batch(micro_batch_tokens: int) -> None:
    examples = some_pairs()
    gradient, sums = gradient_of(examples, micro_batch_tokens)
    torch.testing.assert_close(gradient, by_the_equation(examples, [5] * 5), rtol=1e-4, atol=1e-6)
    assert sums.pairs == 5


def test_a_mean_of_micro_batch_means_would_be_another_gradient() -> None:
    examples = some_pairs()
    # Micro-batches of two and three pairs, averaged each and then together: weights 1/4 and 1/6 for 1/5.
    wrong = by_the_equation(examples, [4, 4, 6, 6, 6])
    gradient, _ = gradient_of(examples, 100_000)
    assert (gradient - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("loss", EVERY_LOSS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(5)), micro_batch_tokens=st.integers(1, 400))
def test_neither_order_nor_padding_nor_micro_batches_change_the_gradient_or_the_metrics(
    loss: str, order: list[int], micro_batch_tokens: int
) -> None:
    # KTO's losses are flat for pairs as unlikely as these: a small beta keeps their gradient above rounding errors.
    flags = {**EVERY_LOSS[loss], "beta": 0.02 if loss == "kto" else 0.2}
    examples = some_pairs_for_kto()
    expected, expected_sums = gradient_of(examples, 100_000, **flags)
    gradient, sums = gradient_of([examples[i] for i in order], micro_batch_tokens, **flags)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert list(sums) == pytest.approx(list(expected_sums), rel=1e-5)


def kl_by_hand(examples: Sequence[PairExample]) -> float:
    """z0 from the model's plain logits, one sequence at a time."""
    model, differences = tiny.model(), []
    for example in examples:
        assert example.mismatched is not None
        prompt = example.mismatched.prompt_ids
        for response, reference in (
            (example.chosen_ids, example.mismatched.reference_chosen),
            (example.rejected_ids, example.mismatched.reference_rejected),
        ):
            ids = torch.tensor([[*prompt, *response]])
            logps = (model(ids).logits[0, :-1] / 0.7).log_softmax(-1)
            own = logps[range(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum().item()
            differences.append(own - reference)
    return max(0.0, sum(differences) / len(differences))


def test_the_kl_of_kto_is_that_of_responses_read_with_another_prompt_and_never_negative() -> None:
    examples = some_pairs_for_kto()
    expected = kl_by_hand(examples)
    assert expected > 1
    assert kto_kl(tiny.model(), examples, 0.7, 60) == pytest.approx(expected, rel=1e-5)
    assert gradient_of(examples, 60, loss_type="kto")[1].kto_kl == pytest.approx(expected, rel=1e-5)
    likely = [e._replace(mismatched=Mismatched(e.prompt_ids, 0.0, 0.0)) for e in examples]
    assert kto_kl(tiny.model(), likely, 0.7, 60) == 0.0


def test_the_prompt_that_kto_reads_a_response_with_is_the_next_one_that_differs() -> None:
    prompts = Prompts([(), (), (), ()], [[1], [2], [2], [1]])
    assert [mismatched_prompt(prompts, row) for row in range(4)] == [[2], [1], [1], [2]]
    with pytest.raises(DataError, match="all prompts are the same"):
        mismatched_prompt(Prompts([(), ()], [[1], [1]]), 0)


def test_log_probabilities_of_sequences_are_the_models() -> None:
    model = tiny.model()
    pairs = [(list(e.prompt_ids), list(e.chosen_ids)) for e in some_pairs()]
    found = sequence_logprobs(model, pairs, 1.0, 50)
    for (prompt, response), logprob in zip(pairs, found, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        alone = logps[range(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum()
        assert logprob == pytest.approx(alone.item(), abs=1e-4)


# ---- the loop ----


def test_the_first_update_starts_at_the_reference(tmp_path: Path, source: FunctionReward) -> None:
    train(dpo_config(tmp_path, max_steps=1, per_device_train_batch_size=8), source)
    (first,) = metrics(tmp_path / "run")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert 0.0 <= first["rewards/accuracies"] <= 1.0


def test_log_ratios_to_the_previous_policy_start_every_round_at_zero(
    tmp_path: Path, source: FunctionReward
) -> None:
    online = {"max_steps": 3, "per_device_train_batch_size": 8}
    train(dpo_config(tmp_path, reference="previous", **online), source)
    rows = metrics(tmp_path / "run")
    assert [row["loss/dpo"] for row in rows] == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert rows[2]["objective/kl"] > 1e-3  # KL is still measured from where training began
    train(dpo_config(tmp_path, reference="initial", output_dir=tmp_path / "initial", **online), source)
    assert metrics(tmp_path / "initial")[2]["loss/dpo"] != pytest.approx(math.log(2), abs=1e-4)


def test_the_moving_average_lies_between_the_policy_before_training_and_the_previous_one(
    tmp_path: Path, source: FunctionReward
) -> None:
    def run(name: str, **changes: Any) -> Path:
        train(dpo_config(tmp_path, max_steps=3, output_dir=tmp_path / name, **changes), source)
        return tmp_path / name

    assert_same_run(run("ema 1", reference="ema", ema_decay=1.0), run("initial"))
    previous = run("previous", reference="previous")
    assert_same_run(run("ema 0", reference="ema", ema_decay=0.0), previous)
    between = run("ema", reference="ema", ema_decay=0.5)
    assert metrics(between)[1] != metrics(previous)[1]
    assert metrics(between)[1] != metrics(tmp_path / "initial")[1]


def test_kto_starts_at_the_reference_and_every_round_at_its_previous_policy(
    tmp_path: Path, source: FunctionReward
) -> None:
    online = {"max_steps": 2, "per_device_train_batch_size": 8, "loss_type": "kto"}
    train(dpo_config(tmp_path, reference="previous", **online), source)
    for row in metrics(tmp_path / "run"):
        assert row["kto/kl"] == pytest.approx(0.0, abs=1e-4)
        assert row["loss/dpo"] == pytest.approx(0.5, abs=1e-4)  # 1 - s(0) of either side


def test_threshold_learns_from_several_pairs_of_a_prompt(tmp_path: Path, source: FunctionReward) -> None:
    train(dpo_config(tmp_path, max_steps=1, pair_strategy="threshold"), source)
    (row,) = metrics(tmp_path / "run")
    assert row["pairs/count"] > 8


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"soft_labels": False},
        {"reference": "previous"},
        {"reference": "ema"},
        {"pair_strategy": "random"},
        {"pair_strategy": "threshold", "tie_threshold": 0.1},
        *list(EVERY_LOSS.values())[1:],
    ],
    ids=str,
)
def test_the_reward_rises_and_kl_stays_in_range(
    tmp_path: Path, changes: dict[str, Any], source: FunctionReward
) -> None:
    learning = {"max_steps": 10, "rollout_batch_size": 16, "learning_rate": 5e-3, "num_train_epochs": 2}
    train(
        dpo_config(tmp_path, per_device_train_batch_size=8, label_temperature=0.1, **{**learning, **changes}),
        source,
    )
    rows = metrics(tmp_path / "run")
    assert rows[0]["objective/scores"] < 0.15
    assert rows[-1]["objective/scores"] > rows[0]["objective/scores"] + 0.25
    assert all(-1e-4 <= row["objective/kl"] < 30 for row in rows)


def test_engine_and_trainer_are_compared_in_every_round(tmp_path: Path, source: FunctionReward) -> None:
    train(dpo_config(tmp_path, max_steps=3), source)
    for row in metrics(tmp_path / "run"):
        mean, most = (row[f"sampling/sampling_logp_difference/{of}"] for of in ("mean", "max"))
        assert 0 < mean < most < 1e-5


def test_every_round_samples_afresh(tmp_path: Path, source: FunctionReward) -> None:
    tiny.save_prompts(tmp_path / "prompts.jsonl", count=1)  # so that both rounds ask the same
    train(dpo_config(tmp_path, max_steps=2, learning_rate=0.0, samples_per_step=32), source)
    first, second = (
        sorted((tmp_path / f"run/samples/step-00000{step}.jsonl").read_text().splitlines()) for step in (1, 2)
    )
    assert first != second


def test_metrics_carry_the_names_that_users_know(tmp_path: Path, source: FunctionReward) -> None:
    train(dpo_config(tmp_path, max_steps=1), source)
    (row,) = metrics(tmp_path / "run")
    assert {"step", "episode", "objective/kl", "objective/scores", "reward/missing", "loss/dpo"} < set(row)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} < set(row)
    assert (row["step"], row["episode"]) == (1, 32)


def test_transcripts_are_written_for_people(tmp_path: Path, source: FunctionReward) -> None:
    train(dpo_config(tmp_path, max_steps=1, samples_per_step=5), source)
    lines = (tmp_path / "run/samples/step-000001.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    assert len(lines) == 5
    assert row["prompt"][-1]["role"] == "user"
    words = row["response"].split()
    assert row["reward"] == pytest.approx(words.count("w0") / max(1, len(words)))


def test_a_missing_reward_is_counted_and_takes_no_part(tmp_path: Path) -> None:
    def mostly(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        rewards = tiny.share_of_w0(prompts, responses)
        return [None if len(prompts) == 32 and i % 4 == 0 else 5.0 for i, _ in enumerate(rewards)]

    train(dpo_config(tmp_path, max_steps=1, self_check=False), FunctionReward(mostly))
    (row,) = metrics(tmp_path / "run")
    assert row["reward/missing"] == 8
    assert row["objective/scores"] == 5.0  # a missing one as 0 would make it 3.75
    assert row["pairs/count"] == 0 and row["pairs/skipped_tie"] == 8
    assert row["loss/dpo"] is None


def test_a_round_of_ties_changes_nothing(tmp_path: Path) -> None:
    equal = FunctionReward(lambda prompts, responses: [1.0] * len(responses))
    train(dpo_config(tmp_path, max_steps=2, self_check=False), equal)
    before, after = weights(tmp_path / "policy"), weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert len(metrics(tmp_path / "run")) == 2


def test_too_many_missing_rewards_stop_the_run_at_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, source: FunctionReward
) -> None:
    failing = False

    def half(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        rewards = tiny.share_of_w0(prompts, responses)
        return [None if failing and i % 2 else r for i, r in enumerate(rewards)]

    def fail() -> None:
        nonlocal failing
        failing = True

    config = dpo_config(tmp_path, max_missing_rewards=0.4)
    with pytest.raises(QualityError, match=r"16 of 32 rewards are missing.*function returned None"):
        train(config, Interrupting(3, fail, half))
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-000002"
    train(config, source)
    train(dpo_config(tmp_path, output_dir=tmp_path / "whole"), source)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# ---- resume ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reference": "ema", "ema_decay": 0.6},
        {"loss_type": "kto", "reference": "previous", "pair_strategy": "threshold"},
    ],
    ids=str,
)
def test_a_run_stopped_between_two_updates_of_a_round_goes_on_to_the_same_result(
    tmp_path: Path, source: FunctionReward, changes: dict[str, Any]
) -> None:
    config = dpo_config(tmp_path, num_train_epochs=2, **changes)
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


def test_a_server_that_is_lost_leaves_a_checkpoint(tmp_path: Path, source: FunctionReward) -> None:
    def lose() -> None:
        raise RewardServerError("gone")

    config = dpo_config(tmp_path)
    with pytest.raises(RewardServerError, match="gone"):
        train(config, Interrupting(3, lose))
    train(config, source)
    train(dpo_config(tmp_path, output_dir=tmp_path / "whole"), source)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("loss", EVERY_LOSS)
def test_micro_batches_do_not_change_the_run(tmp_path: Path, source: FunctionReward, loss: str) -> None:
    flags = EVERY_LOSS[loss]
    train(dpo_config(tmp_path, **flags, micro_batch_tokens=30, output_dir=tmp_path / "small"), source)
    train(dpo_config(tmp_path, **flags, micro_batch_tokens=100_000, output_dir=tmp_path / "large"), source)
    for small, large in zip(metrics(tmp_path / "small"), metrics(tmp_path / "large"), strict=True):
        if (
            small["step"] == 1
        ):  # policy and reference are equal: the sign of a reward is that of a rounding error
            del small["rewards/accuracies"], large["rewards/accuracies"]
        assert small == pytest.approx(large, abs=1e-4)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, source: FunctionReward) -> None:
    train(dpo_config(tmp_path), source)
    before = metrics(tmp_path / "run")
    counting = Interrupting(-1, None)
    train(dpo_config(tmp_path), counting)
    assert metrics(tmp_path / "run") == before
    assert counting.calls == 0


def test_a_stop_in_the_middle_of_a_step_leaves_the_checkpoint_of_the_last_one_as_it_was(
    tmp_path: Path, source: FunctionReward
) -> None:
    config = dpo_config(tmp_path, num_train_epochs=2, save_steps=1, save_total_limit=2)
    whole = replace(config, output_dir=tmp_path / "whole", max_steps=1)
    train(whole, source)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupting(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    kept = list_checkpoints(tmp_path / "run")
    assert [path.name for path in kept] == ["checkpoint-000001", "checkpoint-000001+000001"]
    assert [is_between_steps(path) for path in kept] == [True, False]
    mine, theirs, midway = (
        weights(kept[0]),
        weights(tmp_path / "whole" / "checkpoint-000001"),
        weights(kept[1]),
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not all(torch.equal(mine[name], midway[name]) for name in mine)
    train(config, source)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [
        "checkpoint-000003",
        "checkpoint-000004",
    ]


def test_other_prompts_are_refused_on_resume(tmp_path: Path, source: FunctionReward) -> None:
    config = dpo_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(config, Interrupting(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    rows = config.dataset.read_text().splitlines(keepends=True)
    config.dataset.write_text("".join([*rows[1:], rows[0]]))
    with pytest.raises(DataError, match="not what this run began with"):
        train(config, source)


def test_another_reward_model_is_refused_on_resume(tmp_path: Path, source: FunctionReward) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(dpo_config(tmp_path), Interrupting(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    other = FunctionReward(tiny.share_of_w0, version="2")
    with pytest.raises(RewardServerError, match="serves version 2, this run began with 1"):
        train(dpo_config(tmp_path), other)


def test_another_reference_is_refused_on_resume(tmp_path: Path, source: FunctionReward) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(dpo_config(tmp_path), Interrupting(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    tiny.save_policy(tmp_path / "policy", seed=1)
    with pytest.raises(ModelError, match="not the one that this run began with"):
        train(dpo_config(tmp_path), source)


@pytest.mark.slow
def test_kill_9_at_a_random_moment_and_the_same_command_again_give_the_uninterrupted_run(
    tmp_path: Path,
) -> None:
    def share(text: str) -> float:
        return text.split().count("w0") / max(1, len(text.split()))

    rng = random.Random()
    killed, lines = tmp_path / "killed", tmp_path / "killed/metrics.jsonl"
    with serving(NumberServer(score=share, max_items=16)) as at:
        config = dpo_config(tmp_path, max_steps=30, save_steps=4, reward_server=at, output_dir=killed)
        changed = [
            f.name for f in fields(DPOConfig) if getattr(config, f.name) != f.default and f.name != "seed"
        ]
        flags = [word for name in changed for word in (f"--{name}", str(getattr(config, name)))]
        command = [sys.executable, "-m", "rlaif.cli", "train", "dpo", *flags]

        kill_after = rng.randint(1, 20)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            if lines.is_file() and len(lines.read_text().splitlines()) >= kill_after:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait()
        assert kill_after <= len(lines.read_text().splitlines()) < 30
        subprocess.run(command, check=True, capture_output=True)
        with RewardClient(at) as client:
            train(replace(config, output_dir=tmp_path / "whole"), client)
    assert_same_run(killed, tmp_path / "whole")
    assert len(metrics(killed)) == 30


# ---- the round as data, flags, errors ----


def test_a_stored_round_is_read_back_exactly_and_only_for_its_reward_model(tmp_path: Path) -> None:
    sample = RoundSample(3, [7, 2], "w1", True, -1.1, -1.3, 0.2, Reward(0.1 + 0.2, 1 / 3, None, 9))
    missing = RoundSample(
        3, [8], "w2", False, -2.0, -2.0, 0.0, Reward(None, None, "out_of_range: long"), -0.7
    )
    written = Round(4, [sample, missing], {"rollout": 0.25}, "v1", Difference(0.1, 0.2))
    store_round(tmp_path, written)
    assert stored_round(tmp_path, 4, "v1") == written
    assert stored_round(tmp_path, 4, "v2") is None
    assert stored_round(tmp_path, 5, "v1") is None


def test_the_penalty_of_an_unfinished_response_counts_in_both_units() -> None:
    assert penalised(Reward(1.0, 7.0), 0.5, scale=4.0)[:2] == (0.5, 5.0)
    missing = Reward(None, None, "no_reward")
    assert penalised(missing, 0.5, scale=4.0) == missing


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_generations": 1}, "num_generations"),
        ({"beta": 0.0}, "beta"),
        ({"label_temperature": 0.0}, "label"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"loss_type": "robust"}, "label_smoothing"),
        ({"undesirable_weight": 2.0}, "kto"),
        ({"ema_decay": 1.5}, "ema_decay"),
    ],
)
def test_flags_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        dpo_config(tmp_path, **change)


def test_a_dead_server_is_one_line_and_exit_code_6(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dpo_config(tmp_path)
    at = f"127.0.0.1:{free_port()}"
    flags = {"model_name_or_path": config.model_name_or_path, "dataset": config.dataset, "reward_server": at}
    flags |= {"output_dir": tmp_path / "run", "reward_give_up_after_s": 0.2}
    code = main(["train", "dpo", *(str(w) for name, value in flags.items() for w in (f"--{name}", value))])
    assert code == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rlaif:")]
    assert len(lines) == 1 and "start one: rlaif serve" in lines[0]
