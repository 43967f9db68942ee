"""Clients and proxies that nobody here wrote, unchanged, against a real server.

What is not installed is skipped; `make foreign` installs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reward_server.process import ServerProcess, server_process

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = REPOSITORY / ".cache" / "foreign"
PEERS = Path(__file__).parent / "peers"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(tmp_path_factory.mktemp("server")) as running:
        yield running


def tool(name: str, install: str) -> str:
    """Path of a program; skips the test if there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed: {install}")
    return found


def installed(path: str) -> Path:
    """A package in .cache/foreign; skips the test if it is not there."""
    folder = INSTALLED / path
    if not folder.exists():
        pytest.skip(f"{path} is not installed: make foreign")
    return folder


def proto_folders() -> list[str]:
    """Where our .proto file is, and google/rpc/status.proto that it imports."""
    import google.rpc.status_pb2 as status

    return [str(REPOSITORY / "protos"), str(Path(status.__file__).parents[2])]


def output(*command: str, **environment: str) -> str:
    """What a command prints.

    Raises:
        AssertionError: it fails; the text is what it said.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
