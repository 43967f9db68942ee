"""`rlaif watch`: what a run's files say, while they grow, and nothing that a policy wrote does harm to the terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlaif.errors import DataError
from rlaif.watch import WatchConfig, Watched, run, sparkline


def make_run(folder: Path, rows: list[dict[str, Any]], **record: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"command": "train ppo", "config": {"max_steps": 5}, **record}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_sample(folder: Path, response: str, reward: float | None = 0.25) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    sample = {"prompt": [{"role": "user", "content": "Say it."}], "response": response, "reward": reward}
    (folder / "samples" / "step-000001.jsonl").write_text(json.dumps(sample) + "\n")


def row(step: int, **more: Any) -> dict[str, Any]:
    times = {"time/rollout": 1.0, "time/reward": 2.0, "time/step": 4.0}
    return {"step": step, "objective/scores": step / 10, "objective/kl": 0.5, **times, **more}


def shown(capsys: pytest.CaptureFixture[str], *runs: Path, width: int = 160) -> str:
    os.environ["COLUMNS"] = str(width)
    try:
        run(WatchConfig(runs=runs))
    finally:
        del os.environ["COLUMNS"]
    return capsys.readouterr().out


def test_runs_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make_run(tmp_path / "one", [row(1), row(2)], ended={"step": 2, "reason": "max_steps"})
    two = make_run(tmp_path / "two", [row(1, **{"eval/win_rate": 0.75})])
    lines = {line.split("  ")[0]: line for line in shown(capsys, one, two).splitlines()}
    assert "2 of 5, ended: max_steps" in lines["step"] and "1 of 5" in lines["step"]
    assert "0.2" in lines["reward"] and "0.1" in lines["reward"]
    assert lines["held-out win rate"].split()[3:] == ["-", "0.75", "▄"]
    assert lines["time of a step"].count("rollout 25 %, reward 50 %, rest 25 %") == 2


def test_three_curves_fit_a_terminal_of_80_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two", "six"):
        make_run(Path(name), [row(step) for step in range(1, 60)])
    lines = shown(capsys, Path("one"), Path("two"), Path("six"), width=80).splitlines()
    (reward,) = (line for line in lines if line.startswith("reward"))
    assert reward.count("5.9") == 3 and reward.count("█") == 3


def test_a_run_is_followed_line_by_line_and_a_torn_line_is_waited_for(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [row(1)])
    watched = Watched(folder)
    watched.look()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(2)) + "\n" + json.dumps(row(3))[:20])
    watched.look()
    assert [r["step"] for r in watched.rows] == [1, 2]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row(3))[20:] + "\n")
    watched.look()
    assert [r["step"] for r in watched.rows] == [1, 2, 3]
    make_run(folder, [row(1)])  # resumed from step 1
    watched.look()
    assert [r["step"] for r in watched.rows] == [1]


def test_what_a_policy_wrote_is_shown_as_it_is_and_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", [row(1)])
    write_sample(folder, "[bold red]loud[/] \x1b[2Jgone")
    out = shown(capsys, folder)
    assert "[bold red]loud[/]" in out and "\x1b[2J" not in out
    assert "reward 0.25" in out


def test_a_run_that_has_not_begun_is_shown_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 of 5" in shown(capsys, make_run(tmp_path / "run", []))


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run directory"):
        run(WatchConfig(runs=(tmp_path,)))


def test_on_a_terminal_the_view_stays_until_the_run_has_ended(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", [row(1)], ended={"step": 1, "reason": "max_steps"})
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "rlaif.cli", "watch", "--runs", str(folder)],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        timeout=60,
    )
    os.close(theirs)
    out = os.read(ours, 65536).decode()
    os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "ended: max_steps" in out and "\x1b[" in out


def test_on_a_terminal_a_run_is_waited_for(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "rlaif.cli",
            "watch",
            "--refresh_s",
            "0.05",
            "--runs",
            str(tmp_path / "later"),
        ],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    seen = b""
    while b"not started yet" not in seen:
        seen += os.read(ours, 65536)
    make_run(tmp_path / "later", [row(1)], ended={"step": 1, "reason": "max_steps"})
    while b"ended: max_steps" not in seen:
        seen += os.read(ours, 65536)
    _, error = watching.communicate(timeout=60)
    os.close(ours)
    assert (watching.returncode, error) == (0, b"")


@pytest.mark.parametrize(
    ("values", "bars"),
    [([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"), ([2, 2], "▄▄"), ([1], "▄"), ([0, 0, 1, 1, 7, 7], "▁▂█")],
    ids=["eighths", "flat", "single", "means of stretches"],
)
def test_a_sparkline_spans_from_least_to_greatest(values: list[float], bars: str) -> None:
    assert sparkline(values, width=3 if len(values) == 6 else 32) == bars
