"""Nothing is lost, doubled or paid for twice: `kill -9` at random points, and rows that always fail.

`python benchmarks/kill_resume.py` labels 2,000 pairs once without a disturbance. Then, 20 times: it starts the same
run anew, kills it at a random point with SIGKILL, runs the command again, and compares the dataset byte by byte. Then
it lets 5 % of the rows fail always, by one fault after the other, and lets requests fail for a while.
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from harness import (
    Report,
    Server,
    arguments,
    environment,
    measure,
    pair_row,
    read_jsonl,
    rlaif,
    show,
    spread,
    table,
    write_jsonl,
)
from scripted_judge import row_key, tags_in, unlucky

POISON_SHARE = 0.05


def label_columns(folder: Path) -> bytes:
    """The whole dataset as Arrow's byte stream: equal bytes are equal rows in equal order."""
    rows = pq.read_table(folder / "preferences.parquet").replace_schema_metadata(None).combine_chunks()
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, rows.schema) as writer:
        writer.write_table(rows)
    return stream.getvalue()


def without(folder: Path, keys: set[str]) -> list[dict[str, Any]]:
    """The rows of the dataset whose pairs are not among the keys."""
    rows = pq.read_table(folder / "preferences.parquet").to_pylist()
    return [
        row for row in rows if _key(row["chosen"][0]["content"], row["rejected"][0]["content"]) not in keys
    ]


def _key(a: str, b: str) -> str:
    return row_key([*tags_in(a), *tags_in(b)])


def kill_at(command: list[str], server: Server, log: Path, answered: int, delay_s: float) -> int:
    """Start the command and kill it `delay_s` after the server has answered so many requests.

    Returns:
        Requests that the server had answered then; -1 if the command ended before.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment())
    while process.poll() is None and server.stats()["answered"] < answered:
        time.sleep(0.01)
    time.sleep(delay_s)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return -1 if ended else int(server.stats()["answered"])


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--in_flight", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = Report.begin("kill_resume", "Kill and resume, and rows that fail")
    work = args.work or Path(tempfile.mkdtemp(prefix="kill_resume-"))
    rows = [pair_row(i) for i in range(args.rows)]
    dataset = write_jsonl(work / "pairs.jsonl", rows)
    requests = 2 * args.rows

    def command(name: str, *more: object) -> list[str]:
        shutil.rmtree(work / name, ignore_errors=True)
        return rlaif(
            "label", "pairs", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / name,
            "--no_cot", "--ties", "keep", "--max_in_flight", args.in_flight, *more,
        )  # fmt: skip

    with Server(args.environments, latency_s=0.02) as server:
        clean = measure(command("clean"), log=work / "clean.log")
        clean_stats = server.stats()
        expected = label_columns(work / "clean")
        print(f"clean run: {clean.seconds:.1f} s, {clean_stats['requests']} requests", file=sys.stderr)

        # ---- kills: most while it asks, some before the first answer and some after the last ----
        chance = random.Random(args.seed)
        kills = []
        for number in range(args.kills):
            phase = number % 10
            if phase == 8:
                answered, delay = 0, chance.uniform(0.0, 1.5)
            elif phase == 9:
                answered, delay = requests, chance.uniform(0.0, 1.0)
            else:
                answered, delay = chance.randrange(1, requests), 0.0
            server.reset()
            line = command("killed")
            at = kill_at(line, server, work / "killed.log", answered, delay)
            measure(line, log=work / "resumed.log")
            stats = server.stats()
            got = pq.read_table(work / "killed" / "preferences.parquet").column("id").to_pylist()
            kills.append(
                {
                    "answered_when_killed": at,
                    "repeated_requests": stats["repeated"],
                    "peak_in_flight": stats["peak_in_service"],
                    "lost": len({row["id"] for row in without(work / "clean", set())} - set(got)),
                    "duplicated": len(got) - len(set(got)),
                    "identical": label_columns(work / "killed") == expected,
                }
            )
            print(f"kill {number + 1}: {kills[-1]}", file=sys.stderr)

        # ---- rows that always fail ----
        poisoned = []
        for kind, more in (("400", ()), ("500", ()), ("truncate", ()), ("hang", ("--timeout_s", 2))):
            server.reset(poison={kind: POISON_SHARE})
            line = command("poisoned", "--max_unlabelled", 1, *more)
            used = measure(line, log=work / "poisoned.log")
            stats = server.stats()
            keys = [_key(row["response_a"], row["response_b"]) for row in rows]
            bad = {key for key in keys if unlucky(f"poison {kind}", key, POISON_SHARE)}
            unlabelled = read_jsonl(work / "poisoned" / "unlabelled.jsonl")
            poisoned.append(
                {
                    "kind": kind,
                    "rows": len(bad),
                    "exactly_those": {_key(r["response_a"], r["response_b"]) for r in unlabelled} == bad
                    and len(unlabelled) == len(bad),
                    "others_identical": without(work / "poisoned", set()) == without(work / "clean", bad),
                    "requests": stats["requests"] / clean_stats["requests"],
                    "seconds": used.seconds,
                }
            )
            print(f"poison: {poisoned[-1]}", file=sys.stderr)

        # ---- requests that fail for a while ----
        faults = {"429": 0.002, "500": 0.05, "truncate": 0.02, "hang": 0.01}
        server.reset(poison={}, faults=faults)
        used = measure(command("shaky", "--timeout_s", 2), log=work / "shaky.log")
        stats = server.stats()
        shaky = {
            "identical": label_columns(work / "shaky") == expected,
            "requests": stats["requests"] / clean_stats["requests"],
            "seconds": used.seconds,
        }

    repeated = spread([kill["repeated_requests"] for kill in kills])
    body = (
        f"{args.rows} pairs, {requests} requests, {args.in_flight} in flight at most; the undisturbed run took "
        f"{clean.seconds:.1f} s.\n\n{len(kills)} kills: repeated requests after each {show(repeated, 0)}, median "
        f"(least to greatest); rows lost {sum(k['lost'] for k in kills)}, duplicated "
        f"{sum(k['duplicated'] for k in kills)}; {sum(k['identical'] for k in kills)} datasets of {len(kills)} equal "
        "the undisturbed one byte for byte.\n\n"
        + table(
            ("rows that always fail", "how", "exactly those unlabelled", "others identical", "requests", "s"),
            [
                (p["rows"], p["kind"], p["exactly_those"], p["others_identical"], f"{p['requests']:.3f}x",
                 f"{p['seconds']:.1f}")
                for p in poisoned
            ],
        )
        + f"\n\nWith {', '.join(f'{100 * v:g} % {k}' for k, v in faults.items())} on the first attempt of a request: "
        f"dataset identical: {shaky['identical']}, {shaky['requests']:.3f}x requests, {shaky['seconds']:.1f} s."
    )  # fmt: skip
    checks = {
        "no row lost": not any(k["lost"] for k in kills),
        "no row duplicated": not any(k["duplicated"] for k in kills),
        "every resumed dataset equals the undisturbed one byte for byte": all(k["identical"] for k in kills),
        f"repeated requests are at most those in flight ({args.in_flight})": repeated["max"]
        <= args.in_flight,
        "exactly the failing rows are unlabelled": all(p["exactly_those"] for p in poisoned),
        "all other rows equal the clean run": all(p["others_identical"] for p in poisoned),
        "at most 1.1 times the requests": all(p["requests"] <= 1.1 for p in poisoned),
        "transient faults change no label": shaky["identical"],
    }
    figures = {"kills": kills, "poisoned": poisoned, "shaky": shaky, "repeated_requests": repeated}
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
