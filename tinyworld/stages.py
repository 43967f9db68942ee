"""Stages of a pipeline in the embedded world: commands that a user would type, each a process that resumes on its own.

A finished stage has a marker and is not run again unless its command has changed; one that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import join
from typing import Any

from rlaif.errors import RlaifError, StorageError
from rlaif.orphans import end_children_with_this_process
from rlaif.runs import write_atomic
from tinyworld.grammar import make_post

POLICY = "tinyworld:policy"
JUDGE = "tinyworld:judge"
CONFIGS = Path(__file__).parent / "configs"
PROCESSES = 2
"""Tracks that run side by side unless it is said otherwise, each on one core."""

SERVER_START_S = 120.0
SERVER_STOP_S = 30.0
INTERRUPTED = (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a stage that was told to end: by the signal itself, or by the command that caught it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage; its marker and its timing are kept under it.
        args: what follows the program; `{server}` stands for the address of the reward server.
        server: the reward server it needs, a key of `Phase.servers`; None if it needs none.
        module: the program, as `python -m` takes it.
    """

    name: str
    args: tuple[str, ...]
    server: str | None = None
    module: str = "rlaif.cli"


@dataclass(frozen=True, slots=True)
class Phase:
    """Tracks that run side by side, each a sequence of stages.

    Attributes:
        title: what is done.
        tracks: the stages of each track; begun in this order, several at work at a time.
        servers: arguments of `rlaif serve` for each reward server; all run for as long as the phase does.
    """

    title: str
    tracks: tuple[tuple[Stage, ...], ...]
    servers: Mapping[str, tuple[str, ...]]


def remember(settings: Mapping[str, Any], path: Path) -> None:
    """Write the settings of a pipeline to `path`, or see that they are those written there.

    Raises:
        StorageError: the folder holds a run with other settings.
    """
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise StorageError(
            f"{path.parent} holds a {path.stem} with other settings: choose another --output_dir or delete it"
        )
    write_atomic(path, json.dumps(settings, indent=2) + "\n")


def write_prompts(out: Path, *, seed: int, num_prompts: int, num_eval_prompts: int) -> None:
    """Write `prompts.jsonl`, the posts to train on, and `eval-prompts.jsonl`, others to measure on, to `out`."""
    first = 10_000_000 * (seed + 1)
    for name, count, start in (
        ("prompts.jsonl", num_prompts, first),
        ("eval-prompts.jsonl", num_eval_prompts, first + 5_000_000),
    ):
        posts = [make_post(start + i).text for i in range(count)]
        rows = [{"prompt": [{"role": "user", "content": post}]} for post in posts]
        write_atomic(out / name, "".join(json.dumps(row) + "\n" for row in rows))


def run_phase(phase: Phase, out: Path, *, processes: int = PROCESSES) -> None:
    """Run what is left of a phase's tracks, `processes` at a time, with the reward servers that it needs.

    Raises:
        RlaifError: a stage failed; its own message stands above. Stages at work are waited for, no other begins.
        KeyboardInterrupt: Ctrl-C or SIGTERM, which stages at work get too: they end where they can go on.
    """
    tracks = [[stage for stage in track if not _is_done(out, stage)] for track in phase.tracks]
    tracks = [track for track in tracks if track]
    if not tracks:
        return
    print(f"\n== {phase.title}", flush=True)
    end_children_with_this_process()  # a stage that outlived a kill would write into the run that goes on
    with ExitStack() as stack:
        needed = {s.server for track in tracks for s in track if s.server}
        servers = {
            name: stack.enter_context(_reward_server(name, args, out))
            for name, args in phase.servers.items()
            if name in needed
        }
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        work = _Work(out, servers)
        try:
            for future in as_completed([pool.submit(work.run, track) for track in tracks]):
                future.result()
        except BaseException as err:
            pool.shutdown(wait=False, cancel_futures=True)
            work.stop(interrupt=isinstance(err, KeyboardInterrupt))
            raise


def marker(out: Path, stage: Stage) -> Path:
    """Where a finished stage leaves its command and the seconds that it took, as JSON."""
    return out / "stages" / f"{stage.name}.json"


def _is_done(out: Path, stage: Stage) -> bool:
    path = marker(out, stage)
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["args"] == list(stage.args)


class _Work:
    """The tracks of a phase at work."""

    def __init__(self, out: Path, servers: Mapping[str, str]) -> None:
        self._out = out
        self._servers = servers
        self._stopped = threading.Event()
        self._processes: set[subprocess.Popen[str]] = set()

    def stop(self, *, interrupt: bool) -> None:
        """Let no other stage begin, and end those at work if `interrupt`."""
        self._stopped.set()
        if interrupt:
            for process in tuple(self._processes):
                process.terminate()

    def run(self, track: Sequence[Stage]) -> None:
        """Run the stages of a track, one after the other."""
        for stage in track:
            if self._stopped.is_set():
                return
            self._run(stage)

    def _run(self, stage: Stage) -> None:
        address = self._servers[stage.server] if stage.server else ""
        args = [a.replace("{server}", address) for a in stage.args]
        started = time.monotonic()
        process = _start(stage.name, stage.module, args)
        self._processes.add(process)
        _relay(stage.name, process)
        code = process.wait()
        self._processes.discard(process)
        if code in INTERRUPTED:
            raise KeyboardInterrupt
        if code != 0:
            raise RlaifError(
                f"stopped at {stage.name!r} (exit code {code}); mend it and run the same command again to go on"
            )
        path = marker(self._out, stage)
        path.parent.mkdir(exist_ok=True)
        done = {
            "command": _shown(stage.module, args),
            "args": stage.args,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_atomic(path, json.dumps(done) + "\n")


def _shown(module: str, args: Sequence[str]) -> str:
    return f"{'rlaif' if module == 'rlaif.cli' else f'python -m {module}'} {join(args)}"


def _start(
    name: str, module: str, args: Sequence[str], *, own_session: bool = False
) -> subprocess.Popen[str]:
    """Start a command whose output comes through a pipe; one thread, since the tracks share the cores."""
    print(f"{name:>13} $ {_shown(module, args)}", flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=own_session,
    )


def _relay(name: str, process: subprocess.Popen[str]) -> None:
    """Print what a process says, every line under its stage's name, until it has ended."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            print(f"{name:>13} | {line}", end="", flush=True)


@contextmanager
def _reward_server(name: str, args: Sequence[str], out: Path) -> Iterator[str]:
    """Start `rlaif serve` in a process of its own, yield its address, and drain it at the end."""
    ready = out / f"server-{name}"
    ready.unlink(missing_ok=True)
    full = ["serve", *args, "--port", "0", "--ready_file", str(ready)]
    # A session of its own: Ctrl-C ends the stages first, and the server after them.
    process = _start(f"serve {name}", "rlaif.cli", full, own_session=True)
    relay = threading.Thread(target=_relay, args=(f"serve {name}", process), daemon=True)
    relay.start()
    try:
        deadline = time.monotonic() + SERVER_START_S
        while not ready.exists():
            if process.poll() is not None:
                raise RlaifError(f"the reward server ended at its start with exit code {process.returncode}")
            if time.monotonic() > deadline:
                raise RlaifError(f"the reward server was not ready after {SERVER_START_S:.0f} s")
            time.sleep(0.1)
        yield ready.read_text(encoding="utf-8").strip()
    finally:
        process.terminate()
        try:
            process.wait(SERVER_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        relay.join()
