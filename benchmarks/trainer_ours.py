"""Our trainers, with the interface of `peers/trl/train.py`: trainer_ours.py METHOD FOLDER OUTPUT ...

The reward is the same Python function that the peers call in their process, so neither side pays for a server.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trainer_load as load

from policy_trainer import dpo, optim, ppo
from policy_trainer.branches import sequence_logprobs
from policy_trainer.config import DPOConfig, PPOConfig
from policy_trainer.models import load_policy
from policy_trainer.preference_losses import PreferenceObjective
from policy_trainer.reward_source import FunctionReward
from rlaif.chat import encode_pair
from rlaif.types import Conversation, user_prompt

marks: list[list[float]] = []
"""Wall-clock and processor seconds at which each step's rewards were asked for, or a DPO step ended."""


def mark() -> None:
    marks.append([time.perf_counter(), time.process_time()])


def reward(prompts: Sequence[Conversation], responses: Sequence[str]) -> list[float]:
    mark()
    return load.rewards([prompt[-1].content for prompt in prompts], responses)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What both methods are told."""
    return {
        "model_name_or_path": str(args.folder),
        "dataset": args.folder / "prompts.jsonl",
        "output_dir": args.output,
        "reward_server": "in this process",
        "seed": args.seed,
        "max_steps": args.steps,
        "rollout_batch_size": args.batch,
        "max_new_tokens": load.MAX_RESPONSE,
        "self_check": False,
        "save_steps": args.steps,
        "micro_batch_tokens": args.micro,
    }


def online(args: argparse.Namespace) -> dict[str, Any]:
    """Shares of the step's time and of the responses that ended, beside the marks."""
    if args.method == "ppo":
        ppo.train(PPOConfig(**settings(args)), FunctionReward(reward))
    else:
        more = {"num_generations": 2, "soft_labels": False, "per_device_train_batch_size": args.batch}
        dpo.train(DPOConfig(**settings(args), **more), FunctionReward(reward))
    steps = [json.loads(line) for line in (args.output / "metrics.jsonl").read_text().splitlines()]
    episodes = args.batch * (1 if args.method == "ppo" else 2)
    whole = sum(s["time/step"] for s in steps)
    parts = ("rollout", "forward", "reward", "update")
    return {
        "ended": [s["val/num_eos_tokens"] / episodes for s in steps],
        "shares": {part: sum(s[f"time/{part}"] for s in steps) / whole for part in parts},
    }


def dpo_updates(args: argparse.Namespace) -> dict[str, Any]:
    """Optimiser steps on given pairs, whose reference log-probabilities are known."""
    config = DPOConfig(**settings(args))
    policy, tokenizer = load_policy(str(args.folder))
    rows = load.read(args.folder / "pairs.jsonl")
    sides = {
        side: [encode_pair(tokenizer, user_prompt(r["prompt"]), r[side]) for r in rows]
        for side in ("chosen", "rejected")
    }
    known = {side: sequence_logprobs(policy, pairs, 1.0, args.micro) for side, pairs in sides.items()}
    examples = [
        dpo.PairExample(c.prompt_ids, c.response_ids, r.response_ids, known_c, known_r, 1.0)
        for c, r, known_c, known_r in zip(*sides.values(), *known.values(), strict=True)
    ]
    optimizer = optim.adamw(policy.parameters(), config.learning_rate, config)
    mark()
    for step in range(args.steps):
        chosen = optim.shuffled_stream(len(examples), args.seed, step * args.batch, args.batch)
        optimizer.zero_grad(set_to_none=True)
        dpo.accumulate_gradients(
            policy,
            [examples[i] for i in chosen],
            objective=PreferenceObjective("sigmoid", config.beta),
            temperature=config.temperature,
            micro_batch_tokens=config.micro_batch_tokens,
        )
        optim.clip_gradients(list(policy.parameters()), config.max_grad_norm, "policy")
        optimizer.step()
        mark()
    return {"ended": []}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=("ppo", "online_dpo", "dpo"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    for number in ("steps", "batch", "micro", "seed"):
        parser.add_argument(f"--{number}", type=int, required=True)
    arguments = parser.parse_args()
    found = dpo_updates(arguments) if arguments.method == "dpo" else online(arguments)
    print(json.dumps({"marks": marks, **found}))
