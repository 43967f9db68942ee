"""Memory of a run over a million rows, and whether its output loads.

`python benchmarks/million_rows.py` scores a million short answers through the scripted server. The resident set of
the client is sampled once a second, from the start to the end of the export. After a warm-up of 2 % of the requests
it may grow by 100 MB at most.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from harness import Report, Server, arguments, environment, response, rlaif, table, text, write_jsonl

MOST_MB = 100.0


def resident_mb(pid: int) -> float:
    """Resident set of a process; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next(
        (int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith("VmRSS")), 0.0
    )


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--in_flight", type=int, default=128)
    parser.add_argument("--warm_up", type=float, default=0.02, help="share of the requests")
    args = parser.parse_args()
    report = Report.begin("million_rows", f"Memory of a run over {args.rows:,} rows")
    work = args.work or Path(tempfile.mkdtemp(prefix="million_rows-"))
    shutil.rmtree(work / "run", ignore_errors=True)
    dataset = write_jsonl(
        work / "scores.jsonl",
        (
            {"prompt": f"Question {i}: {text(i, words=8)}?", "response": response(i, 0)[:120]}
            for i in range(args.rows)
        ),
    )
    samples: list[tuple[float, int, float]] = []
    with Server(args.environments) as server:
        command = rlaif(
            "label", "scores", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / "run",
            "--max_in_flight", args.in_flight,
        )  # fmt: skip
        started = time.monotonic()
        with (work / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        answered = 0
        while process.poll() is None:
            if answered < args.rows:
                answered = int(server.stats()["answered"])
            samples.append((time.monotonic() - started, answered, resident_mb(process.pid)))
            if len(samples) % 60 == 0:
                print(
                    f"{samples[-1][0]:.0f} s, {answered} answered, {samples[-1][2]:.0f} MB", file=sys.stderr
                )
            time.sleep(1.0)
        seconds = time.monotonic() - started
        stats = server.stats()
    if process.returncode:
        raise SystemExit((work / "log").read_text()[-2000:])
    warm = next(mb for _, answered, mb in samples if answered >= args.warm_up * args.rows)
    peak = max(mb for _, answered, mb in samples if answered >= args.warm_up * args.rows)
    last_answer = next(t for t, answered, _ in samples if answered >= args.rows)
    output = work / "run" / "scores.parquet"
    rows = pq.ParquetFile(output).metadata.num_rows

    import datasets

    loaded = datasets.load_dataset(
        "parquet", data_files=str(output), split="train", cache_dir=str(work / "cache")
    )
    sizes = {p.name: p.stat().st_size / 1e6 for p in (work / "run").iterdir() if p.is_file()}
    tenths = [samples[min(len(samples) - 1, len(samples) * i // 10)] for i in range(11)]
    body = (
        f"{args.rows} rows, {stats['requests']} requests ({stats['repeated']} repeated) in {seconds:.0f} s "
        f"({args.rows / seconds:.0f} rows per second), {last_answer:.0f} s until the last answer.\n\n"
        f"Resident set: {warm:.0f} MB after {args.warm_up:.0%} of the answers, {peak:.0f} MB at most from then on: "
        f"{peak - warm:.0f} MB more. The output has {rows} rows; `datasets` loads {len(loaded)}.\n\n"
        + table(("s", "answered", "resident MB"), [(f"{t:.0f}", n, f"{mb:.0f}") for t, n, mb in tenths])
        + "\n\n"
        + table(("file", "MB"), [(name, f"{size:.1f}") for name, size in sorted(sizes.items())])
    )
    checks = {
        f"memory grows by less than {MOST_MB:g} MB after the warm-up": peak - warm < MOST_MB,
        "every row is in the output, once asked": rows == stats["distinct"] == stats["requests"] == args.rows,
        "datasets loads the output": len(loaded) == args.rows,
    }
    figures = {"rows": args.rows, "seconds": seconds, "warm_mb": warm, "peak_mb": peak, "samples": samples}
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
