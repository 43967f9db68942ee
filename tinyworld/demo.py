"""`rlaif demo`: the whole engine in the embedded world, each stage the command that a user would type.

    sample -> label -> train rm -> serve -> PPO and DPO      (distilled: the reward is the learned model)
                                   serve -> PPO              (direct: the reward is the judge itself)

Every stage is a process of its own and resumes on its own; a finished one is not run again. Gold utility is
read here and nowhere before: it measures the result.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    """

    name: str
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Stages that run one after the other, and the reward server they need (arguments of `rlaif serve`)."""

    title: str
    stages: tuple[Stage, ...]
    server: tuple[str, ...] | None = None


def plan(config: DemoConfig) -> list[Group]:
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

    def online(algorithm: str, folder: str, steps: int) -> tuple[str, ...]:
        what = ("--dataset", prompts, "--reward_server", "{server}", "--max_steps", str(steps))
        return ("train", algorithm, *settings(algorithm), *what, *to(folder))

    return [
        Group(
            "Label: the judge compares the policy's own summaries, reasoning first",
            (
                Stage("sample", sample(POLICY, prompts, "candidates", 4)),
                Stage("label", label("labels", "--pairs_per_prompt", "2")),
                Stage(
                    "label-no-cot",
                    label("labels-no-cot", "--pairs_per_prompt", "2", "--no-cot", "--limit", "400"),
                ),
            ),
        ),
        Group(
            "Distil: a reward model learns from the soft labels",
            (Stage("rm", ("train", "rm", *settings("rm"), "--dataset", str(out / "labels"), *to("rm"))),),
        ),
        Group(
            "Distilled RLAIF: PPO and iterative DPO against the served reward model",
            (
                Stage("ppo-distilled", online("ppo", "ppo-distilled", config.ppo_steps)),
                Stage("dpo", online("dpo", "dpo", config.dpo_rounds)),
            ),
            server=("--model", str(out / "rm")),
        ),
        Group(
            "Direct RLAIF: PPO against the served judge, which scores from 1 to 10",
            (Stage("ppo-direct", online("ppo", "ppo-direct", config.ppo_steps)),),
            server=("--judge", JUDGE, "--rubric", "tinyworld:score", "--max_in_flight", "128"),
        ),
        Group(
            "Evaluate: summaries of unseen posts by every policy",
            (
                Stage("eval-start", sample(POLICY, unseen, "eval/start", 1)),
                *(
                    Stage(f"eval-{name}", sample(str(out / name), unseen, f"eval/{name}", 1))
                    for name in POLICIES
                ),
            ),
        ),
    ]


def run(config: DemoConfig) -> None:
    """Run every stage that is not finished, then write `summary.json` and `report.html`.

    Raises:
        RlaifError: a stage failed; its own message stands above.
    """
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    _remember(config, out)
    _write_prompts(out / "prompts.jsonl", config.num_prompts, first_seed=10_000_000 * (config.seed + 1))
    _write_prompts(
        out / "eval-prompts.jsonl",
        config.num_eval_prompts,
        first_seed=10_000_000 * (config.seed + 1) + 5_000_000,
    )
    for group in plan(config):
        pending = [s for s in group.stages if not _marker(out, s).exists()]
        if not pending:
            continue
        print(f"\n== {group.title}", flush=True)
        with _reward_server(group.server, out) if group.server else nullcontext("") as address:
            for stage in pending:
                _run_stage(stage, address, out)
    results = collect_results(out, POLICIES)
    write_atomic(out / "summary.json", json.dumps(asdict(results), indent=2) + "\n")
    write_atomic(out / "report.html", render_report(results))
    print("\n" + results.text())
    print(f"\nReport: {out / 'report.html'}")


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


def _command(args: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "rlaif.cli", *args]


def _run_stage(stage: Stage, address: str, out: Path) -> None:
    args = [a.replace("{server}", address) for a in stage.args]
    print(f"\n$ rlaif {join(args)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(_command(args), check=False).returncode
    if code == -signal.SIGINT or code == 130:
        raise KeyboardInterrupt
    if code != 0:
        raise RlaifError(
            f"the demo stopped at {stage.name!r} (exit code {code}); mend it and run `rlaif demo` again to go on"
        )
    marker = _marker(out, stage)
    marker.parent.mkdir(exist_ok=True)
    seconds = round(time.monotonic() - started, 1)
    write_atomic(marker, json.dumps({"command": f"rlaif {join(args)}", "seconds": seconds}) + "\n")


@contextmanager
def _reward_server(args: Sequence[str], out: Path) -> Iterator[str]:
    """Start `rlaif serve` in a process of its own, yield its address, and drain it at the end."""
    ready = out / "server-address"
    ready.unlink(missing_ok=True)
    full = ["serve", *args, "--port", "0", "--ready_file", str(ready)]
    print(f"\n$ rlaif {join(full)} &", flush=True)
    process = subprocess.Popen(_command(full), start_new_session=True)
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
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            try:
                process.wait(SERVER_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
