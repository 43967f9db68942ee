"""`rlaif serve` at 70 % of its capacity, and at three times its capacity: latencies, refusals, health, memory.

Calls of one chat each arrive at random (Poisson) whatever the server does, and a latency counts from the moment the
call should have been sent. The capacity is measured with more calls in flight than a batch holds, before and after
each phase, since other work on the machine changes it.

    OMP_NUM_THREADS=1 python benchmarks/reward_overload.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import reward_load as load
from reward_callers import Seen

QUEUE_ITEMS = 64
BATCH_TOKENS = 2048
RSS_INTERVAL_S = 0.5


class Phases:
    """The phases of the benchmark, each with callers in processes of their own.

    Args:
        server: under load.
        length: of a chat in tokens, about.
    """

    def __init__(self, server: load.RewardServerProcess, length: int) -> None:
        self._server = server
        self._length = length

    def saturate(self, seconds: float) -> Seen:
        """Callers that wait for their answers, more of them than a batch holds."""
        return self._read(self._start("saturate", seconds))

    def arrive(self, rate: float, seconds: float) -> tuple[Seen, Seen, list[float]]:
        """Calls at this rate, health checks beside them, and the server's memory in MiB meanwhile."""
        calls, health = self._start("arrive", seconds, "--rate", rate), self._start("health", seconds)
        rss = [self._server.rss_mib()]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(RSS_INTERVAL_S)
            rss.append(self._server.rss_mib())
        return self._read(calls), self._read(health), rss

    def _start(self, what: str, seconds: float, *more: object) -> subprocess.Popen[str]:
        script = Path(__file__).parent / "reward_callers.py"
        own = (self._server.address, what, "--seconds", seconds, "--length", self._length, *more)
        command = [sys.executable, str(script), *map(str, own)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=harness.environment())

    def _read(self, callers: subprocess.Popen[str]) -> Seen:
        found, _ = callers.communicate()
        if callers.returncode != 0:
            raise SystemExit(f"the callers ended with status {callers.returncode}; see above")
        return Seen(**json.loads(found))


def quantile(values: Sequence[float], q: float) -> float:
    """The value that a share `q` does not exceed."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def milliseconds(values: Sequence[float]) -> str:
    """Median, 99th percentile and greatest, in ms."""
    if not values:
        return "none"
    parts = (statistics.median(values), quantile(values, 0.99), max(values))
    return " / ".join(f"{1000 * v:.1f}" for v in parts)


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--capacity_s", type=float, default=10.0)
    parser.add_argument("--moderate_s", type=float, default=60.0)
    parser.add_argument("--overload_s", type=float, default=60.0)
    parser.add_argument("--length", type=int, default=64, help="tokens of a chat")
    args = parser.parse_args()
    load.alone()
    report = harness.Report.begin(
        "reward_overload", "The reward server at 70 % and at 300 % of its capacity, CPU"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = load.save_reward_model(folder / "model")
        flags = {"max_queue_items": QUEUE_ITEMS, "max_batch_tokens": BATCH_TOKENS}
        with load.RewardServerProcess(folder, model, **flags) as server:
            phases = Phases(server, args.length)
            phases.saturate(args.capacity_s)  # memory settles
            capacities = [phases.saturate(args.capacity_s)]
            moderate = phases.arrive(0.7 * capacities[0].rate, args.moderate_s)
            capacities.append(phases.saturate(args.capacity_s))
            overload = phases.arrive(3 * capacities[1].rate, args.overload_s)
            capacities.append(phases.saturate(args.capacity_s))
    batch_s = statistics.median(s for c in capacities for s in c.batch_s)
    around = statistics.fmean(c.rate for c in capacities[1:])
    typed = "RESOURCE_EXHAUSTED QUEUE_FULL with RetryInfo"
    both = (moderate, overload)
    late = [[*calls.late_s, *health.late_s] for calls, health, _ in both]
    growth = [max(rss) - rss[0] for _, _, rss in both]
    body = harness.table(
        ("median / p99 / greatest in ms", "70 %", "300 %"),
        [
            (
                "calls sent a second",
                *(f"{(len(c.scored) + len(c.refused)) / c.seconds:.1f}" for c, _, _ in both),
            ),
            ("scored a second", *(f"{c.rate:.1f}" for c, _, _ in both)),
            ("time to a score", *(milliseconds(c.scored) for c, _, _ in both)),
            ("time of its batch", *(milliseconds(c.batch_s) for c, _, _ in both)),
            ("refused", *(c.refusals or "none" for c, _, _ in both)),
            ("time to a refusal", *(milliseconds(c.refused) for c, _, _ in both)),
            ("health", *(h.health for _, h, _ in both)),
            ("time to a health answer", *(milliseconds(h.health_s) for _, h, _ in both)),
            ("the callers' own lateness", *map(milliseconds, late)),
            ("growth of memory, MiB", *(f"{mib:.1f}" for mib in growth)),
        ],
    )
    rates = ", ".join(f"{c.rate:.1f}" for c in capacities)
    body += (
        f"\n\nCapacity before, between and after: {rates} chats a second; a full batch at capacity takes "
        f"{1000 * batch_s:.0f} ms at the median. One chat of about {args.length} tokens a call, Poisson arrivals; "
        f"--max_queue_items={QUEUE_ITEMS} --max_batch_tokens={BATCH_TOKENS}. Qwen3 classifier, 14 M parameters, "
        f"float32. Server, callers (one process for the calls, one for health) and whatever else the machine does "
        f"share its cores; a time is no better than the lateness of the callers' own event loops."
    )
    checks = {
        "70 %: p99 at most 3 full batches": quantile(moderate[0].scored, 0.99) <= 3 * batch_s,
        "70 %: nothing refused": not moderate[0].refused,
        "300 %: at least 0.9 of the capacity is scored": overload[0].rate >= 0.9 * around,
        "300 %: every refusal is typed": set(overload[0].refusals) == {typed},
        "300 %: refusals within 20 ms at p99": quantile(overload[0].refused, 0.99) <= 0.020,
        "every health check answered SERVING": {s for _, h, _ in both for s in h.health} == {"SERVING"},
        "every health check within 100 ms": max(s for _, h, _ in both for s in h.health_s) <= 0.1,
        "300 %: memory grows by less than 50 MB": growth[1] < 50,
        "the callers are not the late ones: 10 ms at p99": max(quantile(s, 0.99) for s in late) <= 0.010,
    }
    figures = {
        "capacity": [c.rate for c in capacities],
        "batch_s": batch_s,
        "goodput_over_capacity": overload[0].rate / around,
        "scored_p99_s": [quantile(c.scored, 0.99) for c, _, _ in both],
        "refused_p99_s": quantile(overload[0].refused, 0.99),
        "health_max_s": [max(h.health_s) for _, h, _ in both],
        "late_p99_s": [quantile(s, 0.99) for s in late],
        "growth_mib": growth,
    }
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
