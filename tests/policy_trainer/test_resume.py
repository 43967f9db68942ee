"""An interrupted run continues as if nothing had happened: equal metrics, samples and weights, to the last bit."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.rpc import code_pb2, status_pb2

from policy_trainer import sft
from policy_trainer.checkpoint import (
    list_checkpoints,
    load_latest,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from policy_trainer.client import RewardClient
from policy_trainer.config import SFTConfig
from policy_trainer.ppo import train
from policy_trainer.reward_source import FunctionReward
from protos.rlaif.reward.v1 import reward_pb2
from rlaif.errors import ModelError, RewardServerError, StorageError
from rlaif.types import Conversation
from tests.policy_trainer import tiny
from tests.policy_trainer.reward_servers import NumberServer, serving


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tiny.without_times([json.loads(line) for line in lines])


def samples(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted((folder / "samples").iterdir())}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def share_until(call: int) -> FunctionReward:
    """Rewards until the process is interrupted in the middle of a step."""
    calls = 0

    def function(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Interrupted
        return tiny.share_of_w0(prompts, responses)

    return FunctionReward(function)


@pytest.mark.parametrize(
    "settings",
    [
        {"value_head": "separate"},
        {"value_head": "shared"},
        {"advantage_estimator": "grpo", "rollout_batch_size": 4, "num_generations": 2},
        {"use_peft": True, "value_head": "shared"},
        {"use_peft": True},
        {"dtype": "bfloat16"},
        {"max_staleness": 2},
        {"max_staleness": 1, "use_peft": True},
        {"policy_objective": "penalty", "reward_normalization": "running", "ptx_dataset": "text.jsonl"},
    ],
    ids=[
        "separate critic",
        "shared critic",
        "grpo",
        "lora",
        "lora, separate critic",
        "bfloat16",
        "rollouts ahead",
        "lora, rollouts ahead",
        "penalty, running moments and text",
    ],
)
def test_ppo_resumed_equals_ppo_uninterrupted(tmp_path: Path, settings: dict[str, Any]) -> None:
    if "ptx_dataset" in settings:
        settings = {**settings, "ptx_dataset": tiny.save_text(tmp_path / settings["ptx_dataset"])}
    config = tiny.ppo_config(tmp_path, **settings, max_steps=6, save_steps=2, target_kl=3.0, kl_horizon=50)
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    train(whole, FunctionReward(tiny.share_of_w0))
    # Call 1 is the self-check: this ends in step 4, one step after the last checkpoint.
    with pytest.raises(Interrupted):
        train(config, share_until(5))
    assert len(rows(config.output_dir)) == 3
    train(config, FunctionReward(tiny.share_of_w0))
    assert rows(config.output_dir) == rows(whole.output_dir)
    assert samples(config.output_dir) == samples(whole.output_dir)
    assert weights(config.output_dir) == weights(whole.output_dir)


def test_a_checkpoint_without_what_an_earlier_release_did_not_have_is_gone_on_from(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, max_steps=2, save_steps=1)
    with pytest.raises(Interrupted):
        train(config, share_until(3))
    state = config.output_dir / "checkpoint-000001" / "state.json"
    info = json.loads(state.read_text())
    del info["penalty_coef"], info["scores_seen"]
    state.write_text(json.dumps(info))
    train(config, FunctionReward(tiny.share_of_w0))
    assert len(rows(config.output_dir)) == 2


def test_a_lost_reward_server_ends_ppo_at_a_checkpoint(tmp_path: Path) -> None:
    """The steps since the last regular checkpoint are not lost with it."""
    calls = 0

    def function(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RewardServerError("gone")
        return tiny.share_of_w0(prompts, responses)

    config = tiny.ppo_config(tmp_path)
    with pytest.raises(RewardServerError, match="gone"):
        train(config, FunctionReward(function))
    saved = load_latest(config.output_dir)
    assert saved is not None and saved.step == 2
    train(config, FunctionReward(tiny.share_of_w0))
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    train(whole, FunctionReward(tiny.share_of_w0))
    assert rows(config.output_dir) == rows(whole.output_dir)
    assert weights(config.output_dir) == weights(whole.output_dir)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path)
    train(config, FunctionReward(tiny.share_of_w0))
    before = (config.output_dir / "metrics.jsonl").read_bytes()
    train(config, share_until(1))
    assert (config.output_dir / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_refuses_another_reward_model(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, save_steps=1)
    with pytest.raises(Interrupted):
        train(config, share_until(3))
    with pytest.raises(RewardServerError, match=r"version 2.*began with 1"):
        train(config, FunctionReward(tiny.share_of_w0, version="2"))


def test_a_resumed_run_refuses_another_reference(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, save_steps=1)
    with pytest.raises(Interrupted):
        train(config, share_until(3))
    tiny.save_policy(tmp_path / "policy", seed=1)
    with pytest.raises(ModelError, match="reference"):
        train(config, FunctionReward(tiny.share_of_w0))


def test_another_setting_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    config = tiny.ppo_config(tmp_path, max_steps=1)
    train(config, FunctionReward(tiny.share_of_w0))
    with pytest.raises(StorageError, match="kl_coef"):
        train(dataclasses.replace(config, kl_coef=0.5), FunctionReward(tiny.share_of_w0))


def test_a_signal_ends_at_a_checkpoint(tmp_path: Path) -> None:
    """SIGTERM in the middle of step 2: the step is finished, saved, and the run goes on from there later."""
    calls = 0

    def function(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        nonlocal calls
        calls += 1
        if calls == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return tiny.share_of_w0(prompts, responses)

    config = tiny.ppo_config(tmp_path, max_steps=4)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(config, FunctionReward(function))
    assert signal.getsignal(signal.SIGTERM) == handler
    saved = load_latest(config.output_dir)
    assert saved is not None and saved.step == 2 == len(rows(config.output_dir))


# ---- kill -9 of the real command ----


class ShareServer(NumberServer):
    """`tiny.share_of_w0` over real gRPC; now and then an answer is late, so that a kill can fall anywhere."""

    def _outcome(self, item: reward_pb2.ScoreItem) -> reward_pb2.ScoreOutcome:
        text = item.conversation.messages[-1].content
        if text == "w1":
            error = status_pb2.Status(code=code_pb2.OUT_OF_RANGE, message="no reward for this one")
            return reward_pb2.ScoreOutcome(id=item.id, error=error)
        (raw,) = tiny.share_of_w0([()], [text])
        assert raw is not None
        score = reward_pb2.Score(raw=raw, normalized=(raw - self.center) / self.scale, tokens=3)
        return reward_pb2.ScoreOutcome(id=item.id, score=score)


def command(folder: Path, output: Path, address: str) -> subprocess.Popen[bytes]:
    flags = {
        "model_name_or_path": folder / "policy",
        "dataset": folder / "prompts.jsonl",
        "output_dir": output,
        "reward_server": address,
        "max_new_tokens": 8,
        "rollout_batch_size": 8,
        "max_steps": 30,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "save_steps": 3,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, "-m", "rlaif.cli", "train", "ppo", *words], stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error.decode()


@pytest.mark.slow
def test_ppo_killed_at_a_random_moment_continues_as_if_uninterrupted(tmp_path: Path) -> None:
    tiny.ppo_config(tmp_path)
    moment = random.SystemRandom()
    with serving(ShareServer(max_items=64)) as address:
        whole, killed = (command(tmp_path, tmp_path / name, address) for name in ("whole", "killed"))
        lines_before, delay = moment.randint(1, 25), moment.uniform(0, 0.1)
        deadline = time.monotonic() + 200
        log = tmp_path / "killed" / "metrics.jsonl"
        while not (log.is_file() and log.read_bytes().count(b"\n") >= lines_before):
            assert killed.poll() is None, killed.communicate()[1].decode()
            assert time.monotonic() < deadline, "the run is stuck"
            time.sleep(0.005)
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        finish(command(tmp_path, tmp_path / "killed", address))
        finish(whole)
    note = f"killed {delay:.3f} s after line {lines_before}"
    assert len(rows(tmp_path / "whole")) == 30
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole"), note
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole"), note


def test_a_served_reward_trains_like_the_same_reward_computed_here(tmp_path: Path) -> None:
    def unless_w1(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
        known = tiny.share_of_w0(prompts, responses)
        return [None if r == "w1" else s for r, s in zip(responses, known, strict=True)]

    local = FunctionReward(unless_w1, center=1.0, scale=2.0, version="v1")
    config = tiny.ppo_config(tmp_path)
    train(config, local)
    remote = dataclasses.replace(config, output_dir=tmp_path / "remote")
    with serving(ShareServer()) as address, RewardClient(address) as client:
        train(remote, client)
    assert rows(remote.output_dir) == rows(config.output_dir)
    assert weights(remote.output_dir) == weights(config.output_dir)


# ---- supervised fine-tuning ----


def test_sft_resumed_equals_sft_uninterrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_policy(tmp_path / "policy")
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"w{i % 24}", "completion": f"w{(i + 1) % 24} w{(i * 5) % 24}"} for i in range(30)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = SFTConfig(
        model_name_or_path=str(tmp_path / "policy"),
        dataset=data,
        output_dir=tmp_path / "run",
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        save_steps=3,
    )
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    sft.run(whole)
    # 30 * 2 / 4 = 15 steps. The signal comes from a thread while the run is under way.
    stopper = threading.Timer(0.0, lambda: _interrupt_after(config.output_dir / "metrics.jsonl"))
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        sft.run(config)
    stopper.join()
    step = len(rows(config.output_dir))
    assert step < 15
    assert "going on" not in capsys.readouterr().err
    sft.run(config)
    assert capsys.readouterr().err.splitlines()[0] == f"going on from step {step}"
    assert rows(config.output_dir) == rows(whole.output_dir)
    assert weights(config.output_dir) == weights(whole.output_dir)


def _interrupt_after(log: Path) -> None:
    while not (log.is_file() and log.stat().st_size):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)


# ---- checkpoints ----


def save(folder: Path, step: int, **state: Any) -> Path:
    return save_checkpoint(
        folder,
        step,
        policy=tiny.model(),
        tokenizer=tiny.tokenizer(),
        state=state,
        info={"kl_coef": 0.1},
        keep=2,
    )


def test_the_oldest_checkpoints_go_and_the_newest_is_read_back(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step, numbers={"x": torch.tensor([step])})
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-000002", "checkpoint-000010"]
    latest = load_latest(tmp_path)
    assert latest is not None
    assert (latest.step, latest.info["kl_coef"]) == (10, 0.1)
    assert latest.state["numbers"]["x"].tolist() == [10]


def test_a_checkpoint_that_a_kill_left_half_written_does_not_count(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / ".checkpoint-000002.tmp"
    half.mkdir()
    (half / "trainer_state.pt").write_bytes(b"half")
    latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 1
    save(tmp_path, 2)
    assert not half.exists()


def test_a_checkpoint_is_an_ordinary_model_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save(tmp_path, 1)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for a, b in zip(loaded.parameters(), tiny.model().parameters(), strict=True):
        assert torch.equal(a, b)
    assert AutoTokenizer.from_pretrained(folder).chat_template == tiny.TEMPLATE


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "trainer_state.pt").write_bytes(b"\x00" * 100)
    with pytest.raises(StorageError, match=r"checkpoint-000001.*remove that folder"):
        load_latest(tmp_path)


def test_random_numbers_continue(tmp_path: Path) -> None:
    save(tmp_path, 1)
    latest = load_latest(tmp_path)
    assert latest is not None

    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    before = rng_state()
    expected = draw()
    draw()
    restore_rng(before)
    assert draw() == expected
    restore_rng(latest.state["rng"])
    assert draw() == expected
