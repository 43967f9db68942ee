"""How long a run takes, against what the backend alone needs, also with stragglers.

`python benchmarks/makespan.py` labels pairs through a server that serves a fixed number of requests at a time, and
then sends the server the same judgements as ready-made bodies (`backend_alone.py`). The ratio of the two times, as the
server saw them from the first request to the last answer, is the share of its speed that the labeler uses. With
stragglers, 1 % of the judgements take 100 times as long, and block a place for that time.
"""

from __future__ import annotations

import heapq
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import (
    HERE,
    Report,
    Server,
    arguments,
    measure,
    pair_row,
    rlaif,
    show,
    spread,
    table,
    write_jsonl,
)
from scripted_judge import service_time, tags_in

LEAST = 0.95


def queue_length_s(times: Sequence[float], capacity: int) -> float:
    """When the last of these jobs ends, all present at 0, served in order at `capacity` places."""
    free = [0.0] * capacity
    last = 0.0
    for length in times:
        end = heapq.heappop(free) + length
        heapq.heappush(free, end)
        last = max(last, end)
    return last


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--judgements", type=int, default=8000)
    parser.add_argument("--capacity", type=int, default=32)
    parser.add_argument("--latency_s", type=float, default=0.2)
    parser.add_argument("--in_flight", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    report = Report.begin("makespan", "Makespan against the backend alone")
    work = args.work or Path(tempfile.mkdtemp(prefix="makespan-"))
    rows = [pair_row(i) for i in range(args.judgements // 2)]
    dataset = write_jsonl(work / "pairs.jsonl", rows)
    orders = [
        f"{row['prompt']}\n{row[a]}\n{row[b]}"
        for row in rows
        for a, b in (("response_a", "response_b"), ("response_b", "response_a"))
    ]
    bodies = write_jsonl(
        work / "bodies.jsonl",
        (
            {"model": "judge", "messages": [{"role": "user", "content": o}], "max_tokens": 1, "logprobs": True,
             "top_logprobs": 20}
            for o in orders
        ),
    )  # fmt: skip
    python = args.environments / "server" / "bin" / "python"
    found: dict[str, list[dict[str, float]]] = {}
    ideal = {}
    with Server(args.environments, latency_s=args.latency_s, capacity=args.capacity) as server:
        for repeat in range(args.repeats):
            for name, share in (("even", 0.0), ("1 % stragglers", 0.01)):
                times = [service_time("+".join(tags_in(o)), args.latency_s, share, 100.0) for o in orders]
                ideal[name] = queue_length_s(times, args.capacity)
                server.reset(straggler_share=share)
                alone = [str(python), str(HERE / "backend_alone.py"), f"{server.url}/v1/chat/completions"]
                alone += [str(bodies), "--in_flight", str(args.in_flight)]
                sent = json.loads(subprocess.run(alone, stdout=subprocess.PIPE, check=True).stdout)
                backend = server.stats()
                server.reset(straggler_share=share)
                shutil.rmtree(work / "run", ignore_errors=True)
                command = rlaif(
                    "label", "pairs", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / "run",
                    "--no_cot", "--max_in_flight", args.in_flight,
                )  # fmt: skip
                used = measure(command, log=work / "log")
                stats = server.stats()
                if not stats["answered"] == backend["answered"] == sent["requests"] == len(orders):
                    raise SystemExit(f"{stats['answered']} judgements of {len(orders)}")
                found.setdefault(name, []).append(
                    {
                        "backend_s": backend["busy_s"],
                        "ours_s": stats["busy_s"],
                        "share": backend["busy_s"] / stats["busy_s"],
                        "command_s": used.seconds,
                        "share_of_command": backend["busy_s"] / used.seconds,
                        "share_of_ideal": ideal[name] / stats["busy_s"],
                    }
                )
                print(f"repeat {repeat + 1}, {name}: {found[name][-1]}", file=sys.stderr)
    summary: dict[str, dict[str, Any]] = {
        name: {field: spread([run[field] for run in runs]) for field in runs[0]}
        for name, runs in found.items()
    }
    body = (
        f"{len(orders)} judgements, {args.capacity} places of {args.latency_s:g} s each, {args.in_flight} requests in "
        f"flight at most; median (least to greatest) of {args.repeats} repeats.\n\n"
        + table(
            ("service times", "ideal queue, s", "backend alone, s", "ours, s", "backend alone / ours",
             "whole command, s", "backend alone / whole command"),
            [
                (name, f"{ideal[name]:.1f}", show(s["backend_s"], 1), show(s["ours_s"], 1), show(s["share"]),
                 show(s["command_s"], 1), show(s["share_of_command"]))
                for name, s in summary.items()
            ],
        )
    )  # fmt: skip
    checks = {
        f"{name}: at least {LEAST:.0%} of the backend's speed": s["share"]["median"] >= LEAST
        for name, s in summary.items()
    }
    return report.finish({"ideal_s": ideal, **summary}, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
