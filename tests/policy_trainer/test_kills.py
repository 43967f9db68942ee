"""A kill at every moment of a step, and a disk that is full when a checkpoint is due: nothing is lost or altered."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from policy_trainer import dpo, ppo
from policy_trainer.checkpoint import list_checkpoints, load_latest, save_checkpoint
from policy_trainer.config import OnlineConfig
from policy_trainer.reward_source import FunctionReward
from rlaif.errors import StorageError
from rlaif.storage import LOCK_FILE
from rlaif.types import Conversation
from tests.disks import small_disk
from tests.policy_trainer import tiny
from tests.policy_trainer.kills import Death, Killed, MortalReward, watching
from tests.policy_trainer.test_dpo import dpo_config
from tests.policy_trainer.test_resume import rows, samples, weights

SMALL: dict[str, Any] = {
    "max_steps": 2,
    "save_steps": 1,
    "save_total_limit": 1,
    "rollout_batch_size": 4,
    "max_new_tokens": 4,
    "self_check": False,
}
"""A step has few moments."""
EVERYTHING: dict[str, Any] = {
    "policy_objective": "penalty",
    "reward_normalization": "running",
    "target_kl": 3.0,
    "kl_horizon": 50,
    "ptx_batch_size": 2,
    "num_ppo_epochs": 1,
}


def ppo_with_everything(folder: Path) -> OnlineConfig:
    """All that has a state: both optimisers, two coefficients, running moments, a stream of text."""
    return tiny.ppo_config(folder, ptx_dataset=tiny.save_text(folder / "text.jsonl"), **SMALL, **EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "configured", "phases"),
    [
        (ppo.train, ppo_with_everything, ()),
        (dpo.train, lambda folder: dpo_config(folder, **SMALL), ("os.rename /rounds/",)),
    ],
    ids=["ppo", "iterative dpo"],
)
def test_killed_at_any_moment_of_a_step_a_run_ends_as_if_it_had_not_been(
    tmp_path: Path,
    train: Callable[..., None],
    configured: Callable[[Path], OnlineConfig],
    phases: Sequence[str],
) -> None:
    config = configured(tmp_path)
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    train(whole, FunctionReward(tiny.share_of_w0))
    expected = (rows(whole.output_dir), samples(whole.output_dir), weights(whole.output_dir))

    def life(death: Death) -> None:
        with watching(death):
            train(config, MortalReward(death, tiny.share_of_w0))

    # Where each life begins: step 1 is done and saved, the rewards of step 2 are asked for.
    at = tmp_path / "begun"
    asked = Death(config.output_dir)
    life(asked)
    second = [i for i, name in enumerate(asked.moments) if name == "rewards are asked for"][1]
    shutil.rmtree(config.output_dir)
    with pytest.raises(Killed):
        life(Death(config.output_dir, second))
    shutil.copytree(config.output_dir, at)

    seen = Death(config.output_dir)
    life(seen)
    for phase in (
        "open /.run.json",
        "forward",
        "rewards are asked for",
        "rewards are awaited",
        "optimiser step",
        "open /metrics.jsonl",
        "os.mkdir /.checkpoint-000002.tmp",
        "os.rename /.checkpoint-000002.tmp",
        "os.rename /checkpoint-000001",
        "os.remove /.checkpoint-000001.tmp/",
        "os.rename /.final.tmp/",
        *phases,
    ):
        assert any(name.startswith(phase) for name in seen.moments), f"no moment before {phase}"
    for number in seen.distinct():
        name = seen.moments[number]
        shutil.rmtree(config.output_dir)
        shutil.copytree(at, config.output_dir)
        with pytest.raises(Killed):
            life(Death(config.output_dir, number))
        train(config, FunctionReward(tiny.share_of_w0))
        ended = (rows(config.output_dir), samples(config.output_dir), weights(config.output_dir))
        assert ended == expected, f"killed before moment {number}: {name}"
        assert [p.name for p in config.output_dir.glob(".*")] == [LOCK_FILE], f"left after {name}"


def test_a_kill_while_a_checkpoint_replaces_one_of_the_same_step_leaves_one_of_them(tmp_path: Path) -> None:
    def save(number: int) -> None:
        save_checkpoint(
            tmp_path / "run",
            3,
            policy=model,
            tokenizer=tokenizer,
            state={"number": number},
            info={"number": number},
            keep=1,
        )

    model, tokenizer = tiny.model(), tiny.tokenizer()
    save(0)
    shutil.copytree(tmp_path / "run", tmp_path / "first")
    found = []
    while True:
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "first", tmp_path / "run")
        death = Death(tmp_path / "run", at=len(found))
        try:
            with watching(death):
                save(1)
        except Killed:
            latest = load_latest(tmp_path / "run")
            assert latest is not None and latest.state["number"] == latest.info["number"]
            assert not list((tmp_path / "run").glob(".*"))
            found.append(latest.info["number"])
        else:
            break
    assert len(found) > 5
    assert found == sorted(found) and set(found) == {0, 1}


def test_a_disk_that_is_full_when_a_checkpoint_is_due_loses_nothing(tmp_path: Path) -> None:
    """While the rewards of step 2 are awaited, somebody fills the disk but for 64 KiB."""
    config = tiny.ppo_config(tmp_path, max_steps=3, save_steps=1, self_check=False)
    whole = dataclasses.replace(config, output_dir=tmp_path / "whole")
    train = ppo.train
    train(whole, FunctionReward(tiny.share_of_w0))
    with small_disk(tmp_path / "disk", kib=4096) as disk:
        config = dataclasses.replace(config, output_dir=disk / "run")
        filler, calls = disk / "filler", 0

        def filling(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float | None]:
            nonlocal calls
            calls += 1
            if calls == 2:
                filler.write_bytes(bytes(shutil.disk_usage(disk).free - (64 << 10)))
            return tiny.share_of_w0(prompts, responses)

        with pytest.raises(StorageError, match=r"no space left on device; free some space"):
            train(config, FunctionReward(filling))
        # The step was trained and logged; it is the checkpoint that did not fit.
        assert [row["step"] for row in rows(config.output_dir)] == [1, 2]
        assert [p.name for p in list_checkpoints(config.output_dir)] == ["checkpoint-000001"]
        kept = torch.load(config.output_dir / "checkpoint-000001" / "trainer_state.pt", weights_only=True)
        assert set(kept) == {"optimizer", "value", "value_optimizer", "rng"}
        filler.unlink()
        train(config, FunctionReward(tiny.share_of_w0))
        assert rows(config.output_dir) == rows(whole.output_dir)
        assert weights(config.output_dir) == weights(whole.output_dir)
        assert os.listdir(config.output_dir / "checkpoint-000003")
