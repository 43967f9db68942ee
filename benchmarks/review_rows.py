"""The review page over a hundred thousand rows: how long until it answers, its memory, and how long a page takes.

`python benchmarks/review_rows.py` writes a preference dataset with rationales and suspicious rows, serves it by
`rlaif review`, and asks for pages one after another, as one person does. Responses have some 160 words.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from harness import Report, arguments, environment, rlaif, table, text
from measure_command import pss_bytes

from labeler.preferences import SCHEMA
from rlaif.storage import write_parquet

MOST_PAGE_MS = 100.0
MOST_MEMORY_MB = 500.0


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Labels as a judge with a position bias gives them, one row in a hundred cut, some with little label mass."""
    chance = random.Random(0)
    for i in range(count):
        p = chance.uniform(0.5, 1.0)
        first = min(1.0, max(0.0, p + chance.gauss(0.1, 0.15)))
        told = {
            "id": f"{i:016x}",
            "prompt": [{"role": "user", "content": f"Question {i}: {text(i, words=60)}?"}],
            "chosen": [
                {"role": "assistant", "content": f"{text(i, 'good', words=chance.randint(60, 260))}."}
            ],
            "rejected": [{"role": "assistant", "content": f"{text(i, 'bad', words=160)}."}],
            "chosen_prob": p,
            "chosen_is_a": bool(chance.getrandbits(1)),
            "chosen_prob_first": first,
            "chosen_prob_second": min(1.0, max(0.0, 2 * p - first)),
            "label_mass_ab": chance.uniform(0.45, 1.0),
            "label_mass_ba": 0.99,
            "rationale_ab": text(i, "ab", words=80),
            "rationale_ba": text(i, "ba", words=80),
            "truncated": chance.random() < 0.01,
            "source": "logprobs",
            "votes": [],
            "judge": "benchmark",
            "rubric": "helpfulness-pair",
            "rubric_hash": "0" * 12,
        }
        yield {name: told.get(name) for name in SCHEMA.names}


def timed(calls: int, ask: Callable[[int], httpx2.Response]) -> tuple[float, float, float]:
    """Median, 99th percentile and greatest time of so many requests, in milliseconds."""
    taken = []
    for i in range(calls):
        began = time.perf_counter()
        answer = ask(i)
        taken.append(1000 * (time.perf_counter() - began))
        assert answer.status_code in (200, 303), answer.text
    return float(np.median(taken)), float(np.quantile(taken, 0.99)), max(taken)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=200, help="requests of each kind")
    args = parser.parse_args()
    report = Report.begin("review_rows", f"The review page over {args.rows:,} rows")
    work = args.work or Path(tempfile.mkdtemp(prefix="review_rows-"))
    shutil.rmtree(work / "labels", ignore_errors=True)
    write_parquet(work / "labels" / "preferences.parquet", rows(args.rows), SCHEMA)
    began = time.monotonic()
    process = subprocess.Popen(
        rlaif("review", work / "labels", "--port", 0), stdout=subprocess.PIPE, text=True, env=environment()
    )
    atexit.register(process.kill)  # also where a request fails
    assert process.stdout is not None
    url = next(m[0] for line in process.stdout if (m := re.search(r"http://\S+", line)))
    start_s = time.monotonic() - began
    started_mb = pss_bytes(process.pid) / 1e6
    chance = random.Random(1)

    def somewhere() -> int:
        return chance.randrange(args.rows) + 1

    with httpx2.Client(base_url=url.partition("/?")[0]) as client:
        client.get(url)
        asked: dict[str, Callable[[int], httpx2.Response]] = {
            "first page, by suspicion": lambda i: client.get("/"),
            "a page somewhere": lambda i: client.get(f"/?page={somewhere() // 50 + 1}"),
            "a page of one reason": lambda i: client.get("/?reason=orders_disagree&page=3"),
            "a row": lambda i: client.get(f"/rows/{somewhere()}"),
            "a mark, on the disk": lambda i: client.post(f"/rows/{somewhere()}/mark", data={"verdict": "a"}),
            "a page, after the marks": lambda i: client.get(f"/?page={i + 1}"),
        }
        found = {name: timed(args.calls, ask) for name, ask in asked.items()}
        found["a new search"] = timed(20, lambda i: client.get(f"/?q=question+{i}"))
    ended_mb = pss_bytes(process.pid) / 1e6
    marks = len((work / "labels" / "review" / "marks.jsonl").read_text().splitlines()) - 1
    process.send_signal(signal.SIGINT)
    process.communicate()
    body = (
        f"{os.path.getsize(work / 'labels' / 'preferences.parquet') / 1e6:.0f} MB of Parquet. {start_s:.1f} s from the "
        f"command to the address; {started_mb:.0f} MB of memory then, {ended_mb:.0f} MB after all requests.\n\n"
        + table(
            ("request", "median, ms", "99 %, ms", "longest, ms"),
            [(name, *(f"{ms:.1f}" for ms in taken)) for name, taken in found.items()],
        )
    )
    checks = {
        f"pages, rows and marks take less than {MOST_PAGE_MS:g} ms in the median": all(
            taken[0] < MOST_PAGE_MS for name, taken in found.items() if name != "a new search"
        ),
        f"memory stays below {MOST_MEMORY_MB:g} MB": max(started_mb, ended_mb) < MOST_MEMORY_MB,
        "every mark is in the journal": marks == args.calls,
    }
    figures = {"rows": args.rows, "start_s": start_s, "memory_mb": [started_mb, ended_mb], "ms": found}
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
