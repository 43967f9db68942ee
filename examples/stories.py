"""Pieces of the story example: openings to continue, synthetic preferences, and a look at the result.

    python examples/stories.py openings --output_dir DIR
    python examples/stories.py pairs --candidates candidates.jsonl --output pairs.jsonl
    python examples/stories.py curve --run PPO_DIR
    python examples/stories.py compare --model BEFORE --model AFTER --prompts heldout.jsonl --output compare.json

The preference is made up, and simple on purpose: nobody and no judge was asked. A story is *warmer* the more
different warm words it uses (`happy`, `friend`, `hug`, ...) and the fewer different sad ones; of two stories the
warmer is preferred with probability sigmoid(difference). Different words count, so saying `happy` twice gains
nothing. What is real is everything else: a pretrained language model, a reward model that learns the
preference from its samples, and PPO against it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

from rlaif.records import Quarantine, read_candidates, read_prompts
from rlaif.types import to_dicts

NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Tim", "Anna", "Max", "Lucy", "Sam", "Jane", "Jack")
OPENINGS = (
    "Once upon a time, there was a little child named {}.",
    "One day, {} went to the park.",
    "{} had a big red ball.",
    "One day, {} found a box in the garden.",
    "{} and a dog were in the kitchen.",
    "It was a cold day and {} was at home.",
    "{} wanted to go to the sea.",
    "One morning, {} saw a bird in a tree.",
)
HELD_OUT_NAMES = ("Mia", "Jack", "Anna")

WARM = """
    happy happily smile smiled smiling laugh laughed love loved loves fun friend friends hug hugged kind nice
    thank thanked thanks glad proud share shared help helped together play played enjoy enjoyed excited
"""
SAD = "sad cry cried crying scared afraid hurt angry mad mean alone lost broke broken bad fell worried sorry"


def warmth(story: str) -> int:
    """How many different warm words a story uses, less how many different sad ones."""
    words = set(re.findall(r"[a-z]+", story.lower()))
    return len(words & set(WARM.split())) - len(words & set(SAD.split()))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write JSON lines; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def write_openings(output_dir: Path) -> None:
    """Openings to train on, and others with names that training never sees."""
    rows = {"train": [], "heldout": []}
    for opening, name in product(OPENINGS, NAMES):
        split = "heldout" if name in HELD_OUT_NAMES else "train"
        rows[split].append({"prompt": opening.format(name)})
    for split, prompts in rows.items():
        path = output_dir / f"{split}.jsonl"
        print(f"{path}: {write_rows(path, prompts)} openings")


def write_pairs(candidates: Path, output: Path) -> None:
    """All pairs of candidates of different warmth, with P(chosen preferred) = sigmoid(difference in warmth)."""
    rows, ties = [], 0
    for found in read_candidates(candidates, Quarantine(None)):
        for first, second in combinations(found.candidates, 2):
            gap = warmth(first.response) - warmth(second.response)
            if gap == 0:
                ties += 1
                continue
            chosen, rejected = (first, second) if gap > 0 else (second, first)
            rows.append(
                {
                    "prompt": to_dicts(found.prompt),
                    "chosen": [{"role": "assistant", "content": chosen.response}],
                    "rejected": [{"role": "assistant", "content": rejected.response}],
                    "chosen_prob": 1 / (1 + math.exp(-abs(gap))),
                }
            )
    print(f"{output}: {write_rows(output, rows)} pairs; {ties} ties left out")


def print_curve(run: Path, every: int) -> None:
    """Reward and KL over the steps of a PPO run, averaged over `every` steps."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if "objective/scores" in row]
    print("steps     reward  KL/response  entropy  clip fraction")
    names = ("objective/scores", "objective/kl", "policy/entropy_avg", "policy/clipfrac_avg")
    for start in range(0, len(steps), every):
        rows = steps[start : start + every]
        means = [sum(row[name] for row in rows) / len(rows) for name in names]
        span = f"{rows[0]['step']}-{rows[-1]['step']}"
        print(f"{span:<8}  {means[0]:6.3f}  {means[1]:11.2f}  {means[2]:7.2f}  {means[3]:13.3f}")


def sample(model_dir: str, prompts: Sequence[str], copies: int, max_new_tokens: int, seed: int) -> list[str]:
    """`copies` continuations of each prompt from the model's full distribution, in prompt order."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    torch.manual_seed(seed)
    stories = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt)] * copies)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        # Decoded together with its prompt: on its own, the first token would lose its space.
        stories += [tokenizer.decode(row, skip_special_tokens=True)[len(prompt) :] for row in out]
    return stories


def compare(
    models: Sequence[str], prompts_file: Path, copies: int, max_new_tokens: int, output: Path
) -> None:
    """Sample each model on the same openings, without any code of the trainer, and print warmth and stories.

    `perplexity` is that of the samples under the *first* model: how odd the stories look to the policy that
    training started from. `different words` is the share of distinct words within a story, averaged.
    """
    prompts = [prompt[-1].content for prompt in read_prompts(prompts_file, Quarantine(None))]
    report = []
    for model in models:
        stories = sample(model, prompts, copies, max_new_tokens, seed=0)
        lengths = [re.findall(r"\w+", s.lower()) for s in stories]
        report.append(
            {
                "model": model,
                "stories": len(stories),
                "warmth": sum(map(warmth, stories)) / len(stories),
                "perplexity": perplexity(models[0], prompts, stories, copies),
                "different words": sum(len(set(w)) / max(1, len(w)) for w in lengths) / len(stories),
                "words": sum(map(len, lengths)) / len(stories),
                "samples": [
                    prompts[i] + stories[i * copies]
                    for i in range(0, len(prompts), max(1, len(prompts) // 6))
                ],
            }
        )
        print(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in report[-1].items() if k != "samples"}
        )
        for text in report[-1]["samples"]:
            print(f"  | {' '.join(text.split())}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def perplexity(model_dir: str, prompts: Sequence[str], stories: Sequence[str], copies: int) -> float:
    """Exponential of the mean negative log-likelihood per token of the stories given their openings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for i, story in enumerate(stories):
            prompt = tokenizer.encode(prompts[i // copies])
            ids = tokenizer.encode(prompts[i // copies] + story)
            if len(ids) == len(prompt):
                continue
            logprobs = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            picked = logprobs.gather(1, torch.tensor(ids[len(prompt) :]).unsqueeze(1))
            total, tokens = total - float(picked.sum()), tokens + len(picked)
    return math.exp(total / tokens)


def main() -> None:
    """Run one of the pieces."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    openings = commands.add_parser("openings", help="write train.jsonl and heldout.jsonl")
    openings.add_argument("--output_dir", type=Path, required=True)
    pairs = commands.add_parser("pairs", help="synthetic preferences over candidates of `rlaif sample`")
    pairs.add_argument("--candidates", type=Path, required=True)
    pairs.add_argument("--output", type=Path, required=True)
    curve = commands.add_parser("curve", help="reward and KL over the steps of a PPO run")
    curve.add_argument("--run", type=Path, required=True)
    curve.add_argument("--every", type=int, default=5, help="steps per line")
    look = commands.add_parser("compare", help="sample models on the same openings")
    look.add_argument(
        "--model", action="append", required=True, help="a folder; the first is the starting policy"
    )
    look.add_argument("--prompts", type=Path, required=True)
    look.add_argument("--num_samples", type=int, default=16, help="stories per opening")
    look.add_argument("--max_new_tokens", type=int, default=64)
    look.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "openings":
        write_openings(arguments.output_dir)
    elif arguments.command == "pairs":
        write_pairs(arguments.candidates, arguments.output)
    elif arguments.command == "curve":
        print_curve(arguments.run, arguments.every)
    else:
        compare(
            arguments.model,
            arguments.prompts,
            arguments.num_samples,
            arguments.max_new_tokens,
            arguments.output,
        )


if __name__ == "__main__":
    main()
