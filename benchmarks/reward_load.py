"""What the benchmarks of the reward server share: a model, a server process, chats, and a client that counts."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import harness
import torch
from reward_callers import Chat, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForSequenceClassification

from protos.rlaif.reward.v1 import reward_pb2 as pb
from protos.rlaif.reward.v1 import reward_pb2_grpc


def save_reward_model(folder: Path) -> Path:
    """A Qwen3 classifier of 14 M random weights, 7 layers of width 384, whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=7,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        num_labels=1,
        pad_token_id=2,
    )
    Qwen3ForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def chats(rng: random.Random, count: int, *, median: float = 110.0, sigma: float = 0.7) -> list[Chat]:
    """Unique chats whose lengths are lognormal, at most 1,500 tokens: a third prompt, the rest response."""
    found = []
    for _ in range(count):
        length = min(1500, max(12, int(median * rng.lognormvariate(0.0, sigma))))
        found.append(Chat(text(rng, length // 3), text(rng, length - length // 3)))
    return found


def group(rng: random.Random, count: int, prompt: int, response: int) -> list[Chat]:
    """So many responses to one prompt, both of the lengths given."""
    asked = text(rng, prompt)
    return [Chat(asked, text(rng, response)) for _ in range(count)]


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RewardServerProcess:
    """`rlaif serve` in a process of its own; use as a context manager.

    Args:
        folder: for its files.
        model: what it serves.
        python: the interpreter, if not this one.
        flags: of the command; True for those without a value.
    """

    def __init__(
        self, folder: Path, model: Path | str, *, python: str = sys.executable, **flags: Any
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._ready = folder / "address"
        self._ready.unlink(missing_ok=True)
        self._log = folder / "serve.log"
        self._metrics_port = free_port()
        own = {"port": 0, "ready_file": self._ready, "metrics_port": self._metrics_port, **flags}
        arguments = [f"--{name}" if value is True else f"--{name}={value}" for name, value in own.items()]
        self._command = [python, *harness.rlaif("serve", f"--model={model}", *arguments)[1:]]

    def __enter__(self) -> RewardServerProcess:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=harness.environment(CUDA_VISIBLE_DEVICES="")
            )
        while not self._ready.exists():
            if self.process.poll() is not None:
                raise SystemExit(f"rlaif serve did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.1)
        self.address = self._ready.read_text()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()

    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mib(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def counters(self) -> dict[str, float]:
        """Prometheus counters without labels."""
        url = f"http://127.0.0.1:{self._metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#") and "{" not in line)
        return {name: float(value) for name, value in pairs}


async def send_all(address: str, messages: Sequence[Sequence[Chat]], in_flight: int) -> list[float]:
    """Score every chat, so many messages in flight; raw scores in order.

    Raises:
        SystemExit: an item has no score.
    """
    gate = asyncio.Semaphore(in_flight)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)  # type: ignore[no-untyped-call]

        async def send(chats: Sequence[Chat]) -> list[float]:
            async with gate:
                request = pb.ScoreRequest(items=[chat.message(i) for i, chat in enumerate(chats)])
                answer = await stub.Score(request)
            failed = [o.error.message for o in answer.outcomes if o.WhichOneof("outcome") != "score"]
            if failed:
                raise SystemExit(f"an item has no score: {failed[0]}")
            return [o.score.raw for o in answer.outcomes]

        answers = await asyncio.gather(*map(send, messages))
    return [score for answer in answers for score in answer]


def alone() -> None:
    """One thread for numerical work in this process, as in the server's."""
    torch.set_num_threads(1)
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit(
            f"run it as OMP_NUM_THREADS=1 {Path(sys.argv[0]).name}: the server has one thread too"
        )
