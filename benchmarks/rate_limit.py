"""How much of an allowed rate is used after the limit changes, and how many requests are refused.

`python benchmarks/rate_limit.py` labels pairs through a server that lets in a number of requests per minute and
answers 429 with `Retry-After` beyond it. The number changes twice while the run goes on; the labeler is not told. It
is measured once where every answer carries OpenAI's `x-ratelimit-*` headers and once where none does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import Report, Server, arguments, environment, pair_row, rlaif, table, write_jsonl

LEAST, MOST_REFUSED, WITHIN_S, WINDOW_S = 0.95, 0.02, 60, 10


def rate(admitted: Mapping[int, int], start: int, end: int) -> float:
    """Requests let in per second over the seconds [start, end)."""
    return sum(admitted.get(second, 0) for second in range(start, end)) / (end - start)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rpm", type=int, nargs="*", default=[6000, 3000, 9000])
    parser.add_argument("--seconds", type=int, default=100, help="at each limit")
    parser.add_argument("--latency_s", type=float, default=0.2)
    parser.add_argument("--in_flight", type=int, default=128)
    args = parser.parse_args()
    report = Report.begin("rate_limit", "Use of an allowed rate")
    work = args.work or Path(tempfile.mkdtemp(prefix="rate_limit-"))
    enough = sum(args.rpm) * args.seconds // 60 + 10000
    dataset = write_jsonl(work / "pairs.jsonl", map(pair_row, range(enough // 2)))
    found: list[dict[str, Any]] = []
    refused: dict[str, float] = {}
    for headers in (True, False):
        name = "with headers" if headers else "Retry-After alone"
        with Server(
            args.environments, latency_s=args.latency_s, rpm=args.rpm[0], limit_headers=headers
        ) as server:
            shutil.rmtree(work / "run", ignore_errors=True)
            command = rlaif(
                "label", "pairs", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / "run",
                "--no_cot", "--max_in_flight", args.in_flight,
            )  # fmt: skip
            with (work / "log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
            while not server.stats()["admitted_at"]:
                if process.poll() is not None:
                    raise SystemExit((work / "log").read_text()[-2000:])
                time.sleep(0.1)
            changes = []
            for rpm in args.rpm:
                server.configure(rpm=rpm)
                changes.append(int(time.time()) + 1)
                time.sleep(args.seconds)
            process.kill()
            process.wait()
            stats = server.stats()
        admitted = {int(second): n for second, n in stats["admitted_at"].items()}
        total = sum(admitted.values())
        refused[name] = stats["refused"] / (stats["refused"] + total)
        for rpm, start in zip(args.rpm, changes, strict=True):
            end = start + args.seconds - 1
            reached = next(
                (
                    second - start
                    for second in range(start + WINDOW_S, end)
                    if rate(admitted, second - WINDOW_S, second) >= LEAST * rpm / 60
                ),
                None,
            )
            used = rate(admitted, start + WITHIN_S, end) / (rpm / 60)
            found.append({"server": name, "rpm": rpm, "used": used, "reached_after_s": reached})
            print(found[-1], file=sys.stderr)
    body = (
        f"{args.latency_s * 1000:g} ms of latency, at most {args.in_flight} requests in flight; each limit holds for "
        f"{args.seconds} s and its use is measured from {WITHIN_S} s after the change on. The time to reach "
        f"{LEAST:.0%} is that of a mean over {WINDOW_S} s.\n\n"
        + table(
            (
                "server",
                "requests allowed per minute",
                f"used after {WITHIN_S} s",
                f"{LEAST:.0%} reached after, s",
            ),
            [(f["server"], f["rpm"], f"{f['used']:.1%}", f["reached_after_s"]) for f in found],
        )
        + "\n\nRefused: "
        + ", ".join(f"{share:.2%} ({name})" for name, share in refused.items())
        + "."
    )
    checks = {
        f"at least {LEAST:.0%} of the allowed rate within {WITHIN_S} s of a change": all(
            f["used"] >= LEAST for f in found
        ),
        f"less than {MOST_REFUSED:.0%} of the requests refused": max(refused.values()) < MOST_REFUSED,
    }
    return report.finish({"phases": found, "refused": refused}, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
