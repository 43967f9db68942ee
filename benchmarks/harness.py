"""What the benchmarks share: the scripted server as a process, data whose labels are known, CPU time, result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from scripted_judge import fraction, tag

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEFAULT_ENVIRONMENTS = HERE.parent / ".cache" / "benchmarks"

_PROSE = """
the answer depends on how much time there is and what has been tried before so it helps to begin with one small
step then look at the result and change a single thing at a time until the cause is clear to everyone involved
"""
_WORDS = _PROSE.split()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=DEFAULT_ENVIRONMENTS,
        help="where peers/setup.sh put the environments of the server and the peers",
    )
    parser.add_argument("--work", type=Path, help="folder for data and runs; a temporary one if not given")
    parser.add_argument("--no_results", action="store_true", help="print only, write no files under results/")
    return parser


class Server:
    """The scripted server in a process of its own; use as a context manager.

    Args:
        environments: it runs in `environments/server` if that is there, else in this interpreter.
        behaviour: fields of `scripted_server.Behaviour`.
    """

    def __init__(self, environments: Path, **behaviour: Any) -> None:
        python = environments / "server" / "bin" / "python"
        self.command = [
            str(python) if python.exists() else sys.executable,
            str(HERE / "scripted_server.py"),
            "--behaviour",
            json.dumps(behaviour),
        ]

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        while True:
            try:
                self.stats()
                return self
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("the scripted server did not start; see above") from None
                time.sleep(0.02)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def ref(self) -> str:
        """The judge as the command line names it."""
        return f"openai:judge@{self.url}/v1"

    def stats(self) -> dict[str, Any]:
        """What was asked since the last `reset`."""
        return self._call("/control/stats")

    def reset(self, **behaviour: Any) -> None:
        """Forget what was asked; change the behaviour where it is given."""
        self._call("/control/reset", {})
        self.configure(**behaviour)

    def configure(self, **behaviour: Any) -> None:
        """Change the behaviour from now on."""
        self._call("/control/configure", behaviour)

    def cpu_s(self) -> float:
        """User and system time of the server so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=30) as answer:
            return dict(json.load(answer))


# ---- data ----


def text(*seed: object, words: int) -> str:
    """Words that look like prose and depend on the seed alone."""
    start = int(fraction("text", *seed) * 1e6)
    return " ".join(_WORDS[(start * 31 + i * (1 + start % 7)) % len(_WORDS)] for i in range(words))


def response(row: int, number: int) -> str:
    """A response of some 60 words that carries its tag."""
    return f"[#{tag(row, number)}] {text(row, number, words=60)}."


def pair_row(row: int) -> dict[str, str]:
    """A pair as `rlaif label pairs` reads it."""
    return {
        "prompt": f"Question {row}: {text(row, words=40)}?",
        "response_a": response(row, 0),
        "response_b": response(row, 1),
    }


def score_row(row: int) -> dict[str, str]:
    """A conversation as `rlaif label scores` reads it."""
    return {"prompt": f"Question {row}: {text(row, words=20)}?", "response": response(row, 0)}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a file; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- commands ----


@dataclass(frozen=True)
class Used:
    """What a command took: its descendants are counted once they have been waited for.

    Attributes:
        status: exit status; negative for a signal.
        seconds: wall time.
        cpu_s: user and system time.
        peak_mib: largest resident set of any one process of it.
    """

    status: int
    seconds: float
    cpu_s: float
    peak_mib: float


def rlaif(*args: object) -> list[str]:
    """The command line of this project."""
    return [sys.executable, "-m", "rlaif.cli", *map(str, args)]


def environment(**more: str) -> dict[str, str]:
    """The environment of the commands measured: one thread for numerical libraries, no network of theirs."""
    fixed = {"OMP_NUM_THREADS": "1", "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, "PYTHONPATH": str(HERE.parent), **fixed, **more}


def measure(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    expect: Sequence[int] = (0,),
) -> Used:
    """Run a command to its end, its output into `log`.

    Raises:
        SystemExit: it ended with a status that is not expected.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env or environment(), cwd=cwd)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in expect:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)}\nended with status {process.returncode}:\n{tail}")
    return Used(process.returncode, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


# ---- results ----


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(values: Mapping[str, float], digits: int = 3) -> str:
    """A spread for people: `median (least to greatest)`."""
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f} to {values['max']:.{digits}f})"


def loop_ms() -> float:
    """Processor time of a fixed loop of plain Python: neighbours on a busy machine make every instruction dearer."""
    taken = []
    for _ in range(5):
        began = time.process_time()
        sum(i * i for i in range(200_000))
        taken.append(1000 * (time.process_time() - began))
    return statistics.median(taken)


def machine() -> dict[str, Any]:
    """Where and when a benchmark ran."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "load_average": round(os.getloadavg()[0], 2),
        "niceness": os.nice(0),
        "python_loop_ms": round(loop_ms(), 1),
    }


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@dataclass
class Report:
    """One benchmark's outcome: printed, and kept under `results/` as JSON and Markdown.

    Attributes:
        name: of the files.
        title: heading of the Markdown file.
        started: the machine as it was at the start.
    """

    name: str
    title: str
    started: dict[str, Any]

    @classmethod
    def begin(cls, name: str, title: str) -> Report:
        """Note the machine's state."""
        return cls(name, title, machine())

    def finish(
        self, figures: Mapping[str, Any], body: str, checks: Mapping[str, bool], *, keep: bool = True
    ) -> int:
        """Print and write everything; the exit status is 0 if all checks hold."""
        ended = machine()
        verdicts = "\n".join(
            f"- {'holds' if good else 'DOES NOT HOLD'}: {what}" for what, good in checks.items()
        )
        before = self.started
        where = (
            f"{ended['date']}, {ended['cpu']}, {ended['cores']} cores, {ended['memory_gib']} GiB, Python "
            f"{ended['python']}; niceness {ended['niceness']}, load average {before['load_average']} before, "
            f"{ended['load_average']} after; a fixed loop of Python took {before['python_loop_ms']} and "
            f"{ended['python_loop_ms']} ms of processor time."
        )
        page = f"# {self.title}\n\n{body}\n\n{verdicts}\n\n{where}\n"
        print(page)
        if keep:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{self.name}.md").write_text(page, encoding="utf-8")
            content = {"machine": {"before": self.started, "after": ended}, "checks": checks, **figures}
            (RESULTS / f"{self.name}.json").write_text(
                json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8"
            )
        return 0 if all(checks.values()) else 1
