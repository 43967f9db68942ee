"""Processor time of the client per one-token judgement, beside the peers through the same server in the same run.

`python benchmarks/client_cost.py --environments DIR` prints a table: for each tool the processor time (user and
system, all its processes) per judgement, the wall time, and how many times less ours is. The cost of a judgement is
the difference between a large and a small input, so that starting Python and importing count for nobody; the whole
command divided by its judgements stands beside it. Tools take turns within each repeat.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Report, Server, Used, arguments, show, spread, table
from tools import LABELS, PEERS, judge, write_inputs

LIMIT_MS = 1.5
LESS_THAN = {"distilabel": 5.0, "curator": 2.0}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--judgements", type=int, default=4000, help="of the large input")
    parser.add_argument("--small", type=int, default=400, help="judgements of the small input")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--in_flight", type=int, default=64)
    parser.add_argument("--latency_s", type=float, default=0.02)
    parser.add_argument("--tools", nargs="*", default=["rlaif", *PEERS])
    parser.add_argument("--once", nargs="*", default=["alpaca_eval"], help="tools too slow to repeat")
    args = parser.parse_args()
    report = Report.begin("client_cost", "Processor time of the client per one-token judgement")
    work = args.work or Path(tempfile.mkdtemp(prefix="client_cost-"))
    sizes = (args.small, args.judgements)
    for size in sizes:
        write_inputs(work / str(size), size // 2)
    used: dict[str, list[tuple[Used, Used]]] = {tool: [] for tool in args.tools}
    server_ms = []
    with Server(args.environments, latency_s=args.latency_s) as server:
        for repeat in range(args.repeats):
            for tool in args.tools:
                if repeat and tool in args.once:
                    continue
                runs = []
                for size in sizes:
                    server.reset(kind="vllm" if tool == "rlaif" else "plain", pair_labels=LABELS[tool])
                    before = server.cpu_s()
                    run = judge(
                        tool, work / str(size), work / tool, server, args.in_flight, args.environments
                    )
                    stats = server.stats()
                    if stats["answered"] != size or stats["distinct"] != size:
                        raise SystemExit(f"{tool} made {stats['answered']} judgements of {size}: {stats}")
                    runs.append(run)
                server_ms.append(1000 * (server.cpu_s() - before) / args.judgements)
                used[tool].append((runs[0], runs[1]))
                print(f"repeat {repeat + 1}: {tool} {runs}", file=sys.stderr)
    extra = args.judgements - args.small
    cost = {t: spread([1000 * (b.cpu_s - a.cpu_s) / extra for a, b in runs]) for t, runs in used.items()}
    whole = {t: spread([1000 * b.cpu_s / args.judgements for _, b in runs]) for t, runs in used.items()}
    wall = {t: spread([b.seconds for _, b in runs]) for t, runs in used.items()}
    ratios = {
        tool: spread(
            [(b.cpu_s - a.cpu_s) / (d.cpu_s - c.cpu_s) for (a, b), (c, d) in zip(runs, ours, strict=False)]
        )
        for ours in [used["rlaif"]]
        for tool, runs in used.items()
        if tool != "rlaif"
    }
    rows = [
        (t, show(cost[t]), show(whole[t]), show(wall[t], 1), show(ratios[t], 1) if t in ratios else "1")
        for t in args.tools
    ]
    header = ("tool", "ms per judgement", "ms, whole command", "wall s", "times ours")
    body = (
        f"{args.judgements} judgements of one token, {args.in_flight} in flight, {args.latency_s * 1000:g} ms of "
        f"latency; median (least to greatest) of {args.repeats} repeats"
        f"{''.join(f', {tool} once' for tool in args.once if tool in args.tools)}.\n\n{table(header, rows)}\n\n"
        f"The server itself took {show(spread(server_ms))} ms per judgement."
    )
    checks = {f"ours takes at most {LIMIT_MS} ms per judgement": cost["rlaif"]["median"] <= LIMIT_MS}
    for tool, least in LESS_THAN.items():
        if tool in ratios:
            checks[f"{tool} takes at least {least:g} times as much"] = ratios[tool]["median"] >= least
    figures: dict[str, Any] = {"ms": cost, "ms_whole_command": whole, "seconds": wall, "times_ours": ratios}
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
