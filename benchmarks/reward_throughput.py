"""Scored items per second of `rlaif serve` against the raw batched forward on the same weights.

The raw forward has every advantage: it is in this process, its inputs are tokenised beforehand, it knows the whole
load, sorts it by length and pads batches of the size that a first round found best. The server gets text over gRPC.
Both take turns, so that a busy machine is busy for both.

    OMP_NUM_THREADS=1 python benchmarks/reward_throughput.py
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import harness
import reward_load as load
import torch

from reward_server.model import RewardModel, load_reward_model
from reward_server.passes import pad
from reward_server.scorers.base import ScoreTask
from reward_server.scorers.learned import LearnedScorer
from rlaif.types import user_prompt, with_response

BATCHES = (1, 2, 4, 8, 16, 32)


class Raw:
    """The padded forward of transformers over sequences sorted by length."""

    def __init__(self, model: Path) -> None:
        self._loaded: RewardModel = load_reward_model(str(model), device="cpu")
        self._scorer = LearnedScorer("raw", self._loaded)

    def tokenize(self, chats: Sequence[load.Chat]) -> list[tuple[int, ...]]:
        """Token ids as the server makes them."""
        tasks = [ScoreTask(with_response(user_prompt(c.prompt), c.response)) for c in chats]
        return [self._scorer.prepare(task).sequences[0] for task in tasks]

    @torch.inference_mode()
    def scores(self, sequences: Sequence[tuple[int, ...]], batch: int) -> list[float]:
        """Raw scores in order."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        found = [0.0] * len(sequences)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids, mask = pad([sequences[i] for i in rows], 2)
            logits = self._loaded.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i, score in zip(rows, logits.squeeze(-1).tolist(), strict=True):
                found[i] = score
        return found


class Scenario:
    """A load, sent to both in turns."""

    def __init__(
        self, name: str, messages: Sequence[Sequence[load.Chat]], in_flight: int, target: float
    ) -> None:
        self.name = name
        self.messages = messages
        self.in_flight = in_flight
        self.target = target
        self.chats = [chat for message in messages for chat in message]
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.server_rate: list[float] = []
        self.raw_rate: list[float] = []
        self.apart = 0.0

    def prepare(self, raw: Raw) -> None:
        """Tokenise, and find the raw forward's best batch by processor time."""
        self.sequences = raw.tokenize(self.chats)
        self.tokens = sum(map(len, self.sequences))
        sizes = [b for b in BATCHES if b <= len(self.sequences)]

        def cost(batch: int) -> float:
            times = []
            for _ in range(2):
                started = time.process_time()
                raw.scores(self.sequences, batch)
                times.append(time.process_time() - started)
            return min(times)

        self.batch = min(sizes, key=cost)

    def round(self, raw: Raw, server: load.RewardServerProcess) -> None:
        """Both once, the server between two halves of the raw forward."""
        raw_wall = raw_cpu = 0.0
        expected: list[float] = []
        for part in range(2):
            started, cpu = time.monotonic(), time.process_time()
            expected = raw.scores(self.sequences, self.batch)
            raw_wall += (time.monotonic() - started) / 2
            raw_cpu += (time.process_time() - cpu) / 2
            if part:
                continue
            started, cpu = time.monotonic(), server.cpu_s()
            found = asyncio.run(load.send_all(server.address, self.messages, self.in_flight))
            served_wall, served_cpu = time.monotonic() - started, server.cpu_s() - cpu
        self.wall.append(raw_wall / served_wall)
        self.cpu.append(raw_cpu / served_cpu)
        self.server_rate.append(len(self.chats) / served_wall)
        self.raw_rate.append(len(self.chats) / raw_wall)
        self.apart = max(self.apart, *(abs(a - b) for a, b in zip(expected, found, strict=True)))


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--items", type=int, default=96, help="items of a scenario with single chats")
    args = parser.parse_args()
    load.alone()
    report = harness.Report.begin("reward_throughput", "The reward server against the raw forward, CPU")
    rng = random.Random(0)
    mixed = load.chats(rng, args.items)
    groups = [load.group(rng, 8, 512, 256) for _ in range(2)]
    scenarios = [
        Scenario(
            "16 items a message, 4 in flight", [mixed[i : i + 16] for i in range(0, len(mixed), 16)], 4, 0.95
        ),
        Scenario("1 item a call, 32 in flight", [[chat] for chat in mixed], 32, 0.90),
        Scenario("8 responses of 256 to a prompt of 512 tokens", groups, 2, 1.8),
    ]
    padding: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = load.save_reward_model(folder / "model")
        raw = Raw(model)
        for scenario in scenarios:
            scenario.prepare(raw)
        with load.RewardServerProcess(folder, model) as server:
            for _ in range(args.rounds):
                for scenario in scenarios:
                    before = server.counters()
                    scenario.round(raw, server)
                    after = server.counters()
                    computed, real = (
                        after[name] - before[name]
                        for name in ("rlaif_padded_tokens_total", "rlaif_tokens_total")
                    )
                    padding[scenario.name] = computed / real
    body = harness.table(
        (
            "load",
            "server ÷ raw, wall",
            "raw ÷ server, processor time",
            "server items/s",
            "raw items/s",
            "raw batch",
            "tokens an item",
            "computed ÷ real tokens",
        ),
        [
            (
                s.name,
                harness.show(harness.spread(s.wall), 2),
                harness.show(harness.spread(s.cpu), 2),
                harness.show(harness.spread(s.server_rate), 1),
                harness.show(harness.spread(s.raw_rate), 1),
                s.batch,
                round(s.tokens / len(s.chats)),
                f"{padding[s.name]:.3f}",
            )
            for s in scenarios
        ],
    )
    body += (
        f"\n\n{args.rounds} rounds in turns; medians, least and greatest. Qwen3 classifier, 14 M parameters, "
        "float32, one thread each. Lognormal lengths (sigma 0.7) in the first two loads. The processor time of the "
        f"server includes gRPC and tokenising. Largest difference between a served and a raw score: "
        f"{max(s.apart for s in scenarios):.1e}."
    )
    checks = {
        f"{s.name}: at least {s.target} of the raw forward": statistics.median(s.wall) >= s.target
        for s in scenarios
    }
    checks["padding on lognormal lengths at most 1.10"] = max(padding[s.name] for s in scenarios[:2]) <= 1.10
    checks["scores equal to 1e-5"] = max(s.apart for s in scenarios) <= 1e-5
    figures = {
        s.name: {
            "wall_ratio": s.wall,
            "cpu_ratio": s.cpu,
            "server": s.server_rate,
            "raw": s.raw_rate,
            "batch": s.batch,
        }
        for s in scenarios
    }
    return report.finish({"figures": figures, "padding": padding}, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
