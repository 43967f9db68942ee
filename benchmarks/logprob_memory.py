"""Peak memory of log-probabilities and their gradient against vocabulary and length: in chunks, and from all logits.

    OMP_NUM_THREADS=1 python benchmarks/logprob_memory.py

Each figure is of a process of its own: how much its largest resident set grew while it computed the log-probabilities
of given hidden states under an output embedding, and the gradient of their sum.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import harness
import torch

HIDDEN = 64
CHUNK = 256
VOCABULARIES = (8_192, 32_768, 131_072)
POSITIONS = (1_024, 2_048, 4_096)


def grown_mib(how: str, vocabulary: int, positions: int) -> float:
    """By how much the largest resident set of this process grows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from policy_trainer.logprobs import gather_logprobs, logprobs_from_hidden

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model = LlamaForCausalLM(config)
    head = model.get_output_embeddings()
    hidden = torch.randn(1, positions, HIDDEN, requires_grad=True)
    targets = torch.randint(vocabulary, (1, positions))
    # The embedding's own gradient is there in any case.
    head.weight.grad = torch.zeros_like(head.weight)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if how == "chunked":
        found = logprobs_from_hidden(model, hidden, targets, 1.0, chunk=CHUNK).logprobs
    else:
        found = gather_logprobs(head(hidden), targets, 1.0)
    torch.autograd.backward(found.sum())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> int:
    """Run it; the exit status is 0 if all targets hold."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(f"grown {grown_mib(args.one[0], int(args.one[1]), int(args.one[2])):.1f}")
        return 0
    report = harness.Report.begin("logprob_memory", "Peak memory of log-probabilities and their gradient")
    grown: dict[tuple[str, int, int], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for how in ("chunked", "all logits"):
            for vocabulary in VOCABULARIES:
                for positions in POSITIONS:
                    if how == "all logits" and vocabulary * positions > 2**28:
                        continue  # more than 6 GB
                    log = Path(temporary) / "log"
                    command = [sys.executable, __file__, "--one", how, str(vocabulary), str(positions)]
                    harness.measure(command, log=log)
                    line = next(x for x in log.read_text().splitlines() if x.startswith("grown"))
                    grown[how, vocabulary, positions] = float(line.split()[1])
    body = harness.table(
        ("vocabulary", "positions", "in chunks, MiB", "all logits, MiB"),
        [
            (
                v,
                n,
                *(
                    f"{grown[how, v, n]:.0f}" if (how, v, n) in grown else "-"
                    for how in ("chunked", "all logits")
                ),
            )
            for v in VOCABULARIES
            for n in POSITIONS
        ],
    )
    body += (
        f"\n\nGrowth of the process's largest resident set; float32, hidden size {HIDDEN}, chunks of {CHUNK} positions "
        "(the trainer's are of 4,096). One chunk's logits are the vocabulary times 4 × "
        f"{CHUNK} bytes; the gradient of the output embedding is not counted."
    )
    ratios = {v: grown["chunked", v, POSITIONS[-1]] / grown["chunked", v, POSITIONS[0]] for v in VOCABULARIES}
    more = POSITIONS[-1] // POSITIONS[0]
    checks = {
        f"in chunks, vocabulary {v}: {more} times the positions take less than 1.2 times the memory": r < 1.2
        for v, r in ratios.items()
    }
    figures = {"grown_mib": {", ".join(map(str, key)): value for key, value in grown.items()}}
    return report.finish(figures, body, checks, keep=not args.no_results)


if __name__ == "__main__":
    raise SystemExit(main())
