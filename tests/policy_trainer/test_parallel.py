"""A run with two processes is the run with one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.policy_trainer import parallel_runs, tiny

FILES = {"run.json", "metrics.jsonl", "samples", "model.safetensors", "config.json", "tensorboard"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[Path, Path]:
    """All runs, by one process and by two."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    tiny.save_policy(one / "policy")
    tiny.save_prompts(one / "prompts.jsonl")
    rows = [{"prompt": f"w{i}", "completion": " ".join(tiny.WORDS[i : i + 1 + i % 5])} for i in range(16)]
    (one / "conversations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(one, two, dirs_exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.policy_trainer.parallel_runs", str(two)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in parallel_runs.NAMES:
        parallel_runs.run(name, one)
    return one, two


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return tiny.without_times([json.loads(line) for line in lines])


@pytest.mark.slow
@pytest.mark.parametrize("name", parallel_runs.NAMES)
def test_two_processes_train_what_one_trains(folders: tuple[Path, Path], name: str) -> None:
    one, two = (folder / name for folder in folders)
    assert len(metrics(one)) == 2
    for ours, theirs in zip(metrics(one), metrics(two), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)
    start, trained, other = (
        load_file(folder / "model.safetensors") for folder in (folders[0] / "policy", one, two)
    )
    assert any(not trained[k].equal(start[k]) for k in start)
    assert_close(other, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_sample_what_one_samples(folders: tuple[Path, Path]) -> None:
    for name in (*parallel_runs.PPO, *parallel_runs.DPO):
        one, two = (
            [
                {k: row[k] for k in ("prompt", "response", "reward")}
                for row in map(
                    json.loads, sorted((f / name / "samples").iterdir())[0].read_text().splitlines()
                )
            ]
            for f in folders
        )
        assert one == two
