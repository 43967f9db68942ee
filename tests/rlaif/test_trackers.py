"""`--report_to`: metrics reach each tracker, a resumed run goes on in the same one, and what is absent is said."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlaif.errors import ConfigError
from rlaif.runs import Run
from rlaif.storage import LOCK_FILE
from rlaif.trackers import TrackerName


@dataclass(frozen=True)
class Config:
    output_dir: Path
    report_to: tuple[TrackerName, ...]


def in_two_parts(folder: Path, *trackers: TrackerName) -> None:
    """Steps 1 and 2, then a resume from step 1 and steps 2 and 3."""
    for first, last in ((1, 2), (2, 3)):
        with Run.open(folder, Config(folder, trackers), command="train ppo") as run:
            run.truncate_metrics(first - 1)
            for step in range(first, last + 1):
                run.log(step, {"objective/kl": step / 2, "eval/win_rate": None})


def test_none_reports_nowhere_and_metrics_jsonl_stays(tmp_path: Path) -> None:
    in_two_parts(tmp_path / "run", "none")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {LOCK_FILE, "metrics.jsonl", "run.json"}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]


def test_none_stands_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beside others"):
        in_two_parts(tmp_path, "none", "tensorboard")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run_begins(
    tmp_path: Path, name: TrackerName
) -> None:
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=rf"pip install 'rlaif\[{name}\]'"):
        in_two_parts(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


def test_wandb_keeps_a_run_offline_and_goes_on_under_its_id(tmp_path: Path, repository: Path) -> None:
    """In a process of its own: what W&B buffers is on the disk when its service has ended."""
    pytest.importorskip("wandb", reason="pip install 'rlaif[wandb]'")
    program = "import sys; from pathlib import Path; from tests.rlaif.test_trackers import in_two_parts"
    subprocess.run(
        [sys.executable, "-c", f"{program}; in_two_parts(Path(sys.argv[1]), 'wandb')", tmp_path / "run"],
        env={**os.environ, "WANDB_MODE": "offline"},
        cwd=repository,
        check=True,
        capture_output=True,
    )
    kept = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len({path.stem for path in kept}) == 1 <= len(kept)
    assert all(b"objective/kl" in path.read_bytes() for path in kept)


def test_trackio_keeps_a_run_and_goes_on_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio", reason="pip install 'rlaif[trackio]'")
    in_two_parts(tmp_path / "run", "trackio")
    database = sqlite3.connect(tmp_path / "trackio" / "rlaif.db")
    rows = list(database.execute("select run_name, step, metrics from metrics order by id"))
    assert len({name for name, _, _ in rows}) == 1
    assert [(step, json.loads(values)) for _, step, values in rows] == [
        (step, {"objective/kl": step / 2}) for step in (1, 2, 2, 3)
    ]
