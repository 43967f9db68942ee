"""A reward server as a process of its own: it is weighed, stopped, killed and started again on its port."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prometheus_client.parser import text_string_to_metric_families


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """`tests.reward_server.length_server` with the flags of `rlaif serve`; keeps its ports over restarts."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str] = MappingProxyType({}), **flags: Any
    ) -> None:
        self._environment = {**os.environ, **environment}
        self.port = free_port()
        self._metrics_port = free_port()
        self.ready = folder / f"ready-{self.port}"
        self.log = folder / f"log-{self.port}"
        own = {
            "model": "length",
            "port": self.port,
            "metrics_port": self._metrics_port,
            "ready_file": self.ready,
            "drain_timeout_s": 10,
        }
        self._arguments = [f"--{name}={value}" for name, value in {**own, **flags}.items()]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        self.ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.reward_server.length_server", *self._arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        until = time.monotonic() + 60
        while not self.ready.exists():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        return self.process.wait(30)

    def rss_mib(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def open_files(self) -> int:
        """File descriptors."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def metric(self, name: str, **labels: str) -> float:
        """A Prometheus sample; 0 where there is none yet."""
        url = f"http://127.0.0.1:{self._metrics_port}/metrics"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


@contextmanager
def server_process(
    folder: Path, environment: Mapping[str, str] = MappingProxyType({}), **flags: Any
) -> Iterator[ServerProcess]:
    """A running server that is killed at the end."""
    server = ServerProcess(folder, environment, **flags)
    server.start()
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)
