"""Our trainers beside TRL's: PPO against its last one, online DPO and the updates of DPO against its current ones.

    benchmarks/peers/setup.sh .cache/benchmarks
    python benchmarks/trainer_peers.py ppo       # or online_dpo, or dpo

Both sides train the same random weights on the same prompts (or pairs) with the same reward, a function that is called
in the process. They take turns, each in a process of its own with one thread; every round has another seed. A step is
timed from one call of the reward to the next: what is learned from its responses, and the sampling of the next.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import trainer_load as load

TITLES = {"ppo": "PPO", "online_dpo": "Online DPO", "dpo": "Updates of DPO"}
PEER = {"ppo": ("trl_ppo", "TRL 1.12.0"), "online_dpo": ("trl", "TRL 1.16.0"), "dpo": ("trl", "TRL 1.16.0")}
TARGET = {"ppo": 2.0, "online_dpo": 2.0, "dpo": 1.0}
PER_PROMPT = {"ppo": 1, "online_dpo": 2, "dpo": 1}
UNIT = {"ppo": "episodes/s", "online_dpo": "episodes/s", "dpo": "pairs/s"}


@dataclass
class Side:
    """What one side did in all rounds."""

    name: str
    rate: list[float] = field(default_factory=list)
    cpu_rate: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)

    def add(self, found: dict[str, Any], peak_mib: float, steps: int, per_step: int) -> None:
        """One run of so many steps."""
        marks = found["marks"]
        # The peers call the reward once for every micro-batch of theirs.
        a_step = max(1, round(len(marks) / steps))
        wall, cpu = (
            (last - first) / (len(marks) - 1) * a_step
            for first, last in zip(marks[0], marks[-1], strict=True)
        )
        self.rate.append(per_step / wall)
        self.cpu_rate.append(per_step / cpu)
        self.peak_mib.append(peak_mib)
        self.ended += found["ended"]
        self.shares += [found["shares"]] if "shares" in found else []


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("method", choices=sorted(TITLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="prompts or pairs in one step")
    parser.add_argument(
        "--median", type=float, default=48, help="words of a prompt, lognormal with sigma 0.7"
    )
    parser.add_argument("--micro_batch_tokens", type=int, default=8192, help="ours")
    parser.add_argument("--micro", type=int, default=4, help="theirs: per_device_train_batch_size")
    args = parser.parse_args()
    method = args.method
    environment, peer = PEER[method]
    report = harness.Report.begin(f"trainer_peers_{method}", f"{TITLES[method]} beside {peer}, CPU")
    ours, theirs = Side("ours"), Side(peer)
    drivers = {
        "ours": ([sys.executable, str(harness.HERE / "trainer_ours.py")], args.micro_batch_tokens, ours),
        peer: (
            [str(args.environments / environment / "bin/python"), str(harness.HERE / "peers/trl/train.py")],
            args.micro,
            theirs,
        ),
    }
    path = os.pathsep.join((str(harness.HERE), str(harness.HERE.parent)))
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        folder = work / "given"
        folder.mkdir(parents=True, exist_ok=True)
        load.save_policy(folder)
        load.write_data(folder, rows=4 * args.batch, median=args.median, sigma=0.7)
        for number in range(args.rounds):
            # Whoever goes first in one round goes last in the next.
            for name, (program, micro, side) in list(drivers.items())[:: 1 if number % 2 == 0 else -1]:
                out = work / f"{name}-{number}"
                used = harness.measure(
                    [
                        *program, method, str(folder), str(out), "--steps", str(args.steps),
                        "--batch", str(args.batch), "--micro", str(micro), "--seed", str(number),
                    ],
                    log=work / f"{name}-{number}.log",
                    env=harness.environment(PYTHONPATH=path, CUDA_VISIBLE_DEVICES=""),
                )  # fmt: skip
                lines = (work / f"{name}-{number}.log").read_text().splitlines()
                printed = next(line for line in reversed(lines) if line.startswith('{"marks"'))
                side.add(json.loads(printed), used.peak_mib, args.steps, args.batch * PER_PROMPT[method])
    ratio = [a / b for a, b in zip(ours.rate, theirs.rate, strict=True)]
    cpu_ratio = [a / b for a, b in zip(ours.cpu_rate, theirs.cpu_rate, strict=True)]
    memory = [a / b for a, b in zip(ours.peak_mib, theirs.peak_mib, strict=True)]
    body = harness.table(
        (
            "",
            UNIT[method],
            f"{UNIT[method].removesuffix('/s')} per second of processor time",
            "peak memory, MiB",
        ),
        [
            (
                s.name,
                *(harness.show(harness.spread(v), 2) for v in (s.rate, s.cpu_rate)),
                harness.show(harness.spread(s.peak_mib), 0),
            )
            for s in (ours, theirs)
        ]
        + [("ours ÷ theirs", *(harness.show(harness.spread(v), 2) for v in (ratio, cpu_ratio, memory)))],
    )
    body += (
        f"\n\n{args.rounds} rounds in turns of {args.steps} steps each; medians, least and greatest. Llama of 10 M "
        f"random weights, vocabulary of {load.VOCABULARY}, float32, one thread. {args.batch} prompts a step, "
        f"lognormal, median {args.median:g} tokens, sigma 0.7, at most {load.MAX_PROMPT}; responses of up to "
        f"{load.MAX_RESPONSE} tokens that end with probability {load.END_PROBABILITY} at each. Ours with "
        f"micro_batch_tokens {args.micro_batch_tokens}, theirs with "
        f"per_device_train_batch_size {args.micro} and gradient accumulation."
    )
    if ours.ended:
        shares = [(s.name, sum(s.ended) / len(s.ended)) for s in (ours, theirs)]
        body += f" Responses that ended: {', '.join(f'{share:.0%} ({name})' for name, share in shares)}."
    if ours.shares:
        mean = {part: sum(s[part] for s in ours.shares) / len(ours.shares) for part in ours.shares[0]}
        body += f" Shares of our step: {', '.join(f'{part} {share:.0%}' for part, share in mean.items())}."
    checks = {
        f"at least {TARGET[method]} of {peer}": harness.spread(ratio)["median"] >= TARGET[method],
        "no more memory": harness.spread(memory)["median"] <= 1.0,
    }
    figures = {s.name: s.__dict__ for s in (ours, theirs)}
    return report.finish({"sides": figures}, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
