"""A reward model in vLLM's engine behind `rlaif serve`, beside transformers' forward of each conversation alone."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import torch
from google.rpc import code_pb2
from transformers import LlamaForSequenceClassification

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc
from reward_server.model import load_reward_model
from rlaif.chat import BUILTIN_TEMPLATES, encode_conversation
from rlaif.types import Message
from tests.reward_server import tiny
from tests.reward_server.fakes import conversation

from .conftest import needs_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600), needs_vllm]

POISON = "~"
BLOCK = 32
LIMIT = 700
MEAN, STD = 0.25, 4.0


class Running(NamedTuple):
    """`rlaif serve` as a process of its own, a client of it, and the model that it serves."""

    process: subprocess.Popen[str]
    stub: Any
    folder: Path


class Oracle:
    """Single-item float32 forwards of transformers."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = tiny.byte_tokenizer()
        self.tokenizer.chat_template = BUILTIN_TEMPLATES["plain"]
        self.model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1).eval()

    def ids(self, prompt: str, response: str) -> list[int]:
        turns = (Message("user", prompt), Message("assistant", response))
        return encode_conversation(self.tokenizer, turns, max_length=LIMIT, truncation="left").ids

    def score(self, prompt: str, response: str) -> float:
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([self.ids(prompt, response)])).logits
        return float(logits.item())


def save_model(folder: Path, **changes: object) -> Path:
    """Heads of 32 dimensions, the least that vLLM takes on a CPU; reading `POISON` makes everything NaN."""
    tiny.save_classifier(folder, hidden_size=64, max_position_embeddings=1024, **changes)
    model = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)  # scores that differ from text to text
        model.model.embed_tokens.weight[tiny.byte_tokenizer().convert_tokens_to_ids(POISON)] = math.nan
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id"):
        config.pop(name, None)  # as hub models that leave the number of outputs to the weights
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def serving(folder: Path, ready: Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "rlaif.cli", "serve", "--model", f"vllm:{folder}"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--ready_file", str(ready), "--max_length", str(LIMIT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        while not ready.is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        with grpc.insecure_channel(ready.read_text()) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]
            yield Running(process, stub, folder)
    finally:
        process.kill()
        process.wait()


def engines(server: int) -> list[int]:
    """The processes that a server has started, from whichever thread, but for Python's own and the watcher."""
    found = [
        int(i)
        for task in Path(f"/proc/{server}/task").iterdir()
        for i in (task / "children").read_text().split()
    ]
    others = (b"resource_tracker", b"rlaif.orphans")
    return [pid for pid in found if not any(o in Path(f"/proc/{pid}/cmdline").read_bytes() for o in others)]


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked for its exit code has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose PAD is its EOS: transformers steps over the EOS that ends every conversation."""
    folder = save_model(tmp_path_factory.mktemp("model") / "rm", pad_token_id=1)
    card = {"mean": MEAN, "std": STD, "source": "a test", "max_length": 1000}
    (folder / "reward_model.json").write_text(json.dumps(card))
    with serving(folder, folder.parent / "ready") as running:
        yield running
        engine = engines(running.process.pid)
        assert engine
        running.process.send_signal(signal.SIGTERM)
        out, err = running.process.communicate(timeout=120)
    assert running.process.returncode == 0, err
    assert "still in flight" not in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in engine), "the engine outlives the server"


@pytest.fixture(scope="module")
def oracle(served: Running) -> Oracle:
    return Oracle(served.folder)


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices("abcdefgh ijklmnop qrstuvwxyz.", k=length))


def request(chats: Sequence[tuple[str, str]], **fields: Any) -> pb.ScoreRequest:
    items = [pb.ScoreItem(id=i, conversation=conversation(*chat)) for i, chat in enumerate(chats)]
    return pb.ScoreRequest(items=items, **fields)


def raw(answer: pb.ScoreResponse) -> list[float]:
    assert [o.WhichOneof("outcome") for o in answer.outcomes] == ["score"] * len(answer.outcomes)
    return [o.score.raw for o in answer.outcomes]


def test_scores_are_those_of_each_conversation_alone_in_transformers(served: Running, oracle: Oracle) -> None:
    rng = random.Random(0)
    chats = [(text(rng, rng.randint(1, 300)), text(rng, rng.randint(0, 390))) for _ in range(60)]
    expected = [oracle.score(*chat) for chat in chats]
    assert max(expected) - min(expected) > 1

    def send(order: list[int]) -> None:
        answer = served.stub.Score(request([chats[i] for i in order]), timeout=120)
        assert raw(answer) == pytest.approx([expected[i] for i in order], abs=1e-4)
        for i, outcome in zip(order, answer.outcomes, strict=True):
            assert outcome.score.normalized == pytest.approx((outcome.score.raw - MEAN) / STD)
            assert outcome.score.tokens == len(oracle.ids(*chats[i]))

    send(list(range(60)))
    with ThreadPoolExecutor(8) as clients:  # other batches, with a prefix cache that knows the texts by now
        list(clients.map(send, [rng.sample(range(60), rng.randint(1, 30)) for _ in range(12)]))


def test_responses_to_one_prompt_find_it_in_the_cache(served: Running, oracle: Oracle) -> None:
    rng = random.Random(1)
    prompt = text(rng, 300)
    chats = [(prompt, text(rng, 40)) for _ in range(8)]
    answer = served.stub.Score(request(chats), timeout=120)
    assert raw(answer) == pytest.approx([oracle.score(*chat) for chat in chats], abs=1e-4)
    shared = 301 // BLOCK * BLOCK
    assert answer.usage.cached_tokens >= 7 * shared
    again = served.stub.Score(request(chats[:1]), timeout=120)
    assert again.usage.cached_tokens >= shared
    assert raw(again) == pytest.approx(raw(answer)[:1], abs=1e-4)


def test_a_comparison_is_the_sigmoid_of_the_difference(served: Running, oracle: Oracle) -> None:
    item = pb.CompareItem(
        id=1, prompt=conversation("which?"), response_a="this one", response_b="that one, sir"
    )
    compared = served.stub.Compare(pb.CompareRequest(items=[item]), timeout=120).outcomes[0].comparison
    difference = oracle.score("which?", "this one") - oracle.score("which?", "that one, sir")
    assert compared.p_a == pytest.approx(1 / (1 + math.exp(-difference)), abs=1e-4)


def test_a_deterministic_score_is_the_same_to_the_last_bit_under_any_load(served: Running) -> None:
    rng = random.Random(2)
    chat = (text(rng, 250), text(rng, 100))
    others = [[(text(rng, 20), text(rng, rng.randint(1, 300))) for _ in range(8)] for _ in range(6)]
    found, cached = set(), 0
    with ThreadPoolExecutor(4) as clients:
        load = [clients.submit(served.stub.Score, request(chats), timeout=120) for chats in others]
        for _ in range(5):
            answer = served.stub.Score(request([chat], deterministic=True), timeout=120)
            found.update(raw(answer))
            cached += answer.usage.cached_tokens
        assert all(raw(each.result()) for each in load)
    assert len(found) == 1
    assert cached == 0


def test_a_score_that_is_not_a_number_fails_that_item_alone(served: Running, oracle: Oracle) -> None:
    rng = random.Random(3)
    chats = [(text(rng, 60), text(rng, 60)) for _ in range(6)]
    chats[2] = (text(rng, 60), f"bad {POISON} text")
    for _ in range(3):  # again, with whatever the poisoned item left in the cache
        outcomes = served.stub.Score(request(chats), timeout=120).outcomes
        assert outcomes[2].error.code == code_pb2.INTERNAL
        assert "nan" in outcomes[2].error.message
        for i in (0, 1, 3, 4, 5):
            assert outcomes[i].score.raw == pytest.approx(oracle.score(*chats[i]), abs=1e-4)


def test_a_long_conversation_is_refused_or_loses_the_start_of_its_prompt(
    served: Running, oracle: Oracle
) -> None:
    chats = [("x" * 900 + "the end", "fine"), ("short", "fine")]
    refused = served.stub.Score(request(chats), timeout=120).outcomes
    assert refused[0].error.code == code_pb2.OUT_OF_RANGE and str(LIMIT) in refused[0].error.message
    assert refused[1].WhichOneof("outcome") == "score"
    answer = served.stub.Score(request(chats, truncation=pb.TRUNCATION_LEFT), timeout=120)
    assert answer.outcomes[0].score.truncated and answer.outcomes[0].score.tokens == LIMIT
    assert raw(answer)[0] == pytest.approx(oracle.score(*chats[0]), abs=1e-4)


def test_the_version_says_that_another_engine_computes(served: Running) -> None:
    info = served.stub.GetInfo(pb.GetInfoRequest(), timeout=60)
    weights = load_reward_model(str(served.folder), device="cpu", max_length=LIMIT).version
    assert info.model.version and info.model.version != weights
    assert (info.normalization.center, info.normalization.scale) == (MEAN, STD)
    assert info.limits.max_tokens_per_item == LIMIT


def test_an_engine_that_dies_fails_what_waits_and_ends_the_server(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "rm")
    rng = random.Random(4)
    chats = [(text(rng, 100), text(rng, 500)) for _ in range(100)]

    def score_until_one_fails() -> set[int]:
        while True:
            outcomes = running.stub.Score(request(chats), timeout=120).outcomes
            if any(o.WhichOneof("outcome") == "error" for o in outcomes):
                return {o.error.code for o in outcomes}

    with serving(folder, tmp_path / "ready") as running, ThreadPoolExecutor(1) as client:
        first = raw(running.stub.Score(request(chats[:2]), timeout=120))
        assert first == pytest.approx([Oracle(folder).score(*chat) for chat in chats[:2]], abs=1e-4)
        failing = client.submit(score_until_one_fails)
        for pid in engines(running.process.pid):
            os.kill(pid, signal.SIGKILL)
        codes = failing.result(timeout=60)
        _, err = running.process.communicate(timeout=60)
    assert code_pb2.UNAVAILABLE in codes and codes <= {code_pb2.OK, code_pb2.UNAVAILABLE}
    assert running.process.returncode == 5
    assert f"rlaif: the engine of vllm:{folder} has ended" in err


def test_an_engine_does_not_outlive_a_server_that_is_killed(tmp_path: Path) -> None:
    with serving(save_model(tmp_path / "rm"), tmp_path / "ready") as running:
        engine = engines(running.process.pid)
        assert engine
        running.process.kill()
        running.process.wait()
        until = time.monotonic() + 30
        while not all(map(gone, engine)):
            assert time.monotonic() < until
            time.sleep(0.1)


def test_what_is_no_reward_model_is_one_line_before_an_engine_starts(tmp_path: Path) -> None:
    model = tiny.save_language_model(tmp_path / "lm")
    done = subprocess.run(
        [sys.executable, "-m", "rlaif.cli", "serve", "--model", f"vllm:{model}", "--port", "0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 4
    assert "no trained scalar head" in done.stderr and "Traceback" not in done.stderr
