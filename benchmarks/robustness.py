"""Training against a reward server that is killed, fails and hangs: the run ends as if nothing had been.

`python benchmarks/robustness.py` trains the embedded world's policy with `rlaif train ppo` and `rlaif train dpo`
against a server that answers 20 % of the texts with errors: once without another fault, once with the server killed
(SIGKILL) and started again every 30 s, once with calls that hang. Which texts fail follows from the text, so all
must end with the same weights, bit for bit; every reward in the transcripts is compared with what the server gives
that text. At last the server hangs for good: the run must end at a checkpoint with a clear line, and go on with a
sound server.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faulty_rewards import fails, reward
from harness import HERE, Report, arguments, environment, measure, read_jsonl, rlaif, table

from tinyworld.stages import write_prompts

FAIL_SHARE = 0.2
TIMEOUT_S = 3.0
REWARD_SERVER_EXIT = 6


class FaultyRewards:
    """The faulty server as a process that can be killed and started again at the same port."""

    def __init__(self, log: Path, **faults: float) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = int(listener.getsockname()[1])
        self.log, self.kills = log, 0
        words = [word for name, value in faults.items() for word in (f"--{name}", str(value))]
        file = str(HERE / "faulty_rewards.py")
        self._command = [sys.executable, file, "--port", str(self.port), "--log", str(log), *words]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=environment())

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def restart_every(self, seconds: float, until: threading.Event) -> None:
        """Kill it and start it again, for as long as `until` is not set."""
        while not until.wait(seconds):
            self.kill()
            self.kills += 1
            self._process = self._start()


@contextmanager
def faulty_rewards(
    log: Path, *, restart_every_s: float | None = None, **faults: float
) -> Iterator[FaultyRewards]:
    """Serve until the block ends."""
    server, done = FaultyRewards(log, **faults), threading.Event()
    restarts = threading.Thread(target=server.restart_every, args=(restart_every_s, done))
    if restart_every_s is not None:
        restarts.start()
    try:
        yield server
    finally:
        done.set()
        if restart_every_s is not None:
            restarts.join()
        server.kill()


def calls(log: Path) -> dict[str, int]:
    """What the server was asked: calls answered, items failed in them, calls that hung, calls that a kill cut off."""
    lines = read_jsonl(log)
    count = Counter(line["call"] for line in lines)
    return {
        "answered": count["answered"],
        "failed_items": sum(line.get("failed", 0) for line in lines),
        "hung": count["hangs"],
        "cut_off": count["begins"] - count["answered"],
    }


def examine(method: str, run: Path, responses_per_step: int) -> dict[str, Any]:
    """What a finished run says it did, against what the server gives the texts of its transcripts."""
    rows = read_jsonl(run / "metrics.jsonl")
    invented = missing = 0
    counts_agree = True
    for row in rows:
        transcripts = read_jsonl(run / "samples" / f"step-{row['step']:06d}.jsonl")
        rewarded = [t for t in transcripts if t["reward"] is not None]
        for t in rewarded:
            # The wire carries doubles as such; DPO's reward of an unfinished response has no penalty here.
            invented += fails(t["response"], FAIL_SHARE) or t["raw"] != reward(t["response"])
        counts_agree &= row["reward/missing"] == responses_per_step - len(rewarded)
        missing += int(row["reward/missing"])
    return {
        "method": method,
        "steps": len(rows),
        "responses": len(rows) * responses_per_step,
        "missing": missing,
        "invented": invented,
        "counts_agree": counts_agree,
        "weights": (run / "model.safetensors").read_bytes().hex(),
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--methods", nargs="+", default=["ppo", "dpo"], choices=["ppo", "dpo"])
    parser.add_argument("--ppo_steps", type=int, default=30)
    parser.add_argument("--dpo_steps", type=int, default=15)
    parser.add_argument("--restart_every_s", type=float, default=30.0)
    args = parser.parse_args()
    report = Report.begin("robustness", "Training against a reward server that is killed, fails and hangs")
    work = args.work or Path(tempfile.mkdtemp(prefix="robustness-"))
    work.mkdir(parents=True, exist_ok=True)
    write_prompts(work, seed=0, num_prompts=200, num_eval_prompts=1)
    prompts = work / "prompts.jsonl"

    def command(method: str, run: Path, port: int) -> list[str]:
        groups = {"ppo": (16, 1), "dpo": (8, 2)}[method]
        return rlaif(
            "train", method, "--model_name_or_path", "tinyworld:policy", "--dataset", prompts,
            "--output_dir", run, "--reward_server", f"127.0.0.1:{port}",
            "--rollout_batch_size", groups[0], "--num_generations", groups[1], "--samples_per_step", 16,
            "--max_steps", args.ppo_steps if method == "ppo" else args.dpo_steps,
            "--max_new_tokens", 40, "--learning_rate", 1e-4, "--save_steps", 20,
            "--reward_timeout_s", TIMEOUT_S, "--reward_give_up_after_s", 60,
            *(("--num_ppo_epochs", 2, "--value_head", "shared") if method == "ppo" else ()),
        )  # fmt: skip

    faults: dict[str, dict[str, Any]] = {
        "none": {},
        f"killed every {args.restart_every_s:g} s": {
            "delay_s": 2.0,
            "restart_every_s": args.restart_every_s,
        },
        "1 call in 10 hangs": {"hang_share": 0.1},
    }
    lives: list[dict[str, Any]] = []
    for method in args.methods:
        for name, fault in faults.items():
            label = f"{method}-{len(lives)}"
            with faulty_rewards(work / f"{label}.log", fail_share=FAIL_SHARE, **fault) as server:
                used = measure(command(method, work / label, server.port), log=work / f"{label}.out")
            found = examine(method, work / label, 16)
            lives.append(
                {**found, "fault": name, "kills": server.kills, **calls(server.log), "seconds": used.seconds}
            )
            shown = {key: value for key, value in lives[-1].items() if key != "weights"}
            print(shown, file=sys.stderr, flush=True)
    for life in lives:
        clean = next(other for other in lives if other["method"] == life["method"])
        life["as_undisturbed"] = life["weights"] == clean["weights"]

    # ---- a server that hangs for good ----
    stuck = command(args.methods[0], work / "stuck", 0)
    at = stuck.index("--reward_server") + 1

    def against(server: FaultyRewards, give_up_after_s: float, expect: int) -> Path:
        stuck[at] = f"127.0.0.1:{server.port}"
        line = [*stuck, "--reward_give_up_after_s", str(give_up_after_s), "--no-self_check"]
        measure(line, log=work / "stuck.out", expect=(expect,))
        return work / "stuck.out"

    with faulty_rewards(work / "stuck.log", fail_share=FAIL_SHARE, hang_share=1.0) as server:
        said = against(server, 7, REWARD_SERVER_EXIT).read_text().splitlines()[-1]
    stopped_at = [json.loads(p.read_text())["step"] for p in (work / "stuck").glob("checkpoint-*/state.json")]
    with faulty_rewards(work / "sound.log", fail_share=FAIL_SHARE) as server:
        against(server, 60, 0)
    after = examine(args.methods[0], work / "stuck", 16)

    body = (
        f"The embedded world's policy, 16 responses a step, one deadline of {TIMEOUT_S:g} s per request; "
        f"{100 * FAIL_SHARE:g} % of all texts are answered with an error in every row.\n\n"
        + table(
            ("method", "fault", "steps", "rewards missing", "invented", "server killed", "calls cut off by kills",
             "calls hung", "weights as without the fault", "s"),
            [
                (r["method"], r["fault"], r["steps"], f"{r['missing']} of {r['responses']}", r["invented"], r["kills"],
                 r["cut_off"] if r["kills"] else 0, r["hung"], r["as_undisturbed"], f"{r['seconds']:.0f}")
                for r in lives
            ],
        )
        + f"\n\nA server that always hangs, given up after 7 s: `{said}` (exit code {REWARD_SERVER_EXIT}), at a "
        f"checkpoint of step {stopped_at}; with a sound server the same command then did {after['steps']} steps, "
        f"{after['invented']} rewards invented."
    )  # fmt: skip
    wished = {"ppo": args.ppo_steps, "dpo": args.dpo_steps}
    checks = {
        "every run ended with the right number of steps": all(
            r["steps"] == wished[r["method"]] for r in lives
        ),
        "no reward was invented": not any(r["invented"] for r in [*lives, after]),
        "reward/missing is the number of responses without a reward, at every step": all(
            r["counts_agree"] for r in [*lives, after]
        ),
        "some rewards were missing in every run": all(r["missing"] for r in lives),
        "the server was killed, and calls hung": any(r["kills"] for r in lives)
        and any(r["hung"] for r in lives),
        "killed and hanging servers left the weights as they would have been": all(
            r["as_undisturbed"] for r in lives
        ),
        "a server that always hangs ended the run at a checkpoint of step 0, and a sound one let it go on": (
            stopped_at == [0] and after["steps"] == wished[args.methods[0]]
        ),
    }
    for life in lives:
        del life["weights"]
    return report.finish({"runs": lives, "stuck": said}, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
