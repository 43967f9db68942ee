"""The reward server beside the servers that people use: vLLM's `/classify` and OpenRLHF's `serve_rm`.

    make .venv-vllm/.ready && benchmarks/peers/setup.sh .cache/benchmarks
    OMP_NUM_THREADS=1 python benchmarks/reward_peers.py

All serve the same weights on one thread each and take turns with the same texts, new ones in every round, so that a
prefix cache holds what a round's texts share and not the texts themselves. Against vLLM in float32; against OpenRLHF,
which has no float32, in bfloat16.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp
import harness
import reward_load as load

START_LIMIT_S = 300
Messages = Sequence[Sequence[load.Chat]]
Send = Callable[[Messages, int], Awaitable[list[float]]]

ENGINE = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS counts
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class HttpServer:
    """A peer's server in a process of its own; use as a context manager."""

    def __init__(self, command: Sequence[str], log: Path, port: int, probe: str, **env: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command = command
        self._log = log
        self._probe = self.url + probe
        self._env = harness.environment(CUDA_VISIBLE_DEVICES="", **env)

    def __enter__(self) -> HttpServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._env)
        until = time.monotonic() + START_LIMIT_S
        while True:
            try:
                with urllib.request.urlopen(self._probe, timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > until:
                    tail = self._log.read_text(errors="replace")[-2000:]
                    raise SystemExit(f"{' '.join(self._command)}\ndid not start:\n{tail}") from None
                time.sleep(0.5)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()


def rendered(chat: load.Chat) -> str:
    """The chat as the model's template writes it."""
    return f"<s>{chat.prompt}{chat.response}</s>"


def vllm_server(python: Path, model: Path, log: Path, *, cache: bool) -> HttpServer:
    """The HTTP server of vLLM as it starts by default, compiled; small blocks, so that short prompts are shared too."""
    port = load.free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "rm",
        "--runner", "pooling", "--convert", "classify", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--block-size", "32", "--disable-uvicorn-access-log",
        "--enable-prefix-caching" if cache else "--no-enable-prefix-caching",
    ]  # fmt: skip
    return HttpServer(command, log, port, "/health", **ENGINE)


def openrlhf_server(python: Path, model: Path, log: Path) -> HttpServer:
    """OpenRLHF's own `serve_rm`, unchanged, with an import stub for flash-attn and the attention of torch."""
    port = load.free_port()
    command = [
        str(python), "-m", "openrlhf.cli.serve_rm", "--reward.model_name_or_path", str(model),
        "--ds.attn_implementation", "sdpa", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    return HttpServer(
        command, log, port, "/docs", PYTHONPATH=str(harness.HERE / "peers" / "openrlhf" / "stubs")
    )


def grpc_client(server: load.RewardServerProcess) -> Send:
    """Ours."""
    return lambda messages, in_flight: load.send_all(server.address, messages, in_flight)


def http_client(url: str, body: Callable[[list[str]], Any], scores: Callable[[Any], list[float]]) -> Send:
    """A client that keeps its connections, so many messages in flight."""

    async def send_all(messages: Messages, in_flight: int) -> list[float]:
        gate = asyncio.Semaphore(in_flight)
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout, raise_for_status=True) as session:

            async def send(chats: Sequence[load.Chat]) -> list[float]:
                async with gate, session.post(url, json=body([rendered(c) for c in chats])) as answer:
                    return scores(await answer.json())

            answers = await asyncio.gather(*map(send, messages))
        return [score for answer in answers for score in answer]

    return send_all


def classify_client(server: HttpServer) -> Send:
    """The `/classify` of vLLM on text that bears its special tokens, raw logits."""
    return http_client(
        f"{server.url}/classify",
        lambda texts: {"model": "rm", "input": texts, "use_activation": False, "add_special_tokens": False},
        lambda answer: [item["probs"][0] for item in answer["data"]],
    )


def get_reward_client(server: HttpServer) -> Send:
    """OpenRLHF's `/get_reward`."""
    return http_client(
        f"{server.url}/get_reward", lambda texts: {"query": texts}, lambda answer: list(answer["rewards"])
    )


@dataclass
class Load:
    """Texts of a kind, and how they are sent."""

    name: str
    in_flight: int
    make: Callable[[random.Random], Messages]


@dataclass
class Comparison:
    """Ours beside one peer under one load."""

    load: str
    ours: str
    peer: str
    target: float
    ratio: list[float] = field(default_factory=list)

    @property
    def check(self) -> str:
        """What must hold, in words."""
        return f"{self.load}: {self.ours} at least {self.target} of {self.peer}"


OURS, OURS_VLLM, OURS_BF16 = "ours (torch)", "ours (vllm:)", "ours (torch), bf16"
OFF, ON, OPENRLHF = "/classify, no prefix cache", "/classify, prefix cache", "serve_rm, bf16"


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=64, help="chats of a load of single chats")
    parser.add_argument("--torch_compile", action="store_true", help="compile our torch scorer in float32")
    parser.add_argument("--vllm_python", type=Path, default=harness.HERE.parent / ".venv-vllm/bin/python")
    args = parser.parse_args()
    load.alone()
    report = harness.Report.begin("reward_peers", "The reward server beside vLLM and OpenRLHF, CPU")

    def singles(rng: random.Random) -> Messages:
        return [[chat] for chat in load.chats(rng, args.items)]

    def sixteens(rng: random.Random) -> Messages:
        chats = load.chats(rng, args.items)
        return [chats[i : i + 16] for i in range(0, len(chats), 16)]

    loads = (
        Load("1 chat a call, 32 in flight", 32, singles),
        Load("16 chats a message, 4 in flight", 4, sixteens),
        Load(
            "8 responses of 256 to a prompt of 512 tokens",
            2,
            lambda rng: [load.group(rng, 8, 512, 256) for _ in range(2)],
        ),
    )
    mixed, batched, grouped = (each.name for each in loads)
    comparisons = [
        *(
            Comparison(name, ours, peer, target)
            for ours in (OURS, OURS_VLLM)
            for peer, target in ((OFF, 1.1), (ON, 1.0))
            for name in (mixed, batched, grouped)
        ),
        Comparison(mixed, OURS_BF16, OPENRLHF, 1.15),
    ]
    rates: dict[tuple[str, str], list[float]] = {}
    apart: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as running:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = load.save_reward_model(folder / "model")
        os.environ.update(ENGINE)
        python = args.environments / "openrlhf" / "bin" / "python"
        served = {
            OURS: load.RewardServerProcess(
                folder / "ours", model, **({"torch_compile": True} if args.torch_compile else {})
            ),
            OURS_BF16: load.RewardServerProcess(folder / "bf16", model, dtype="bfloat16"),
            OURS_VLLM: load.RewardServerProcess(
                folder / "vllm", f"vllm:{model}?enforce_eager=false", python=str(args.vllm_python)
            ),
        }
        peers = {
            OFF: vllm_server(args.vllm_python, model, folder / "off.log", cache=False),
            ON: vllm_server(args.vllm_python, model, folder / "on.log", cache=True),
            OPENRLHF: openrlhf_server(python, model, folder / "openrlhf.log"),
        }
        with ThreadPoolExecutor() as pool:  # they start together
            list(pool.map(running.enter_context, [*served.values(), *peers.values()]))
        clients: dict[str, Send] = {name: grpc_client(server) for name, server in served.items()}
        clients |= {OFF: classify_client(peers[OFF]), ON: classify_client(peers[ON])}
        clients[OPENRLHF] = get_reward_client(peers[OPENRLHF])
        for number in range(-1, args.rounds):  # the first one warms up
            rng = random.Random(
                f"round {number}"
            )  # a number would seed -1 and 1 alike, and caches know a text again
            for each in loads:
                names = {n for c in comparisons if c.load == each.name for n in (c.ours, c.peer)}
                messages = each.make(rng)[: 2 if number < 0 else None]
                found: dict[str, list[float]] = {}
                for name in rng.sample(sorted(names), len(names)):
                    started = time.monotonic()
                    found[name] = asyncio.run(clients[name](messages, each.in_flight))
                    rate = len(found[name]) / (time.monotonic() - started)
                    if number >= 0:
                        rates.setdefault((each.name, name), []).append(rate)
                for name, scores in found.items():
                    worst = max(abs(a - b) for a, b in zip(scores, found[OURS], strict=True))
                    apart[name] = max(apart.get(name, 0.0), worst)
    for c in comparisons:
        pairs = zip(rates[c.load, c.ours], rates[c.load, c.peer], strict=True)
        c.ratio = [ours / peer for ours, peer in pairs]
    body = harness.table(
        ("load", "server", "sequences/s"),
        [(name, server, harness.show(harness.spread(r), 1)) for (name, server), r in sorted(rates.items())],
    )
    body += "\n\n" + harness.table(
        ("load", "ours", "peer", "ours ÷ peer", "target"),
        [(c.load, c.ours, c.peer, harness.show(harness.spread(c.ratio), 2), c.target) for c in comparisons],
    )
    flags = "Ours (torch) with --torch_compile. " if args.torch_compile else ""
    distances = ", ".join(f"{name} {worst:.1e}" for name, worst in sorted(apart.items()) if name != OURS)
    body += (
        f"\n\n{args.rounds} rounds in turns, in an order drawn for each; medians, least and greatest. Qwen3 "
        "classifier, 14 M parameters, one thread of each server for numerical work, float32 but for the two marked "
        f"bf16. {flags}Lognormal lengths (sigma 0.7) but for the groups. vLLM compiled, blocks of 32 tokens. Largest "
        f"differences from our float32 scores: {distances}."
    )
    checks = {c.check: harness.spread(c.ratio)["median"] >= c.target for c in comparisons}
    checks["float32 scores equal to 1e-4"] = max(apart[name] for name in (OURS_VLLM, OFF, ON)) <= 1e-4
    figures = {
        "rates": {f"{name}; {server}": r for (name, server), r in rates.items()},
        "ratios": {f"{c.load}; {c.ours}; {c.peer}": c.ratio for c in comparisons},
        "apart": apart,
    }
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
