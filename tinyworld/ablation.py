"""The prompt study of the RLAIF paper in the embedded world: `python -m tinyworld.ablation --output_dir OUT`.

Preamble x exemplars x chain of thought, one order or both, and self-consistency (arXiv 2309.00267, tables 2 and
following), with gold as the human who labels the pairs. Each study is one `rlaif eval judge --variants` command; a
later one reuses the replies of the first. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from shlex import join

from rlaif.errors import RlaifError
from rlaif.storage import write_atomic
from tinyworld.gold import gold_prefers
from tinyworld.pairs import WRITERS, Writer, decided

STUDIES: dict[str, tuple[str, ...]] = {
    "prompts": ("--variants", "preamble=none,base,detailed", "exemplars=0,1,2", "cot=on,off"),
    "orders": ("--variants", "cot=on,off", "orders=both,one"),
    "self-consistency": ("--variants", "rationales=1,4,16", "--rationale_temperature", "1.0"),
}
"""What varies in each study, the first combination of it being what the others are compared with."""


def gold_pairs(writer: Writer, n: int, seed: int) -> Iterator[dict[str, object]]:
    """`n` pairs that gold does not tie, as rows of a dataset with human labels; other pairs for every seed."""
    for post, a, b in islice(decided(writer, 1_000_000 * seed), n):
        label = 1 if gold_prefers(post, a, b) else 2
        yield {"prompt": post, "response_a": a, "response_b": b, "label": label}


def commands(out: Path, judge: str, seed: int) -> dict[str, list[str]]:
    """The `rlaif` command of each study, without the program's name."""
    shared = ["eval", "judge", "--judge", judge, "--rubric", "tinyworld:pair"]
    shared += ["--dataset", str(out / "pairs.jsonl"), "--seed", str(seed)]
    first = next(iter(STUDIES))
    return {
        study: [
            *shared,
            *options,
            *(() if study == first else ("--reuse", str(out / first))),
            *("--output_dir", str(out / study)),
        ]
        for study, options in STUDIES.items()
    }


def main() -> None:
    """Command line; prints every study's table and writes them to `OUT/ablation.md`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--judge", default="tinyworld:judge-fewshot", help="who is asked")
    parser.add_argument("--n", type=int, default=400, help="pairs")
    parser.add_argument("--pairs", choices=WRITERS, default="so_so", help="how the summaries were written")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of sampled rationales")
    args = parser.parse_args()
    out: Path = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    rows = gold_pairs(WRITERS[args.pairs], args.n, args.seed)
    write_atomic(out / "pairs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    tables = []
    for study, arguments in commands(out, args.judge, args.seed).items():
        began = time.monotonic()
        print(f"\n$ rlaif {join(arguments)}", flush=True)
        done = subprocess.run([sys.executable, "-m", "rlaif.cli", *arguments], env=environment, check=False)
        if done.returncode:
            raise RlaifError(f"{study} stopped with exit code {done.returncode}; the same command goes on")
        print(f"{time.monotonic() - began:.0f} s", flush=True)
        report = (out / study / "report.md").read_text(encoding="utf-8")
        tables.append(
            f"## {study}\n\n`rlaif {join(arguments)}`\n\n{report.partition('## Variants')[2].strip()}\n"
        )
    write_atomic(out / "ablation.md", "\n".join(tables))
    print(f"\n-> {out / 'ablation.md'}")


if __name__ == "__main__":
    try:
        main()
    except RlaifError as err:
        sys.exit(str(err))
