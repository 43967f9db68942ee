"""A dry run counts the tokens that real vLLM then reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from labeler.journal import ReplyJournal, Usage
from tests.labeler.commands import label, write_lines
from tests.vllm.conftest import Served, needs_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]

ROWS = [
    {"prompt": f"How do I cook {n} eggs?", "response_a": f"Boil {n}.", "response_b": "Ask\n\na cook…"}
    for n in range(3)
]


def counted(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Prompt tokens, and how they were counted."""
    out = capsys.readouterr().out
    found = re.search(r"counted\s+([\d,]+) (.*)", out)
    assert found is not None, out
    return int(found[1].replace(",", "")), found[2]


def used(out: Path) -> Usage:
    with ReplyJournal(out, read_only=True) as journal:
        return journal.totals().usage


@pytest.mark.parametrize("kind", ["pairs", "scores"])
def test_the_server_counts_for_itself(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    rows = ROWS if kind == "pairs" else [{"prompt": r["prompt"], "response": r["response_a"]} for r in ROWS]
    data = write_lines(tmp_path / "data.jsonl", rows)
    assert label(served.judge, data, tmp_path / "out", "--no-cot", "--dry_run", kind=kind) == 0
    tokens, how = counted(capsys)
    assert "/tokenize" in how
    assert label(served.judge, data, tmp_path / "out", "--no-cot", kind=kind) == 0
    assert tokens == used(tmp_path / "out").prompt_tokens > 0


def test_the_tokenizer_alone_counts_as_the_server_does(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", ROWS)
    assert label(served.judge, data, tmp_path / "a", "--no-cot", "--dry_run") == 0
    by_server, _ = counted(capsys)
    assert label(f"vllm:{served.model_dir}", data, tmp_path / "b", "--no-cot", "--dry_run") == 0
    alone, how = counted(capsys)
    assert how == "exactly, with the model's tokenizer"
    assert alone == by_server
