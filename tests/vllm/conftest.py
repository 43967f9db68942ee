"""A tiny Llama, and a real vLLM OpenAI server that serves it, for every test of this folder.

The tests run in the environment that has vLLM (`make test-vllm`); anywhere else they are skipped.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, for engines in this process

EXAMPLES = Path(__file__).parents[2] / "examples"
START_LIMIT_S = 240


class Served(NamedTuple):
    """A running server: its URL, the judge's name for `--judge`, and the folder of the model it serves."""

    url: str
    judge: str
    model_dir: Path


needs_vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed here: make test-vllm"
)


@pytest.fixture(scope="session")
def tiny_llama(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights whose tokenizer splits numbers into digits and a digit from the space before it."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    text = shared_data / "hh_helpful_1000.jsonl"
    make = [sys.executable, EXAMPLES / "make_tiny_llama.py", "--text", text, "--output_dir", folder]
    subprocess.run(make, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny_llama, tmp_path_factory.mktemp("server") / "vllm.log") as url:
        yield Served(url, f"openai:tiny-llama@{url}/v1", tiny_llama)


@contextmanager
def serving(model_dir: Path, log: Path, *options: str, **environment: str) -> Iterator[str]:
    """The URL of a server for the model, which it calls `tiny-llama`, while it runs."""
    port = _free_port()
    with log.open("w") as output:
        server = subprocess.Popen(
            [EXAMPLES / "serve_tiny_vllm.sh", model_dir, str(port), *options],
            env={**os.environ, "PYTHON": sys.executable, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(server, f"{url}/health", log)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _wait_until_healthy(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(START_LIMIT_S):
        if server.poll() is not None:
            pytest.fail(f"vLLM ended with code {server.returncode}:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"vLLM did not become healthy in {START_LIMIT_S} s:\n{log.read_text()[-2000:]}")
