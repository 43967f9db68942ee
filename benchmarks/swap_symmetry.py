"""Labels equal the known probabilities, and those of (A, B) and (B, A) add up to 1, in any order of rows and requests.

`python benchmarks/swap_symmetry.py` labels the same pairs again and again through the command line: as they are,
swapped, shuffled, half of them swapped, with 1, 8 and 64 requests in flight, from a server that reads given token ids
and from one that reports its likeliest tokens alone. It prints the largest deviation of each run.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from harness import (
    Report,
    Server,
    arguments,
    measure,
    pair_row,
    response,
    rlaif,
    score_row,
    table,
    write_jsonl,
)
from scripted_judge import expected_score, pair_label, tag, tags_in

TOLERANCE = 1e-6
Row = dict[str, str]


def swapped(row: Row) -> Row:
    """The same pair the other way round."""
    return {**row, "response_a": row["response_b"], "response_b": row["response_a"]}


def arrangements(rows: Sequence[Row], chance: random.Random) -> dict[str, list[Row]]:
    """The same pairs in several files."""
    some = [swapped(row) if chance.random() < 0.5 else row for row in rows]
    return {
        "as they are": list(rows),
        "swapped": [swapped(row) for row in rows],
        "shuffled": chance.sample(rows, len(rows)),
        "shuffled, half swapped": chance.sample(some, len(some)),
        "both ways in one file": chance.sample([*rows, *map(swapped, rows)], 2 * len(rows)),
    }


def label_pairs(
    rows: Sequence[Row], work: Path, server: Server, in_flight: int
) -> list[tuple[str, str, float]]:
    """(tag of A, tag of B, P(A preferred)) of each row of the output, A being the input's first response."""
    shutil.rmtree(work, ignore_errors=True)
    dataset = write_jsonl(work / "pairs.jsonl", rows)
    command = rlaif(
        "label", "pairs", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / "out",
        "--no_cot", "--ties", "keep", "--max_in_flight", in_flight,
    )  # fmt: skip
    measure(command, log=work / "log")
    labelled = []
    for row in pq.read_table(work / "out" / "preferences.parquet").to_pylist():
        chosen, rejected = (tags_in(row[side][0]["content"])[0] for side in ("chosen", "rejected"))
        if row["chosen_is_a"]:
            labelled.append((chosen, rejected, row["chosen_prob"]))
        else:
            labelled.append((rejected, chosen, 1.0 - row["chosen_prob"]))
    return labelled


def label_scores(count: int, work: Path, server: Server) -> float:
    """The largest deviation of a score from the known expectation."""
    shutil.rmtree(work, ignore_errors=True)
    dataset = write_jsonl(work / "scores.jsonl", map(score_row, range(count)))
    command = rlaif(
        "label", "scores", "--judge", server.ref, "--dataset", dataset, "--output_dir", work / "out"
    )
    measure(command, log=work / "log")
    rows = pq.read_table(work / "out" / "scores.parquet").to_pylist()
    if len(rows) != count:
        raise SystemExit(f"{len(rows)} scores of {count}")
    return max(abs(row["score"] - expected_score(tags_in(row["response"])[0])) for row in rows)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    report = Report.begin("swap_symmetry", "Swap symmetry and known labels")
    work = args.work or Path(tempfile.mkdtemp(prefix="swap_symmetry-"))
    rows = [pair_row(i) for i in range(args.pairs)]
    assert tags_in(response(0, 0)) == [tag(0, 0)]
    found: dict[tuple[str, str, int], list[tuple[str, str, float]]] = {}
    score_error = {}
    with Server(args.environments, latency_s=0.002) as server:
        for kind in ("vllm", "plain"):
            for name, arranged in arrangements(rows, random.Random(0)).items():
                for in_flight in (1, 8, 64):
                    server.reset(kind=kind)
                    labels = label_pairs(arranged, work / "run", server, in_flight)
                    if len(labels) != len(arranged):
                        raise SystemExit(f"{kind}, {name}: {len(labels)} labels of {len(arranged)} rows")
                    found[kind, name, in_flight] = labels
        # Of ten labels in two spellings each, a list of the 20 likeliest tokens cannot hold all.
        for split in (False, True):
            server.reset(kind="vllm", split_digits=split)
            name = "10 is two tokens" if split else "10 is one token"
            score_error[name] = label_scores(args.pairs, work / "run", server)
    everything = [label for labels in found.values() for label in labels]
    by_pair: dict[tuple[str, str], list[float]] = {}
    for a, b, p in everything:
        by_pair.setdefault((a, b), []).append(p)
    known = {key: max(abs(p - pair_label(a, b)) for a, b, p in labels) for key, labels in found.items()}
    symmetry = max(abs(p + q - 1.0) for (a, b), ps in by_pair.items() for p in ps for q in by_pair[b, a])
    body = (
        f"{len(found)} runs of {args.pairs} pairs, {len(everything)} labels. Over all runs together, the largest "
        f"|label(A, B) + label(B, A) - 1| is {symmetry:.2e}. The largest deviation of a score (1 to 10) from its known "
        "expectation is "
        + " and ".join(f"{error:.2e} where {name}" for name, error in score_error.items())
        + ".\n\n"
        + table(
            ("server", "rows", "in flight", "largest deviation of a label from the known probability"),
            [(*key, f"{error:.2e}") for key, error in known.items()],
        )
    )
    checks = {
        f"label(A, B) + label(B, A) = 1 within {TOLERANCE:g}": symmetry <= TOLERANCE,
        f"labels equal the known probabilities within {TOLERANCE:g}": max(known.values()) <= TOLERANCE,
        f"scores equal the known expectations within {TOLERANCE:g}": max(score_error.values()) <= TOLERANCE,
    }
    figures = {
        "symmetry": symmetry,
        "label_error": {f"{kind}, {name}, {n}": e for (kind, name, n), e in known.items()},
        "score_error": score_error,
    }
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    sys.exit(main())
