"""Running the labeler's commands on small files, with a scripted judge that likes what is called good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from labeler.journal import ReplyJournal
from rlaif.cli import main

RULES = [
    {"user": r"(?s)RESPONSE 1 >>>\ngood", "probs": [0.8, 0.1]},
    {"user": r"(?s)RESPONSE 2 >>>\ngood", "probs": [0.3, 0.6]},
    {"user": r"(?s)RESPONSE 1 >>>\nbroken|RESPONSE 2 >>>\nbroken", "fail": "the endpoint answered 500"},
    {"text": " They differ.", "prefix": "Comparison:"},
    {"probs": [0.5, 0.5]},
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def scripted(tmp_path: Path, rules: list[dict[str, Any]] = RULES) -> str:
    path = tmp_path / "judge.yaml"
    path.write_text(yaml.safe_dump({"rules": rules}))
    return f"scripted:{path}"


def label(judge: str, dataset: Path, out: Path, *flags: str, kind: str = "pairs") -> int:
    return main(
        ["label", kind, "--judge", judge, "--dataset", str(dataset), "--output_dir", str(out), *flags]
    )


def pair(i: int, a: str = "good", b: str = "bad", **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "response_a": f"{a} {i}", "response_b": f"{b} {i}", **more}


def preferences(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "preferences.parquet").to_pylist()


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def replies(out: Path) -> int:
    """Paid replies on record."""
    if not (out / "journal.sqlite").exists():
        return 0
    with ReplyJournal(out, read_only=True) as journal:
        totals = journal.totals().replies
    return sum(count for kind, count in totals.items() if kind != "probe")
