"""The RLAIF recipe through a server that nobody here wrote: vLLM's, with real pairs."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from labeler.judge import Judge, Recipe
from labeler.llm import LabelReading, open_llm
from labeler.rubric import load_rubric
from rlaif.models import ModelRef
from rlaif.records import Quarantine, read_pairs
from rlaif.types import Pair, Preference

from .conftest import Served, needs_vllm
from .oracle import label_probs, prompt_ids

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> list[Pair]:
    return list(islice(read_pairs(shared_data / "hh_helpful_1000.jsonl", Quarantine(None)), 6))


async def judging(model: str, pairs: Sequence[Pair]) -> list[Preference]:
    llm = open_llm(ModelRef.parse(model))
    judge = Judge(llm, load_rubric("helpfulness-pair"), Recipe(max_rationale_tokens=24))
    try:
        return list(await asyncio.gather(*map(judge.judge_pair, pairs)))
    finally:
        await llm.close()


def judge_all(model: str, pairs: Sequence[Pair]) -> list[Preference]:
    return asyncio.run(judging(model, pairs))


@pytest.mark.parametrize("labels", [("1", "2"), tuple(str(i) for i in range(1, 11))], ids=["two", "ten"])
def test_labels_equal_the_full_softmax_of_transformers(
    served: Served, pairs: list[Pair], labels: tuple[str, ...]
) -> None:
    """The tokenizer splits 10 into 1, 0 and a space from the digit after it."""
    tokenizer = AutoTokenizer.from_pretrained(served.model_dir)
    model = AutoModelForCausalLM.from_pretrained(served.model_dir).eval()

    async def read() -> list[LabelReading]:
        llm = open_llm(ModelRef.parse(served.judge))
        try:
            return list(await asyncio.gather(*(llm.label_logprobs(p.prompt, "Best:", labels) for p in pairs)))
        finally:
            await llm.close()

    for pair, reading in zip(pairs, asyncio.run(read()), strict=True):
        expected = label_probs(model, tokenizer, prompt_ids(tokenizer, pair.prompt, "Best:"), labels)
        assert reading.distribution.logprobs == pytest.approx(list(map(math.log, expected)), abs=1e-3)
        assert reading.distribution.mass == pytest.approx(sum(expected), rel=1e-3)
        assert not reading.distribution.censored


def test_a_pair_and_its_swap_get_complementary_labels(served: Served, pairs: list[Pair]) -> None:
    there = judge_all(served.judge, pairs)
    back = judge_all(served.judge, [p.swapped() for p in pairs])
    for one, other in zip(there, back, strict=True):
        assert one.p_a is not None and other.p_a is not None
        assert one.p_a + other.p_a == pytest.approx(1.0, abs=1e-4)


def test_vllm_and_transformers_give_the_same_labels(served: Served, pairs: list[Pair]) -> None:
    remote = judge_all(served.judge, pairs)
    local = judge_all(f"hf:{served.model_dir}", pairs)
    for one, other in zip(remote, local, strict=True):
        assert one.ab is not None and other.ab is not None
        assert one.ab.rationale == other.ab.rationale
        assert one.p_a == pytest.approx(other.p_a, abs=1e-3)


IN_FLIGHT = 4


def label_command(served: Served, shared_data: Path, output_dir: Path) -> list[str]:
    flags = {
        "judge": served.judge,
        "dataset": shared_data / "hh_helpful_1000.jsonl",
        "limit": 40,
        "max_rationale_tokens": 24,
        "max_in_flight": IN_FLIGHT,
        "output_dir": output_dir,
    }
    return [sys.executable, "-m", "rlaif.cli", "label", "pairs"] + [
        str(part) for name, value in flags.items() for part in (f"--{name}", value)
    ]


def labels_in(output_dir: Path) -> dict[str, float]:
    rows = pq.read_table(output_dir / "preferences.parquet").to_pylist()
    by_id = {row["id"]: row["chosen_prob"] for row in rows}
    assert len(by_id) == len(rows), "a pair was written twice"
    return by_id


def labels_bought(output_dir: Path) -> int:
    path = output_dir / "journal.sqlite"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
        tables = journal.execute("SELECT name FROM sqlite_master WHERE name = 'replies'").fetchall()
        count = "SELECT count(*) FROM replies WHERE kind = 'label'"
        return int(journal.execute(count).fetchone()[0]) if tables else 0


def answered(served: Served) -> int:
    """Requests that the server has completed since it was started."""
    with urllib.request.urlopen(served.url + "/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return round(sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:request_success_total")))


def test_labeling_killed_at_a_random_moment_goes_on_where_it_was(
    served: Served, shared_data: Path, tmp_path: Path
) -> None:
    start = answered(served)
    whole = label_command(served, shared_data, tmp_path / "whole")
    subprocess.run(whole, check=True, capture_output=True)
    between = answered(served)

    cut = label_command(served, shared_data, tmp_path / "cut")
    first = subprocess.Popen(
        cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while labels_bought(tmp_path / "cut") < 16:
        assert first.poll() is None, "labeling ended before it could be killed"
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert labels_bought(tmp_path / "cut") < 80
    subprocess.run(cut, check=True, capture_output=True)

    # A label is two requests here, so what was in flight may be paid again with what it had already been given.
    assert answered(served) - between <= between - start + 2 * IN_FLIGHT, "something was bought twice"
    expected, resumed = labels_in(tmp_path / "whole"), labels_in(tmp_path / "cut")
    assert resumed.keys() == expected.keys(), "something was lost"
    # A rationale whose label was still to be read is now known as text alone, no longer by the tokens it was
    # written in, and this judge of random weights writes words in unusual ones.
    changed = [i for i in expected if resumed[i] != pytest.approx(expected[i], abs=1e-3)]
    assert len(changed) <= IN_FLIGHT
