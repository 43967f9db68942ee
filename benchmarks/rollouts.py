"""Tokens per second of the ways to sample with transformers, and of vLLM where it is installed.

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py

Each way samples the full distribution for the same prompts, in turns. `ours` is `HFRollout`, which also gives the
log-probabilities that training needs; the others are asked for token ids alone, which is less work: `generate` with a
dynamic cache and with a static one, and `generate_batch`, transformers' continuous batching over a paged cache.

What is counted is processor time of one thread, so that a busy machine changes little.

A second table has the seconds of a PPO step's forwards with `--reuse_logprobs_tolerance` and without.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from harness import Report, arguments, table, write_jsonl
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from policy_trainer.batching import PAD_FILL
from policy_trainer.config import AdvantageEstimator, PPOConfig
from policy_trainer.models import eos_token_ids, load_policy
from policy_trainer.ppo import Trainer
from policy_trainer.reward_source import FunctionReward
from policy_trainer.rollout import HFRollout
from rlaif.chat import encode_prompt
from rlaif.types import user_prompt
from tinyworld.grammar import make_post

BATCH, READ = 32, 64
"""Prompts that are sampled for, and responses that are read."""


class Task(NamedTuple):
    """A model with prompts, and what ends a response."""

    name: str
    model: Any
    prompts: Sequence[Sequence[int]]
    eos_ids: Sequence[int]
    max_new_tokens: int


def embedded_world() -> Task:
    """The embedded world's policy, whose responses end by themselves."""
    model, tokenizer = load_policy("tinyworld:policy")
    prompts = [encode_prompt(tokenizer, user_prompt(make_post(i).text), max_length=256) for i in range(BATCH)]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    name = f"embedded world, {size:.1f} M parameters"
    return Task(name, model, prompts, eos_token_ids(model, tokenizer), 40)


def random_llama() -> Task:
    """15 M parameters of random weights; every 32nd token ends a response, so that lengths vary as they do in use."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    lengths = torch.randint(32, 129, (BATCH,)).tolist()
    prompts = [torch.randint(3, 8192, (n,)).tolist() for n in lengths]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return Task(f"random Llama, {size:.1f} M parameters", model, prompts, range(2, 8192, 32), 48)


def ours(task: Task, seed: int) -> int:
    engine = HFRollout(task.model, task.eos_ids)
    sampled = engine.generate(task.prompts, max_new_tokens=task.max_new_tokens, temperature=1.0, seed=seed)
    return sum(len(s.response_ids) for s in sampled)


def wishes(task: Task, **more: Any) -> GenerationConfig:
    return GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=task.max_new_tokens,
        eos_token_id=list(task.eos_ids),
        pad_token_id=PAD_FILL,
        **more,
    )


def generate(task: Task, seed: int, **more: Any) -> int:
    torch.manual_seed(seed)
    longest = max(map(len, task.prompts))
    ids = torch.tensor([[PAD_FILL] * (longest - len(p)) + list(p) for p in task.prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in task.prompts])
    out = task.model.generate(input_ids=ids, attention_mask=mask, generation_config=wishes(task, **more))
    ends = torch.isin(out[:, longest:], torch.tensor(list(task.eos_ids))).int()
    first = torch.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1])
    return int(first.sum())


def generate_static(task: Task, seed: int) -> int:
    return generate(task, seed, cache_implementation="static", disable_compile=True)


def generate_batch(task: Task, seed: int) -> int:
    torch.manual_seed(seed)
    # By default the cache takes what memory the machine has.
    cache = ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=2048)
    out = task.model.generate_batch(
        [list(p) for p in task.prompts],
        generation_config=wishes(task),
        continuous_batching_config=cache,
    )
    assert len(out) == len(task.prompts), "continuous batching lost requests"
    return sum(len(o.generated_tokens) for o in out.values())


def forwards(estimator: AdvantageEstimator, rounds: int) -> tuple[list[float], list[float]]:
    """Processor seconds to read a step's responses: all, and with the engine's numbers reused."""
    spent: tuple[list[float], list[float]] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_jsonl(
            Path(folder) / "prompts.jsonl", ({"prompt": make_post(i).text} for i in range(READ))
        )
        config = PPOConfig(
            model_name_or_path="tinyworld:policy",
            dataset=prompts,
            output_dir=Path(folder) / "run",
            reward_server="127.0.0.1:1",
            advantage_estimator=estimator,
            num_generations=1 if estimator == "gae" else 4,
            rollout_batch_size=READ if estimator == "gae" else READ // 4,
            max_new_tokens=40,
        )
        reward = FunctionReward(lambda prompts, responses: [0.0] * len(responses))
        trainer = Trainer.start(config, reward)
        episodes = trainer.next_rollout().episodes
        for turn in range(rounds + 1):
            for tolerance, seconds in zip((None, 1e-3), spent, strict=True):
                trainer.config = replace(config, reuse_logprobs_tolerance=tolerance)
                began = time.process_time()
                read = trainer.read(episodes)
                if turn:
                    seconds.append(time.process_time() - began)
                assert read.metrics.get("sampling/logprobs_reused", 0.0) == float(tolerance is not None)
        reward.close()
    return spent


WAYS: dict[str, Callable[[Task, int], int]] = {
    "ours": ours,
    "generate": generate,
    "generate, static cache": generate_static,
    "generate_batch": generate_batch,
}


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    report = Report.begin("rollouts", "Tokens per second of sampling with transformers")
    rates: dict[str, dict[str, list[float]]] = {}
    for make in (embedded_world, random_llama):
        task = make()
        of_task = rates[task.name] = {way: [] for way in WAYS}
        for turn in range(options.rounds + 1):
            for way, sample in WAYS.items():
                with torch.no_grad():
                    began = time.process_time()
                    tokens = sample(task, turn)
                    seconds = time.process_time() - began
                if turn:  # the first is to warm up
                    of_task[way].append(tokens / seconds)
    rows = [(name, *(f"{median(of_task[way]):.0f}" for way in WAYS)) for name, of_task in rates.items()]
    body = (
        f"Sampled tokens per second of processor time, {BATCH} prompts at temperature 1, median of {options.rounds} "
        f"turns, {torch.get_num_threads()} thread(s), fp32. `ours` gives log-probabilities as well, the others do not."
        "\n\n" + table(("model", *WAYS), rows)
    )
    estimators: tuple[AdvantageEstimator, ...] = ("gae", "grpo")
    reading = {estimator: forwards(estimator, options.rounds * 3) for estimator in estimators}
    body += (
        "\n\nProcessor seconds of the forwards between rollout and update, "
        f"{READ} responses of the embedded world, median:\n\n"
    )
    body += table(
        ("estimator", "all read", "engine's log-probabilities reused", "saved"),
        [
            (
                name,
                f"{median(all_read):.3f}",
                f"{median(reused):.3f}",
                f"{1 - median(reused) / median(all_read):.0%}",
            )
            for name, (all_read, reused) in reading.items()
        ],
    )
    best = {
        name: median(of_task["ours"]) >= max(median(of_task[way]) for way in WAYS if way != "ours")
        for name, of_task in rates.items()
    }
    checks = {f"{name}: ours is the fastest": good for name, good in best.items()}
    return report.finish(
        {"tokens_per_s": rates, "forward_s": reading}, body, checks, keep=not options.no_results
    )


if __name__ == "__main__":
    raise SystemExit(main())
