"""`rlaif demo`: the whole engine in the embedded world, each stage the command that a user would type.

    sample -> label -> train rm -> serve -> PPO and DPO      (distilled: the reward is the learned model)
                                   serve -> PPO              (direct: the reward is the judge itself)

Every stage is a process of its own and resumes on its own; a finished one is not run again. Two tracks of
stages run side by side, each on one core. Gold utility is read here and nowhere before: it measures the result.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from rlaif.runs import write_atomic
from tinyworld.config import DemoConfig
from tinyworld.report import render_report
from tinyworld.results import collect_results
from tinyworld.stages import CONFIGS, JUDGE, POLICY, Phase, Stage, remember, run_phase, write_prompts

POLICIES = {"ppo-distilled": "distilled PPO", "ppo-direct": "direct PPO", "dpo": "iterative DPO"}
"""Run directories of the trained policies, and what the report calls them."""


def plan(config: DemoConfig) -> list[Phase]:
    """The commands of the demo, in order."""
    out = Path(config.output_dir)
    prompts, unseen, candidates = (
        str(out / name) for name in ("prompts.jsonl", "eval-prompts.jsonl", "candidates")
    )

    def to(folder: str) -> tuple[str, ...]:
        return ("--output_dir", str(out / folder), "--seed", str(config.seed))

    def settings(name: str) -> tuple[str, ...]:
        return ("--config", str(CONFIGS / f"{name}.yaml"))

    def sample(model: str, dataset: str, folder: str, n: int) -> tuple[str, ...]:
        what = ("--model_name_or_path", model, "--dataset", dataset, "--num_return_sequences", str(n))
        return ("sample", *what, "--max_new_tokens", "40", *to(folder))

    def label(folder: str, *options: str) -> tuple[str, ...]:
        judge = ("--judge", JUDGE, "--rubric", "tinyworld:pair", "--dataset", candidates)
        return ("label", "pairs", *judge, *options, *to(folder))

    def online(algorithm: str, folder: str, steps: int, server: str) -> Stage:
        what = ("--dataset", prompts, "--reward_server", "{server}", "--max_steps", str(steps))
        return Stage(folder, ("train", algorithm, *settings(algorithm), *what, *to(folder)), server)

    def evaluate(name: str, model: str) -> Stage:
        return Stage(f"eval-{name}", sample(model, unseen, f"eval/{name}", 1))

    return [
        Phase(
            "Label with the judge and distil the labels into a reward model; meanwhile, PPO against the judge itself",
            (
                (
                    Stage("sample", sample(POLICY, prompts, "candidates", 3)),
                    Stage("label", label("labels")),
                    Stage("label-no-cot", label("labels-no-cot", "--no-cot", "--limit", "400")),
                    Stage(
                        "rm", ("train", "rm", *settings("rm"), "--dataset", str(out / "labels"), *to("rm"))
                    ),
                ),
                (online("ppo", "ppo-direct", config.ppo_steps, "judge"),),
            ),
            {"judge": ("--judge", JUDGE, "--rubric", "tinyworld:score")},
        ),
        Phase(
            "PPO and iterative DPO against the reward model",
            (
                (online("ppo", "ppo-distilled", config.ppo_steps, "rm"),),
                (online("dpo", "dpo", config.dpo_rounds, "rm"),),
            ),
            {"rm": ("--model", str(out / "rm"))},
        ),
        Phase(
            "Summaries of unseen posts by every policy, to be measured by gold",
            (
                (evaluate("start", POLICY), evaluate("ppo-direct", str(out / "ppo-direct"))),
                (evaluate("ppo-distilled", str(out / "ppo-distilled")), evaluate("dpo", str(out / "dpo"))),
            ),
            {},
        ),
    ]


def run(config: DemoConfig) -> None:
    """Run every stage that is not finished, then write `summary.json` and `report.html`.

    Raises:
        RlaifError: a stage failed; its own message stands above.
    """
    started = time.monotonic()
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    remember(asdict(config), out / "demo.json")
    write_prompts(
        out, seed=config.seed, num_prompts=config.num_prompts, num_eval_prompts=config.num_eval_prompts
    )
    for phase in plan(config):
        run_phase(phase, out)
    results = collect_results(out, POLICIES)
    write_atomic(out / "summary.json", json.dumps(asdict(results), indent=2) + "\n")
    write_atomic(out / "report.html", render_report(results))
    print("\n" + results.text())
    print(f"\nfinished after {time.monotonic() - started:.0f} s. Report: {out / 'report.html'}")
