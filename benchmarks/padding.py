"""What padding costs a forward and backward pass, and whether packing would be faster, on CPU.

    OMP_NUM_THREADS=1 python benchmarks/padding.py

The same 64 prompts and responses are read in three ways: padded as one batch would be, prompts on the left and
responses on the right; in the trainer's batches; packed one after the other into long rows, with attention within
each. All give the same log-probabilities.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
import trainer_load as load
from torch import Tensor

from policy_trainer.batching import collate, forward_batches, length_buckets
from policy_trainer.logprobs import gather_logprobs, logprobs_from_hidden, token_logprobs
from policy_trainer.models import load_policy

ROWS = 64
BUDGET = 8192
PACK = 512
Pair = tuple[list[int], list[int]]


def given(seed: int) -> list[Pair]:
    """Prompts and responses as token ids."""
    rng = random.Random(seed)

    def ids(text: str) -> list[int]:
        return [int(word[1:]) + len(load.SPECIAL) for word in text.split()]

    return [(ids(load.prompt(rng, 48, 0.7)), [*ids(load.response(rng)), load.EOS]) for _ in range(ROWS)]


def as_one(model: Any, pairs: Sequence[Pair]) -> tuple[float, int]:
    """In batches of up to `BUDGET` tokens, prompts padded on the left, responses on the right."""
    total, tokens = 0.0, 0
    lengths = [len(p) + len(r) for p, r in pairs]
    for rows in length_buckets(lengths, max_rows=ROWS, max_tokens=BUDGET):
        batch = collate([pairs[i][0] for i in rows], [pairs[i][1] for i in rows])
        positions = batch.attention_mask.cumsum(1) - batch.attention_mask
        hidden = model.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, -batch.response_len - 1 : -1]
        found = (
            logprobs_from_hidden(model, hidden, batch.response_ids, 1.0).logprobs[batch.response_mask].sum()
        )
        found.backward()
        total, tokens = total + found.item(), tokens + batch.input_ids.numel()
    return total, tokens


def in_batches(model: Any, pairs: Sequence[Pair]) -> tuple[float, int]:
    """As the trainer reads them."""
    total, tokens = 0.0, 0
    lengths = [len(p) + len(r) for p, r in pairs]
    for rows in forward_batches(lengths, max_tokens=BUDGET, device=torch.device("cpu")):
        batch = collate([pairs[i][0] for i in rows], [pairs[i][1] for i in rows])
        read = token_logprobs(model, batch.input_ids, batch.attention_mask, batch.response_len, 1.0)
        found = read.logprobs[batch.response_mask].sum()
        found.backward()
        total, tokens = total + found.item(), tokens + len(rows) * max(lengths[i] for i in rows)
    return total, tokens


def packed(model: Any, pairs: Sequence[Pair]) -> tuple[float, int]:
    """One after the other in rows of up to `PACK` tokens; positions that begin anew keep them apart."""
    total, tokens = 0.0, 0
    packs: list[list[Pair]] = [[]]
    for pair in pairs:
        if packs[-1] and sum(len(p) + len(r) for p, r in [*packs[-1], pair]) > PACK:
            packs.append([])
        packs[-1].append(pair)
    for pack in packs:
        ids = torch.tensor([[i for p, r in pack for i in (*p, *r)]])
        positions = torch.tensor([[i for p, r in pack for i in range(len(p) + len(r))]])
        at, start = [], 0
        for p, r in pack:
            at += range(start + len(p), start + len(p) + len(r))
            start += len(p) + len(r)
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        targets = torch.tensor(at)
        logits: Tensor = model.lm_head(hidden[targets - 1])
        found = gather_logprobs(logits, ids[0, targets], 1.0).sum()
        found.backward()
        total, tokens = total + found.item(), tokens + ids.numel()
    return total, tokens


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = harness.Report.begin("padding", "What padding costs a forward and backward pass, CPU")
    with tempfile.TemporaryDirectory() as temporary:
        load.save_policy(Path(temporary))
        model, _ = load_policy(temporary)
    ways: dict[str, Callable[[Any, Sequence[Pair]], tuple[float, int]]] = {
        "padded left and right": as_one,
        "the trainer's batches": in_batches,
        f"packed, rows of {PACK}": packed,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[float]] = {name: [] for name in ways}
    apart = 0.0
    for number in range(-1, args.rounds):  # the first one warms up
        pairs = given(number)
        real = sum(len(p) + len(r) for p, r in pairs)
        sums = []
        for name, read in ways.items():
            model.zero_grad()
            began = time.perf_counter()
            total, padded = read(model, pairs)
            took = time.perf_counter() - began
            sums.append(total)
            if number >= 0:
                seconds[name].append(took)
                tokens[name].append(padded / real)
        apart = max(apart, max(abs(s - sums[0]) / abs(sums[0]) for s in sums))
    base = harness.spread(seconds["padded left and right"])["median"]
    body = harness.table(
        ("", "seconds", "speed", "tokens read ÷ real tokens"),
        [
            (
                name,
                harness.show(harness.spread(taken), 2),
                f"{base / harness.spread(taken)['median']:.2f}",
                harness.show(harness.spread(tokens[name]), 2),
            )
            for name, taken in seconds.items()
        ],
    )
    body += (
        f"\n\n{args.rounds} rounds of {ROWS} other prompts and responses each, forward and backward, one thread, "
        "float32; medians, least and greatest. Llama of 10 M random weights; prompts lognormal, median 48 tokens, "
        f"sigma 0.7, at most {load.MAX_PROMPT}; responses of up to {load.MAX_RESPONSE}. Largest "
        f"relative difference between the sums of log-probabilities: {apart:.1e}."
    )
    ours = harness.spread(seconds["the trainer's batches"])["median"]
    checks = {
        "all ways agree to 1e-5": apart < 1e-5,
        "the trainer's batches are faster than packing": ours
        <= harness.spread(seconds[f"packed, rows of {PACK}"])["median"],
    }
    return report.finish({"seconds": seconds, "tokens": tokens}, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
