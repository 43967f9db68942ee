"""The RLAIF recipe through a server that nobody here wrote: vLLM's, with real pairs."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from labeler.judge import Judge
from labeler.llm import LLM, Generation, LabelReading, open_llm
from labeler.rubric import load_rubric
from rlaif.models import ModelRef
from rlaif.records import Quarantine, read_pairs
from rlaif.types import Conversation, Message, Pair, Preference, to_dicts

from .conftest import Served

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]


class Recorder:
    """An LLM that passes everything on to another and keeps what was read out."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.readings: list[tuple[Conversation, str, Sequence[str], LabelReading]] = []

    @property
    def name(self) -> str:
        return self.llm.name

    @property
    def version(self) -> str:
        return self.llm.version

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return self.llm.special_tokens

    async def generate(self, messages: Conversation, prefix: str = "", **options: Any) -> Generation:
        return await self.llm.generate(messages, prefix, **options)

    async def label_logprobs(
        self, messages: Conversation, prefix: str, labels: Sequence[str]
    ) -> LabelReading:
        reading = await self.llm.label_logprobs(messages, prefix, labels)
        self.readings.append((messages, prefix, labels, reading))
        return reading

    async def close(self) -> None:
        await self.llm.close()


@pytest.fixture(scope="module")
def pairs(shared_data: Path) -> list[Pair]:
    return list(islice(read_pairs(shared_data / "hh_helpful_1000.jsonl", Quarantine(None)), 6))


def judge_all(model: str, pairs: Sequence[Pair]) -> tuple[list[Preference], Recorder]:
    async def run() -> tuple[list[Preference], Recorder]:
        recorder = Recorder(open_llm(ModelRef.parse(model)))
        judge = Judge(recorder, load_rubric("helpfulness-pair"), max_rationale_tokens=24)
        try:
            return list(await asyncio.gather(*map(judge.judge_pair, pairs))), recorder
        finally:
            await recorder.close()

    return asyncio.run(run())


def test_label_logprobs_equal_the_models_own_log_softmax(served: Served, pairs: list[Pair]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.model_dir)
    model = AutoModelForCausalLM.from_pretrained(served.model_dir).eval()
    _, recorder = judge_all(served.judge, pairs)

    assert len(recorder.readings) == 2 * len(pairs)
    for messages, prefix, labels, reading in recorder.readings:
        turns = to_dicts((*messages, Message("assistant", prefix)))
        ids = tokenizer.apply_chat_template(turns, continue_final_message=True, return_dict=False)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        wanted = [float(expected[tokenizer.convert_tokens_to_ids(label)]) for label in labels]
        assert reading.distribution.logprobs == pytest.approx(wanted, abs=1e-3)
        assert reading.distribution.mass == pytest.approx(sum(map(math.exp, wanted)), rel=1e-3)
        assert not reading.distribution.censored


def test_a_pair_and_its_swap_get_complementary_labels(served: Served, pairs: list[Pair]) -> None:
    there, _ = judge_all(served.judge, pairs)
    back, _ = judge_all(served.judge, [p.swapped() for p in pairs])
    for one, other in zip(there, back, strict=True):
        assert one.p_a is not None and other.p_a is not None
        assert one.p_a + other.p_a == pytest.approx(1.0, abs=1e-4)


def test_vllm_and_transformers_give_the_same_labels(served: Served, pairs: list[Pair]) -> None:
    remote, _ = judge_all(served.judge, pairs)
    local, _ = judge_all(f"hf:{served.model_dir}", pairs)
    for one, other in zip(remote, local, strict=True):
        assert one.ab is not None and other.ab is not None
        assert one.ab.rationale == other.ab.rationale
        assert one.p_a == pytest.approx(other.p_a, abs=1e-3)


def label_command(served: Served, shared_data: Path, output_dir: Path) -> list[str]:
    flags = {
        "judge": served.judge,
        "dataset": shared_data / "hh_helpful_1000.jsonl",
        "limit": 40,
        "max_rationale_tokens": 24,
        "max_in_flight": 4,
        "output_dir": output_dir,
    }
    return [sys.executable, "-m", "rlaif.cli", "label", "pairs"] + [
        str(part) for name, value in flags.items() for part in (f"--{name}", value)
    ]


def labels(output_dir: Path) -> dict[str, float]:
    rows = pq.read_table(output_dir / "preferences.parquet").to_pylist()
    by_id = {row["id"]: row["chosen_prob"] for row in rows}
    assert len(by_id) == len(rows), "a pair was written twice"
    return by_id


def test_labeling_killed_at_a_random_moment_goes_on_where_it_was(
    served: Served, shared_data: Path, tmp_path: Path
) -> None:
    whole = label_command(served, shared_data, tmp_path / "whole")
    subprocess.run(whole, check=True, capture_output=True)

    cut = label_command(served, shared_data, tmp_path / "cut")
    first = subprocess.Popen(
        cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    journal = tmp_path / "cut" / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert first.poll() is None, "labeling ended before it could be killed"
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = journal.read_bytes().count(b"\n")
    subprocess.run(cut, check=True, capture_output=True)

    keys = [json.loads(line)["key"] for line in journal.read_text().splitlines()]
    assert before < 40 == len(keys) == len(set(keys)), "something was bought twice or lost"
    expected = labels(tmp_path / "whole")
    assert labels(tmp_path / "cut") == pytest.approx(expected, abs=1e-3)
