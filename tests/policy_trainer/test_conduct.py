"""Evaluation on the way, the best checkpoint, early stops, tables of completions, the model card."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from policy_trainer.card import header
from policy_trainer.checkpoint import list_checkpoints
from policy_trainer.config import PPOConfig
from policy_trainer.dpo import train as train_dpo
from policy_trainer.heldout import best_step, reason_to_stop
from policy_trainer.ppo import run, train
from policy_trainer.reward_source import FunctionReward
from rlaif.errors import ConfigError, DataError, ModelError, StorageError
from rlaif.types import Conversation
from tests.policy_trainer import tiny


def source(function: Any = tiny.share_of_w0) -> FunctionReward:
    return FunctionReward(function)


def config(folder: Path, **changes: Any) -> PPOConfig:
    """Held out: eight prompts of three words that training has not."""
    held_out = folder / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"prompt": f"w{i} w{i} w{i}"}) + "\n" for i in range(8)))
    settings = {"eval_dataset": held_out, "eval_steps": 2, "learning_rate": 3e-2, **changes}
    return tiny.ppo_config(folder, **settings)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def training_part(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in tiny.without_times(rows)]


# ---- evaluation ----


def test_evaluation_comes_every_n_steps_and_at_the_end_and_changes_nothing(tmp_path: Path) -> None:
    """Tied to nothing: the run learns the same, to the last bit, as one without evaluation."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    train(config(tmp_path / "with", max_steps=5), source())
    train(config(tmp_path / "without", max_steps=5, eval_dataset=None), source())
    rows = metrics(tmp_path / "with")
    assert [row["step"] for row in rows if "eval/win_rate" in row] == [2, 4, 5]
    assert training_part(rows) == training_part(metrics(tmp_path / "without"))
    weights = [(tmp_path / name / "run" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1]


def test_a_policy_that_has_not_learned_ties_with_its_reference(tmp_path: Path) -> None:
    train(config(tmp_path, max_steps=2, learning_rate=0.0), source())
    (row,) = (row for row in metrics(tmp_path) if "eval/win_rate" in row)
    assert row["eval/win_rate"] == 0.5 == row["eval/win_rate_low"] == row["eval/win_rate_high"]
    assert row["eval/win_rate_length_controlled"] == 0.5
    assert row["eval/kl"] == pytest.approx(0.0, abs=1e-5)
    assert row["eval/missing"] == 0


@pytest.mark.parametrize("eval_by", ["score", "compare"])
def test_the_win_rate_is_over_prompts_with_both_rewards_and_the_missing_are_counted(
    tmp_path: Path, eval_by: str
) -> None:
    """Nobody can score an answer to a prompt of w1, w3, ...; what the reference earned is in its file."""

    def even_prompts(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        scores = tiny.share_of_w0(prompts, responses)
        held_out = [p[-1].content.split() for p in prompts]
        return [
            None if len(set(words)) == 1 and len(words) == 3 and int(words[0][1:]) % 2 else score
            for words, score in zip(held_out, scores, strict=True)
        ]

    train(config(tmp_path, max_steps=2, eval_by=eval_by), source(even_prompts))
    (row,) = (row for row in metrics(tmp_path) if "eval/win_rate" in row)
    kept = json.loads((tmp_path / "run" / "eval-reference.json").read_text())["answers"]
    assert [reward is None for _, reward in kept] == [bool(i % 2) for i in range(8)]
    assert row["eval/missing"] == 4
    assert (row["eval/win_rate"] * 8) % 1 == 0  # of four comparisons with halves


def test_a_resumed_run_evaluates_as_the_uninterrupted_one_did(tmp_path: Path) -> None:
    train(config(tmp_path, max_steps=4, save_steps=1, save_total_limit=None), source())
    whole = tiny.without_times(metrics(tmp_path))
    best = (tmp_path / "run" / "best.json").read_text()
    for path in list_checkpoints(tmp_path / "run")[1:]:
        (path / "state.json").unlink()  # as if the run had been killed after step 1
    (tmp_path / "run" / "best.json").unlink()
    train(config(tmp_path, max_steps=4, save_steps=1, save_total_limit=None), source())
    assert tiny.without_times(metrics(tmp_path)) == whole
    assert (tmp_path / "run" / "best.json").read_text() == best


def test_the_best_checkpoint_is_named_and_outlives_the_pruning(tmp_path: Path) -> None:
    """Rewards are turned round after step 2: what was learned until then loses from there on."""
    calls = 0

    def fickle(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        nonlocal calls
        training = len(prompts) == 16
        calls += training
        sign = -1 if training and calls > 2 else 1
        return [None if s is None else sign * s for s in tiny.share_of_w0(prompts, responses)]

    settings = config(
        tmp_path, max_steps=8, save_steps=1, save_total_limit=1, self_check=False, rollout_batch_size=16
    )
    train(settings, source(fickle))
    rows = metrics(tmp_path)
    named = json.loads((tmp_path / "run" / "best.json").read_text())
    assert named["step"] == best_step(rows) < 8
    assert named["eval/win_rate"] == max(row.get("eval/win_rate", 0.0) for row in rows)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == [named["checkpoint"], "checkpoint-000008"]


def test_iterative_dpo_is_evaluated_too(tmp_path: Path) -> None:
    from tests.policy_trainer.test_dpo import dpo_config

    held_out = config(tmp_path).eval_dataset
    settings = dataclasses.replace(
        dpo_config(tmp_path), max_steps=2, eval_dataset=held_out, eval_steps=1, log_completions=True
    )
    train_dpo(settings, source())
    folder = Path(settings.output_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= row["eval/win_rate"] <= 1 for row in rows) and len(rows) == 2
    table = pq.read_table(folder / "completions" / "completions_00002.parquet").to_pylist()
    assert {row["advantage"] for row in table} == {None}


# ---- early stops ----


def row(step: int, win_rate: float | None = None, kl: float = 1.0) -> dict[str, Any]:
    return {"step": step, "objective/kl": kl} | ({} if win_rate is None else {"eval/win_rate": win_rate})


@pytest.mark.parametrize(
    ("rates", "stops"),
    [
        ([0.5, 0.6, 0.7], False),
        ([0.5, 0.7, 0.6], False),
        ([0.5, 0.7, 0.6, 0.69], True),
        ([0.7, 0.7, 0.7], True),  # no higher is not higher
        ([0.7, 0.6, None], False),  # nothing was evaluated at this step
        ([0.7, 0.6, 0.8], False),
    ],
    ids=["rises", "one below the best", "two below the best", "flat", "between evaluations", "recovers"],
)
def test_patience_counts_evaluations_since_the_best(
    tmp_path: Path, rates: list[float | None], stops: bool
) -> None:
    settings = config(tmp_path, early_stopping_patience=2)
    rows = [row(i, rate) for i, rate in enumerate(rates, 1)]
    reason = reason_to_stop(settings, rows)
    assert (reason is not None) == stops
    if reason is not None:
        assert "0.7 at step" in reason


def test_kl_may_reach_its_limit_and_not_exceed_it(tmp_path: Path) -> None:
    settings = config(tmp_path, early_stop_kl=1.0)
    assert (
        reason_to_stop(settings, [row(1, kl=9.0), row(2, kl=1.0)]) is None
    )  # only the step just completed counts
    assert "1.01 nats" in (reason_to_stop(settings, [row(1, kl=1.0), row(2, kl=1.01)]) or "")


def test_a_run_that_leaves_the_reference_ends_at_a_checkpoint_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tmp_path, max_steps=12, early_stop_kl=0.5, learning_rate=5e-2)
    train(settings, source())
    rows = metrics(tmp_path)
    assert rows[-1]["step"] < 12 and rows[-1]["objective/kl"] > 0.5
    assert all(r["objective/kl"] <= 0.5 for r in rows[:-1])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["ended"]["step"] == rows[-1]["step"]
    assert "early_stop_kl 0.5" in record["ended"]["reason"]
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{rows[-1]['step']:06d}"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run")

    # The same command again ends there again; a higher limit goes on.
    train(settings, source())
    assert metrics(tmp_path) == rows
    assert "ended at step" in capsys.readouterr().err
    train(dataclasses.replace(settings, early_stop_kl=None), source())
    assert [r["step"] for r in metrics(tmp_path)] == list(range(1, 13))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["ended"]["reason"] == "max_steps"


def test_a_run_without_an_early_end_says_so(tmp_path: Path) -> None:
    train(config(tmp_path, max_steps=1), source())
    ended = json.loads((tmp_path / "run" / "run.json").read_text())["ended"]
    assert (ended["step"], ended["reason"]) == (1, "max_steps")


def test_an_interruption_is_noted_and_taken_back_by_the_run_that_goes_on(tmp_path: Path) -> None:
    calls = 0

    def interrupted_in_step_2(
        prompts: Sequence[Conversation], responses: Sequence[str]
    ) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return tiny.share_of_w0(prompts, responses)

    settings = config(tmp_path, max_steps=3, eval_dataset=None)
    with pytest.raises(KeyboardInterrupt):
        train(settings, source(interrupted_in_step_2))
    ended = json.loads((tmp_path / "run" / "run.json").read_text())["ended"]
    assert (ended["step"], ended["reason"]) == (2, "interrupted")
    train(settings, source())
    ended = json.loads((tmp_path / "run" / "run.json").read_text())["ended"]
    assert (ended["step"], ended["reason"]) == (3, "max_steps")


def test_a_run_that_failed_before_its_first_step_leaves_its_directory_to_the_mended_command(
    tmp_path: Path,
) -> None:
    settings = config(tmp_path, max_steps=1)
    with pytest.raises(ModelError):
        train(dataclasses.replace(settings, model_name_or_path=str(tmp_path / "nowhere")), source())
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        train(dataclasses.replace(settings, eval_dataset=tmp_path / "absent.jsonl"), source())
    train(settings, source())
    assert metrics(tmp_path)[-1]["step"] == 1


def test_a_run_goes_on_with_smaller_micro_batches_and_not_with_another_way_to_evaluate(
    tmp_path: Path,
) -> None:
    """The first is a matter of memory; the second would set two measures beside each other."""
    settings = config(tmp_path, max_steps=2)
    train(settings, source())
    with pytest.raises(StorageError, match="eval_by"):
        train(dataclasses.replace(settings, eval_by="compare"), source())
    train(dataclasses.replace(settings, micro_batch_tokens=64), source())


def test_a_missing_file_is_said_before_the_reward_server_is_waited_for(tmp_path: Path) -> None:
    settings = config(tmp_path, reward_server="127.0.0.1:1")
    for name in ("dataset", "eval_dataset"):
        with pytest.raises(DataError, match=r"absent\.jsonl"):
            run(dataclasses.replace(settings, **{name: tmp_path / "absent.jsonl"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_kl": 5.0, "kl_coef": 0.0}, "positive kl_coef"),
        ({"target_kl": 5.0, "kl_horizon": 1.0}, "a fifth of the responses"),
        ({"critic_warmup_steps": 3, "max_steps": 3}, "below max_steps"),
        ({"eval_dataset": None, "early_stopping_patience": 2}, "eval_dataset"),
        ({"early_stop_kl": 0.0}, "early_stop_kl must be positive"),
        ({"eval_steps": 0}, "eval_steps must be at least 1"),
    ],
    ids=[
        "a coefficient of 0 is steered",
        "a coefficient could become negative",
        "warm-up to the end",
        "patience without evaluations",
        "no kl",
        "no steps",
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **changes)


def test_training_data_is_not_held_out(tmp_path: Path) -> None:
    data = config(tmp_path).dataset
    with pytest.raises(ConfigError, match="hold prompts out"):
        config(tmp_path, eval_dataset=data)


# ---- what is left to read ----


def test_completions_hold_every_response_of_a_step_with_reward_and_advantage(tmp_path: Path) -> None:
    """`dr_grpo`: an advantage is the reward less the mean of the prompt's group."""
    settings = config(
        tmp_path,
        max_steps=2,
        log_completions=True,
        samples_per_step=1,
        advantage_estimator="dr_grpo",
        rollout_batch_size=3,
        num_generations=4,
    )
    train(settings, source())
    table = pq.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pylist()
    assert len(table) == 12 and {r["step"] for r in table} == {1}
    for start in range(0, 12, 4):
        group = table[start : start + 4]
        assert len({json.dumps(r["prompt"]) for r in group}) == 1
        mean = sum(r["reward"] for r in group) / 4
        assert [r["advantage"] for r in group] == pytest.approx([r["reward"] - mean for r in group], abs=1e-6)
        assert [r["reward"] for r in group] == tiny.share_of_w0([], [r["completion"] for r in group])


def test_completions_hold_the_responses_without_a_reward_too(tmp_path: Path) -> None:
    def every_other(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        return [None if i % 2 else s for i, s in enumerate(tiny.share_of_w0(prompts, responses))]

    settings = config(
        tmp_path,
        max_steps=1,
        log_completions=True,
        max_missing_rewards=0.5,
        self_check=False,
        eval_dataset=None,
    )
    train(settings, source(every_other))
    table = pq.read_table(tmp_path / "run" / "completions" / "completions_00001.parquet").to_pylist()
    assert len(table) == settings.responses_per_step
    for i, row in enumerate(table):
        assert (row["reward"] is None) == (row["advantage"] is None) == (row["kl"] is None) == bool(i % 2)


@pytest.mark.parametrize(
    ("model", "base"),
    [("hf:org/model", "org/model"), ("org/model", "org/model"), ("tinyworld:policy", None)],
    ids=["hf", "bare", "embedded"],
)
def test_a_base_model_of_the_hub_is_named_as_the_hub_names_it(model: str, base: str | None) -> None:
    made = header("train ppo", {"model_name_or_path": model, "advantage_estimator": "dr_grpo"})
    card = ModelCard(f"{made}\n\n# x\n")
    assert card.data.base_model == base
    assert card.data.tags == ["rlaif", "dr-grpo"]


def test_the_model_card_is_valid_and_says_what_made_the_model(tmp_path: Path) -> None:
    train(config(tmp_path, max_steps=2), FunctionReward(tiny.share_of_w0, name="words", version="v7"))
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["rlaif", "ppo"]
    assert card.data.base_model is None  # a folder is no name on the hub
    import hashlib

    digest = hashlib.sha256((tmp_path / "prompts.jsonl").read_bytes()).hexdigest()
    for said in (
        digest,
        "`words`, version `v7`",
        "eval/win_rate",
        str(tmp_path / "policy"),
        "checkpoint-000002",
    ):
        assert said in card.text
