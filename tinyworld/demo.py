"""`rlaif demo`: the whole engine in the embedded world, each stage the command that a user would type.

    sample -> label -> train rm -> serve -> PPO and DPO      (distilled: the reward is the learned model)
                                   serve -> PPO              (direct: the reward is the judge itself)

Every stage is a process of its own and resumes on its own; a finished one is not run again. Two tracks of
stages run side by side, each on one core. Gold utility is read here and nowhere before: it measures the result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import join

from rlaif.errors import RlaifError, StorageError
from rlaif.runs import write_atomic
from tinyworld.config import DemoConfig
from tinyworld.grammar import make_post
from tinyworld.report import render_report
from tinyworld.results import collect_results

POLICY = "tinyworld:policy"
JUDGE = "tinyworld:judge"
POLICIES = {"ppo-distilled": "distilled PPO", "ppo-direct": "direct PPO", "dpo": "iterative DPO"}
"""Run directories of the trained policies, and what the report calls them."""

CONFIGS = Path(__file__).parent / "configs"
SERVER_START_S = 120.0
SERVER_STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: of the stage; its marker and its timing are kept under it.
        args: what follows `rlaif`; `{server}` stands for the address of the reward server.
        server: the reward server it needs, a key of `Phase.servers`; None if it needs none.
    """

    name: str
    args: tuple[str, ...]
    server: str | None = None


@dataclass(frozen=True, slots=True)
class Phase:
    """Tracks that run side by side, each a sequence of stages.

    Attributes:
        title: what is done.
        tracks: the stages of each track.
        servers: arguments of `rlaif serve` for each reward server; all run for as long as the phase does.
    """

    title: str
    tracks: tuple[tuple[Stage, ...], ...]
    servers: Mapping[str, tuple[str, ...]]


def plan(config: DemoConfig) -> list[Phase]:
    """The commands of the demo, in order."""
    out = Path(config.output_dir)
    prompts, unseen, candidates = (
        str(out / name) for name in ("prompts.jsonl", "eval-prompts.jsonl", "candidates")
    )

    def to(folder: str) -> tuple[str, ...]:
        return ("--output_dir", str(out / folder), "--seed", str(config.seed))

    def settings(name: str) -> tuple[str, ...]:
        return ("--config", str(CONFIGS / f"{name}.yaml"))

    def sample(model: str, dataset: str, folder: str, n: int) -> tuple[str, ...]:
        what = ("--model_name_or_path", model, "--dataset", dataset, "--num_return_sequences", str(n))
        return ("sample", *what, "--max_new_tokens", "40", *to(folder))

    def label(folder: str, *options: str) -> tuple[str, ...]:
        judge = ("--judge", JUDGE, "--rubric", "tinyworld:pair", "--dataset", candidates)
        return ("label", "pairs", *judge, *options, *to(folder))

    def online(algorithm: str, folder: str, steps: int, server: str) -> Stage:
        what = ("--dataset", prompts, "--reward_server", "{server}", "--max_steps", str(steps))
        return Stage(folder, ("train", algorithm, *settings(algorithm), *what, *to(folder)), server)

    def evaluate(name: str, model: str) -> Stage:
        return Stage(f"eval-{name}", sample(model, unseen, f"eval/{name}", 1))

    return [
        Phase(
            "Label with the judge and distil the labels into a reward model; meanwhile, PPO against the judge itself",
            (
                (
                    Stage("sample", sample(POLICY, prompts, "candidates", 3)),
                    Stage("label", label("labels")),
                    Stage("label-no-cot", label("labels-no-cot", "--no-cot", "--limit", "400")),
                    Stage(
                        "rm", ("train", "rm", *settings("rm"), "--dataset", str(out / "labels"), *to("rm"))
                    ),
                ),
                (online("ppo", "ppo-direct", config.ppo_steps, "judge"),),
            ),
            {"judge": ("--judge", JUDGE, "--rubric", "tinyworld:score")},
        ),
        Phase(
            "PPO and iterative DPO against the reward model",
            (
                (online("ppo", "ppo-distilled", config.ppo_steps, "rm"),),
                (online("dpo", "dpo", config.dpo_rounds, "rm"),),
            ),
            {"rm": ("--model", str(out / "rm"))},
        ),
        Phase(
            "Summaries of unseen posts by every policy, to be measured by gold",
            (
                (evaluate("start", POLICY), evaluate("ppo-direct", str(out / "ppo-direct"))),
                (evaluate("ppo-distilled", str(out / "ppo-distilled")), evaluate("dpo", str(out / "dpo"))),
            ),
            {},
        ),
    ]


def run(config: DemoConfig) -> None:
    """Run every stage that is not finished, then write `summary.json` and `report.html`.

    Raises:
        RlaifError: a stage failed; its own message stands above.
    """
    started = time.monotonic()
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    _remember(config, out)
    first_seed = 10_000_000 * (config.seed + 1)
    _write_prompts(out / "prompts.jsonl", config.num_prompts, first_seed)
    _write_prompts(out / "eval-prompts.jsonl", config.num_eval_prompts, first_seed + 5_000_000)
    for phase in plan(config):
        _run_phase(phase, out)
    results = collect_results(out, POLICIES)
    write_atomic(out / "summary.json", json.dumps(asdict(results), indent=2) + "\n")
    write_atomic(out / "report.html", render_report(results))
    print("\n" + results.text())
    print(f"\nfinished after {time.monotonic() - started:.0f} s. Report: {out / 'report.html'}")


def _remember(config: DemoConfig, out: Path) -> None:
    path = out / "demo.json"
    settings = asdict(config)
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
        raise StorageError(
            f"{out} holds a demo with other settings: choose another --output_dir or delete it"
        )
    write_atomic(path, json.dumps(settings, indent=2) + "\n")


def _write_prompts(path: Path, count: int, first_seed: int) -> None:
    rows = [{"prompt": [{"role": "user", "content": make_post(first_seed + i).text}]} for i in range(count)]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _marker(out: Path, stage: Stage) -> Path:
    return out / "stages" / f"{stage.name}.json"


def _run_phase(phase: Phase, out: Path) -> None:
    """Run what is left of a phase's tracks side by side, with the reward servers that it needs."""
    tracks = [[s for s in track if not _marker(out, s).exists()] for track in phase.tracks]
    tracks = [track for track in tracks if track]
    if not tracks:
        return
    print(f"\n== {phase.title}", flush=True)
    with ExitStack() as stack:
        needed = {s.server for track in tracks for s in track if s.server}
        servers = {
            name: stack.enter_context(_reward_server(name, args, out))
            for name, args in phase.servers.items()
            if name in needed
        }
        pool = stack.enter_context(ThreadPoolExecutor(len(tracks)))
        for future in [pool.submit(_run_track, track, servers, out) for track in tracks]:
            future.result()


def _run_track(track: Sequence[Stage], servers: Mapping[str, str], out: Path) -> None:
    for stage in track:
        address = servers[stage.server] if stage.server else ""
        args = [a.replace("{server}", address) for a in stage.args]
        started = time.monotonic()
        process = _start(stage.name, args)
        _relay(stage.name, process)
        code = process.wait()
        if code in (-2, 130):
            raise KeyboardInterrupt
        if code != 0:
            raise RlaifError(
                f"the demo stopped at {stage.name!r} (exit code {code}); mend it and run `rlaif demo` again to go on"
            )
        marker = _marker(out, stage)
        marker.parent.mkdir(exist_ok=True)
        seconds = round(time.monotonic() - started, 1)
        write_atomic(marker, json.dumps({"command": f"rlaif {join(args)}", "seconds": seconds}) + "\n")


def _start(name: str, args: Sequence[str], *, own_session: bool = False) -> subprocess.Popen[str]:
    """Start an `rlaif` command whose output comes through a pipe; one thread, since the tracks share the cores."""
    print(f"{name:>13} $ rlaif {join(args)}", flush=True)
    return subprocess.Popen(
        [sys.executable, "-m", "rlaif.cli", *args],
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
    process = _start(f"serve {name}", full, own_session=True)
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
