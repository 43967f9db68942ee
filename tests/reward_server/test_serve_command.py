"""`rlaif serve` as a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import grpc
import pytest

from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.config import ServeConfig
from reward_server.server import load_scorer
from rlaif.errors import ConfigError, ModelError
from tests.reward_server import tiny
from tests.reward_server.fakes import score_request


@pytest.mark.slow
def test_a_process_serves_keeps_its_port_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    model = tiny.save_classifier(tmp_path / "rm")
    ready = tmp_path / "ready"
    command = [sys.executable, "-m", "rlaif.cli", "serve", "--model", str(model), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(
        [*command, "--port", "0", "--ready_file", str(ready)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        while not ready.is_file():
            assert first.poll() is None, first.communicate()
            time.sleep(0.05)
        address = ready.read_text()
        with grpc.insecure_channel(address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            answer = stub.Score(score_request("hello"), timeout=60)
        second = subprocess.run(
            [*command, "--port", address.rpartition(":")[2]], capture_output=True, text=True, env=environment
        )
        assert second.returncode == 2
        assert "rlaif: cannot listen on" in second.stderr and "Traceback" not in second.stderr
        first.send_signal(signal.SIGTERM)
        out, err = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 0, err
    assert out.startswith(f"serving {model} version={answer.model.version} on {address}")
    assert not ready.exists()


@pytest.mark.slow
def test_a_model_that_is_no_reward_model_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    model = tiny.save_language_model(tmp_path / "lm")
    done = subprocess.run(
        [sys.executable, "-m", "rlaif.cli", "serve", "--model", str(model), "--port", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 4
    assert "no trained scalar head" in done.stderr and "Traceback" not in done.stderr


def test_a_model_in_vllm_is_refused_by_one_line_where_it_cannot_be(tmp_path: Path) -> None:
    named = f"vllm:{tiny.save_classifier(tmp_path / 'rm')}"
    with pytest.raises(ConfigError, match="--device cpu is not for vllm:"):
        load_scorer(ServeConfig(model=named, device="cpu"))
    if find_spec("vllm") is None:
        with pytest.raises(ModelError, match="pip install"):
            load_scorer(ServeConfig(model=named))


_WARN = """
from huggingface_hub.utils import logging
from reward_server.server import log_to_stderr
log_to_stderr()
logging.get_logger("huggingface_hub.any").warning("from the hub")
"""


def test_a_warning_of_the_hub_is_printed_once() -> None:
    done = subprocess.run([sys.executable, "-c", _WARN], capture_output=True, text=True, check=True)
    assert done.stderr.count("from the hub") == 1
