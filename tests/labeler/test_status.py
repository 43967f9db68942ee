"""`rlaif label status`: a run seen from outside, while it runs, after it ended, and after it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from labeler.heartbeat import Heartbeat, is_alive, process_start, read_heartbeat
from labeler.status import read_status
from rlaif.cli import main
from rlaif.errors import StorageError
from tests.labeler.openai_server import Fault, ScriptedServer


def command(judge: str, folder: Path, rows: int, *flags: str) -> list[str]:
    data = folder / "pairs.jsonl"
    texts = [{"prompt": f"q {i}", "response_a": f"good {i}", "response_b": f"bad {i}"} for i in range(rows)]
    data.write_text("".join(json.dumps(t) + "\n" for t in texts))
    return [
        *("label", "pairs", "--no-cot", "--judge", judge, "--dataset", str(data)),
        *("--output_dir", str(folder / "out"), *flags),
    ]


def scripted(folder: Path, rules: list[dict[str, Any]]) -> str:
    (folder / "judge.yaml").write_text(yaml.safe_dump({"rules": rules}))
    return f"scripted:{folder / 'judge.yaml'}"


class Gate:
    """Lets a server answer so many requests; the next ones wait, and `reached` says that they do."""

    def __init__(self, open_for: int) -> None:
        self.reached = threading.Event()
        self._left = open_for
        self._lock = threading.Lock()
        self._shut = threading.Event()

    def __call__(self, body: dict[str, Any]) -> Fault | None:
        with self._lock:
            self._left -= 1
            waits = self._left < 0
        if waits:
            self.reached.set()
            self._shut.wait()
        return None

    def release(self) -> None:
        """Let everything pass."""
        self._shut.set()


@contextmanager
def held_run(tmp_path: Path, rows: int, answered: int) -> Iterator[subprocess.Popen[bytes]]:
    """A run whose endpoint has answered so many requests and holds the others."""
    gate = Gate(answered)
    with ScriptedServer(lambda user, prefix, labels: {"1": 0.7, "2": 0.3}, fault=gate) as server:
        arguments = command(server.ref, tmp_path, rows, "--max_in_flight", "2")
        process = subprocess.Popen([sys.executable, "-m", "rlaif.cli", *arguments], stderr=subprocess.DEVNULL)
        try:
            assert gate.reached.wait(60)
            yield process
        finally:
            gate.release()
            if process.poll() is None:
                process.kill()
            process.wait()


def test_a_running_run_tells_how_far_it_is_and_is_not_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_run(tmp_path, rows=20, answered=12) as process:
        status = read_status(tmp_path / "out")
        assert (status.command, status.state, status.pid) == ("label pairs", "running", process.pid)
        assert 8 <= status.replies["label"] <= 12  # the last answers may not have been written down yet
        assert status.prompt_tokens > 0
        assert main(["label", "status", "--output_dir", str(tmp_path / "out")]) == 0
        shown = capsys.readouterr().out
        assert f"process {process.pid}" in shown and "of 20" in shown


def test_a_killed_run_is_found_out_and_its_replies_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with held_run(tmp_path, rows=20, answered=12) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    status = read_status(tmp_path / "out")
    assert (status.state, status.rate) == ("killed", None)
    assert 8 <= status.replies["label"] <= 12
    assert "run the same command again" in status.next
    assert "--max_in_flight 2" in status.rerun
    assert main(["label", "status", "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "killed"


def test_a_process_that_is_not_reaped_yet_is_gone_too(tmp_path: Path) -> None:
    with held_run(tmp_path, rows=4, answered=1) as process:
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
        assert read_status(tmp_path / "out").state == "killed"


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    with held_run(tmp_path, rows=20, answered=12) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    status = read_status(tmp_path / "out")
    assert (status.state, status.error, status.phase) == ("stopped", "interrupted", "asking")
    assert 8 <= status.replies["label"] <= 12


def test_a_finished_run_names_what_stays_open_and_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = {"user": "good 3\n", "fail": "context too long"}
    judge = scripted(tmp_path, [fails, {"probs": [0.6, 0.2]}])
    assert main(command(judge, tmp_path, 20, "--max_unlabelled", "0.5")) == 0
    assert "1 unlabelled: context too long" in capsys.readouterr().err
    status = read_status(tmp_path / "out")
    assert (status.state, status.done, status.total) == ("finished", 0, 20)
    assert status.unlabelled == {"context too long": 1}
    assert status.open_requests == {"context too long": 2}  # both orders
    assert status.replies["label"] == 38
    assert "unlabelled.jsonl" in status.next and "what is too long fails again" in status.next
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"rules": [{"probs": [0.6, 0.2]}]}))
    clean = command(f"scripted:{tmp_path / 'judge.yaml'}", tmp_path, 5)
    assert main([*clean[:-1], str(tmp_path / "clean")]) == 0
    status = read_status(tmp_path / "clean")
    assert (status.unlabelled, status.error) == ({}, None)
    assert "rlaif train rm" in status.next


def test_a_run_that_failed_keeps_its_error(tmp_path: Path) -> None:
    assert main(command(scripted(tmp_path, [{"fail": "the endpoint answered 500"}]), tmp_path, 200)) == 8
    status = read_status(tmp_path / "out")
    assert status.state == "stopped"
    assert status.error is not None and "questions all failed" in status.error
    assert sum(status.unlabelled.values()) >= 50


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["label", "status", "--output_dir", str(tmp_path)]) == 3
    assert "holds no labeling run" in capsys.readouterr().err
    (tmp_path / "progress.json").write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        read_heartbeat(tmp_path)


def test_a_number_that_was_given_to_another_process_is_not_the_run() -> None:
    mine = process_start(os.getpid())
    if mine is None:
        pytest.skip("this system does not tell when a process began")
    assert is_alive(os.getpid(), mine)
    assert not is_alive(os.getpid(), mine + 1)


def test_the_phases_of_a_run_count_for_themselves(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, "label pairs") as heartbeat:
        heartbeat.enter("reading", "pairs")
        assert list(heartbeat.count("abc")) == ["a", "b", "c"]
        heartbeat.enter("asking", "pairs", 3)
        heartbeat.advance(2)
    beat = read_heartbeat(tmp_path)
    assert beat is not None
    assert (beat["state"], beat["phase"], beat["done"], beat["total"]) == ("finished", "asking", 2, 3)
